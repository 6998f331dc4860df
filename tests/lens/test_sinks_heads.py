"""Heads off or on the first token: equal to what the output projection says, controls, known models."""

import numpy as np
import pytest
import torch

import lens
from lens import edits
from lens.common.errors import LensError
from lens.common.results import of_kind
from lens.edits._others import other_heads
from tests.lens.architectures import build

IDS = torch.randint(3, 97, (2, 31), generator=torch.Generator().manual_seed(5))
HEAD = (1, 4)


@pytest.fixture(scope="module")
def network():
    found = build("llama")
    torch.nn.init.normal_(found.lm_head.weight, std=0.7)
    return found


def losses_with(network, ids, to: str | None) -> float:
    """Loss with head 4 of layer 1 replaced before the output projection, by transformers and a hook."""
    attention = network.model.layers[1].self_attn
    values = []
    hooks = [attention.v_proj.register_forward_hook(lambda *args: values.append(args[2]))]

    def replace(_, args):
        z = args[0].clone()
        first = values[-1][:, :1, 8:16]  # head 4 reads the second group of keys and values
        z[..., 32:40] = 0 if to == "off" else first
        return (z,)

    if to is not None:
        hooks.append(attention.o_proj.register_forward_pre_hook(replace))
    with torch.no_grad():
        logits = network(ids[None]).logits[0, :-1].double()
    for hook in hooks:
        hook.remove()
    return float(torch.nn.functional.cross_entropy(logits, ids[1:]))


EDITS = {
    "off": edits.Ablate([HEAD]),
    "first": edits.Move(None, to="first", heads=[HEAD]),
}


@pytest.mark.parametrize("to", EDITS)
def test_the_loss_is_that_of_transformers_with_the_head_replaced(network, to):
    model = lens.load(network)
    result = lens.effect(model, IDS, EDITS[to], controls=("size", "mass", "layer"))
    expected = [losses_with(network, ids, to) - losses_with(network, ids, None) for ids in IDS]
    assert np.abs(expected).min() > 1e-5
    assert result.values["edit"]["delta_loss"][0] == pytest.approx(expected, abs=2e-6)
    after = result.alphas[0][1, 1, 4, 0]
    assert after == pytest.approx(0 if to == "off" else 1, abs=1e-5)
    assert f"Edit {EDITS[to].words}{' (amount 1)' * (to != 'off')} of L1H4" in result.findings()[0]
    (said,) = of_kind(result.findings(), "prediction")
    assert said.endswith("went to the first key." if to == "off" else "lay there.")
    assert (result.values["layer"]["keys"] == result.values["edit"]["keys"]).all()


def test_control_heads():
    mass = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.45, 0.85]])
    chosen = torch.tensor([[True, False, True], [False, False, False]])
    random = np.random.default_rng(3)
    assert other_heads("mass", chosen, random, mass).nonzero().tolist() == [[1, 1], [1, 2]]
    for _ in range(9):
        drawn = other_heads("size", chosen, random, mass)
        assert drawn.sum() == 2
        assert not (drawn & chosen).any()
    few = torch.tensor([[True, False, False], [False, True, False]])
    layers = {
        tuple(other_heads("layer", few, random, mass).nonzero()[:, 0].tolist()) for _ in range(9)
    }
    assert layers == {(0, 1)}


def test_a_control_of_a_head_is_the_edit_of_another_head(network):
    """With one other head left in the layer the draw is known."""
    model = lens.load(network)
    others = [(1, head) for head in (0, 1, 2)]
    many = edits.Ablate([*others])
    found = lens.effect(model, IDS[0], many, controls=("layer",))
    twin = lens.effect(model, IDS[0], edits.Ablate([(1, 3), (1, 4), (1, 5)]), controls=())
    assert found.values["layer"]["kl"] == pytest.approx(twin.values["edit"]["kl"], rel=1e-5)
    mass = found.values["layer"]["mass"]
    assert mass == pytest.approx(twin.values["edit"]["mass"], rel=1e-5)
    drawn = lens.effect(model, IDS[0], many, controls=("size",), draws=20).values["size"]
    assert drawn["keys"] == 3
    alone = lens.effect(model, IDS[0], many, controls=("size",)).values["size"]
    assert drawn["kl"] != alone["kl"]  # the mean of 20


def test_sublayers_have_controls_of_their_kind_and_no_mass(network):
    model = lens.load(network)
    found = lens.effect(model, IDS, edits.Ablate(["L0.mlp", "L1.mlp"]))
    assert list(found.values) == ["edit"]
    assert found.missing["size"] == "2 sub-layers mlp are edited and 1 others are left"
    assert found.missing["mass"] == "sub-layers pay no attention"
    said = {one.kind: str(one) for one in found.findings()}
    assert said["mass"] == "There is no control of equal mass: sub-layers pay no attention."
    assert "attention lay there" not in said["prediction"]
    one = lens.effect(model, IDS, edits.Ablate("L0.mlp"), controls=("size",))
    with torch.no_grad(), lens.edit(model, edits.Ablate("L0.mlp")):
        loss = torch.nn.functional.cross_entropy(network(IDS[:1]).logits[0, :-1], IDS[0, 1:])
    change = float(loss) - losses_with(network, IDS[0], None)
    assert one.values["edit"]["delta_loss"][0, 0] == pytest.approx(change, abs=2e-5)
    assert one.scope == "L0.mlp"
    others = []
    for name in ("L1.mlp", "L2.mlp"):
        others.append(lens.effect(model, IDS[0], edits.Ablate(name), controls=()).values["edit"])
    kl = one.values["size"]["kl"][0, 0]
    assert min(abs(kl - other["kl"][0, 0]) for other in others) < 1e-6


def test_a_mean_is_taken_over_the_prompts_themselves(network):
    model = lens.load(network)
    own = lens.effect(model, IDS, edits.Ablate([HEAD], "mean"))
    named = lens.effect(model, IDS, edits.Ablate([HEAD], "mean", over=IDS))
    assert np.array_equal(own.values["edit"]["kl"], named.values["edit"]["kl"])
    assert (own.values["mass"]["kl"] > 0).all()


@pytest.mark.parametrize(
    ("edit", "missing"),
    [
        (edits.Act(), {"size", "mass", "layer"}),
        (edits.LearnedSink(layers=[1]), {"layer"}),
        (edits.Pasta([(2, 4)], heads=["L0H1", "L2H5"]), set()),
        (edits.Act(heads=["L0H1"], threshold=0.01), set()),
    ],
    ids=["act", "learned sink", "pasta", "act of one head"],
)
def test_recipes_are_compared_with_other_heads_where_some_are_left(network, edit, missing):
    model = lens.load(network)
    found = lens.effect(model, IDS, edit)
    assert set(found.missing) == missing
    with torch.no_grad(), lens.edit(model, edit):
        logits = network(IDS[:1]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, IDS[0, 1:])
    change = float(loss) - losses_with(network, IDS[0], None)
    assert found.values["edit"]["delta_loss"][0, 0] == pytest.approx(change, abs=2e-5)


def test_several_edits_act_together_and_each_has_its_own_control(network):
    model = lens.load(network)
    both = [edits.Mask("first", heads=[HEAD]), edits.Ablate("L0.mlp")]
    found = lens.effect(model, IDS[0], both, controls=("size", "self"))
    with torch.no_grad(), lens.edit(model, *both):
        logits = network(IDS[:1]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, IDS[0, 1:])
    change = float(loss) - losses_with(network, IDS[0], None)
    assert found.values["edit"]["delta_loss"][0, 0] == pytest.approx(change, abs=2e-5)
    assert found.values["edit"]["keys"] == 2
    assert found.scope == "L1H4, L0.mlp"
    assert found.edit == "Mask first (amount 1) and Ablate to zero"
    # sparing the first row changes nothing of a mask; the sub-layer has no such control and stays out
    assert found.values["self"]["kl"] == pytest.approx(found.values["edit"]["kl"], rel=1e-4)


def test_more_than_half_of_the_heads_leave_no_control(network):
    model = lens.load(network)
    most = edits.Ablate([(layer, head) for layer in range(2) for head in range(6)])
    found = lens.effect(model, IDS, most)
    assert set(found.missing) == {"size", "mass", "layer"}
    assert "12 of 18 heads are edited" in found.missing["size"]
    with pytest.raises(LensError, match="Ablate takes out at least one head"):
        edits.Ablate([])
