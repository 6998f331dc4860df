"""VAR end to end in vision-language models: equal to a twin on whole probabilities, step by step."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import lens
from lens.common.errors import LensError
from lens.edits._phi import phi
from lens.edits._var import PRESETS, VarSettings
from lens.passes.interface import language_model, switched
from tests.lens.naive import rms_ratio
from tests.lens.vision_models import (
    BUILDERS,
    FAMILIES,
    HEADS,
    IMAGE,
    LAYERS,
    QUESTION,
    SYSTEM,
    build,
    planted,
)

DIM = 7
PLACES = [0, SYSTEM + 2, SYSTEM + 7]  # one text sink, two image sinks
NUMBERS = {"tau": 4.0, "rho": 0.6, "least_visual": 0.3}
DIMS = (DIM, 30)


class Twin:
    """VAR on whole probabilities, in float64, as an attention function of transformers."""

    def __init__(self, model, preset, amount, layers, numbers=NUMBERS, prompt=None):
        self.model, self.released, self.amount = model, preset == "released", amount
        self.layers, self.numbers, self.prompt = layers, numbers, prompt
        self.hidden = self.ids = None
        self.selected = np.zeros((LAYERS, HEADS), int)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **_):
        if module.layer_idx == 0 and not hasattr(module, "q_proj"):
            raise AssertionError("the vision tower must not be edited")
        share = query.shape[1] // key.shape[1]
        q, k, v = (
            x.double()
            for x in (query, key.repeat_interleave(share, 1), value.repeat_interleave(share, 1))
        )
        scores = q @ k.transpose(-1, -2) * scaling + attention_mask.double()
        p = scores.softmax(-1)
        if module.layer_idx in self.layers:
            p = self.edited(p, module.layer_idx)
        return (p @ v).to(query.dtype).transpose(1, 2).contiguous(), None

    def edited(self, p, layer):
        hidden = self.hidden.double()
        rms = (hidden.pow(2).mean(-1) + 1e-6).sqrt()
        size = (hidden[..., list(DIMS)].abs() / rms[..., None]).amax(-1)
        tau, rho, least = (self.numbers[name] for name in ("tau", "rho", "least_visual"))
        sink = size > tau if self.released else size >= tau
        if self.released and self.prompt is not None:
            sink[:, self.prompt :] = False
        image = self.ids == IMAGE
        new = p.clone()
        for b in range(p.shape[0]):
            s, r, vis = sink[b], image[b] & ~sink[b], image[b]
            for h in range(p.shape[1]):
                for i in range(p.shape[2]):
                    row = p[b, h, i]
                    if image[b, i] or not image[b, :i].any():
                        continue
                    m_vis, m_r, m_s = (
                        float(row[vis].sum()),
                        float(row[r].sum()),
                        float(row[s].sum()),
                    )
                    if m_vis < least:
                        continue
                    if self.released:
                        portion = float(row[vis & s].sum()) / float((row[vis] + 1e-6).sum())
                        chosen = portion <= rho
                    else:
                        chosen = m_r / m_vis >= rho
                    if not chosen:
                        continue
                    self.selected[layer, h] += 1
                    kept = self.amount if self.released else 1 - self.amount
                    new[b, h, i, s] = row[s] * kept
                    new[b, h, i, r] = row[r] + (1 - kept) * m_s * row[r] / m_r
        return new

    @contextmanager
    def running(self, ids):
        self.ids = ids
        AttentionInterface.register("var_twin", self)
        AttentionMaskInterface.register("var_twin", eager_mask)
        layers = language_model(self.model).layers

        def take(_, args, kwargs):
            self.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        hooks = [layer.register_forward_pre_hook(take, with_kwargs=True) for layer in layers]
        try:
            with switched(self.model, "var_twin"), torch.no_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()


LAYERS_OF = {"paper": range(LAYERS - 1), "released": range(2, LAYERS)}


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("name", BUILDERS)
def test_var_equals_its_twin_on_whole_probabilities(name, preset):
    network, inputs, _ = build(name)
    model = lens.load(network)
    image = lens.vision.segments(model, inputs).keys("image")
    twin = Twin(network, preset, 0.7, LAYERS_OF[preset])
    with planted(network, DIM, PLACES), torch.no_grad():
        with twin.running(inputs["input_ids"]):
            expected = network(**inputs).logits
        own = network(**inputs).logits
        with lens.edit(
            model, lens.edits.Var(image, preset=preset, amount=0.7, dims=DIMS, **NUMBERS)
        ) as (edit,):
            found = network(**inputs).logits
    assert rms_ratio(found, expected) < 1e-5
    assert rms_ratio(found, own) > 1e-3
    selection = edit.selection()
    assert (selection.selected == twin.selected).all()
    assert 0 < selection.selected.sum() < selection.text.sum()
    assert edit.edited_rows == twin.selected.sum()
    assert edit.skipped_rows == 0


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_is_what_recomputing_the_whole_prefix_gives(name, preset):
    """Each cached step against the twin's pass over all tokens so far."""
    network, inputs, _ = build(name)
    model = lens.load(network)
    image = lens.vision.segments(model, inputs).keys("image")
    numbers = {**NUMBERS, "tau": 3.0, "rho": 0.5}
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None}
    options["suppress_tokens"] = [IMAGE]
    embedding = network.get_input_embeddings()
    with torch.no_grad():  # whatever is generated is a sink, so that a step must look for new ones
        embedding.weight[:, 30] += 0.2
    with planted(network, DIM, PLACES), torch.no_grad():
        with lens.edit(
            model, lens.edits.Var(image, preset=preset, amount=0.8, dims=DIMS, **numbers)
        ) as (edit,):
            found = network.generate(**inputs, **options)
        plain = network.generate(**inputs, **options)
        ids = found.sequences
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inputs:
            whole["mm_token_type_ids"] = (ids == IMAGE).long()
        if (
            "token_type_ids" in inputs
        ):  # PaliGemma's answer is seen one way, what Gemma 3 writes is no picture
            own = inputs["token_type_ids"]
            more = torch.full((1, 5), int(name == "paligemma"))
            whole["token_type_ids"] = torch.cat([own, more], 1)
        twin = Twin(network, preset, 0.8, LAYERS_OF[preset], numbers, prompt=length)
        with twin.running(ids):
            logits = network(**whole).logits
    scores = torch.cat(found.logits)
    assert edit.steps == 5
    assert rms_ratio(scores, logits[0, length - 1 : -1]) < 1e-5
    assert rms_ratio(found.logits[0], plain.logits[0]) > 1e-4


def test_nothing_moved_keeps_every_bit():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    image = lens.vision.segments(model, inputs).keys("image")
    with planted(network, DIM, PLACES), torch.no_grad():
        with lens.traces.capturing(model, statistics=["received"]):
            captured = network(**inputs).logits
        for preset, amount in (("paper", 0.0), ("released", 1.0)):
            with lens.edit(
                model, lens.edits.Var(image, preset=preset, amount=amount, **NUMBERS)
            ) as (edit,):
                assert torch.equal(network(**inputs).logits, captured)
            assert edit.calls == 0
        with lens.edit(model, lens.edits.Var(image, dims=DIMS, tau=7.0)) as (edit,):  # no sink
            assert torch.equal(network(**inputs).logits, captured)
        assert (edit.calls, edit.empty_calls) == (0, 2)
        with lens.edit(model, lens.edits.Var(image, sinks=range(32))) as (edit,):  # no receiver
            assert torch.equal(network(**inputs).logits, captured)
        assert (edit.calls, edit.empty_calls, edit.skipped_rows) == (0, 2, 0)
        assert math.isnan(edit.mass_before)
        assert "No row" in edit.selection().findings()[0]
        with lens.edit(model, lens.edits.Var(image, sinks=PLACES, rho=1.0)) as (edit,):  # no head
            assert torch.equal(network(**inputs).logits, captured)
        assert edit.edited_rows == 0


def test_heads_that_are_not_image_centric_keep_their_bits():
    """The output of each head of the first layer, taken before the output projection."""
    network, inputs, _ = build("llava")
    model = lens.load(network)
    image = lens.vision.segments(model, inputs).keys("image")
    seen = []
    projection = language_model(network).layers[0].self_attn.o_proj
    projection.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].unflatten(-1, (6, -1)))
    )
    with planted(network, DIM, PLACES), torch.no_grad():
        with lens.traces.capturing(model, statistics=["received"]):
            network(**inputs)
        with lens.edit(model, lens.edits.Var(image, sinks=PLACES, rho=0.99)) as (edit,):
            network(**inputs)
    captured, edited = seen
    untouched = edit.selection().selected[0] == 0
    assert 0 < untouched.sum() < HEADS
    assert torch.equal(edited[:, :, untouched], captured[:, :, untouched])
    assert not torch.equal(edited[:, :, ~untouched], captured[:, :, ~untouched])
    assert torch.equal(edited[:, :-QUESTION], captured[:, :-QUESTION])  # system and image rows


def test_left_padding_does_not_change_what_var_does():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    padded = {
        **inputs,
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (3, 0), value=0),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (3, 0), value=0),
    }
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found = []
    for given, shift in ((inputs, 0), (padded, 3)):
        image = lens.vision.segments(model, given).keys("image")
        places = [place + shift for place in PLACES]
        with (
            planted(network, DIM, places),
            torch.no_grad(),
            lens.edit(model, lens.edits.Var(image, dims=DIMS, **NUMBERS)),
        ):
            found.append(network(**given).logits[:, -QUESTION:])
    assert rms_ratio(found[1], found[0]) < 1e-5


def test_the_paper_and_the_released_code_differ_where_the_table_says():
    paper, released = VarSettings(0.4, 0.5), VarSettings(0.6, 0.5, released=True)
    assert paper.moved == pytest.approx(released.moved)
    assert (paper.layers(5), released.layers(5)) == (range(4), range(2, 5))
    hidden = torch.zeros(1, 1, 16)
    hidden[..., 3] = 8.0  # |x| / RMS = sqrt(16) but for the epsilon
    exactly = float(phi(hidden, [3]))
    assert exactly == pytest.approx(4.0, rel=1e-5)
    at_tau = VarSettings(0.5, 0.5, tau=exactly)
    assert bool(at_tau.is_sink(hidden, [3]))
    assert not bool(VarSettings(0.5, 0.5, tau=exactly, released=True).is_sink(hidden, [3]))
    visual = torch.full((7,), 0.5, dtype=torch.float64)
    receivers = torch.tensor([0.05, 0.12, 0.2, 0.25, 0.3, 0.42, 0.45], dtype=torch.float64)
    few = torch.tensor(16)
    half = [s.is_centric(visual, receivers, few).tolist() for s in (paper, released)]
    assert half[0] == half[1]  # the two agree at 0.5 alone
    other = [
        VarSettings(0.5, 0.8, released=flag).is_centric(visual, receivers, few).sum()
        for flag in (False, True)
    ]
    assert other == [2, 6]
    assert not VarSettings(0.5, 0.0).is_centric(visual * 0.39, receivers * 0.39, few).any()
    # the 1e-6 per image key lets a row through that lies a little beyond the bound
    beyond = torch.tensor(0.25 - 1e-5, dtype=torch.float64)
    assert not paper.is_centric(visual[0], beyond, few)
    assert not released.is_centric(visual[0], beyond, few)
    assert released.is_centric(visual[0], beyond, torch.tensor(576))
    assert PRESETS["released"].released
    assert (PRESETS["paper"].rho, PRESETS["paper"].tau, PRESETS["paper"].least_visual) == (
        0.8,
        20,
        0.2,
    )


def test_what_does_not_fit_is_refused():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    image = lens.vision.segments(model, inputs).keys("image")
    for match, options in (
        ("preset must be one of 'paper', 'released', got 'code'", {"preset": "code"}),
        ("rho of VAR is a fraction 0..1, got 1.5", {"rho": 1.5}),
        ("tau of VAR must be above 0, got 0", {"tau": 0}),
        ("give sinks, or dims and tau", {"sinks": [0], "dims": [3]}),
        ("dims must be some of 0 to 47 .* got .48.", {"dims": [48]}),
        ("layers must be numbers 0 to 2, got 3", {"layers": [3]}),
    ):
        with (
            pytest.raises(LensError, match=match),
            lens.edit(model, lens.edits.Var(image, **options)),
        ):
            pass


def test_a_cache_that_the_block_did_not_see_grow_is_refused():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    image = lens.vision.segments(model, inputs).keys("image")
    options = {"dims": DIMS, **NUMBERS}
    two = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    two["input_ids"][1, -1] = 5
    last = {"input_ids": two["input_ids"][:, -1:]}
    with torch.no_grad():
        cache = network(**two, use_cache=True).past_key_values
        with (
            lens.edit(model, lens.edits.Var(image, **options)),
            pytest.raises(LensError, match="began outside the block, or was cut"),
        ):
            network(**last, past_key_values=cache)
        with lens.edit(model, lens.edits.Var(image, **options)):
            cache = network(**two, use_cache=True).past_key_values
            cache.reorder_cache(torch.tensor([1, 0]))
            with pytest.raises(LensError, match="put into another order since the last step"):
                network(**last, past_key_values=cache)
