"""What the text gets from the image, layer by layer: beside a mask that cuts the same edges."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.vision.routes import ROUTES, TextFlow, _routes
from tests.lens.vision_models import LAYERS, QUESTION, SYSTEM, build


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
    for route, keys in zip(ROUTES, _routes(kind, 0), strict=True):
        chosen = keys.nonzero()[:, 0].tolist()
        for layer in range(LAYERS):
            with lens.edit(model, lens.edits.Knockout(text, chosen, layers=[layer])):
                after = model.model(**inputs).logits[0].log_softmax(-1)
            kl = (before.exp() * (before - after)).sum(-1)
            own = flow.kl[ROUTES.index(route), layer, 0]
            assert own == pytest.approx(float(kl[text[:-1]].mean()), rel=1e-3, abs=1e-6)
            assert own > 0


def test_the_control_of_image_tokens_is_as_many_others(found):
    model, inputs, flow = found
    kind = lens.vision.segments(model, inputs).kind[0]
    for seed in range(5):
        image, system, part, others = _routes(kind, seed)
        assert torch.equal(image, kind == 1)
        assert torch.equal(system, kind == 0)
        assert int(part.sum()) == int(others.sum()) == (SYSTEM - 1 + QUESTION + 1) // 2
        assert set(kind[part].tolist()) == {1}
        assert 1 not in kind[others]
        assert not bool(others[0])  # the first token stays
    assert flow.keys[:, 0].tolist() == [16, SYSTEM, 8, 8]
    table = flow.table()
    assert table["route"].tolist() == [route for route in ROUTES for _ in range(LAYERS)]
    excess = table.set_index("route")["excess"]
    assert excess.drop("image_part").isna().all()
    assert excess["image_part"].tolist() == pytest.approx((flow.kl[2] - flow.kl[3])[:, 0].tolist())
    assert table["layer"].tolist() == [0, 1, 2] * 4
    assert table["kl"].tolist() == flow.kl.ravel().tolist()
    assert flow.mass[0].mean() < 1
    assert [one.kind for one in flow.findings()] == ["image", "control", "limit"]
    assert (
        "are not told from as many others (on one prompt, without an interval)"
        in flow.findings()[1]
    )
    assert flow.plot().layout.xaxis.tickvals[:2] == (0, 1)
    assert [one.name for one in flow.plot().data] == [
        "without the image", "without what comes before it", "without 8 image tokens", "without 8 others",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "others", "said"),
    [
        ((3.0, 3.2, 2.9), (1.0, 1.1, 0.9), "In layer 1 the text depends on 8 random image tokens more than on"),
        ((1.0, 1.1, 0.9), (3.0, 3.2, 2.9), "In layer 1 the text depends on 8 random image tokens less than on"),
        ((1.0, 3.0, 2.0), (3.0, 1.0, 2.0), "8 random image tokens are not told from as many others (the interval holds 0)"),
        ((np.nan,) * 3, (1.0, 1.0, 1.0), "Too few tokens are left to compare image tokens with others"),
    ],
)  # fmt: skip
def test_whether_the_image_counts_for_more_is_what_the_control_says(part, others, said):
    kl = np.ones((4, 2, 3))
    kl[0, 1], kl[2, 1], kl[3, 1] = 5, part, others
    flow = TextFlow(
        kl, kl, kl / 9, np.full((4, 3), 8), layers=(0, 1), last=(0, 1), window=1, seed=0
    )
    assert "most in layer 1: without" in flow.findings()[0]
    assert said in flow.findings()[1]


def test_the_layer_of_most_is_told_beside_others_and_windows_by_their_layers():
    """Layers 1, 3, 7 and 8 attend; two are cut at once."""
    kl = np.ones((4, 3, 4))
    kl[0] = [[1, 2, 1, 2], [5, 6, 5, 6.5], [5, 6, 6, 5]]
    keys = np.full((4, 4), 8)
    flow = TextFlow(kl, kl, kl / 9, keys, layers=(1, 3, 7), last=(3, 7, 8), window=2, seed=0)
    image, _, limit = flow.findings()
    assert "most in layers 3 to 7, not told apart from layers 7 to 8: without" in image
    assert "2 layers that attend at once" in limit
    alone = TextFlow(
        kl[..., :1],
        kl[..., :1],
        kl[..., :1],
        keys[:, :1],
        layers=(1, 3, 7),
        last=(3, 7, 8),
        window=2,
        seed=0,
    )
    assert "most in layers 3 to 7 (of one prompt): without" in alone.findings()[0]


def test_what_has_no_image_is_refused(found):
    model, inputs, _ = found
    with pytest.raises(LensError, match="holds no image token"):
        lens.vision.text_flow(model, {"input_ids": inputs["input_ids"][:, :SYSTEM]}, progress=False)
    with pytest.raises(LensError, match="window must be 1 to 3, the layers, got 4"):
        lens.vision.text_flow(model, inputs, window=4, progress=False)
