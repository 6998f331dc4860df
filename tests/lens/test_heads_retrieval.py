"""Retrieval scores equal a twin on whole matrices, and find the heads that copy."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.heads import retrieval
from lens.heads.behaviour.retrieval import fetched
from lens.tasks import needles


def twin(model, trial):
    """Share of the needle per head [layer, head], by the authors' words, decoding step by step."""
    first, last = trial.needle
    ids, hits = list(trial.prompt), {}
    model.model.set_attn_implementation("eager")
    for _ in range(last - first):
        with torch.no_grad():
            out = model.model(torch.tensor([ids]), output_attentions=True)
        token = int(out.logits[0, -1].argmax())
        for layer, attention in enumerate(out.attentions):
            for head, row in enumerate(attention[0, :, -1]):
                key = int(row.argmax())
                if first <= key < last and ids[key] == token:
                    hits.setdefault((layer, head), set()).add(key)
        ids.append(token)
    model.model.set_attn_implementation("sdpa")
    values = np.zeros((model.info.layers, model.info.heads))
    for head, keys in hits.items():
        values[head] = len(keys) / (last - first)
    return values, ids[len(trial.prompt) :]


@pytest.mark.parametrize("name", ["induction-2l", "text-lm-3l"])
def test_scores_equal_the_twin_and_name_the_induction_heads(name):
    """Their pages: induction heads L1H0, L1H2, L1H3 and L1H2, L1H3, L1H5."""
    model = lens.load(name)
    trials = needles.copied(model, n=6, length=45, needle=7, seed=3)
    found = retrieval(model, trials, progress=False)
    expected, recall = [], []
    for trial in trials:
        values, answer = twin(model, trial)
        assert needles.answered(model, trial) == answer
        wanted = list(trial.prompt[slice(*trial.needle)])
        recall.append(sum(min(wanted.count(t), answer.count(t)) for t in set(wanted)) / 7)
        if recall[-1] > 0.5:
            expected.append(values)
    assert found.recall.tolist() == recall
    np.testing.assert_array_equal(found.per_trial, np.stack(expected, -1))
    assert 3 <= found.n <= 6
    known = {"induction-2l": {"L1H0", "L1H2", "L1H3"}, "text-lm-3l": {"L1H2", "L1H3", "L1H5"}}
    assert {str(head) for head in found.heads()[:3]} == known[name]
    table = found.table().set_index("name")
    assert (table["n"] == found.n).all()
    assert (table["trials"] == 6).all()
    assert (table["retrieval_low"] <= table["retrieval"]).all()
    assert "of 6 trials succeeded" in repr(found)
    np.testing.assert_array_equal(found.plot().data[0].z, found.values)


def test_a_position_counts_once_and_only_with_its_own_token():
    trial = needles.Trial((9, 5, 6, 5, 9), (1, 4), 0.3)
    keys = np.array([[[1, 1, 3], [3, 2, 4], [2, 1, 1]]])  # [layer, head, step]
    found = fetched(keys, trial, [5, 5, 5])
    np.testing.assert_allclose(found, [[2 / 3, 1 / 3, 1 / 3]])


def test_a_text_needle_lies_where_it_says():
    model = lens.load("text-lm-3l")
    hay = lens.tasks.text("moby-dick")
    trials = needles.text(
        model, hay, needle=" eat a pie", question=" You should", lengths=[40, 61], depths=[0.2, 0.9]
    )
    assert [trial.depth for trial in trials] == [0.2, 0.9, 0.2, 0.9]
    for trial in trials:
        first, last = trial.needle
        assert "".join(model.token_strings(trial.prompt[first:last])) == " eat a pie"
        assert "".join(model.token_strings(trial.prompt)).endswith(" You should")
        assert trial.prompt.count(model.bos_id) == 1
        assert abs(first / len(trial.prompt) - trial.depth) < 0.25


def test_a_model_that_does_not_retrieve_is_not_scored():
    model = lens.load("stories260k")  # its page: no induction head
    with pytest.raises(LensError, match="there is no retrieval to attribute to heads"):
        retrieval(model, needles.copied(model, n=3, length=40), progress=False)


def test_trials_that_cannot_be_are_said():
    model = lens.load("text-lm-3l")
    with pytest.raises(LensError, match="needs at least one trial"):
        retrieval(model, [])
    with pytest.raises(LensError, match="the needle must lie within the prompt of 3 tokens"):
        needles.Trial((1, 2, 3), (2, 4), 0.5)
    with pytest.raises(LensError, match="copied needs n and needle of at least 1"):
        needles.copied(model, length=200)
    options = {"needle": " a pie", "question": " Eat", "lengths": [30]}
    for length in (-5, 0, 20.5):
        with pytest.raises(LensError, match="length must be a positive integer"):
            needles.text(model, lens.tasks.text("lily"), **options | {"lengths": [length]})
    with pytest.raises(LensError, match="the haystack has 4 tokens, 30 were asked for"):
        needles.text(model, " the cat", **options)
    with pytest.raises(LensError, match=r"depth must lie between 0 and 1, got 1\.2"):
        needles.text(model, lens.tasks.text("lily"), depths=[1.2], **options)
