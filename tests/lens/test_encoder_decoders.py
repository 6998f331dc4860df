"""Whole encoder-decoders: three attentions, each equal to `eager`, with two token axes across."""

import itertools
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.special import entr

import lens
from lens import LensError, edits
from lens.passes.interface import switched
from lens.traces import alignment
from lens.traces.parts import TraceParts

from .encoder_decoders import MAKE, eager, inputs_of, made


@torch.no_grad()
@pytest.mark.parametrize("name", MAKE)
def test_every_part_is_what_eager_gives(name):
    model, given = made(name), inputs_of(name)
    loaded = lens.load(model)
    with switched(model, "eager"):
        expected = eager(name, model, given)
    traces = lens.capture(loaded, given, block_size=1, keep_qk=True, progress=False)
    assert set(traces) == set(expected) == set(loaded.parts)
    for part, layers in expected.items():
        trace = traces[part]
        info = loaded.part(part).info
        assert (trace.layers, trace.heads) == (info.attending, info.heads)
        assert len(layers) == len(trace.layers)
        for layer, own in zip(trace.layers, layers, strict=True):
            found = torch.tensor(trace.block_mass.sel(layer=layer).values)
            assert (found - own).abs().max() < 1e-5
            assert own.max() > 1.2 * own.mean()
            if part == "cross":
                at = torch.arange(own.shape[-1], dtype=torch.float32)
                assert (
                    torch.tensor(trace.center.sel(layer=layer).values) - own @ at
                ).abs().max() < 1e-4
                assert (trace.strongest.sel(layer=layer).values == own.argmax(-1).numpy()).all()
                assert (trace.visible.sel(layer=layer) == own.shape[1]).all()
                tile = trace.tile(layer, 1, (0, own.shape[1]), (1, own.shape[2]))
                assert abs(tile - own[1, :, 1:].numpy()).max() < 1e-5
    cross = traces["cross"]
    assert (cross.queries, cross.length) == tuple(expected["cross"][0].shape[1:])
    assert len(cross.query_tokens) == cross.queries
    assert len(cross.tokens) == cross.length


@torch.no_grad()
@pytest.mark.parametrize("hidden", [slice(0, 2), slice(3, 5), slice(5, None)], ids=str)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_tokens_of_a_source_that_are_hidden_stay_where_they_are(name, hidden):
    model, given = made(name), inputs_of(name)
    mask = torch.ones_like(given["input_ids"])
    mask[0, hidden] = 0
    given = {**given, "attention_mask": mask}
    with switched(model, "eager"):
        expected = eager(name, model, given)
    traces = lens.capture(lens.load(model), given, block_size=1, progress=False)
    shown = mask[0].bool()[: traces["encoder"].length]
    assert len(shown) == (5 if hidden.stop is None else 7)
    for part in ("encoder", "cross"):
        for found, own in zip(traces[part].block_mass.values, expected[part], strict=True):
            rows = shown if part == "encoder" else slice(None)
            own = own[:, : len(shown)] if part == "encoder" else own
            np.testing.assert_allclose(
                found[:, rows], own[:, rows, : len(shown)], atol=1e-5, err_msg=part
            )


def test_all_parts_come_from_one_pass():
    loaded = lens.load(made("bart"))
    passes = []
    hook = loaded.model.get_encoder().register_forward_pre_hook(lambda *_: passes.append(1))
    traces = lens.capture(loaded, inputs_of("bart"), progress=False)
    hook.remove()
    assert (len(traces), len(passes)) == (3, 1)
    for part, trace in traces.items():
        alone = lens.capture(loaded.part(part), inputs_of("bart"), progress=False)
        assert set(trace.dataset) == set(alone.dataset)
        for name, values in alone.dataset.items():
            assert np.allclose(trace.dataset[name], values, rtol=0, atol=2e-5, equal_nan=True)


def test_both_axes_have_their_names(tmp_path):
    loaded = lens.load(made("whisper"))
    trace = lens.capture(loaded, inputs_of("whisper"), progress=False)
    assert trace.cross.query_tokens == ["2", "30", "31", "32", "33"]
    assert trace.cross.tokens[:3] == ["0.00 s", "0.02 s", "0.04 s"]
    assert trace.cross.attrs["seconds_per_position"] == pytest.approx(0.02)
    picture = lens.capture(lens.load(made("trocr")), inputs_of("trocr"), progress=False)
    assert picture.cross.tokens[:3] == ["[CLS]", "0,0", "0,1"]
    trace.save(tmp_path / "t")
    again = TraceParts.load(tmp_path / "t")
    assert set(again) == {"encoder", "decoder", "cross"}
    for part, one in trace.items():
        assert again[part].query_tokens == one.query_tokens
        assert again[part].part == part
        assert again[part].dataset.equals(one.dataset)
    assert again.cross.plot("L0H1") is not None
    assert "cross-attention of 5 to 20 tokens" in repr(again)
    assert "<img" in trace.cross._repr_html_()


def test_a_head_is_drawn_with_the_tokens_of_both_sides():
    trace = lens.capture(lens.load(made("bart")), inputs_of("bart"), keep_qk=True, progress=False)
    figure = trace.cross.plot("L1H2")
    assert figure.layout.yaxis.ticktext == ("2", "30", "31", "32", "33")
    assert figure.layout.xaxis.ticktext == ("3", "4", "5", "6", "7", "8", "9")
    drawn = np.array(figure.data[0].z)
    assert np.allclose(drawn.sum(1), 1, atol=1e-5)
    assert (np.array(figure.data[1].x) == drawn.argmax(1)).all()
    sound = lens.capture(lens.load(made("whisper")), inputs_of("whisper"), progress=False)
    assert sound.cross.plot("L0H0").layout.xaxis.title.text == "source (seconds)"
    for draw in (lens.figures.received_mass, lens.figures.row_entropy):
        uniform = next(one for one in draw(trace.cross, 1, 2).data if "uniform" in str(one.name))
        level = np.log(7) if draw is lens.figures.row_entropy else 1 / 7
        assert np.allclose(np.array(uniform.y, float), level)


def test_a_source_alone_is_given_the_target_that_the_model_writes():
    model = made("t5")
    loaded = lens.load(model)
    source = [3, 4, 5, 6, 7]
    trace = lens.capture(loaded.part("cross"), source, progress=False)
    written = model.generate(torch.tensor([source]), max_new_tokens=64, do_sample=False)[0].tolist()
    read = [int(token) for token in trace.query_tokens]
    assert read == written[: len(read)]
    assert len(read) >= len(written) - 1
    pairs = lens.capture(
        loaded.part("cross"), [(source, [0, 5, 6]), (source, [0, 9])], progress=False
    )
    assert [one.queries for one in pairs] == [3, 2]


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_a_target_that_it_writes_is_attended_as_while_it_wrote(name):
    model = made(name)
    loaded, source = lens.load(model), [3, 9, 4, 8, 6]
    traces = lens.capture(loaded, source, new=4, block_size=1, progress=False)
    with torch.no_grad(), lens.traces.capturing(loaded, block_size=1) as recorder:
        ids = model.generate(torch.tensor([source]), max_new_tokens=4, do_sample=False, num_beams=1)
    assert traces.cross.query_tokens == list(map(str, ids[0].tolist()))  # the last is read too
    assert traces.cross.attrs["temperature"] == 0
    for part in ("cross", "decoder"):
        for layer in range(loaded.part(part).info.layers):
            own = [one for one in recorder.records if (one.place, one.layer) == (part, layer)]
            assert len(own) == len(ids[0]) - 1
            for step, record in enumerate(own):  # one row a step, of the keys that there were then
                row = record.variables["block_mass"][0, :, 0]
                found = traces[part].block_mass.values[layer, :, step, : row.shape[-1]]
                assert np.allclose(found, row, atol=1e-5)
    drawn = [
        lens.capture(
            loaded, source, new=4, temperature=3.0, seed=seed, progress=False
        ).cross.query_tokens
        for seed in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    assert len({tuple(one) for one in drawn}) > 1
    for given, said in [
        ({"prompts": (source, [0, 5]), "new": 4}, "give the source alone, or leave new out"),
        ({"prompts": source, "new": 0}, "new must be"),
        ({"prompts": source, "new": 2, "temperature": -1}, "temperature must be 0"),
    ]:
        with pytest.raises(lens.LensError, match=said):
            lens.capture(loaded, **given, progress=False)


def test_scores_of_cross_attention_are_those_of_the_matrix():
    loaded = lens.load(made("bart"))
    traces = lens.capture(loaded, inputs_of("bart"), block_size=1, progress=False)
    table = lens.profile(traces, all=True)
    assert table["part"].unique().tolist() == ["encoder", "decoder", "cross"]
    rows = table[table["part"] == "cross"].set_index(["layer", "head"])
    p = traces.cross.block_mass.values.astype(float)  # [layers, heads, queries, keys]
    entropy = -(p * np.log(p)).sum(-1).mean(-1)
    assert rows["entropy"].to_numpy() == pytest.approx(entropy.ravel(), abs=1e-5)
    assert rows["first_token"].to_numpy() == pytest.approx(p[..., 0].mean(-1).ravel(), abs=1e-5)
    assert rows["prefix_mass"].to_numpy() == pytest.approx(
        p[..., :4].sum(-1).mean(-1).ravel(), abs=1e-5
    )
    assert rows["top_key"].to_numpy() == pytest.approx(p.sum(2).argmax(-1).ravel())
    assert rows["entropy_uniform"].to_numpy() == pytest.approx(np.log(7))
    assert rows["sink_mass_uniform"].to_numpy() == pytest.approx(1 / 7)
    for name in ("previous_token", "induction", "distance", "locality", "positional"):
        assert rows[name].isna().all()
        assert "two sequences" in table.attrs["reasons"]["cross"][name]
    with pytest.raises(lens.LensError, match="one model and part"):
        lens.profile([traces.cross, traces.decoder])


def naive_tau(keys):
    """Kendall's tau-b, pair by pair."""
    order, ties, pairs = 0, 0, 0
    for second in range(len(keys)):
        for first in range(second):
            pairs += 1
            order += np.sign(keys[second] - keys[first])
            ties += keys[second] == keys[first]
    return order / np.sqrt(pairs * (pairs - ties))


def test_alignment_is_what_its_definition_says():
    loaded = lens.load(made("marian"))
    traces = lens.capture(loaded, inputs_of("marian"), block_size=1, keep_qk=True, progress=False)
    labels = {1: 0, 2: [1, 3], 4: 6}
    found = alignment(traces, labels)
    table = found.table().set_index(["layer", "head"])
    p = traces.cross.block_mass.values
    for layer in range(2):
        for head in range(4):
            matrix, row = p[layer, head], table.loc[(layer, head)]
            top = matrix.argmax(-1)
            hits = [top[1] == 0, top[2] in (1, 3), top[4] == 6]
            assert row["accuracy"] == pytest.approx(np.mean(hits))
            mass = [matrix[1, 0], matrix[2, 1] + matrix[2, 3], matrix[4, 6]]
            assert row["mass"] == pytest.approx(np.mean(mass), abs=1e-5)
            assert row["confidence"] == pytest.approx(matrix.max(-1).mean(), abs=1e-5)
            pairs = [top[1] in (1, 3), top[1] == 6, top[2] == 0, top[2] == 6, top[4] == 0]
            assert row["shuffled"] == pytest.approx(np.mean([*pairs, top[4] in (1, 3)]))
            error = [abs(top[1] - 0), min(abs(top[2] - 1), abs(top[2] - 3)), abs(top[4] - 6)]
            assert row["error"] == pytest.approx(np.mean(error))
            if len(set(top)) > 1:
                assert row["monotonicity"] == pytest.approx(naive_tau(top))
            else:
                assert np.isnan(row["monotonicity"])
    assert table["chance"].to_numpy() == pytest.approx(4 / 3 / 7)
    assert {one.kind for one in found.findings()} == {"alignment", "monotonicity"}
    shifted = alignment(traces, {key + 1: value for key, value in labels.items()}, at="predicted")
    assert shifted.table()["accuracy"].tolist() == found.table()["accuracy"].tolist()
    assert found.plot().data[0].z.shape == (2, 4)
    several = alignment([traces, traces.cross], [labels, labels])
    assert several.table()["accuracy"].tolist() == found.table()["accuracy"].tolist()
    assert not alignment(traces).labelled
    assert "[" in found.findings()[0]
    assert "nan" not in alignment(traces, {1: 0}).findings()[0]  # one row has no interval
    listed = alignment(traces, labels, known=["L0H1", (1, 2)])
    accuracy = table["accuracy"]
    means = [accuracy[[(0, 1), (1, 2)]].mean(), accuracy.drop([(0, 1), (1, 2)]).mean()]
    assert listed.table().set_index("name")["known"].to_dict() == {
        f"L{layer}H{head}": (layer, head) in [(0, 1), (1, 2)] for layer, head in table.index
    }
    (said,) = (one for one in listed.findings() if one.kind == "known")
    assert (
        f"a share of {means[0]:.2f}, the other 6 {means[1]:.2f}: a difference of {means[0] - means[1]:+.2f} ["
        in said
    )
    by_order = alignment([traces, traces], known=[(0, 1)]).findings()[0]
    assert "has a mean tau of" in by_order
    for known in ([], [(5, 0)], table.index.tolist()):
        with pytest.raises(LensError, match="known"):
            alignment(traces, labels, known=known)


def test_the_best_of_random_orders_stays_below_what_is_said():
    loaded = lens.load(made("marian"))
    found = alignment(lens.capture(loaded, inputs_of("marian"), progress=False))
    rows, heads = 12, len(found.heads)
    draw = np.random.default_rng(0)
    best = [max(naive_tau(draw.permutation(rows)) for _ in range(heads)) for _ in range(150)]
    limit = replace(found, rows=(rows,)).random_order
    assert 0.9 < np.mean(np.array(best) < limit) < 0.995
    assert replace(found, rows=(rows,) * 4).random_order == pytest.approx(limit / 2)


def test_labels_of_a_sound_are_seconds_too():
    sound = lens.capture(lens.load(made("whisper")), inputs_of("whisper"), progress=False)
    step = sound.cross.attrs["seconds_per_position"]
    spans = {1: (0.05, 0.09), 3: (0.1, 0.1)}
    keys = {
        one: range(int(start / step), int(end / step) + 1) for one, (start, end) in spans.items()
    }
    by_time = alignment(sound, spans, at="predicted").table()
    assert by_time.equals(alignment(sound, keys, at="predicted").table())
    with pytest.raises(LensError, match=r"in seconds is \(start, end\), got \[0.2, 0.1\]"):
        alignment(sound, {1: (0.2, 0.1)})


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({9: 0}, "target has positions 0 to 4, got 9"),
        ({1: 7}, "source has positions 0 to 6"),
        ([5], "labels are a mapping"),
        (5, "labels must be a list, got 5"),
        ({1: []}, r"in whole numbers or words, got \(1, \[\]\)"),
        ({1.5: 0}, "in whole numbers"),
        ({1: 1.7}, "in whole numbers"),
        ({True: 0}, "in whole numbers"),
        ([(1, 0, 2)], "labels are a mapping"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, said):
    loaded = lens.load(made("marian"))
    traces = lens.capture(loaded, inputs_of("marian"), progress=False)
    with pytest.raises(lens.LensError, match=said):
        alignment(traces, labels)
    with pytest.raises(lens.LensError, match="takes traces of cross-attention"):
        alignment(traces.decoder)
    with pytest.raises(lens.LensError, match="traces must be a list, got None"):
        alignment(cast(Any, None))
    with pytest.raises(lens.LensError, match="one for each of 2 prompts"):
        alignment([traces, traces], [labels])


def test_blocks_of_cross_attention_have_as_many_rows_as_the_target():
    """Seven queries of ninety keys in one block of rows: their bounds were those of ninety rows."""
    model = lens.load(made("t5"))
    pairs = [(list(range(3, 93)), [2, *range(30, 36)]), (list(range(9, 79)), [2, 4, 5])]
    pair = [
        lens.capture(model, one, keep_qk=True, block_size=64, progress=False).cross for one in pairs
    ]
    trace = pair[0]
    assert (trace.queries, trace.length) == (7, 90)
    bounds, exact = lens.sinks.block_bounds(trace), trace.received.values / 7
    for block, (first, last) in enumerate(((0, 64), (64, 90))):
        assert bounds.lower[..., block] == pytest.approx(exact[..., first:last].mean(-1), abs=1e-5)
    found = lens.heads.similarity(pair)
    for one, sums, counts in zip(pair, found.sums, found.counts, strict=True):
        maps = one.block_mass.values.astype(float).reshape(-1, *one.block_mass.shape[2:])
        middle = (maps[:, None] + maps[None]) / 2
        own = entr(maps).sum(-1)
        divergence = (entr(middle).sum(-1) - (own[:, None] + own[None]) / 2).clip(0)[..., 0]
        assert sums == pytest.approx(divergence * one.queries, abs=1e-9)
        assert (counts == one.queries).all()


@torch.no_grad()
def test_edits_act_on_the_chosen_part_alone():
    model, given = made("bart"), inputs_of("bart")
    loaded = lens.load(model)
    own = model(**given).logits
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1]])
    encoded = model.get_encoder()(given["input_ids"])
    hidden = model(
        encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=given["decoder_input_ids"]
    ).logits
    with lens.edit(loaded.part("cross"), edits.Mask([1, 4])) as (done,):
        assert (model(**given).logits - hidden).abs().max() < 1e-5
    assert done.calls == 2
    assert (own - hidden).abs().max() > 1e-2
    seen = []
    for part in loaded.parts:
        with lens.edit(loaded.part(part), edits.Ablate(["L1H2"])):
            seen.append(model(**given).logits)
        assert (seen[-1] - own).abs().max() > 1e-3
    assert all((one - other).abs().max() > 1e-4 for one, other in itertools.pairwise(seen))
    with lens.edit(loaded.part("cross"), edits.Knockout([2], [3], heads=["L0H1"])) as (done,):
        changed = (model(**given).logits - own)[0].abs().amax(-1)
    assert done.edited_rows == 1
    assert changed[:2].max() < 1e-5, "query 2 of the target, from there on"
    assert changed[2] > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("baseline", ["zero", "pooled_mean"])
def test_importance_is_the_loss_of_the_target_without_the_head(baseline):
    model = made("marian")
    loaded = lens.load(model)
    pairs = [([3, 4, 5, 6], [2, 30, 31, 32]), ([9, 8, 7], [2, 40, 41])]
    cross = loaded.part("cross")
    found = lens.heads.importance(cross, pairs, baseline=baseline, progress=False)
    assert found.per_prompt.shape == (2, 4, 2)
    module, size = model.model.decoder.layers[1].encoder_attn.out_proj, 12

    def loss(pair, change=None):
        hook = module.register_forward_pre_hook(change) if change else None
        ids = torch.tensor([pair[0]]), torch.tensor([pair[1]])
        logits = model(input_ids=ids[0], decoder_input_ids=ids[1]).logits[0]
        if hook:
            hook.remove()
        return torch.nn.functional.cross_entropy(logits[:-1], ids[1][0, 1:]).item()

    seen = []
    for pair in pairs:
        loss(pair, lambda _, args: seen.append(args[0][0]))
    mean = torch.cat(seen).mean(0)[2 * size : 3 * size] if baseline == "pooled_mean" else 0.0

    def without(_, args):
        z = args[0].clone()
        z[..., 2 * size : 3 * size] = mean
        return (z,)

    for number, pair in enumerate(pairs):
        expected = loss(pair, without) - loss(pair)
        assert found.per_prompt[1, 2, number] == pytest.approx(expected, abs=1e-5)
    assert found.table()["name"].is_unique
    with pytest.raises(lens.LensError, match="measured by method='ablation'"):
        lens.heads.importance(cross, pairs, method="gradient")
    for n, said in ((-1, "n must be a positive integer"), (99, "pairs, 99 were asked for")):
        with pytest.raises(lens.LensError, match=said):
            lens.tasks.language_modelling(cross, pairs, n=n)
    with pytest.raises(lens.LensError, match="targets of at least two tokens"):
        lens.heads.importance(cross, [([3, 4], [2])])


def test_edits_act_while_it_writes():
    model = made("t5")
    loaded = lens.load(model)
    source, options = torch.tensor([[3, 4, 5, 6]]), {"max_new_tokens": 4, "min_new_tokens": 4}
    with lens.edit(loaded.part("cross"), edits.Mask([0])) as (done,):
        model.generate(source, **options)
    assert done.steps == 4
    assert done.calls == 8
    with lens.traces.capturing(loaded.part("cross")) as recorder:
        model.generate(source, **options)
    assert [(one.place, one.keys) for one in recorder.records] == [("cross", 4)] * 8


def test_what_needs_one_part_says_so():
    loaded = lens.load(made("t5"))
    for run in (
        lambda: lens.edit(loaded, edits.Mask("first")).__enter__(),
        lambda: lens.heads.similarity(loaded, [[3, 4, 5]]),
    ):
        with pytest.raises(lens.LensError, match="is an encoder-decoder"):
            run()
    with pytest.raises(lens.LensError, match="part must be one of 'encoder', 'decoder', 'cross'"):
        loaded.part("middle")
    with pytest.raises(
        lens.LensError, match="no encoder-decoder and goes in no stages, so it has no parts"
    ):
        lens.load("induction-2l").part("cross")
    for prompt, said in [
        ([], "no prompts were given"),
        (([3], [0], [1]), "a pair is"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "must hold one prompt"),
        ({"input_ids": [3], "labels": [3]}, "leave labels out"),
        ({"input_ids": [3], "pixels": [3]}, "takes no pixels"),
        (([3], []), "the target has no tokens"),
        ("text", "has no tokenizer"),
        (5, "a source must be"),
    ]:
        with pytest.raises(lens.LensError, match=said):
            lens.capture(loaded, prompt, progress=False)
    with pytest.raises(lens.LensError, match="has no head and cannot write a target"):
        lens.capture(lens.load(made("bart").model), [3, 4], progress=False)


def test_target_ids_that_the_decoder_has_no_embedding_for_are_refused():
    model = lens.load(made("t5"))
    for prompt in (
        ([5, 6], [0, 500]),
        ([5, 6], [0, -1]),
        {"input_ids": [5], "decoder_input_ids": [500]},
    ):
        with pytest.raises(lens.LensError, match=r"target ids of .* go from 0 to"):
            lens.capture(model, prompt, progress=False)
    with pytest.raises(lens.LensError, match=r"^token ids of .* go from 0 to .* got 5 to 500"):
        lens.capture(model, {"input_ids": [5, 500], "decoder_input_ids": [0]}, progress=False)
