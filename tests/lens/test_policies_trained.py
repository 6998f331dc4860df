"""Predictors of the map: their scores against slow twins, what training gives, and their files."""

import dataclasses
from typing import Any, cast

import numpy as np
import pytest
import torch

import lens
from lens import policies
from lens.passes.blocks import BlockView
from lens.passes.head_outputs import read_calls
from lens.policies.trained import divergence, pooled
from lens.policies.training import _KINDS
from tests.lens import naive_policies as naive
from tests.lens.test_policies import call, head

SIZE = (8, 8)


@pytest.fixture(scope="module")
def model():
    return lens.load("text-lm-3l")


@pytest.fixture(scope="module")
def windows(model):
    ids = model.encode(lens.tasks.text("moby-dick"))
    return [ids[start : start + 128] for start in range(0, 128 * 40, 128)]


def drawn(kind, view):
    """The predictor with random weights."""
    maker = _KINDS[kind]
    start = maker.start(pooled(view), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: one + 0.3 * torch.randn(one.shape, generator=generator) for name, one in start.items()
    }
    return maker({0: weights}, SIZE, share=0.4), {
        name: one.double().numpy() for name, one in weights.items()
    }


@pytest.mark.parametrize("kind", ["seer", "sparsifiner", "indexer"])
@pytest.mark.parametrize("tokens", [53, 64])
def test_scores_and_blocks_are_those_of_the_slow_twin(kind, tokens):
    one = call(tokens)
    view = BlockView(one, *SIZE)
    policy, weights = drawn(kind, view)
    found = policy.predicted(policy.weights[0], pooled(view))[0].numpy()
    kept = (policy.keep(view).blocks & view.visible)[0].numpy()
    visible = naive.seen(tokens, *SIZE)
    for number in range(4):
        if kind == "indexer":
            queries = list(one.query[0].double().numpy())
            keys = list(one.key[0].double().numpy())
            expected, shown = naive.indexer(queries, keys, SIZE, weights), found[0]
        else:
            expected = getattr(naive, kind)(*head(view, number), SIZE, weights, number)
            shown = found[number]
        assert np.allclose(shown, expected, atol=1e-4)
        if kind == "sparsifiner":
            expected = expected.clip(min=0)
        for row in range(len(visible)):
            count = np.ceil(visible[row].sum() * 0.4)
            best = naive.best(np.where(visible[row], expected[row], -np.inf), count)
            assert set(np.flatnonzero(kept[number, row])) == set(best)


def test_an_untrained_seer_is_the_pooled_map():
    view = BlockView(call(), *SIZE)
    start = policies.Seer.start(pooled(view), torch.Generator())
    gate = policies.Seer({0: start}, SIZE, top=2)
    assert torch.equal(
        gate.keep(view).blocks & view.visible,
        policies.BlockSparse(2).keep(view).blocks & view.visible,
    )


def test_the_divergence_is_that_of_the_definition():
    view = BlockView(call(), *SIZE)
    seen = pooled(view)
    target = view.masses * 3
    logits = torch.randn(view.shape, generator=torch.Generator().manual_seed(0))
    visible = view.visible[0, 0]
    rows = []
    for number in range(4):
        for row in range(len(visible)):
            q = logits[0, number, row][visible[row]].double().softmax(-1)
            p = target[0, number, row][visible[row]].double()
            p = p / p.sum()
            rows.append(float((p * (p / q).log()).sum()))
    assert float(divergence(logits, target, seen)) == pytest.approx(np.mean(rows), abs=1e-5)


def test_a_gate_trained_here_beats_a_shape_at_equal_density_on_held_out_text(model, windows):
    near = policies.AShape(8, 16)
    gate = policies.train("seer", model, windows[:24], block_size=8, steps=150, progress=False)
    offered = [near, gate.keeping(like=near)]
    found = policies.evaluate(model, windows[30:36], offered, block_size=8, loss=True)
    change = (found.sparse_loss - found.dense_loss).mean(-1)
    recall = found.of("recall").mean((1, 2, 3))
    density = found.of("density").mean((1, 2, 3))
    assert density[0] == density[1]
    assert recall[1] > recall[0] + 0.02
    assert change[1] < 0.5 * change[0]
    for losses in gate.losses.values():
        assert losses[-20:].mean() < 0.7 * losses[:20].mean()


def test_targets_are_the_exact_largest_entries(model, windows):
    """One step from the start: the loss is that of the model's own eager attention."""
    ids = windows[0]
    gate = policies.train("seer", model, [ids], layers=[1], block_size=8, steps=1, progress=False)
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        p = model.model(torch.tensor([ids]), output_attentions=True).attentions[1][0]
    model.model.set_attn_implementation("sdpa")
    peaks = p.unflatten(-1, (-1, 8)).amax(-1).unflatten(-2, (-1, 8)).amax(-2)
    (one,) = (one for one in read_calls(model, torch.tensor([ids])) if one.layer == 1)
    view = BlockView(one, *SIZE)
    start = policies.Seer.start(pooled(view), torch.Generator())
    logits = policies.Seer.predicted(start, pooled(view))
    rows = dataclasses.replace(pooled(view), visible=view.visible[:, :, 4:])
    expected = float(divergence(logits[:, :, 4:], peaks[None, :, 4:], rows))
    assert gate.losses[1][0] == pytest.approx(expected, rel=1e-3)
    assert list(gate.weights) == [1]


@pytest.mark.parametrize("kind", ["sparsifiner", "indexer"])
def test_training_lowers_the_loss_on_other_text(model, windows, kind):
    few, many = (
        policies.train(kind, model, windows[:8], block_size=8, steps=steps, progress=False)
        for steps in (1, 120)
    )
    offered = [one.keeping(share=0.4) for one in (few, many)]
    found = policies.evaluate(model, windows[30:33], offered, block_size=8)
    recall = found.of("recall").mean((1, 2, 3))
    assert recall[1] > recall[0] + 0.02


def test_files_come_back_as_they_went(model, windows, tmp_path):
    for kind in ("seer", "sparsifiner", "indexer"):
        gate = policies.train(kind, model, windows[:2], block_size=8, steps=2, progress=False)
        gate.keeping(top=3).save(tmp_path / "gate")
        again = policies.load_trained(tmp_path / "gate")
        assert type(again) is type(gate)
        assert (again.top, again.share, again.block_size) == (3, None, SIZE)
        for layer, weights in gate.weights.items():
            for name, one in weights.items():
                assert torch.equal(again.weights[layer][name], one)
    (tmp_path / "other").write_text("no weights")
    for path in ("other", "nowhere"):
        with pytest.raises(lens.LensError, match="is no file of a trained policy"):
            policies.load_trained(tmp_path / path)


def test_a_file_that_cannot_be_written_is_named_and_folders_are_made(model, windows, tmp_path):
    gate = policies.train("seer", model, windows[:1], block_size=8, steps=1, progress=False)
    gate.save(tmp_path / "a" / "b" / "gate")
    assert str(policies.load_trained(tmp_path / "a" / "b" / "gate")) == str(gate)
    with pytest.raises(OSError, match="gate"):
        gate.save(tmp_path / "a" / "b" / "gate" / "below")


@pytest.mark.parametrize("kind", ["seer", "sparsifiner", "indexer"])
def test_heads_of_another_model_are_refused(model, windows, kind):
    gate = policies.train(kind, model, windows[:1], block_size=8, steps=1, progress=False)
    other = lens.load("induction-2l")
    gate = dataclasses.replace(gate, weights={0: gate.weights[0]})
    with pytest.raises(lens.LensError, match="was trained on a model with other heads than these"):
        policies.evaluate(other, [lens.tasks.copied(other, 20)], gate, progress=False)


def test_a_layer_that_was_not_trained_stays_dense_and_other_blocks_are_refused(model, windows):
    gate = policies.train(
        "seer", model, windows[:2], layers=[2], block_size=8, steps=2, progress=False
    )
    with lens.edit(model, lens.edits.Sparse(gate)) as (done,):
        model.logits(windows[0])
    assert done.calls == 1
    with pytest.raises(lens.LensError, match=r"trained with blocks of \(8, 8\)"):
        policies.evaluate(model, windows[:1], gate, block_size=4)
    with pytest.raises(lens.LensError, match="there is no L7H0"):
        policies.train("seer", model, windows[:2], layers=[7])
    elsewhere = dataclasses.replace(gate, weights={7: gate.weights[2]})
    with pytest.raises(lens.LensError, match="there is no L7H0"):
        policies.evaluate(model, windows[:1], elsewhere)
    longer = policies.train(
        "sparsifiner", model, [windows[0][:64]], block_size=8, steps=1, progress=False
    )
    with pytest.raises(lens.LensError, match="trained on 8 blocks of keys"):
        policies.evaluate(model, windows[:1], longer)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "gate"}, "kind must be one of"),
        ({"prompts": []}, "no prompts were given"),
        ({"layers": []}, "no layers to train"),
        ({"steps": 0}, "steps"),
        ({"rate": 0}, "rate must be"),
        ({"rate": float("inf")}, "rate must be a number above 0, got inf"),
        ({"layers": 2}, "layers must be a list, got 2"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"block_size": 0}, "block_size must be"),
    ],
)
def test_bad_arguments_are_refused(model, windows, arguments, said):
    given: dict[str, Any] = {"kind": "seer", "prompts": windows[:1], **arguments}
    with pytest.raises(lens.LensError, match=said):
        policies.train(given.pop("kind"), model, given.pop("prompts"), **given)
    with pytest.raises(lens.LensError, match="exactly one of"):
        policies.Seer({}, top=1, share=0.5)
    with pytest.raises(lens.LensError, match="like must be a policy"):
        policies.Seer({}, like=cast(Any, 3))
