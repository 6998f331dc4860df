"""Capture of prompts with images, and the whole chain on it, in small vision-language models."""

import json
import sys

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.passes.structures import MaskStructure
from tests.lens.naive import rms_ratio
from tests.lens.vision_models import (
    BUILDERS,
    HEADS,
    IMAGE,
    LAYERS,
    QUESTION,
    SYSTEM,
    build,
    planted,
    scored,
)

DIM = 7


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_trace_is_of_the_language_model_and_knows_its_segments(name, tmp_path):
    network, inputs, (height, width) = build(name)
    model = lens.load(network)
    network.set_attn_implementation("eager")
    with torch.no_grad():
        maps = network(**inputs, output_attentions=True).attentions
    trace = lens.capture(model, inputs, progress=False)
    tokens = SYSTEM + height * width + QUESTION
    assert trace.dataset.sizes["layer"] == LAYERS
    assert trace.received.shape == (LAYERS, HEADS, tokens)
    expected = torch.stack(maps)[:, 0].sum(-2)
    assert rms_ratio(torch.tensor(trace.received.values), expected) < 1e-4
    blank = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], 0.5)}
    other = lens.capture(model, blank, progress=False)  # the image is looked at
    assert rms_ratio(torch.tensor(other.received.values), expected) > 1e-2
    lens.capture(model, inputs, out=tmp_path / "trace", progress=False)
    for found in (trace, lens.traces.AttentionTrace.load(tmp_path / "trace")):
        segments = lens.vision.trace_segments(found)
        assert segments.kind.tolist() == [[0] * SYSTEM + [1] * (height * width) + [2] * QUESTION]
        assert segments.grids == ((0, SYSTEM, height, width),)
        assert lens.vision.grid(segments, found.received.mean(("layer", "head"))).values.shape == (
            height,
            width,
        )


def test_padding_is_cut_off_and_a_list_gives_a_list():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    padded = {
        **inputs,
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (3, 2)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (3, 2)),
    }
    plain, cut = lens.capture(model, [inputs, padded], progress=False)
    assert np.array_equal(plain.received.values, cut.received.values)
    assert plain.attrs["segments"] == cut.attrs["segments"]


def test_what_cannot_be_captured_or_has_no_segments_is_refused():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    two = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    with pytest.raises(
        LensError, match=r"needs input_ids \[1, tokens\] as a tensor, got a torch.int64"
    ):
        lens.capture(model, two)
    with pytest.raises(LensError, match="takes no pixel_values"):
        lens.capture(lens.load("text-lm-3l"), inputs)
    with pytest.raises(
        LensError,
        match=r"got .*pixel_values too; images, segments and positions with text go to lens\.capture",
    ):
        lens.sinks.massive(model, inputs)  # it would run the text without its image
    trace = lens.capture(lens.load("text-lm-3l"), "It was the best of times", progress=False)
    assert trace.attrs["segments"] is None
    with pytest.raises(
        LensError, match="the trace has no segments: it is of a prompt without images"
    ):
        lens.vision.trace_segments(trace)


def test_separators_inside_an_image_leave_it_without_a_grid():
    network, inputs, _ = build("llava")
    ids = inputs["input_ids"].clone()
    ids[0, SYSTEM + 8], ids[0, SYSTEM + 16] = (
        9,
        IMAGE,
    )  # 16 image tokens, one cut off from the others
    found = lens.vision.segments(lens.load(network), {**inputs, "input_ids": ids})
    assert found.grids == ()
    assert "do not lie one after another" in found.why_no_grids


def test_segments_are_drawn_where_they_lie():
    kind = torch.tensor([[-1, 0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 1, 1, 2]])
    figure = lens.vision.tokens.Segments(kind, ()).plot()
    bars = {bar.name: bar for bar in figure.data}
    assert set(bars) == {"system", "image", "text", "padding"}
    assert list(bars["image"].base) == [3, 1, 4]
    assert list(bars["image"].x) == [3, 2, 2]
    assert list(bars["image"].y) == ["prompt 0", "prompt 1", "prompt 1"]


def test_tiles_have_grids_of_their_own():
    network, inputs, (height, width) = build("idefics3")
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    image = ids[:, SYSTEM : SYSTEM + height * width]
    two = torch.cat([ids[:, : SYSTEM + height * width], ids[:, :1], image, ids[:, -QUESTION:]], 1)
    found = lens.vision.segments(
        lens.load(network), {"input_ids": two, "pixel_values": torch.cat([pixels, pixels], 1)}
    )
    assert found.grids == ((0, SYSTEM, 3, 3), (0, SYSTEM + 10, 3, 3))


@pytest.mark.parametrize("name", list(BUILDERS))
def test_capture_segments_sink_dimensions_var_and_its_effect(name):
    """The whole chain; the planted activation is the sink that it finds and moves."""
    network, inputs, _ = build(name)
    model = lens.load(network)
    places = [SYSTEM + 2, SYSTEM + 7]
    with planted(network, DIM, places):
        trace = lens.capture(model, inputs, progress=False)
        image = lens.vision.trace_segments(trace).keys("image")
        dims = lens.sinks.dims(model, inputs, tau=4.0).dims
        assert dims[0] == DIM
        options = {"dims": dims[:1], "tau": 4.0, "rho": 0.0, "least_visual": 0.1}
        with lens.edit(model, lens.edits.Var(image, **options)) as (edit,), torch.no_grad():
            network(**inputs)
        assert edit.edited_rows > 0
        assert edit.mass_after == pytest.approx(0.4 * edit.mass_before, rel=1e-5)
        var = lens.edits.Var(image, **options)
        found = lens.effect(model, [inputs, inputs], var, amounts=(0.0, 0.6))
        with torch.no_grad():
            own = network(**inputs).logits[0, :-1].log_softmax(-1)
            with lens.edit(model, lens.edits.Var(image, **options)):
                edited = network(**inputs).logits[0, :-1].log_softmax(-1)
    target = inputs["input_ids"][0, 1:]
    assert set(found.missing) == {"size", "mass", "layer"}
    loss = (own - edited).gather(1, target[:, None])[scored(name, inputs)].mean()
    values = found.values["edit"]
    assert values["delta_loss"][1] == pytest.approx([float(loss)] * 2, rel=1e-3, abs=1e-6)
    assert (values["delta_loss"][0] == 0).all()
    assert (values["kl"][1] > 0).all()


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_rows_that_see_later_tokens_have_exact_tiles_too(name, tmp_path):
    network, inputs, _ = build(name)
    trace = lens.capture(lens.load(network), inputs, keep_qk=True, progress=False)
    network.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(network(**inputs, output_attentions=True).attentions)[:, 0].numpy()
    again = lens.traces.AttentionTrace.load(trace.save(tmp_path / "trace"))
    length = trace.length
    for layer, head in ((0, 0), (LAYERS - 1, HEADS - 1)):
        for one in (trace, again):
            found = one.tile(layer, head, (0, length), (0, length))
            assert found == pytest.approx(maps[layer, head], abs=1e-5)
            assert one.tile(layer, head, (6, 9), (4, 12)) == pytest.approx(
                maps[layer, head, 6:9, 4:12], abs=1e-5
            )
    assert maps[0, 0, SYSTEM, SYSTEM + 1] > 0
    row = trace.overlay("L0H1", query=-1).values[0]
    start, end = trace.overlay().grid.span
    assert row.ravel() == pytest.approx(maps[0, 1, -1, start:end], abs=1e-5)
    index = json.loads((tmp_path / "trace" / "trace.json").read_text())
    for change, said in (({"of": [0] * (LAYERS + 1)}, "seen.of must name"), ({"ranges": [[[0], [1]]]}, "one first and one last")):  # fmt: skip
        broken = {**index, "attributes": {**index["attributes"]}}
        broken["attributes"]["seen"] = {**index["attributes"]["seen"], **change}
        (tmp_path / "trace" / "trace.json").write_text(json.dumps(broken))
        with pytest.raises(LensError, match=said):
            lens.traces.AttentionTrace.load(tmp_path / "trace")


def test_what_rows_see_is_kept_where_it_has_no_gap():
    allowed = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 1]]).bool()[
        None, None
    ]
    found = MaskStructure(causal=False, allowed=allowed).ranges()
    assert found.tolist() == [[0, 0, 2, 1], [2, 3, 3, 4]]
    assert MaskStructure(causal=False, allowed=allowed).hides_next(4).tolist() == [
        False,
        False,
        True,
    ]
    gap = allowed.clone()
    gap[0, 0, 3, 2] = False
    assert MaskStructure(causal=False, allowed=gap).ranges() is None
    assert MaskStructure(causal=True).ranges() is None
    assert MaskStructure(causal=True).hides_next(3).tolist() == [True, True]
    assert MaskStructure(causal=False).hides_next(3).tolist() == [False, False]


def packed_tower(windows: bool = False):
    """A vision tower that reads the patches of all pictures in one row; with Qwen2.5-VL's windows if asked for."""
    sizes = {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "intermediate_size": 16,
    }
    sizes |= {"window_size": 16, "fullatt_block_indexes": [1]} if windows else {}
    made = transformers.Qwen2_5_VLConfig if windows else transformers.Qwen3VLConfig
    config = type(made().vision_config)(**sizes, out_hidden_size=16)
    torch.manual_seed(0)
    network = transformers.AutoModel.from_config(config).eval()
    for weight in network.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.2 / weight[0].numel() ** 0.5)
    return network


def pictures(*grids: tuple[int, int]) -> dict[str, torch.Tensor]:
    sizes = torch.tensor([(1, *grid) for grid in grids])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(int(sizes.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
    return {"hidden_states": rows, "grid_thw": sizes}


def test_a_tower_of_packed_pictures_is_exact_and_gives_one_trace_a_picture(monkeypatch):
    network, given, own = packed_tower(), pictures((4, 4), (4, 6)), []
    traces = lens.capture(lens.load(network), given, block_size=1, progress=False)
    module = sys.modules[type(network).__module__]
    eager = module.eager_attention_forward

    def noted(*args, **kwargs):
        output, weights = eager(*args, **kwargs)
        own.append(weights[0])
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", noted)
    network.set_attn_implementation("eager")
    with torch.no_grad():
        network(**given)
    assert [len(trace.tokens) for trace in traces] == [16, 24]
    for number, weights in enumerate(own):  # of each layer the first picture, then the second
        found = traces[number % 2].block_mass.values[number // 2]
        assert np.allclose(found, weights, atol=1e-5)
    assert traces[0].attrs["patches"]["first"] is None  # merged ones stand side by side
    with pytest.raises(
        LensError, match=r"grid_thw must be \[pictures, 3\].*got hidden_states \[5,"
    ):
        lens.capture(lens.load(network), {**given, "hidden_states": given["hidden_states"][:5]})


def test_a_picture_that_is_attended_in_windows_is_no_single_trace():
    model = lens.load(packed_tower(windows=True))
    with pytest.raises(LensError, match="attends 2 times"):
        lens.capture(model, pictures((4, 8)), progress=False)
    with pytest.raises(LensError, match="attends in 2 rows where the pass has 1"):
        lens.heads.similarity(model, pictures((4, 8)), progress=False)
