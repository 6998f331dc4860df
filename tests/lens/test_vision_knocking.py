"""Knock-out of edges from text to image tokens, against whole probabilities."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import lens
from lens.common.errors import LensError
from lens.edits.base import selected_heads
from lens.passes.interface import switched
from lens.passes.sessions import listening
from lens.vision.text_rows import TextRows
from tests.lens.naive import rms_ratio
from tests.lens.vision_models import (
    BUILDERS,
    LAYERS,
    QUESTION,
    SYSTEM,
    build,
    planted,
)

DIM = 7
PLACES = [0, SYSTEM + 2, SYSTEM + 7]  # the first is no image token
KNOBS = {"dims": [DIM], "tau": 4.0}


class Twin:
    """Edges from `rows` to `hidden[layer]` set to -inf in the logits, in the chosen heads."""

    def __init__(self, rows, hidden, heads):
        self.rows, self.hidden, self.heads, self.shares = rows, hidden, heads, []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **_):
        layer, share = module.layer_idx, query.shape[1] // key.shape[1]
        k, v = (x.double().repeat_interleave(share, 1) for x in (key, value))
        scores = query.double() @ k.transpose(-1, -2) * scaling + attention_mask.double()
        edges = self.rows[:, None] & self.hidden[layer][None]
        scores = scores.masked_fill(edges & self.heads[layer][:, None, None], -torch.inf)
        p = scores.softmax(-1)
        self.shares.append(p[0, self.heads[layer]][:, self.rows].sum(1))
        return (p @ v).to(query.dtype).transpose(1, 2).contiguous(), None

    @contextmanager
    def running(self, model):
        AttentionInterface.register("knock_twin", self)
        AttentionMaskInterface.register("knock_twin", eager_mask)
        with switched(model, "knock_twin"), torch.no_grad():
            yield


def an_edit(tokens):
    random = torch.Generator().manual_seed(5)
    image = range(SYSTEM, tokens - QUESTION)
    hidden = torch.zeros(LAYERS, tokens, dtype=torch.bool)
    for layer in range(LAYERS):
        hidden[layer, SYSTEM + torch.randperm(len(image), generator=random)[: 2 + layer]] = True
    return hidden


@pytest.mark.parametrize("name", list(BUILDERS))
def test_hidden_edges_are_those_of_the_text_alone(name):
    network, inputs, _ = build(name)
    model = lens.load(network)
    tokens = inputs["input_ids"].shape[1]
    heads = selected_heads(model, None, ["L0H1", "L0H4", "L1H0", "L2H5"])
    hidden = an_edit(tokens)
    # two stretches of text, as between images: the rows between keep their edges
    runs = [(tokens - QUESTION, tokens - 7), (tokens - 4, tokens)]
    rows = torch.zeros(tokens, dtype=torch.bool)
    for first, end in runs:
        rows[first:end] = True
    twin = Twin(rows, hidden, heads)
    with twin.running(network):
        expected = network(**inputs).logits
    edit = TextRows(runs, list(hidden), heads)
    with listening(model, edit.on_layer), torch.no_grad():
        found = network(**inputs).logits
    with lens.traces.capturing(model, statistics=()), torch.no_grad():
        own = network(**inputs).logits
    watching = TextRows(runs, None, heads)
    with listening(model, watching.on_layer), torch.no_grad():
        assert torch.equal(network(**inputs).logits, own)  # nothing hidden: every bit is kept
    assert rms_ratio(found, expected) < 1e-5
    assert rms_ratio(found, own) > 1e-3
    assert torch.equal(found[:, : tokens - QUESTION], own[:, : tokens - QUESTION])
    for layer, received in edit.received.items():
        assert rms_ratio(received, twin.shares[layer]) < 1e-5
        assert (received[:, hidden[layer]] == 0).all()
        assert (watching.received[layer][:, hidden[layer]] > 0).all()


@pytest.mark.parametrize("name", list(BUILDERS))
def test_sinks_and_controls_of_a_planted_activation(name):
    network, inputs, _ = build(name)
    model = lens.load(network)
    tokens = inputs["input_ids"].shape[1]
    rows = torch.zeros(tokens, dtype=torch.bool)
    rows[tokens - QUESTION :] = True
    hidden = torch.zeros(LAYERS, tokens, dtype=torch.bool)
    hidden[0, PLACES[1:]] = True
    heads = selected_heads(model, [0], None)
    with planted(network, DIM, PLACES):
        found = lens.vision.knock_out(model, [inputs, inputs], layers=[0], **KNOBS)
        twin = Twin(rows, hidden, heads)
        with twin.running(network):
            edited = network(**inputs).logits[0, :-1].log_softmax(-1)
        bare = Twin(rows, hidden & False, heads)
        with bare.running(network):
            base = network(**inputs).logits[0, :-1].log_softmax(-1)
    scored = rows[:-1]
    target = inputs["input_ids"][0, 1:, None]
    delta = float((base - edited).gather(1, target)[scored].mean())
    assert found.tokens == (QUESTION - 1,) * 2
    assert found.values["sinks"]["delta_loss"] == pytest.approx([delta] * 2, abs=1e-5)
    kl = float((base.exp() * (base - edited)).sum(-1)[scored].mean())
    assert found.values["sinks"]["kl"] == pytest.approx([kl] * 2, abs=1e-5)
    mass = float(bare.shares[0][:, hidden[0]].sum() / bare.shares[0].sum())
    assert found.values["sinks"]["mass"] == pytest.approx([mass] * 2, rel=1e-5)
    for name_ in ("size", "position"):
        assert (found.values[name_]["keys"] == 2).all()
    assert (found.values["sinks"]["keys"] == 2).all()
    for place, shares in found.places.items():
        assert shares.sum(1) == pytest.approx([1, 1], abs=1e-5)
        assert (shares[:, 0] == 0).all() == (place == "sinks")
    table = found.table()
    assert table["condition"].tolist() == ["sinks", "size", "mass", "position"]
    excess = found.values["sinks"]["delta_loss"] - found.values["position"]["delta_loss"]
    assert table.loc[3, "excess"] == pytest.approx(excess.mean())
    assert np.isnan(table.loc[0, "excess"])
    words = found.findings()
    assert "2.0 keys per layer" in words[0]
    assert "a small effect alone does not prove" in words[-1]
    figure = found.plot("kl")
    assert list(figure.data[0].x) == ["sinks", "size", "mass", "position"]


def test_what_cannot_be_knocked_out_is_refused():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    ends = {name: tensor[:, : SYSTEM + 17] for name, tensor in inputs.items() if tensor.dim() == 2}
    ends["pixel_values"] = inputs["pixel_values"]
    for match, given, options in (
        ("controls must be some of size, mass, position, got .'self'.", inputs, {"controls": ["self"]}),
        ("edits at least one head", inputs, {"layers": []}),
        ("prompts with images: pass what a vision-language", inputs["input_ids"], {}),
        ("dims must be some of 0 to 47 of", inputs, {"dims": [48]}),
        ("no image token is a sink: phi reaches .*, tau is 20; lower tau", inputs, {}),
        ("measures text after the image; a prompt has none", ends, {}),
    ):  # fmt: skip
        with pytest.raises(LensError, match=match):
            lens.vision.knock_out(model, given, **options)
    with (
        planted(network, DIM, list(range(SYSTEM, SYSTEM + 12))),
        pytest.raises(LensError, match="controls need as many other keys as sources: 12 of 16"),
    ):
        lens.vision.knock_out(model, inputs, **KNOBS)
    with planted(network, DIM, PLACES):
        found = lens.vision.knock_out(model, inputs, controls=[], **KNOBS)
    with pytest.raises(
        LensError, match="measure must be one of delta_loss, kl, flip_rate, got 'x'"
    ):
        found.plot("x")
