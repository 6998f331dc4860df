"""Token segments and image grids of vision-language prompts."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.common.results import of_kind
from lens.edits._phi import phi
from lens.passes.keys import KeysAt
from lens.sinks.activations.dims import SinkDims
from lens.traces.segments import Segments
from tests.lens.vision_models import BUILDERS, IMAGE, LAYERS, QUESTION, SYSTEM, build, planted


@pytest.mark.parametrize("name", list(BUILDERS))
def test_segments_are_the_parts_that_the_prompt_was_made_of(name):
    network, inputs, (height, width) = build(name)
    model = lens.load(network)
    found = lens.vision.segments(model, inputs)
    expected = [0] * SYSTEM + [1] * (height * width) + [2] * QUESTION
    assert found.kind.tolist() == [expected]
    assert found.grids == ((0, SYSTEM, height, width),)
    assert found.table()["tokens"].tolist() == [SYSTEM, height * width, QUESTION]
    (said,) = of_kind(found.findings(), "grids")
    assert said == f"1 image as grids of {height} × {width}."


@pytest.mark.parametrize("name", list(BUILDERS))
def test_capture_reaches_the_language_model_alone(name):
    network, inputs, _ = build(name)
    model = lens.load(network)
    with torch.no_grad():
        own = network(**inputs).logits
        with lens.traces.capturing(model, statistics=["received"]) as recorder:
            captured = network(**inputs).logits
    assert (own - captured).abs().max() < 1e-5
    assert [record.layer for record in recorder.records] == list(range(LAYERS))
    assert {record.keys for record in recorder.records} == {inputs["input_ids"].shape[1]}
    with torch.no_grad(), lens.edit(model, lens.edits.Mask("first")) as (edit,):
        assert (network(**inputs).logits - own).abs().max() > 1e-3
    assert edit.calls == LAYERS


def two_prompts():
    """Padded left and right, with one and two images of 2 × 3 tokens, and text between."""
    ids = torch.tensor(
        [
            [0, 0, 0, 7, 8, *[IMAGE] * 6, 9, 9, 9, 0, 0, 0, 0],
            [7, *[IMAGE] * 6, 5, *[IMAGE] * 6, 9, 9, 9, 9],
        ]
    )
    real = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": real}


def test_padding_several_images_and_keys_of_repeated_rows():
    model = lens.load(build("llava")[0])
    inputs = two_prompts()
    found = lens.vision.segments(model, inputs, grid=[(2, 3)] * 3)
    assert found.kind[0].tolist() == [-1] * 3 + [0, 0] + [1] * 6 + [2] * 3 + [-1] * 4
    assert found.kind[1].tolist() == [0] + [1] * 6 + [2] + [1] * 6 + [2] * 4
    assert found.grids == ((0, 5, 2, 3), (1, 1, 2, 3), (1, 8, 2, 3))
    places = torch.arange(20)[None] - torch.tensor([3, 3, 0, 0])[:, None]  # two rows per prompt
    at = KeysAt(0, 1, places, None)
    image, text = found.keys("image")(at), found.keys("text")(at)
    assert image[0].nonzero()[:, 0].tolist() == list(range(5, 11))
    assert torch.equal(image[0], image[1])
    assert image[3].nonzero()[:, 0].tolist() == [*range(1, 7), *range(8, 14)]
    assert text[2].nonzero()[:, 0].tolist() == [7, 14, 15, 16, 17, 18, 19]  # two generated
    with pytest.raises(LensError, match="segments are of 2 prompts, the model runs 3"):
        found.keys("image")(KeysAt(0, 0, places[:3], None))


def test_segments_refuse_what_they_cannot_know():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    for match, given, options in (
        ("needs input_ids .batch, tokens. as a tensor", {"input_ids": [[1, 2]]}, {}),
        ("prompt 1 holds no image token .id 90.", {"input_ids": torch.tensor([[90, 5], [6, 7]])}, {}),
        ("2 grids of 2 × 3, 2 × 3 make 12 tokens, the prompts hold 16", inputs, {"grid": [(2, 3)] * 2}),
        (
            "tokens of an image in prompt 1 do not lie one after another",
            two_prompts(),
            {"grid": [(2, 3), (3, 4)]},
        ),
    ):  # fmt: skip
        with pytest.raises(LensError, match=match):
            lens.vision.segments(model, given, **options)
    text_only = lens.load("text-lm-3l")
    with pytest.raises(LensError, match="names no image token; give image_token_id"):
        lens.vision.segments(text_only, {"input_ids": torch.tensor([[1, 2]])})
    odd = lens.vision.segments(model, two_prompts())
    assert odd.grids == ()
    assert "18 image tokens are no multiple of the 4 × 4" in odd.why_no_grids
    with pytest.raises(LensError, match="have no grids: 18 image tokens are no multiple"):
        lens.vision.grid(odd, np.zeros(18))
    with pytest.raises(LensError, match="kind must be one of system, image, text, got 'video'"):
        odd.mask("video")


def test_a_grid_puts_each_number_where_its_token_is_and_prints_the_base_rate():
    kind = torch.tensor([[0, 0, *[1] * 6, 2], [0, *[1] * 6, 2, 2]])
    segments = Segments(kind, ((0, 2, 2, 3), (1, 1, 2, 3)))
    values = np.arange(18.0).reshape(2, 9)
    marked = np.zeros((2, 9), bool)
    marked[1, [1, 2, 4]] = True  # (0, 0), (0, 1), (1, 0)
    region = np.array([[True, True, True], [False, False, True]])
    found = lens.vision.grid(segments, values, image=1, marked=marked, region=region, name="mass")
    assert found.values.tolist() == [[10, 11, 12], [13, 14, 15]]
    assert found.marked.tolist() == [[True, True, False], [True, False, False]]
    assert found.base_rate == pytest.approx(4 / 6)
    assert found.rate == pytest.approx(2 / 3)
    assert found.enrichment == pytest.approx(1.0)
    assert found.table()["value"].tolist() == [10, 11, 12, 13, 14, 15]
    assert [(said.kind, said.text) for said in found.findings()] == [
        ("grid", "Image 1: 2 × 3 tokens, mean mass 12.5."),
        ("marked", "3 of 6 tokens are marked (50.0%)."),
        ("region", "66.7% of the marked tokens lie in the region, where 66.7% of all tokens lie: "
         "1.00 times what a blind choice gives."),
    ]  # fmt: skip
    figure = found.plot()
    assert figure.data[1].x.tolist() == [0, 1, 0]
    assert figure.data[1].y.tolist() == [0, 0, 1]
    assert "all tokens 66.7%" in figure.layout.title.text
    bare = lens.vision.grid(segments, values[0])
    assert bare.values.tolist() == [[2, 3, 4], [5, 6, 7]]
    assert np.isnan([bare.rate, bare.base_rate, bare.enrichment]).all()
    for match, options in (
        ("image must be 0 to 1, got 2", {"image": 2}),
        (r"marked must be .tokens. = .9. or .2, 9., got .3.", {"marked": [0, 1, 0]}),
        (r"region must be .2, 3., got .3, 2.", {"region": region.T}),
    ):
        with pytest.raises(LensError, match=match):
            lens.vision.grid(segments, values, **options)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_planted_massive_activation_is_found_where_it_was_planted(name):
    network, inputs, (_, width) = build(name)
    model = lens.load(network)
    places = [SYSTEM + 2, SYSTEM + 7]
    with planted(network, 7, places), torch.no_grad():
        found = lens.sinks.dims(model, inputs, tau=4.0)
        hidden = network(**inputs, output_hidden_states=True).hidden_states[0]
    assert 7 in found.dims[:1]
    assert found.table().loc[0, "first_layer"] == 0
    assert found.table().loc[0, "tokens"] == 2
    size = phi(hidden, [7])
    marked = size[0] >= 4.0
    assert marked.nonzero()[:, 0].tolist() == places
    segments = lens.vision.segments(model, inputs)
    grid = lens.vision.grid(segments, size, marked=marked[None])
    rows, columns = np.nonzero(grid.marked)
    assert [int(r * width + c) for r, c in zip(rows, columns, strict=True)] == [2, 7]
    assert "sink dimension" in found.findings()[0]
    assert found.plot().data[0].name == f"dim {found.dims[0]}"
    nothing = lens.sinks.dims(model, inputs, tau=20.0)
    assert nothing.dims == ()
    assert "with 48 dimensions none can" in nothing.findings()[0]


def test_phi_is_the_published_formula():
    hidden = torch.randn(2, 5, 19, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([hidden[..., d].abs() for d in (3, 11)]).amax(0)
    expected = expected / (hidden.double().pow(2).mean(-1) + 1e-6).sqrt()
    assert torch.allclose(phi(hidden, [3, 11]).double(), expected, atol=1e-6)
    assert (phi(hidden) <= 19**0.5).all()
    model = lens.load("text-lm-3l")
    for match, inputs, options in (
        ("tau must be above 0 and largest_share in 0..1", {}, {"tau": 0}),
        ("reads prompts without padding", {"attention_mask": torch.tensor([[0, 1]])}, {}),
    ):
        with pytest.raises(LensError, match=match):
            lens.sinks.dims(model, inputs, **options)


def test_the_sentences_of_sink_dimensions():
    """Two of four dimensions; the second enters one layer only and reaches less."""
    largest = np.array([[1.0, 30.0, 2.0, 3.0], [1.0, 40.0, 25.0, 2.0]])
    tokens = np.array([[0, 2, 0, 0], [0, 3, 1, 0]])
    found = SinkDims((1, 2), largest, tokens, 20.0, 50, "m")
    assert [(one.kind, one.text) for one in found.findings()] == [
        (
            "dims",
            "2 sink dimensions of m: 1 (up to 40 times the RMS, at most 3 of 50 tokens, entering layers 0 to "
            "1), 2 (up to 25 times the RMS, at most 1 of 50 tokens, entering layers 1 to 1).",
        ),
        (
            "limit",
            "A large coordinate marks candidates; whether attention is parked there is another measurement "
            "(lens.sinks.dims_agreement).",
        ),
    ]
