"""The chain of a vision-language model, in the shapes of seven families with planted visual sinks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lens_analyses.config.vision import VisionSettings
from lens_analyses.steps.vision_language import (
    _WRITTEN,
    _answered,
    _decoding,
    _Made,
    _span,
    chain,
    moved_rows,
)

import lens
from lens.common.errors import LensError
from lens.passes.inputs import read_prompts
from tests.lens.test_vision_pictures import vlm
from tests.lens.vision_models import ANSWER, BUILDERS, HEADS, IMAGE, LAYERS, SYSTEM, build, planted
from tests.tiers import first

DIM, PLACES = 7, [SYSTEM + 2, SYSTEM + 7]
ALWAYS = ("llava", "paligemma", "qwen3_vl")
"""A causal one, one that sees its question both ways, and positions of several axes; the others are one more of these."""


def section_of(name, **settings):
    network, inputs, grid = build(name)
    model = lens.load(network)
    given = VisionSettings(phi="4", **{"amounts": "0,0.6", **settings})
    subject = SimpleNamespace(
        model=model, pictures=[inputs], settings=given, seed=0, progress=False
    )
    with planted(network, DIM, PLACES):
        return model, inputs, grid, chain(subject)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", first(BUILDERS, *ALWAYS))
def test_the_chain_is_whole_in_every_shape(name):
    _, _, (height, width), found = section_of(name)
    measured = {"flow", "knock_out", "var", "act", "pasta"}
    written = {f"{edit}_decoding" for edit in ("var", "act", "pasta")}
    assert set(found.tables) == {"segments", "sinks", "image_centric"} | measured | written
    assert set(found.figures) == {"segments", "before_and_after"} | measured
    assert not any(one.startswith("No ") for one in found.limits)
    assert sum("There is no size control" in one for one in found.limits) == 3  # of all heads
    assert found.headlines == (), "one picture tells nothing apart"
    assert found.summary[0].startswith("Flow: The text depends on its edges to the image most")
    assert not any("nan" in one for one in found.summary)
    assert found.configuration["dims"][0] == DIM
    sinks = found.tables["sinks"].query("layer == 0").dropna()
    assert sinks["position"].tolist() == PLACES
    assert (sinks["row"] * width + sinks["column"]).tolist() == [2, 7]
    assert sinks["row"].max() < height
    assert found.tables["flow"]["layer"].nunique() == LAYERS
    pasta = found.tables["pasta"].query("condition == 'edit'")
    assert pasta["amount"].tolist() == [0, 0.6]
    assert pasta["kl"].iloc[1] > 1e-5 > abs(pasta["kl"].iloc[0])
    assert found.tables["pasta_decoding"]["same"].iloc[0] == 1


def test_a_question_that_is_seen_both_ways_is_measured_on_its_answer():
    network, inputs, _ = build("paligemma")
    model = lens.load(network)
    whole = {name: one[:, :-ANSWER] if one.dim() == 2 else one for name, one in inputs.items()}
    with pytest.raises(LensError, match="sees later tokens, so there is no next-token loss"):
        lens.effect(model, whole, lens.edits.Mask())
    prompts, _ = read_prompts(model, whole, whole=True)
    made = _Made()
    given = _answered(model, prompts[0], lens.vision.segments(model, whole), made)
    ids = given["input_ids"]
    assert torch.equal(ids[:, :-_WRITTEN], whole["input_ids"])
    with torch.no_grad():
        logits = network(**given).logits[0, -_WRITTEN - 1 : -1]
    logits[:, IMAGE] = -torch.inf  # is never written
    assert logits.argmax(-1).tolist() == ids[0, -_WRITTEN:].tolist()
    assert "that the model itself answers" in made.left_out[0]
    found = lens.effect(model, given, lens.edits.Pasta([(SYSTEM, SYSTEM + 4)]), controls=())
    with torch.no_grad(), lens.edit(model, lens.edits.Pasta([(SYSTEM, SYSTEM + 4)])):
        edited = network(**given).logits[0, -_WRITTEN - 1 : -1].log_softmax(-1)
    own = network(**given).logits[0, -_WRITTEN - 1 : -1].log_softmax(-1).detach()
    kl = (own.exp() * (own - edited)).sum(-1).mean()
    assert found.values["edit"]["kl"][0, 0] == pytest.approx(float(kl), rel=1e-3)
    prompts, _ = read_prompts(model, given, whole=True)
    again = _answered(model, prompts[0], lens.vision.segments(model, given), made)
    assert again is prompts[0].inputs


def test_the_overlay_after_is_what_var_makes_of_the_row():
    network, inputs, _ = build("llava")
    kind = lens.vision.segments(lens.load(network), inputs)
    image = kind.mask("image")[0].numpy()
    sink = np.zeros(len(image), bool)
    sink[PLACES] = True
    random = np.random.default_rng(0)
    rows = random.dirichlet(np.full(len(image), 0.5), (4, HEADS))
    after = moved_rows(rows, image, sink, lens.edits.Var(PLACES, rho=0.5, least_visual=0.2))
    assert after.sum(-1) == pytest.approx(np.ones((4, HEADS)))
    for row, new in zip(rows.reshape(-1, len(image)), after.reshape(-1, len(image)), strict=True):
        visual, held = row[image].sum(), row[image & ~sink].sum()
        expected = row.copy()
        if visual >= 0.2 and held / visual >= 0.5:
            expected[sink] *= 0.4
            expected[image & ~sink] *= 1 + 0.6 * row[sink].sum() / held
        assert new == pytest.approx(expected)
    assert not np.allclose(rows, after)
    assert int((inputs["input_ids"] == IMAGE).sum()) == image.sum()


def test_only_tokens_that_the_model_wrote_are_compared():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    prompts, _ = read_prompts(model, [inputs, inputs], whole=True)
    with torch.no_grad():
        written = network.generate(**inputs, max_new_tokens=_WRITTEN, do_sample=False)
    first = int(written[0, inputs["input_ids"].shape[1]])
    network.generation_config.eos_token_id = first  # it stops after one token
    table, (said,) = _decoding(model, prompts, lens.edits.Act(), (0.0,), seed=0)
    assert table["written"].tolist() == [str(first)] * 2
    assert table["same"].tolist() == [1, 1]
    assert "keeps 100% [100%, 100%] of the tokens, 8 at most," in said
    longer = iter(([first], [first, 5, 6]))

    def stops(input_ids, **_):
        return torch.cat([input_ids, torch.tensor([next(longer)])], 1)

    network.generate = stops
    table, _ = _decoding(model, prompts[:1], lens.edits.Act(), (0.5,), seed=0)
    assert table["same"].tolist() == [1, 1 / 3]


def test_pasta_at_an_amount_keeps_the_rest_of_the_weight():
    edit = lens.edits.Pasta([(2, 4)])
    assert edit.at(0.25).alpha == 0.75
    assert edit.at(0.25).dose == 0.25
    model = lens.load("induction-2l")
    plain = model.logits([0, 5, 9, 3, 5])
    with lens.edit(model, edit.at(0.0)):
        torch.testing.assert_close(model.logits([0, 5, 9, 3, 5]), plain)


def test_pasta_emphasises_the_words_that_are_named():
    model = vlm()
    picture = np.zeros((8, 8, 3), np.uint8)
    prompts, _ = read_prompts(model, [(picture, "w6 w7 what is this")], whole=True)
    ids = prompts[0].ids or []
    start, end = _span(model, prompts[0], "w6 w7")
    assert model.tokenizer.decode(ids[start:end]) == "w6 w7"
    first, past = _span(model, prompts[0], None)
    kinds = lens.vision.segments(model, prompts[0].inputs).kind[0]
    assert kinds[first:past].tolist() == [1] * int((kinds == 1).sum())
    with pytest.raises(LensError, match="the question holds no 'w7 w6' as tokens of its own"):
        _span(model, prompts[0], "w7 w6")
