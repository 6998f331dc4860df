"""Attention lies on the picture where the patches are, to the pixel."""

from typing import Any

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from tests.lens.pictures import TOWERS, looking_at_bright, planted, with_a_bright_patch

BRIGHT, DARK = (253, 231, 37), (68, 1, 84)


@pytest.fixture(scope="module")
def towers():
    return {name: looking_at_bright(name) for name in TOWERS}


@pytest.mark.parametrize("name", TOWERS)
def test_a_planted_pattern_is_drawn_on_its_own_pixels_and_no_others(towers, name):
    height, width = TOWERS[name][3]
    for row, column in ((0, 0), (1, width - 1), (height - 1, 2)):
        picture, (top, bottom, left, right) = with_a_bright_patch(name, row, column)
        trace = lens.capture(towers[name], picture, keep_qk=True, progress=False)
        for options in ({}, {"query": "[CLS]"}, {"query": (2, 1)}):
            found = trace.overlay("L0H1", **options)
            assert np.unravel_index(found.values[0].argmax(), (height, width)) == (row, column)
            assert found.values[0, row, column] > 0.99
            drawn = found.render(alpha=1.0)
            is_bright = (drawn == BRIGHT).all(-1)
            expected = np.zeros(picture.shape[:2], bool)
            expected[top:bottom, left:right] = True
            assert np.array_equal(is_bright, expected)
            box = [round(end) for end in found.grid.box]
            inside = np.zeros_like(expected)
            inside[box[1] : box[3], box[0] : box[2]] = True
            assert np.array_equal(
                (np.abs(drawn.astype(int) - DARK) < 3).all(-1), inside & ~expected
            )
            assert (drawn[~inside] == picture[~inside]).all()
        looked = trace.overlay("L0H1", key=(row, column))
        assert (looked.values > 0.99).all()


def test_the_figure_has_the_cells_where_the_picture_has_them(towers):
    picture, (top, bottom, left, right) = with_a_bright_patch("registers", 2, 3)
    trace = lens.capture(towers["registers"], picture, keep_qk=True, progress=False)
    found = trace.overlay(["L0H0", "L0", "mean"], query=(2, 3))
    figure = found.plot(path=True)
    heat = [one for one in figure.data if one.type == "heatmap"]
    assert len(heat) == len(figure.layout.images) == 3
    for one, image in zip(heat, figure.layout.images, strict=True):
        assert (one.x0 + 3 * one.dx, one.dx) == ((left + right) / 2, right - left)
        assert (one.y0 + 2 * one.dy, one.dy) == ((top + bottom) / 2, bottom - top)
        assert (image.x, image.y, image.sizex, image.sizey) == (0, 0, 96, 64)
        assert image.source.startswith("data:image/jpeg;base64,")
    cross, path = (one for one in figure.data[1:3])
    assert (cross.x[0], cross.y[0]) == ((left + right) / 2, (top + bottom) / 2)
    assert (path.x[0], path.y[0]) == pytest.approx(((left + right) / 2, (top + bottom) / 2))
    table = found.table()
    assert len(table) == 180
    row = table[(table["row"] == 2) & (table["column"] == 3)].iloc[0]
    assert row[["left", "top", "right", "bottom"]].tolist() == [left, top, right, bottom]


def test_patches_that_stand_window_by_window_lie_where_they_are_on_the_picture():
    order = [
        row * 4 + column
        for top in (0, 2)
        for left in (0, 2)
        for row in (top, top + 1)
        for column in (left, left + 1)
    ]
    patterns = np.random.default_rng(2).dirichlet(np.ones(16), 16)
    trace = planted(patterns[None, None], 4, 4, order)
    found, row = trace.overlay("L0H0"), trace.overlay("L0H0", query=(3, 1))
    for position, patch in enumerate(order):
        at = divmod(patch, 4)
        assert found.values[0][at] == pytest.approx(patterns[:, position].mean(), rel=1e-6)
        assert row.values[0][at] == pytest.approx(patterns[order.index(13), position], rel=1e-5)
        assert found.grid.position(*at) == position
    assert row.query == (3, 1)


def test_a_patch_that_its_window_looks_at_is_drawn_on_its_own_pixels():
    """Of Swin, in plain and in shifted windows: the rest of the window is dark, other windows look evenly."""
    model = looking_at_bright("swin")
    for row, column in ((0, 0), (5, 2), (7, 4)):
        picture, (top, bottom, left, right) = with_a_bright_patch("swin", row, column)
        trace = lens.capture(model, picture, progress=False).stage0
        for layer, shift in enumerate((0, 2)):
            found = trace.overlay(f"L{layer}H1")
            rows, columns = (_window(place, shift) for place in (row, column))
            inside = np.zeros((8, 8), bool)
            inside[np.ix_(rows, columns)] = True
            assert found.values[0, row, column] * 64 == pytest.approx(inside.sum(), rel=1e-4)
            assert found.values[0][~inside] * 64 == pytest.approx(
                np.ones((~inside).sum()), rel=1e-4
            )
            drawn = found.render(alpha=1.0)
            expected = np.zeros(picture.shape[:2], bool)
            expected[top:bottom, left:right] = True
            assert np.array_equal((drawn == BRIGHT).all(-1), expected)
            dark = np.kron(inside, np.ones((8, 12), bool)) & ~expected
            assert np.array_equal((np.abs(drawn.astype(int) - DARK) < 3).all(-1), dark)


def _window(place, shift):
    """Places along one axis of 8 that see a place in windows of 4, shifted; a window that the edge cuts is two."""
    return [one for one in range(8) if (one - shift) // 4 == (place - shift) // 4]


def test_values_are_those_of_the_models_own_maps():
    torch.manual_seed(3)
    network = TOWERS["registers"][0]().eval()
    model = lens.load(network, processor=TOWERS["registers"][1]())
    picture = np.random.default_rng(4).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    trace = lens.capture(model, picture, keep_qk=True, progress=False)
    network.set_attn_implementation("eager")
    pixels = model.processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        maps = network(pixels, output_attentions=True).attentions[0][0].double().numpy()
    first = 1 + 3
    row = trace.overlay("L0H1", query="[REG1]")
    assert row.values[0].ravel() == pytest.approx(maps[1, 2, first:], rel=1e-4)
    assert row.elsewhere[0] == pytest.approx(maps[1, 2, :first].sum(), rel=1e-4)
    column = trace.overlay("L0", key=(5, 9))
    assert column.values[0].ravel() == pytest.approx(maps[:, first:, 63].mean(0), rel=1e-4)
    mean = trace.overlay()
    assert mean.values[0].ravel() == pytest.approx(maps.mean((0, 1))[first:], rel=1e-4)
    assert mean.elsewhere[0] == pytest.approx(maps.mean((0, 1))[:first].sum(), rel=1e-4)
    assert [one.kind for one in mean.findings()] == ["strongest", "half", "elsewhere"]


def test_without_sinks_the_rest_is_shown_as_shares_of_what_is_left(towers):
    picture, _ = with_a_bright_patch("wide", 2, 5)
    trace = lens.capture(towers["wide"], picture, keep_qk=True, progress=False)
    raw, without = (trace.overlay("L0H0", variant=name) for name in ("raw", "sink_excluded"))
    assert np.isnan(without.values[0, 2, 5])
    assert np.isnan(without.values).sum() == 1
    assert np.nansum(without.values) == pytest.approx(1)
    rest = np.where(np.isnan(without.values), 0, raw.values)
    assert np.nan_to_num(without.values) == pytest.approx(rest / rest.sum())
    assert without.elsewhere[0] == pytest.approx(1 - rest.sum())
    drawn = without.render(alpha=1.0)
    assert (drawn[16:24, 60:72] == picture[16:24, 60:72]).all()  # a sink shows the picture


def test_regions_are_what_touches_and_come_strongest_first(towers):
    picture = np.zeros((72, 48, 3), np.uint8)
    picture[12:36, 8:24] = 255  # 2 × 2 patches
    picture[60:72, 40:48] = 255  # one
    trace = lens.capture(towers["resized"], picture, keep_qk=True, progress=False)
    found = trace.overlay("L0H0").regions(share=0.999)
    assert found["patches"].tolist() == [4, 1]
    assert found["mass"].to_numpy() == pytest.approx([0.8, 0.2], abs=1e-3)
    assert found[["x", "y"]].to_numpy() == pytest.approx(np.array([[16, 24], [44, 66]]), abs=0.1)
    assert len(trace.overlay("L0H0").regions(share=0.7)) == 2  # ties are kept together
    with pytest.raises(LensError, match="share must lie between 0 and 1, got 0"):
        trace.overlay().regions(share=0)
    for number in (1, -1, "a"):
        with pytest.raises(LensError, match="map_ must be 0 to 0, got"):
            trace.overlay().regions(number)
        with pytest.raises(LensError, match="map_ must be 0 to 0, got"):
            trace.overlay().render(number)


def test_what_cannot_be_laid_on_a_picture_is_refused(towers):
    picture, _ = with_a_bright_patch("square", 0, 0)
    trace = lens.capture(towers["square"], picture, keep_qk=True, progress=False)
    for options, match in (
        ({"query": (6, 0)}, r"patches go from \(0, 0\) to \(5, 5\)"),
        ({"query": "[SEP]"}, r"no token is called '\[SEP\]'"),
        ({"key": 37}, "positions go from 0 to 36, got 37"),
        ({"query": 0, "key": 1}, "not both"),
        ({"image": 1}, "image must be 0 to 0, got 1"),
        ({"image": "a"}, "image must be 0 to 0, got 'a'"),
        ({"image": True}, "image must be 0 to 0, got True"),
        ({"query": (0.5, 0)}, r"a patch is \(row, column\), both whole numbers"),
        ({"query": (0, 0, 0)}, r"a patch is \(row, column\), both whole numbers"),
        ({"key": (True, 0)}, r"a patch is \(row, column\), both whole numbers"),
        ({"key": 1.5}, r"a token is \(row, column\) of a patch, a position or a name"),
        ({"query": [0, 0]}, r"a token is \(row, column\) of a patch, a position or a name"),
        ({"heads": None}, "a head is written 'L3H5'"),
        ({"heads": [("L0H0",)]}, "a head is written 'L3H5'"),
        ({"heads": []}, "heads names none"),
        ({"heads": "L4"}, "there is no layer 4"),
        ({"heads": "L0H7"}, "there is no L0H7"),
        ({"variant": "loud"}, "variant must be one of"),
    ):
        with pytest.raises(LensError, match=match):
            trace.overlay(**options)
    text = lens.capture(lens.load("text-lm-3l"), "It was the best of times", progress=False)
    with pytest.raises(
        LensError, match="the patches of this trace are not known: it is of no picture"
    ):
        text.overlay()
    without = lens.capture(towers["square"], picture, progress=False)
    with pytest.raises(LensError, match="keep_qk"):
        without.overlay(query=0)
    assert without.overlay().values.shape == (1, 6, 6)


def test_the_pointing_game_and_iou_of_a_planted_thing_beside_what_needs_no_model(towers):
    picture = np.zeros((72, 48, 3), np.uint8)
    picture[12:36, 8:24] = 255
    trace = lens.capture(towers["resized"], picture, keep_qk=True, progress=False)
    right, wrong = (8, 12, 24, 36), (30, 40, 48, 72)
    found = lens.vision.grounding([trace.overlay("mean")] * 2, [[right], [wrong]])
    assert found.rows["pointing"].tolist() == [1, 0]
    assert found.rows["iou"].to_numpy() == pytest.approx([1, (18 * 32) / (72 * 48)])
    assert found.rows["threshold"].iloc[0] > 0.99
    blind = [16 * 24 / (48 * 72), 18 * 32 / (48 * 72)]
    assert found.rows["pointing_blind"].to_numpy() == pytest.approx(blind)
    assert found.rows["pointing_middle"].tolist() == [0, 0]
    (row,) = found.table().to_dict("records")
    assert (row["pointing"], row["n"]) == (0.5, 2)
    assert row["iou_low"] <= row["iou"] <= row["iou_high"]
    half = lens.vision.grounding(trace.overlay("mean"), [(8, 12, 16, 36)])
    assert half.rows["iou"].iloc[0] == pytest.approx(0.5)
    assert (
        "points into a box in 100% [21%, 100%] of 1 picture; a blind point does in 6%"
        in half.findings()[0]
    )
    assert half.rows["iou_whole"].iloc[0] == pytest.approx(8 * 24 / (48 * 72))
    with pytest.raises(LensError, match="hold nothing of a picture of 48 × 72 pixels"):
        lens.vision.grounding(trace.overlay(), [(50, 0, 60, 10)])
    with pytest.raises(LensError, match="overlays with the same maps, got mean; L0H0, mean"):
        lens.vision.grounding(
            [trace.overlay("mean"), trace.overlay(["L0H0", "mean"])], [[right], [wrong]]
        )
    with pytest.raises(LensError, match="boxes for each picture, got 1 for 2"):
        lens.vision.grounding([trace.overlay()] * 2, [[right]])


def test_iou_at_the_best_threshold_is_that_of_every_threshold_pixel_by_pixel(towers):
    picture = np.random.default_rng(1).integers(0, 256, (72, 48, 3), dtype=np.uint8)
    trace = lens.capture(towers["resized"], picture, keep_qk=True, progress=False)
    overlay, box = trace.overlay(["L0H0", "L0"], query=(1, 2)), (5, 9, 30, 41)
    (own, layer) = lens.vision.grounding(overlay, [box]).rows.to_dict("records")
    inside = np.zeros((72, 48), bool)
    inside[9:41, 5:30] = True
    height, width = overlay.values.shape[1:]
    y, x = (np.indices((height, width)) + 0.5) * np.array([72 / height, 48 / width])[:, None, None]
    maps = [*overlay.values, -np.hypot(y - 36, x - 24)]
    best = []
    for values in maps:
        pixels = overlay.pixel_values(np.round(values / np.abs(values).max(), 5))
        shares = [
            ((pixels >= one) & inside).sum() / ((pixels >= one) | inside).sum()
            for one in np.unique(pixels)
        ]
        best.append(max(shares))
    assert [own["iou"], layer["iou"], own["iou_middle"]] == pytest.approx(best)
    assert "patches round its middle" in lens.vision.grounding(overlay, [box]).findings()[1]
    drawn = overlay.plot(boxes=[box]).layout.shapes
    assert [(one.x0, one.y0, one.x1, one.y1) for one in drawn] == [box] * 2


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (5, "boxes must be a list, got 5"),
        ((0, 0, 5, 5), "box must be a list, got 0"),
        ([(0, 0, 5)], r"a box is \(left, top, right, bottom\)"),
        ([("a", 0, 1, 2)], r"a box is \(left, top, right, bottom\)"),
        ([(True, 0, 5, 5)], r"a box is \(left, top, right, bottom\)"),
    ],
)
def test_what_no_boxes_are_is_refused(towers, boxes, message):
    picture, _ = with_a_bright_patch("square", 0, 0)
    overlay = lens.capture(towers["square"], picture, progress=False).overlay()
    with pytest.raises(LensError, match=message):
        lens.vision.grounding(overlay, boxes)
    others: list[Any] = [None, "x", [None]]
    for other in others:
        with pytest.raises(LensError, match="overlays must be an Overlay"):
            lens.vision.grounding(other, [(0, 0, 5, 5)])
