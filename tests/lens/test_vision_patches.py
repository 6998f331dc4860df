"""Positions of pictures: names from the picture that was looked at, and distances over it."""

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.runs.agreement import kept_problems
from lens.traces.profiles import prompt_table

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "patch_size": 4,
}
REGISTERS = [f"[REG{index}]" for index in range(4)]
TOWERS = {
    "vit": (transformers.ViTConfig, transformers.ViTModel, ["[CLS]"]),
    "deit": (transformers.DeiTConfig, transformers.DeiTModel, ["[CLS]", "[DIST]"]),
    "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel, ["[CLS]"]),
    "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel, []),
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model, ["[CLS]"]),
    "registers": (
        transformers.Dinov2WithRegistersConfig,
        transformers.Dinov2WithRegistersModel,
        ["[CLS]", *REGISTERS],
    ),
}
ANY_SHAPE = ("dinov2", "registers")


def tower(name, size=24):
    torch.manual_seed(1)
    config, model, _ = TOWERS[name]
    network = model(config(**SMALL, image_size=size)).eval()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if ("q" in key or "k" in key) and parameter.dim() == 2:
                parameter.mul_(8)
    return lens.load(network)


def captured(model, height, width, **options):
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(3))
    options = {"keep_qk": True, **options}
    (trace,) = lens.capture(model, [{"pixel_values": pixels}], progress=False, **options)
    return trace


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [*((name, 24, 24) for name in TOWERS), *((name, 20, 36) for name in ANY_SHAPE)],
)
def test_positions_are_named_after_the_picture_that_was_looked_at(name, height, width):
    trace = captured(tower(name), height, width)
    special, rows, columns = TOWERS[name][2], height // 4, width // 4
    patches = [f"{row},{column}" for row in range(rows) for column in range(columns)]
    assert trace.tokens == [*special, *patches]
    assert trace.attrs["patches"] == {"first": len(special), "height": rows, "width": columns}


def test_a_model_of_wide_pictures_has_wide_names():
    trace = captured(tower("vit", (16, 28)), 16, 28)
    assert trace.tokens[:9] == ["[CLS]", *(f"0,{column}" for column in range(7)), "1,0"]
    assert trace.tokens[-1] == "3,6"


def test_positions_behind_the_patches_are_named_too():
    config = transformers.YolosConfig(**SMALL, image_size=[16, 24], num_detection_tokens=2)
    trace = captured(lens.load(transformers.YolosModel(config).eval()), 16, 24)
    assert trace.tokens[-3:] == ["3,5", "[DET0]", "[DET1]"]


SIZES = {name: size for name, size in SMALL.items() if name != "patch_size"}


def test_patches_of_a_padded_picture_are_those_of_the_picture():
    network = transformers.PixtralVisionModel(
        transformers.PixtralVisionConfig(**SIZES, patch_size=4, image_size=32)
    ).eval()
    pixels, sizes = torch.randn(2, 3, 16, 28), torch.tensor([[16, 28], [8, 12]])
    given = {"pixel_values": pixels, "image_sizes": sizes}
    traces = lens.capture(lens.load(network), given, progress=False)
    shapes = [(one.attrs["patches"]["height"], one.attrs["patches"]["width"]) for one in traces]
    assert shapes == [(4, 7), (2, 3)]
    assert traces[1].tokens == ["0,0", "0,1", "0,2", "1,0", "1,1", "1,2"]


def test_patches_that_come_with_their_shape_have_its_names():
    network = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**SIZES, patch_size=4, num_patches=64)
    ).eval()
    given = {
        "pixel_values": torch.randn(1, 28, 48),
        "pixel_attention_mask": torch.ones(1, 28).long(),
        "spatial_shapes": torch.tensor([[4, 7]]),
    }
    trace = lens.capture(lens.load(network), given, progress=False)
    assert (trace.tokens[9], trace.tokens[-1]) == ("1,2", "3,6")


def test_a_bias_that_a_trace_does_not_hold_is_noted():
    """SAM's depends on the query: its q and k alone do not give the probabilities back, and that is no damage."""
    config = transformers.SamVisionConfig(
        **SIZES,
        image_size=24,
        patch_size=4,
        window_size=4,
        global_attn_indexes=[1],
        output_channels=8,
    )
    network = transformers.SamVisionModel(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "rel_pos" in name:
                parameter.normal_()
    trace = captured(lens.load(network), 24, 24)
    assert trace.attrs["biased"] is True
    assert list(kept_problems(trace, 1)) == []
    assert captured(tower("vit"), 24, 24).attrs["biased"] is False


def test_nothing_is_invented_where_the_picture_does_not_explain_the_positions(monkeypatch):
    monkeypatch.setattr("lens.traces.patches._BEFORE", {})
    trace = captured(tower("vit"), 24, 24)
    assert trace.tokens == [str(position) for position in range(37)]
    with pytest.raises(LensError, match="6 × 6 patches and 0 other positions are not 37 positions"):
        lens.vision.patch_distance(trace)


@pytest.mark.parametrize(("name", "height", "width"), [("vit", 24, 24), ("registers", 20, 36)])
def test_distances_are_those_of_plain_loops_over_the_models_own_maps(name, height, width):
    model = tower(name)
    trace = captured(model, height, width)
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(3))
    network = model.model
    network.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(network(pixel_values=pixels, output_attentions=True).attentions)[:, 0]
    found = lens.vision.patch_distance(trace)
    special, rows, columns = len(TOWERS[name][2]), height // 4, width // 4
    places = [(row, column) for row in range(rows) for column in range(columns)]
    for layer, head in np.ndindex(2, 3):
        far, near, elsewhere = [], [], []
        for query, (row, column) in enumerate(places):
            line = maps[layer, head, special + query].double().tolist()
            patches = line[special:]
            total = sum(patches)
            apart = [(abs(row - r), abs(column - c)) for r, c in places]
            far.append(
                sum(p * (a**2 + b**2) ** 0.5 for p, (a, b) in zip(patches, apart, strict=True))
                / total
            )
            near.append(
                sum(p for p, pair in zip(patches, apart, strict=True) if max(pair) <= 1) / total
            )
            elsewhere.append(sum(line[:special]))
        assert found.distance[layer, head] == pytest.approx(np.mean(far), rel=1e-4)
        assert found.near[layer, head] == pytest.approx(np.mean(near), rel=1e-4)
        assert found.elsewhere[layer, head] == pytest.approx(np.mean(elsewhere), abs=1e-5)
        assert found.low[layer, head] < found.distance[layer, head] < found.high[layer, head]
    table = found.table()
    assert table.columns[:4].tolist() == ["layer", "head", "name", "distance"]
    assert (table["name"].iloc[4], len(table)) == ("L1H1", 6)
    assert found.plot().layout.title.text.startswith("How far heads look beyond uniform attention")


def test_uniform_attention_has_the_distance_of_the_picture_alone():
    model = tower("vit")
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "query" in name or "q_proj" in name:
                parameter.zero_()
    found = lens.vision.patch_distance(captured(model, 24, 24))
    apart = [abs(complex(a - c, b - d)) for a in range(6) for b in range(6) for c in range(6) for d in range(6)]  # fmt: skip
    assert found.uniform_distance == pytest.approx([np.mean(apart)] * 2)
    # rows near one of 6: 16 of 36 pairs
    assert found.uniform_near == pytest.approx([(16 / 6) ** 2 / 36] * 2)
    assert found.distance == pytest.approx(np.full((2, 3), np.mean(apart)), rel=1e-5)
    assert found.near == pytest.approx(np.full((2, 3), (16 / 6) ** 2 / 36), rel=1e-5)
    assert found.elsewhere == pytest.approx(np.full((2, 3), 1 / 37), rel=1e-5)
    (said,) = found.findings()
    assert "On 6 × 6 patches 0 of 6 heads look nearer than uniform attention" in said


def test_distances_in_a_row_of_tokens_are_not_scored_on_a_picture():
    table = prompt_table(captured(tower("vit"), 24, 24), "p000")
    in_a_row = (
        "previous_token",
        "prefix_mass",
        "distance",
        "locality",
        "positional",
        "positional_distance",
    )
    rows = table[table["metric"].isin(in_a_row)]
    assert set(rows["metric"]) == set(in_a_row)
    assert rows["value"].isna().all()
    assert rows["detail"].str.contains("patches of a picture").all()
    assert table[table["metric"] == "entropy"]["value"].notna().all()
    words = prompt_table(lens.capture(lens.load("text-lm-3l"), "It was the best of times"), "p000")
    assert words[words["metric"] == "distance"]["value"].notna().all()


def test_what_is_no_picture_or_has_no_tiles_is_refused():
    text = lens.capture(lens.load("text-lm-3l"), "It was the best of times", progress=False)
    with pytest.raises(
        LensError, match="the patches of this trace are not known: it is of no picture"
    ):
        lens.vision.patch_distance(text)
    with pytest.raises(LensError, match="keep_qk"):
        lens.vision.patch_distance(captured(tower("vit"), 24, 24, keep_qk=False))


def test_patches_of_pictures_with_a_rest_lie_on_whole_patches():
    """22 × 38 pixels are 5 × 9 patches of 4; the model leaves the last 2 rows and columns out."""
    trace = captured(tower("dinov2"), 22, 38)
    found = trace.overlay("L0H0", query=(0, 0))
    assert found.values.shape == (1, 5, 9)
    assert found.grid.cell(4, 8) == (32.0, 16.0, 36.0, 20.0)
    assert captured(tower("dinov2"), 20, 36).overlay("L0H0").grid.box == (0.0, 0.0, 36.0, 20.0)
