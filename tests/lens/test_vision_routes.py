"""What the text gets from the image, layer by layer: beside a mask that cuts the same edges."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.vision.routes import ROUTES, _keys
from tests.lens.vision_models import IMAGE, LAYERS, QUESTION, SYSTEM, build


@pytest.fixture(scope="module")
def found():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    return model, inputs, lens.vision.text_flow(model, [inputs], progress=False)


@torch.no_grad()
def test_a_route_that_is_cut_is_the_edges_hidden(found):
    model, inputs, flow = found
    kind = lens.vision.segments(model, inputs).kind[0]
    text = (kind == 2).nonzero()[:, 0].tolist()
    before = model.model(**inputs).logits[0].log_softmax(-1)
    for route, keys in (("image", kind == 1), ("random", _keys("random", kind, 0))):
        chosen = keys.nonzero()[:, 0].tolist()
        for layer in range(LAYERS):
            with lens.edit(model, lens.edits.Knockout(text, chosen, layers=[layer])):
                after = model.model(**inputs).logits[0].log_softmax(-1)
            kl = (before.exp() * (before - after)).sum(-1)
            own = flow.kl[ROUTES.index(route), layer, 0]
            assert own == pytest.approx(float(kl[text[:-1]].mean()), rel=1e-3, abs=1e-6)
            assert own > 0


def test_random_edges_are_as_many_and_the_first_token_stays(found):
    model, inputs, flow = found
    kind = lens.vision.segments(model, inputs).kind[0]
    drawn = _keys("random", kind, 3)
    assert int(drawn.sum()) == int((inputs["input_ids"] == IMAGE).sum())
    assert not bool(drawn[0])
    table = flow.table()
    assert table["route"].tolist() == [route for route in ROUTES for _ in range(LAYERS)]
    assert np.isnan(table[table["route"] == "random"]["excess"]).all()
    image, random = flow.delta_loss[[0, 2], :, 0]
    assert table["excess"][:LAYERS].tolist() == pytest.approx((image - random).tolist())
    assert table["layer"].tolist() == [0, 1, 2] * 3
    assert table["kl"].tolist() == flow.kl.ravel().tolist()
    assert flow.mass[0].mean() < 1
    assert [one.kind for one in flow.findings()] == ["image", "limit"]
    assert [one.name for one in flow.plot().data] == [
        "without the image", "without the system", "without random tokens",
    ]  # fmt: skip
    assert len(kind) > SYSTEM + QUESTION


def test_what_has_no_image_is_refused(found):
    model, inputs, _ = found
    with pytest.raises(LensError, match="holds no image token"):
        lens.vision.text_flow(model, {"input_ids": inputs["input_ids"][:, :SYSTEM]}, progress=False)
    with pytest.raises(LensError, match="window must be 1 to 3, the layers, got 4"):
        lens.vision.text_flow(model, inputs, window=4, progress=False)
