"""Retrieval heads by where they look, by the question, and by what they write."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.heads.behaviour import retrieval as behaviour
from lens.reading import retrieving
from lens.reading.retrieved import KINDS
from lens.tasks.needles import Trial, answered
from tests.lens.layouts import layout_model


@pytest.fixture(scope="module")
def copying():
    model = lens.load("induction-2l")
    return model, lens.tasks.needles.copied(model, n=4, length=30, needle=5)


@pytest.fixture(scope="module")
def found(copying):
    return lens.reading.retrieval(*copying, masked=[1, 3], draws=2, progress=False)


def counted(model, trials):
    """Trials that the model answers."""
    return [trial for trial in trials if trial.recall(answered(model, trial)) > 0.5]


def eager(model, ids):
    """[layer, head, query, key] as the model's own eager attention gives it, and v [layer, head, key, dim]."""
    root = model.model
    own = root.config._attn_implementation
    values = []
    handles = [
        block.attn.v.register_forward_hook(lambda _, __, output: values.append(output[0]))
        for block in root.blocks
    ]
    root.config._attn_implementation = "eager"
    with torch.no_grad():
        maps = root(torch.tensor([list(ids)]), output_attentions=True).attentions
    root.config._attn_implementation = own
    for handle in handles:
        handle.remove()
    heads = maps[0].shape[1]
    split = [value.unflatten(-1, (heads, -1)).transpose(0, 1) for value in values]
    return torch.cat(maps).double(), torch.stack(split).double()


def test_induction_heads_come_first_in_all_three(found):
    for kind in KINDS:
        assert {str(head) for head in found.heads(kind, 3)} == {"L1H0", "L1H2", "L1H3"}
    table = found.table()
    assert table.loc[table["layer"] == 0, "output"].abs().max() < 0.1
    assert (found.agreement()["correlation"] > 0.3).all()
    assert [one.kind for one in found.findings()] == ["heads"] * 3 + ["masked"] * 2 + ["agreement"]


def test_the_literal_score_is_that_of_heads(copying, found):
    own = lens.heads.retrieval(*copying, progress=False)
    np.testing.assert_array_equal(found.values[0], own.per_trial)


def test_what_is_brought_to_the_logit_is_that_of_whole_maps(copying, found):
    model, trials = copying
    root = model.model
    for number, trial in enumerate(counted(model, trials)):
        answer = answered(model, trial)
        maps, values = eager(model, [*trial.prompt, *answer[:-1]])
        first, last = trial.needle
        for layer, head in ((1, 2), (0, 1)):
            weight = (
                root.blocks[layer].attn.o.weight.detach()[:, head * 16 : head * 16 + 16].double()
            )
            scores = []
            for step, token in enumerate(answer):
                row = len(trial.prompt) - 1 + step
                written = (
                    values[layer, head] @ weight.T @ root.unembed.weight.detach()[token].double()
                )
                brought = maps[layer, head, row] * written
                needle = brought[first:last].sum()
                rest = brought[: row + 1].sum() - needle
                count = last - first
                scores.append(float(needle - count / (row + 1 - count) * rest))
            assert found.values[2, layer, head, number] == pytest.approx(np.mean(scores), abs=1e-4)


def test_the_query_score_is_that_of_whole_maps(copying):
    model, trials = copying
    trial = trials[1]
    other = [*trial.prompt[:-2], 1, 2]
    seen = [retrieving._asking(model, trial, list(ids), 2) for ids in (trial.prompt, other)]
    layout = lens.passes.replay.proved(model)
    outputs = [block.output.float() for block in layout.blocks]
    weight = layout.unembed_weight().T
    of_answer = retrieving._answering(model, trial, answered(model, trial), 2, weight, outputs)
    np.testing.assert_allclose(of_answer[1], seen[0], atol=1e-6)
    score = retrieving._calibrated(*seen)
    rows = torch.tensor([len(trial.prompt) - 2, len(trial.prompt) - 1])
    own, null = (eager(model, ids)[0][:, :, rows].mean(2) for ids in (trial.prompt, other))
    away = (own - null)[..., slice(*trial.needle)]
    low = away.mean(-1, keepdim=True) - 2 * away.std(-1, keepdim=True)
    expected = torch.where(away <= low, 0, away).sum(-1)
    np.testing.assert_allclose(score, expected.numpy(), atol=1e-5)


def test_a_trial_is_answered_once_and_two_passes_give_all_scores(copying, monkeypatch):
    model, trials = copying
    done = []

    def counting(own, name):
        def called(*args):
            done.append(name)
            return own(*args)

        return called

    monkeypatch.setattr(retrieving, "base", counting(retrieving.base, "pass"))
    monkeypatch.setattr(behaviour, "answered", counting(answered, "answer"))
    found = lens.reading.retrieval(model, trials, masked=[], progress=False)
    assert done.count("pass") == 2 * len(found.clean)
    assert done.count("answer") == len(trials)


def test_only_the_next_token_s_logits_are_computed():
    model = lens.load("text-lm-3l")
    sizes = []
    handle = model.model.get_output_embeddings().register_forward_hook(
        lambda _, __, output: sizes.append(output.shape[1])
    )
    answered(model, Trial(tuple(range(20)), (3, 6), 0.5))
    handle.remove()
    assert sizes == [1, 1, 1]


def test_a_head_that_looks_and_does_not_write_is_none_by_its_output():
    model = lens.load("induction-2l")
    trials = lens.tasks.needles.copied(model, n=3, length=30, needle=4)
    with torch.no_grad():
        model.model.blocks[1].attn.o.weight[:, :16] = 0  # of L1H0
    found = lens.reading.retrieval(model, trials, masked=[], progress=False)
    means = dict(zip(KINDS, found.values[:, 1, 0].mean(-1), strict=True))
    assert means["literal"] > 0.8
    assert means["query"] > 0.2
    assert means["output"] == 0


def test_all_that_is_brought_alike_is_no_retrieval():
    """Uniform attention and equal values: needle and others bring the same."""
    root = layout_model("gpt2")
    with torch.no_grad():
        for block in root.transformer.h:
            block.attn.c_attn.weight.zero_()  # keys, queries and values are biases
    model = lens.load(root)
    trial = Trial(tuple(range(3, 23)), (5, 9), 0.5)
    answer = answered(model, trial)
    layout = lens.passes.replay.proved(model)
    unembedding = layout.unembed_weight().T
    outputs = [block.output.float() for block in layout.blocks]
    brought = retrieving._answering(model, trial, answer, 1, unembedding, outputs)[-1]
    assert np.abs(brought).max() < 1e-6


def test_masked_heads_are_those_of_the_list(copying, found):
    model, trials = copying
    best, kept = [str(head) for head in found.heads("output", 3)], counted(model, trials)
    with lens.edit(model, lens.edits.Ablate(best, "zero")):
        recalls = [trial.recall(answered(model, trial)) for trial in kept]
    assert found.recalls[2, 1].tolist() == recalls
    with pytest.raises(LensError, match="count must be a positive integer, got -1"):
        found.heads("output", -1)
    assert found.clean.tolist() == [trial.recall(answered(model, trial)) for trial in kept]
    rows = found.recall()
    assert rows[rows["masked"] == 3]["recall"].iloc[:3].max() < found.clean.mean()
    assert set(rows["by"]) == {*KINDS, "random"}
    alike = rows[rows["recall"].isin([0.0, 1.0])]
    assert len(alike)
    assert (alike["recall_high"] - alike["recall_low"] > 0.3).all()
    said = next(one for one in found.findings() if one.kind == "masked")
    assert "1.00 [1.00, 1.00]" not in said
    assert "0.00 [0.00, 0.00]" not in said


def test_random_heads_are_as_many_as_masked_ones_or_none(copying, monkeypatch):
    """Of eight heads three lists of four leave fewer than four: no control, where there was one of fewer heads, or an error."""
    masked = []
    own = retrieving.Ablate
    monkeypatch.setattr(
        retrieving, "Ablate", lambda names, by: masked.append(len(names)) or own(names, by)
    )
    found = lens.reading.retrieval(*copying, masked=[4], draws=2, progress=False)
    lists = {head for kind in KINDS for head in found.heads(kind, 4)}
    assert len(lists) > 4
    assert masked == [4] * 3
    assert np.isnan(found.random).all()
    said = [one for one in found.findings() if one.kind == "masked"]
    assert said[0].endswith("; fewer than 4 heads are in no list, so that none stand beside.")
    assert "nan" not in said[0]


def test_what_cannot_be_scored_is_refused(copying):
    model, trials = copying
    with pytest.raises(LensError, match="masked must be at most half of the 8 heads, got 5"):
        lens.reading.retrieval(model, trials, masked=[5], progress=False)
    with pytest.raises(LensError, match=r"masked\[1\] must be a positive integer, got 0"):
        lens.reading.retrieval(model, trials, masked=[1, 0], progress=False)
    behind = min(len(trial.prompt) - trial.needle[1] for trial in trials)
    with pytest.raises(LensError, match=f"question must be at most {behind}, the tokens behind"):
        lens.reading.retrieval(model, trials, question=behind + 1, progress=False)
    bent = lens.load(layout_model("gemma2"))
    with pytest.raises(LensError, match="a norm comes between what heads of gemma2 write"):
        lens.reading.retrieval(bent, trials, masked=[], progress=False)
