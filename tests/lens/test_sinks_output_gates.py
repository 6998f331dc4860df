"""Gates behind the attention: those of a model's own forward, and none where there are none."""

import pytest
import torch
import transformers

import lens
from lens.common.results import of_kind
from lens.sinks import gates, kinds
from tests.lens.architectures import TEXT, build

IDS = [[1, 5, 9, 33, 8, 61, 12], [1, 44, 3, 3, 7]]


@pytest.fixture(scope="module")
def gated():
    torch.manual_seed(3)
    small = {name: size for name, size in TEXT.items() if name != "intermediate_size"}
    config = transformers.AfmoeConfig(
        **small,
        intermediate_size=56,
        moe_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
        num_dense_layers=3,
        layer_types=["full_attention"] * 3,
    )
    network = transformers.AfmoeForCausalLM(config).eval()
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.gate_proj.weight.mul_(30)  # gates that differ
    return network


def test_the_gate_is_that_of_the_models_own_forward(gated):
    found = gates(lens.load(gated), IDS)
    table = found.table()
    assert set(table["mechanism"]) == {"keys", "off_by_one", "output"}
    table = table[table["mechanism"] == "output"]
    expected = []
    for ids in IDS:
        opened: list[torch.Tensor] = []
        entered: list[torch.Tensor] = []
        handles = []
        for layer in gated.model.layers:
            part = layer.self_attn
            handles.append(
                part.gate_proj.register_forward_hook(
                    lambda m, i, o, opened=opened: opened.append(o)
                )
            )
            handles.append(
                part.o_proj.register_forward_pre_hook(
                    lambda m, i, entered=entered: entered.append(i[0])
                )
            )
        with torch.no_grad():
            gated(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        rows = []
        for raw, product in zip(opened, entered, strict=True):
            gate = raw.double().sigmoid().reshape(len(ids), 6, 8)
            output = product.double().reshape(len(ids), 6, 8) / gate
            weights = output**2 / (output**2).sum(-1, keepdim=True)
            rows.append((weights * gate).sum(-1).mean(0))
        expected.append(torch.stack(rows))
    mean = torch.stack(expected).mean(0)
    values = torch.tensor(table["gate"].to_numpy()).reshape(3, 6)
    torch.testing.assert_close(values, mean, rtol=1e-4, atol=1e-5)
    assert values.std() > 0.02
    (said,) = of_kind(found.findings(), "output")
    assert said.startswith(f"The gates behind the attention let {mean.mean():.0%} [")
    assert "] of the heads' output through on average (effective gate); " in said


def loss(network, ids):
    with torch.no_grad():
        logits = network(torch.tensor([ids])).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))


def test_a_gate_is_a_kind_of_sink_and_its_test_opens_it(gated):
    """Heads of an architecture that is not in the table; opened by hand, the gates of those heads alone let all through."""
    draw = torch.Generator().manual_seed(2)
    prompts = torch.randint(3, 97, (2, 25), generator=draw).tolist()
    found = kinds(lens.load(gated), prompts, progress=False)
    table = found.table()
    assert "gate" in set(table["kind"]) <= {"gate", "none"}
    closed = table["kind"] == "gate"
    assert ((1 - table["gate"] > 0.3) == closed).all()
    before = [loss(gated, ids) for ids in prompts]
    handles = []
    for layer, own in table[closed].groupby("layer"):
        closed_heads = own["head"].tolist()

        def open_gates(_, __, output, heads=closed_heads):
            wide = output.unflatten(-1, (6, -1)).clone()
            wide[..., heads, :] = 1e4
            return wide.flatten(-2)

        part = gated.model.layers[int(layer)].self_attn.gate_proj
        handles.append(part.register_forward_hook(open_gates))
    after = [loss(gated, ids) for ids in prompts]
    for handle in handles:
        handle.remove()
    (row,) = found.tests.to_dict("records")
    assert (row["kind"], row["test"], row["heads"]) == ("gate", "open", int(closed.sum()))
    expected = sum(after) / 2 - sum(before) / 2
    assert row["delta_loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3
    said = of_kind(found.findings(), "test")[0]
    assert "with all of their output let through" in said
    assert "(random keys with " in said
    assert row["mass"] == pytest.approx((1 - table.loc[closed, "gate"]).mean())
    assert row["excess"] == pytest.approx(row["delta_loss"] - row["control"], abs=1e-6)
    assert 0.2 < row["control_mass"] < 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_without_gates_has_no_row_of_them(name):
    found = gates(lens.load(build(name)), IDS)
    assert "output" not in set(found.table()["mechanism"])
    assert found.projections == "found"


def test_a_projection_that_is_not_found_is_said(monkeypatch):
    monkeypatch.setattr("lens.sinks.causes.gates.PROJECTIONS", ("nowhere",))
    found = gates(lens.load(build("llama")), IDS)
    assert "output" not in set(found.table()["mechanism"])
    (limit,) = of_kind(found.findings(), "limit")
    assert "not looked for: a projection was found behind 0 of 3 attention layers." in limit
