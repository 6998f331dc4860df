"""Knock-out of edges from text to image tokens, against whole probabilities."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import lens
from lens.common.errors import LensError
from lens.common.results import of_kind
from lens.edits._others import by_layer
from lens.edits.base import selected_heads
from lens.edits.watching import Watch
from lens.passes.interface import switched
from lens.passes.sessions import listening
from lens.traces.segments import SYSTEM as SYSTEM_KIND
from lens.traces.segments import TEXT as TEXT_KIND
from tests.lens.naive import rms_ratio
from tests.lens.vision_models import (
    BUILDERS,
    LAYERS,
    QUESTION,
    SYSTEM,
    build,
    planted,
    scored,
)
from tests.tiers import first

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


@pytest.mark.parametrize("name", BUILDERS)
def test_hidden_edges_are_those_of_the_text_alone(name):
    network, inputs, _ = build(name)
    model = lens.load(network)
    tokens = inputs["input_ids"].shape[1]
    names = ["L0H1", "L0H4", "L1H0", "L2H5"]
    heads = selected_heads(model, None, names)
    hidden = an_edit(tokens)
    # two stretches of text, as between images: the rows between keep their edges
    rows = torch.zeros(tokens, dtype=torch.bool)
    rows[tokens - QUESTION : tokens - 7] = rows[tokens - 4 :] = True
    twin = Twin(rows, hidden, heads)
    with twin.running(network):
        expected = network(**inputs).logits
    edit = lens.edits.Knockout(rows, by_layer(hidden), heads=names)
    with torch.no_grad(), lens.edit(model, edit) as (done,):
        found = network(**inputs).logits
    with torch.no_grad(), lens.edit(model):
        own = network(**inputs).logits
    assert rms_ratio(found, expected) < 1e-5
    assert rms_ratio(found, own) > 1e-3
    before = slice(tokens - QUESTION)
    assert torch.equal(found[:, before], own[:, before]) == (
        name != "paligemma"
    )  # its image sees the question
    for hides in (False, True):
        watch = Watch(*[done] * hides, rows=rows)
        with torch.no_grad(), listening(model, watch.on_layer):
            network(**inputs)
        bare = Twin(rows, hidden & hides, heads)
        with bare.running(network):
            network(**inputs)
        for layer, shares in enumerate(bare.shares):
            received = watch.received[layer][heads[layer]]
            assert rms_ratio(received, shares) < 1e-5
            assert ((received[:, hidden[layer]] < 1e-20).all()) == hides
    visible = watch.visible[0]
    assert visible[: tokens - QUESTION].tolist() == [QUESTION - 3] * (tokens - QUESTION)
    assert visible[-1] == 1


@pytest.mark.parametrize("name", first(BUILDERS, "gemma3"))
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
    measured = rows[:-1] & scored(name, inputs)
    target = inputs["input_ids"][0, 1:, None]
    delta = float((base - edited).gather(1, target)[measured].mean())
    values = {key: numbers[0] for key, numbers in found.values["edit"].items()}
    assert values["delta_loss"] == pytest.approx([delta] * 2, abs=1e-5)
    kl = float((base.exp() * (base - edited)).sum(-1)[measured].mean())
    assert values["kl"] == pytest.approx([kl] * 2, abs=1e-5)
    mass = float(bare.shares[0][:, hidden[0]].sum() / bare.shares[0].sum())
    assert values["mass"] == pytest.approx([mass] * 2, rel=1e-5)
    for condition in ("edit", "size", "position"):
        assert (found.values[condition]["keys"] == 2).all()
    before, after = found.places
    assert before[:, 0] == pytest.approx([mass] * 2, rel=1e-5)
    assert (after[:, 0] == 0).all()
    kinds = lens.vision.segments(model, inputs).kind[0]
    for place, kind in ((2, SYSTEM_KIND), (3, TEXT_KIND)):
        for shares, runs in ((before, bare), (after, twin)):
            expected = float(runs.shares[0][:, kinds == kind].sum() / runs.shares[0].sum())
            assert shares[:, place] == pytest.approx([expected] * 2, rel=1e-4)
    assert found.places.sum(-1) == pytest.approx(np.ones((2, 2)), abs=1e-5)
    table = found.table()
    assert table["condition"].tolist() == ["edit", "size", "mass", "position"]
    excess = values["delta_loss"] - found.values["position"]["delta_loss"][0]
    assert table.loc[3, "excess"] == pytest.approx(excess.mean())
    assert np.isnan(table.loc[0, "excess"])
    (went,) = of_kind(found.findings(), "went")
    gained = (after - before).mean(0)[1:]
    place = ("other image tokens", "tokens before the image", "the text")[gained.argmax()]
    assert f"went most to {place} ({gained.max():+.1%})" in went
    for taken, said in (
        ([[0.3, 0.1, 0]] * 4, "(+30.0%), 20.0% to 20.0% more than to tokens before the image"),
        (
            [[0.3, 0.1, 0], [0.1, 0.3, 0]] * 2 + [[0.3, 0.1, 0]],
            "which is not told apart from tokens",
        ),
        ([[0, 0, 0.4]], "the text (+40.0%) on one prompt"),
    ):
        moved = np.insert(np.array(taken), 0, -0.4, 1)
        start = np.tile([0.4, 0.2, 0.2, 0.2], (len(taken), 1))
        other = replace(found, places=np.stack([start, start + moved]))
        assert said in of_kind(other.findings(), "went")[0]
    assert list(found.plot("kl").data[0].y) == ["edit", "size", "mass", "position"]


def test_what_cannot_be_knocked_out_is_refused():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    ends = {name: tensor[:, : SYSTEM + 17] for name, tensor in inputs.items() if tensor.dim() == 2}
    ends["pixel_values"] = inputs["pixel_values"]
    for match, given, options in (
        ("controls must be one of 'size', 'mass', 'position', got 'self'", inputs, {"controls": ["self"]}),
        ("edits at least one head", inputs, {"layers": []}),
        ("prompts with images: pass what a vision-language", inputs["input_ids"], {}),
        ("dims must be some of 0 to 47 of", inputs, {"dims": [48]}),
        ("no image token is a sink: phi reaches .*, tau is 20; lower tau", inputs, {}),
        ("scored holds no position of a prompt whose next token is text", ends, {"dims": [DIM], "tau": 0.01}),
    ):  # fmt: skip
        with pytest.raises(LensError, match=match):
            lens.vision.knock_out(model, given, **options)
    with (
        planted(network, DIM, list(range(SYSTEM, SYSTEM + 12))),
        pytest.raises(LensError, match="12 are, and 4 others may stand in"),
    ):
        lens.vision.knock_out(model, inputs, **KNOBS)
