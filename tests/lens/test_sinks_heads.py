"""Heads off or on the first token: equal to what the output projection says, controls, known models."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.sinks import head_effect
from lens.sinks.effects.head_edits import _control
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
        logits = network(ids[None]).logits[0, :-1]
    for hook in hooks:
        hook.remove()
    return float(torch.nn.functional.cross_entropy(logits, ids[1:]))


@pytest.mark.parametrize("to", ["off", "first"])
def test_the_loss_is_that_of_transformers_with_the_head_replaced(network, to):
    model = lens.load(network)
    result = head_effect(model, IDS, heads=[HEAD], to=to)
    expected = [losses_with(network, ids, to) - losses_with(network, ids, None) for ids in IDS]
    assert np.abs(expected).min() > 1e-5
    assert result.values["edit"]["delta_loss"][0] == pytest.approx(expected, abs=2e-6)
    after = result.alphas[0][1, 1, 4, 0]
    assert after == pytest.approx(0 if to == "off" else 1, abs=1e-5)
    assert f"Edit heads {to} (amount 1) of L1H4" in result.findings()[0]


def test_control_heads():
    mass = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.45, 0.85]])
    chosen = torch.tensor([[True, False, True], [False, False, False]])
    random = np.random.default_rng(3)
    assert _control("mass", chosen, mass, random).nonzero().tolist() == [[1, 1], [1, 2]]
    for _ in range(9):
        drawn = _control("size", chosen, mass, random)
        assert drawn.sum() == 2
        assert not (drawn & chosen).any()
    assert torch.equal(_control("edit", chosen, mass, random), chosen)


def test_refusals(network):
    model = lens.load(network)
    with pytest.raises(LensError, match="to must be 'off' or 'first', got 'last'"):
        head_effect(model, IDS, heads=[HEAD], to="last")
    with pytest.raises(LensError, match=r"needs 1 to 9 heads of 18, .* got 0"):
        head_effect(model, IDS, heads=[])
    with pytest.raises(LensError, match="got 12"):
        head_effect(model, IDS, heads=[(layer, head) for layer in range(2) for head in range(6)])
