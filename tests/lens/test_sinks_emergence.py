"""Emergence over layers, lengths and control prompts; the gate of learned sinks in closed form."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.passes.inputs import read_prompts
from lens.passes.residual import stream
from lens.sinks import emergence, gates
from lens.sinks.detection.conditions import by_length, control_prompts
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio

LENGTH = 41
IDS = torch.randint(3, 97, (3, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def text_lm():
    model = lens.load("text-lm-3l")
    ids = model.encode(lens.tasks.text("moby-dick"))
    return model, [[0, *ids[start : start + 63]] for start in range(0, 380, 63)]


def test_the_sinks_of_text_lm_vanish_on_random_and_repeated_tokens(text_lm):
    model, prompts = text_lm
    result = emergence(model, prompts)
    whole = result.table().query("layer != layer").set_index("condition")
    assert whole.loc["text", "rate"] > 0.05
    assert whole.loc["random", "high"] < whole.loc["text", "low"]
    assert whole.loc["repeated", "rate"] == 0
    assert whole["bos"].to_dict() == {"text": "added", "random": "added", "repeated": "absent"}
    assert set(whole["tokens"]) == {64}
    assert result.first_layer("text") == 1
    assert result.first_layer("repeated") is None
    text = result.findings()
    assert text[2] == (
        'Prompts "repeated": key 0 is a sink in 0.0% [0.0%, 0.0%] of layers × heads, in no head in more than half of the '
        "prompts (with uniform attention 0.0%; α above 0.3, mean over the queries that see it; T = 64, BOS absent, n = 7)."
    )
    assert "in more than half of the prompts from layer 1 on" in text[0]
    one = result.rates["text"]
    rare = replace(one, by_head=np.where(np.arange(3)[:, None] == 0, 0.5, one.by_head))
    some = replace(
        result, rates={"text": rare}
    )  # a sink of half of the prompts in layer 0 is none of most
    assert some.first_layer("text") == 1
    assert [curve.name for curve in result.plot().data] == ["text", "random", "repeated"]


def test_rates_by_layer_average_to_those_of_rate(text_lm):
    model, prompts = text_lm
    result = emergence(model, prompts[:3], over=(64, 33), epsilon=0.2)
    assert list(dict.fromkeys(result.rows["condition"])) == ["T = 33", "T = 64"]
    for length in (33, 64):
        cut = [ids[:length] for ids in prompts[:3]]
        traces = lens.capture(model, cut, statistics=["received"])
        expected = lens.sinks.rate(traces, epsilon=0.2)
        rows = result.rows[result.rows["condition"] == f"T = {length}"]
        assert rows["rate"].iloc[0] == expected.value
        assert rows["low"].iloc[0] == expected.low
        assert rows["rate"].iloc[1:].to_numpy() == pytest.approx(expected.by_head.mean(1))
        assert rows["alpha"].iloc[1:].to_numpy() == pytest.approx(expected.alpha.mean(1))


def test_lengths_and_bos_are_made_of_the_prompts(text_lm):
    model, prompts = text_lm
    assert list(by_length(model, prompts)) == ["T = 16", "T = 32", "T = 64"]
    assert list(by_length(model, [prompts[0][:40]])) == ["T = 16", "T = 32", "T = 40"]
    found = emergence(model, prompts[1:3], over="bos", normalise="all")
    assert {name: one.samples.bos for name, one in found.rates.items()} == {
        "with BOS": "added",
        "without BOS": "absent",
    }
    assert set(found.table()["normalise"]) == {"all"}


def test_repeated_tokens_have_equal_states_at_every_position():
    """Gu et al.: with rotary positions a row mixes equal values, so no position can stand out."""
    model = lens.load(build("llama"))
    prompt = read_prompts(model, control_prompts(model, IDS)["repeated"][0])[0][0]
    states = stream(model, prompt)
    assert rms_ratio(states, states[:, :1].expand_as(states)) < 1e-6
    other = stream(model, read_prompts(model, IDS[0])[0][0])
    assert rms_ratio(other, other[:, :1].expand_as(other)) > 0.1


def test_control_prompts_keep_lengths_and_bos(text_lm):
    model, prompts = text_lm
    controls = control_prompts(model, [prompts[0], prompts[1][1:40]], seed=3)
    assert [len(ids) for ids in controls["random"]] == [64, 39]
    assert controls["random"][0][0] == model.bos_id
    assert model.bos_id not in controls["random"][0][1:] + controls["random"][1]
    assert [set(ids) for ids in controls["repeated"]] == [{prompts[0][32]}, {prompts[1][20]}]
    assert controls == control_prompts(model, [prompts[0], prompts[1][1:40]], seed=3)
    assert controls["random"] != control_prompts(model, prompts[:2], seed=4)["random"]


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "mistral"])
def test_gates_equal_those_of_whole_probabilities(architecture):
    """gate of a learned sink = sigmoid(L - b); gate of keys = 1 - their mass."""
    network = build(architecture)
    model = lens.load(network)
    result = gates(model, IDS[:2], sources=[0, 4]).table()
    network.set_attn_implementation("eager")
    with torch.no_grad():
        p = torch.stack(network(IDS[:2], output_attentions=True).attentions).double()
    # [layers, prompts, heads, queries, keys]; eager drops the column of learned sinks
    others = p[..., 1:4].sum(-1) + p[..., 5:].sum(-1)
    mass = p[..., [0, 4]].sum(-1)
    rows = (others > 0) & (torch.arange(LENGTH) > 4)
    expected = ((1 - mass) * rows).sum(-1) / rows.sum(-1)
    keys = result[result["mechanism"] == "keys"]
    assert rms_ratio(keys["gate"], expected.mean(1).flatten()) < 1e-5
    if architecture == "llama":  # with even attention
        even = [1 - 2 / (row + 1) for row in range(5, LENGTH)]
        assert keys["gate_baseline"].tolist() == pytest.approx([np.mean(even)] * 18)
    if architecture == "gpt_oss":
        trace = lens.capture(model, IDS[:2], statistics=["lse"])
        closed = []
        for one in trace:
            b = np.stack([layer.self_attn.sinks.detach().numpy() for layer in network.model.layers])
            lse = one.lse.values.astype(float)  # with the sink
            real = lse + np.log1p(-np.exp(b[..., None] - lse))
            closed.append((1 / (1 + np.exp(b[..., None] - real))).mean(-1))
        learned = result[result["mechanism"] == "learned"]
        assert rms_ratio(learned["gate"], np.mean(closed, 0).ravel()) < 1e-5
        assert rms_ratio(learned["gate"], p.sum(-1).mean((1, 3)).flatten()) < 1e-5
        assert set(result["mechanism"]) == {"keys", "learned"}
        return
    assert set(result["mechanism"]) == {"keys", "off_by_one"}
    lse = np.stack([one.lse.values for one in lens.capture(model, IDS[:2], statistics=["lse"])])
    off = result[result["mechanism"] == "off_by_one"]
    if architecture == "llama":
        even = np.mean([1 - 1 / (row + 2) for row in range(LENGTH)])
        assert off["gate_baseline"].tolist() == pytest.approx([even] * 18)
    assert rms_ratio(off["gate"], (1 / (1 + np.exp(-lse))).mean((0, 3)).ravel()) < 1e-5


def test_the_gate_of_the_sink_head(text_lm):
    model, prompts = text_lm
    result = gates(model, prompts)
    table = result.table().query("mechanism == 'keys'").set_index(["layer", "head"])
    assert table.loc[(1, 0), "gate"] < 0.2
    assert table["gate"].idxmin() == (1, 0)
    assert (table["low"] < table["gate"]).all()
    assert "L1H0 least" in result.findings()[0]
    assert "7 prompts, BOS added" in result.findings()[-1]


def test_refusals(text_lm):
    model, prompts = text_lm
    with pytest.raises(LensError, match="over needs a name for each other kind of prompts"):
        emergence(model, prompts, over={})
    with pytest.raises(
        LensError, match="over must be one of 'controls', 'length', 'bos', got 'bose'"
    ):
        emergence(model, prompts, over="bose")  # pyright: ignore[reportArgumentType]
    with pytest.raises(LensError, match=r"lengths must be 2 to 64 .* got \(65,\)"):
        emergence(model, prompts, over=(65,))
    with pytest.raises(LensError, match="condition must be one of 'text', 'code'"):
        emergence(model, prompts, over={"code": prompts}).first_layer("copied")
    with pytest.raises(LensError, match="no vocabulary, so no tokens can be drawn"):
        control_prompts(lens.load(build("vit")), IDS)
    with pytest.raises(LensError, match="layer 0 sees later tokens; gates"):
        gates(lens.load(build("bert")), IDS)
    with pytest.raises(LensError, match="none of the sources is in a prompt of 64"):
        gates(model, prompts, sources=[70])
    with pytest.raises(LensError, match="no row behind the sources sees another key"):
        gates(model, prompts, sources=range(64))
    with pytest.raises(LensError, match="sources of gates are the same"):
        gates(model, prompts, sources=lambda at: at.positions == 0)
