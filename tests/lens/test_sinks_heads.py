"""Heads off or on the first token: equal to what the output projection says, controls, known models."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.sinks import activity, head_effect
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
    table = activity(model, {"a": IDS, "b": IDS[1]}, heads=[HEAD]).table()
    row = table.query("domain == 'a' and layer == 1 and head == 4")
    assert row[to].to_numpy() == pytest.approx([np.mean(expected)], abs=2e-6)
    row = table.query("domain == 'b' and layer == 1 and head == 4")
    assert row[to].to_numpy() == pytest.approx(expected[1:], abs=2e-6)
    assert np.isnan(row[f"{to}_low"]).all()
    assert table.query("head != 4")[to].isna().all()
    received = lens.sinks.profile(lens.capture(model, IDS[1], statistics=["received"])).alpha
    assert row["activity"].to_numpy() == pytest.approx([1 - received[1, 4, 0]], abs=1e-6)
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


def test_the_sink_head_of_text_lm_is_no_dormant_head():
    """L1H0 parks 0.9 of its attention, and yet its constant output is needed (README of the model)."""
    model = lens.load("text-lm-3l")
    ids = model.encode(lens.tasks.text("moby-dick"))
    prompts = [[0, *ids[start : start + 95]] for start in range(0, 400, 95)]
    noise = lens.tasks.copied(model, 47, 1)
    found = activity(model, {"prose": prompts, "random": noise}, heads=["L1H0", "L2H3"])
    table = found.table().set_index(["domain", "layer", "head"])
    prose, random = table.loc[("prose", 1, 0)], table.loc[("random", 1, 0)]
    assert prose["activity"] < 0.2
    assert random["activity"] > prose["activity"]
    assert prose["off"] > 0.01
    assert abs(prose["first"]) < prose["off"] / 2
    assert not prose["dormant"]
    assert found.findings()[0].startswith(
        "On prose 0 of 2 edited heads are dormant (5 prompts, BOS"
    )
    assert found.switching() == []


def test_refusals(network):
    model = lens.load(network)
    with pytest.raises(LensError, match="to must be 'off' or 'first', got 'last'"):
        head_effect(model, IDS, heads=[HEAD], to="last")
    with pytest.raises(LensError, match=r"needs 1 to 9 heads of 18, .* got 0"):
        head_effect(model, IDS, heads=[])
    with pytest.raises(LensError, match="got 12"):
        head_effect(model, IDS, heads=[(layer, head) for layer in range(2) for head in range(6)])
    with pytest.raises(LensError, match="at least one domain"):
        activity(model, {})
    with pytest.raises(LensError, match="heads is empty"):
        activity(model, {"a": IDS}, heads=[])
