"""Sub-layers left out: against models with their weights set to 0, distances by hand, refusals."""

import numpy as np
import pytest
import torch

import lens
from lens.circuits.known import tracr
from lens.common.errors import LensError
from lens.heads.pruning.distances import DISTANCES, distance
from lens.heads.sublayers import block_influence, greedy_removal, importance
from lens.passes.sublayers import named_sublayers
from lens.tasks import Task, induction
from tests.lens.architectures import VOCAB, build
from tests.lens.naive import rms_ratio

PROMPTS, LENGTH = 5, 11


def some_task():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, VOCAB, (PROMPTS, LENGTH), generator=generator)
    positions = torch.arange(LENGTH - 1).expand(PROMPTS, -1)
    return Task("random", clean, positions, clean[:, 1:], "loss")


def zeroed(name, layer, projection):
    """The model with the weight that one sub-layer writes with set to 0."""
    model = build(name)
    block = model.model.layers[layer]
    with torch.no_grad():
        block.get_submodule(projection).weight.zero_()
    return lens.load(model)


def test_left_out_is_what_a_projection_of_zero_is():
    model, task = lens.load(build("llama")), some_task()
    found = importance(model, task, distance="norm", progress=False)
    assert found.names == tuple(
        f"L{layer}.{kind}" for layer in range(3) for kind in ("attention", "mlp")
    )
    whole = model.model(task.clean).logits
    for at, (layer, projection) in enumerate(
        (layer, projection)
        for layer in range(3)
        for projection in ("self_attn.o_proj", "mlp.down_proj")
    ):
        other = zeroed("llama", layer, projection)
        logits = other.model(task.clean).logits
        assert (
            rms_ratio(found.distances[at], (logits - whole).detach().flatten(1).norm(dim=1)) < 1e-5
        )
        lost = task.evaluate(other) - task.evaluate(model)  # more loss is worse
        assert rms_ratio(found.drops[at], lost) < 1e-4
    assert torch.equal(model.model(task.clean).logits, whole)  # everything is put back


def test_distances_by_their_definitions():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    p, q = a.softmax(-1).numpy(), b.softmax(-1).numpy()
    m = (p + q) / 2
    kl = lambda x, y: (x * np.log(x / y)).sum(-1)  # noqa: E731
    expected = {
        "norm": np.sqrt(((a - b) ** 2).sum((1, 2)).numpy()),
        "angular": ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)))
        .clamp(0, 1)
        .arccos()
        .mean(1),
        "kl": kl(p, q).mean(1),
        "js": ((kl(p, m) + kl(q, m)) / 2).mean(1),
        "js_finercut": ((kl(m, p) + kl(m, q)) / 2).mean(1),
    }
    assert expected.keys() == DISTANCES.keys()
    for name, values in expected.items():
        assert rms_ratio(distance(name, a, b), values) < 1e-9
        assert distance(name, a, a).abs().max() == 0
    apart = torch.tensor([[[80.0, -80.0]]]), torch.tensor([[[-80.0, 80.0]]])
    assert float(distance("js", *apart)) == pytest.approx(np.log(2))
    with pytest.raises(
        LensError, match=r"distance must be one of 'norm', 'angular', 'kl', 'js'.*got 'l1'"
    ):
        distance("l1", a, b)


def test_each_greedy_step_takes_the_sub_layer_that_is_missed_least():
    model, task = lens.load(build("gpt2")), some_task()
    found = greedy_removal(model, task, count=3, distance="kl", progress=False)
    modules = named_sublayers(model)
    whole = model.model(task.clean).logits.detach()
    gone: list[str] = []
    for step, name in enumerate(found.order):
        apart = {}
        for other in modules.keys() - gone:
            handles = [
                modules[x].register_forward_hook(
                    lambda _, __, out: (0 * out[0], *out[1:]) if isinstance(out, tuple) else 0 * out
                )
                for x in (*gone, other)
            ]
            with torch.no_grad():
                cut = model.model(task.clean).logits
            apart[other] = distance("kl", whole, cut).mean().item()
            for handle in handles:
                handle.remove()
        assert min(apart, key=apart.__getitem__) == name
        assert found.distances[step].mean() == pytest.approx(apart[name], rel=1e-5)
        gone.append(name)
    assert found.losses.shape == (4, PROMPTS)
    np.testing.assert_allclose(found.losses[0], task.evaluate(model), rtol=1e-5)
    table = found.table()
    assert table["name"].tolist() == ["", *found.order]
    assert table["distance"].iloc[0] == 0


def test_inactive_components_of_a_compiled_program_are_worth_exactly_nothing():
    known = tracr("induction_causal")
    found = importance(known.model, known.task, distance="kl", progress=False)
    active = {node.split(".")[0] for node in known.nodes}  # a0, m0, ...
    for name, drop, apart in zip(found.names, found.drops, found.distances, strict=True):
        layer, kind = name[1:].split(".")
        node = ("a" if kind == "attention" else "m") + layer
        if node not in active:
            assert np.abs(drop).max() == 0
            assert apart.max() == 0
    assert active
    assert len(found.names) > len(active)  # there is something to tell apart


def test_block_influence_is_one_minus_the_cosine():
    model, task = lens.load(build("llama")), some_task()
    found = block_influence(model, task)
    states = model.model.model(task.clean, output_hidden_states=True).hidden_states
    cosine = torch.cosine_similarity(states[1], states[2], dim=-1).mean(1)
    assert found.per_prompt.shape == (3, PROMPTS)
    assert rms_ratio(found.per_prompt[1], 1 - cosine.detach()) < 1e-4
    assert found.table()["layer"].tolist() == [0, 1, 2]
    assert repr(found).startswith("BlockInfluence('random', ")
    bars = found.plot().data[0]
    np.testing.assert_allclose(bars.y, found.per_prompt.mean(1))


def test_spared_sub_layers_go_last():
    model, task = lens.load(build("llama")), some_task()
    names = list(named_sublayers(model))
    found = greedy_removal(model, task, count=5, distance="kl", spared=0.4, progress=False)
    first = names[: int(0.4 * len(names)) + 1]
    assert len(first) == 3
    assert set(found.order[:3]) == set(names) - set(first)
    assert set(found.order[3:]) < set(first)
    free = greedy_removal(model, task, count=3, distance="kl", progress=False)
    assert set(free.order) & set(first)  # so that sparing them made a difference


def test_layers_of_induction_2l_and_their_figures():
    model = lens.load("induction-2l")
    task = induction(model, n=6, length=12)
    found = importance(model, task, progress=False)
    assert found.names == ("L0.attention", "L1.attention")
    assert found.drops.mean(1).min() > 2  # both are needed to copy
    assert found.distances.max() < np.log(2)
    assert list(found.plot().data[0].text) == ["L0", "L1"]
    assert "missed most is L" in found.plot().layout.title.text
    assert "SkipSweep('induction', induction-2l: 2 sub-layers, 6 prompts; loss" in repr(found)
    removal = greedy_removal(model, task, progress=False)
    assert len(removal.order) == 1
    assert list(removal.plot().data[0].x) == [0, 1]
    assert repr(removal).startswith("GreedyRemoval(js on 'induction', induction-2l: L")


def test_what_cannot_be_left_out_is_refused():
    model = lens.load("induction-2l")
    task = induction(model, n=2)
    with pytest.raises(LensError, match=r"distance must be one of .*got 'l2'"):
        importance(model, task, distance="l2")
    for count in (0, 3):
        with pytest.raises(LensError, match="count must be 1 to 2, the sub-layers"):
            greedy_removal(model, task, count=count)
    with pytest.raises(LensError, match=r"spared must be a share in \[0, 1\), got 1"):
        greedy_removal(model, task, spared=1)
    object.__setattr__(model.info, "layers", 3)
    with pytest.raises(LensError, match="has 2 blocks and 3 layers of attention"):
        importance(model, task)
