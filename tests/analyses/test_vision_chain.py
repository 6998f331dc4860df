"""The chain of a vision-language model, in the shapes of seven families with planted visual sinks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lens_analyses.config.analyses import VisionSettings
from lens_analyses.steps.vision_language import chain, moved_rows

import lens
from tests.lens.vision_models import BUILDERS, CAUSAL, HEADS, IMAGE, LAYERS, SYSTEM, build, planted

DIM, PLACES = 7, [SYSTEM + 2, SYSTEM + 7]


def section_of(name, **settings):
    network, inputs, grid = build(name)
    model = lens.load(network)
    given = VisionSettings(phi="4", **{"amounts": "0,0.6", **settings})
    subject = SimpleNamespace(
        model=model, pictures=[inputs], settings=given, seed=0, progress=False
    )
    with planted(network, DIM, PLACES):
        return model, inputs, grid, chain(subject)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", BUILDERS)
def test_the_chain_is_whole_in_every_shape(name):
    _, _, (height, width), found = section_of(name)
    wanted = {"segments", "sinks", "pasta_decoding"}
    if name in CAUSAL:
        measured = {"flow", "knock_out", "var", "act", "pasta"}
        wanted |= measured | {"var_decoding", "act_decoding", "image_centric"}
        assert {"before_and_after", *measured} <= set(found.figures)
    else:  # there the image sees its own later tokens, for which VAR, ACT and losses are not defined
        assert sum("sees later tokens" in one for one in found.limits) >= 7
    assert wanted <= set(found.tables)
    assert found.configuration["dims"][0] == DIM
    sinks = found.tables["sinks"].query("layer == 0").dropna()
    assert sinks["position"].tolist() == PLACES
    assert (sinks["row"] * width + sinks["column"]).tolist() == [2, 7]
    assert sinks["row"].max() < height
    if name in CAUSAL:
        assert found.tables["flow"]["layer"].nunique() == LAYERS
        pasta = found.tables["pasta"].query("condition == 'edit'")
        assert pasta["amount"].tolist() == [0, 0.6]
        assert pasta["kl"].iloc[1] > 1e-5 > abs(pasta["kl"].iloc[0])
    written = found.tables["pasta_decoding"]
    assert written["same"].iloc[0] == 1


def test_the_overlay_after_is_what_var_makes_of_the_row():
    model, inputs, _, found = section_of("llava")
    kind = lens.vision.segments(model, inputs)
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
    assert found.figures["before_and_after"].data
    assert int((inputs["input_ids"] == IMAGE).sum()) == image.sum()


def test_pasta_at_an_amount_keeps_the_rest_of_the_weight():
    edit = lens.edits.Pasta([(2, 4)])
    assert edit.at(0.25).alpha == 0.75
    assert edit.at(0.25).dose == 0.25
    model = lens.load("induction-2l")
    plain = model.logits([0, 5, 9, 3, 5])
    with lens.edit(model, edit.at(0.0)):
        torch.testing.assert_close(model.logits([0, 5, 9, 3, 5]), plain)
