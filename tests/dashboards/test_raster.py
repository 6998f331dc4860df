"""The numbers behind the map equal the trace's, at every level."""

import numpy as np
import pytest
import xarray as xr
from lens_dashboards import raster as module
from lens_dashboards.raster import header, raster, row

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.traces import pixels
from lens.traces.tiles import exact_tile
from lens.traces.trace import AttentionTrace

RANDOM = np.random.default_rng(3)


@pytest.fixture(scope="module")
def trace(run):
    return run.trace("p000")


def test_tokens_are_exact_probabilities(trace):
    found = raster(trace, 1, 2)
    assert (found.level, found.cell, found.values.shape) == ("tokens", 1, (101, 101))
    filled = np.nan_to_num(found.values)
    np.testing.assert_allclose(filled.sum(-1), 1, atol=1e-5)
    received = trace.received.sel(layer=1, head=2).values
    np.testing.assert_allclose(filled.sum(0), received, rtol=1e-4, atol=1e-6)
    assert np.isnan(found.values[np.triu_indices(101, 1)]).all()
    np.testing.assert_array_equal(row(trace, 1, 2, 60), np.nan_to_num(found.values[60]))


def test_a_window_is_a_part_of_the_whole(trace):
    whole, part = raster(trace, 0, 3), raster(trace, 0, 3, (30, 61, 7, 50))
    np.testing.assert_array_equal(part.values, whole.values[30:61, 7:50])
    assert (part.query_start, part.query_end, part.key_start, part.key_end) == (30, 61, 7, 50)


def test_rows_without_the_first_key_sum_to_one(trace):
    found = raster(trace, 1, 2, variant="sink_excluded")
    assert found.variant == "sink_excluded"
    assert np.isnan(found.values[:, 0]).all()
    exact = trace.tile(1, 2, (0, 101), (0, 101))
    for query in (1, 17, 100):
        expected = exact[query, 1:] / exact[query, 1:].sum()
        np.testing.assert_allclose(np.nan_to_num(found.values[query, 1:]), expected, rtol=1e-4)
        shaded = row(trace, 1, 2, query, "sink_excluded")
        np.testing.assert_allclose(shaded[1:], expected, rtol=1e-4)
        assert np.isnan(shaded[0])
    assert np.isnan(found.values[0]).all()  # sees nothing but the first key
    part = raster(trace, 1, 2, (30, 61, 7, 50), variant="sink_excluded")
    np.testing.assert_array_equal(part.values, found.values[30:61, 7:50])


def test_blocks_have_no_form_without_the_first_key(trace, monkeypatch):
    monkeypatch.setattr(AttentionTrace, "tile_refusal", lambda *_: "no q and k")
    found = raster(trace, 1, 2, variant="sink_excluded")
    assert (found.level, found.variant) == ("blocks", "raw")


def test_blocks_are_the_captured_ones(trace, monkeypatch):
    monkeypatch.setattr(AttentionTrace, "tile_refusal", lambda *_: "no q and k")
    found = raster(trace, 1, 2, (20, 60, 0, 40))
    assert (found.level, found.cell) == ("blocks", 16)
    assert (found.query_start, found.query_end, found.key_start, found.key_end) == (16, 64, 0, 48)
    expected = trace.block_mass.sel(layer=1, head=2).values[1:4, 0:3]
    visible = ~np.isnan(found.values)
    np.testing.assert_array_equal(visible, [[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    np.testing.assert_array_equal(found.values[visible], expected[visible])


@pytest.mark.parametrize(("pooling", "reduce"), [("max", np.nanmax), ("mean", np.nanmean)])
def test_pooling_is_over_whole_cells(trace, monkeypatch, pooling, reduce):
    monkeypatch.setattr(AttentionTrace, "tile_refusal", lambda *_: "no q and k")
    found = raster(trace, 1, 2, pooling=pooling, most=3)
    blocks = trace.block_mass.sel(layer=1, head=2).values
    assert (found.level, found.cell, found.values.shape) == ("pooled", 48, (3, 3))
    assert found.values[1, 0] == pytest.approx(reduce(blocks[3:6, 0:3]))
    assert found.values[2, 1] == pytest.approx(reduce(blocks[6:9, 3:6]))
    assert np.isnan(found.values[0, 1])


def test_what_is_outside_is_refused(trace):
    with pytest.raises(LensError, match="there is no L3H0"):
        raster(trace, 3, 0)
    with pytest.raises(LensError, match="keys 0 to 100; got the rectangle"):
        raster(trace, 0, 0, (200, 210, 0, 4))
    with pytest.raises(LensError, match="there is no query 101"):
        row(trace, 0, 0, 101)


@pytest.mark.parametrize(("pooling", "reduce"), [("max", np.nanmax), ("mean", np.nanmean)])
def test_more_tokens_than_cells_are_exact_probabilities_pooled(trace, monkeypatch, pooling, reduce):
    whole = raster(trace, 1, 2).values
    found = raster(trace, 1, 2, None, pooling, most=40)
    assert (found.level, found.cell, found.values.shape) == ("pixels", 3, (34, 34))
    assert (found.query_end, found.key_end) == (101, 101)
    for row_, column in ((0, 0), (10, 4), (20, 20), (33, 33), (33, 2)):
        cell = whole[3 * row_ : 3 * row_ + 3, 3 * column : 3 * column + 3]
        assert found.values[row_, column] == pytest.approx(reduce(cell), rel=1e-5)
    assert np.isnan(found.values[np.triu_indices(34, 1)]).all()
    part = raster(trace, 1, 2, (20, 101, 3, 90), pooling, most=40)
    assert part.level == "pixels"
    assert part.values[1, 2] == pytest.approx(reduce(whole[23:26, 9:12]), rel=1e-5)


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("variant", ["raw", "sink_excluded"])
@pytest.mark.parametrize("window", [None, (20, 101, 3, 90), (0, 44, 50, 101)])
def test_a_cell_is_the_largest_or_the_mean_of_its_single_tokens(
    trace, monkeypatch, pooling, variant, window
):
    """Against the pool of exact probabilities, which are computed one by one."""
    whole = raster(trace, 1, 2, window, variant=variant)
    monkeypatch.setattr(pixels, "_STRIP", 20)
    found = raster(trace, 1, 2, window, pooling, variant, most=11)
    assert (found.level, found.every, found.variant) == ("pixels", 1, variant)
    expected = module.pool(whole.values, found.cell, pooling)
    np.testing.assert_array_equal(np.isnan(found.values), np.isnan(expected))
    np.testing.assert_allclose(found.values, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("pooling", "reduce"), [("max", np.nanmax), ("mean", np.nanmean)])
def test_beyond_what_is_looked_at_whole_some_queries_of_each_cell_are(
    trace, monkeypatch, pooling, reduce
):
    whole = raster(trace, 1, 2).values
    monkeypatch.setattr(module, "MOST_EXACT", {pooling: 64})
    found = raster(trace, 1, 2, None, pooling, most=13)
    assert (found.cell, found.every, header(trace, found)["every"]) == (8, 3, 3)
    looked = np.arange(3) * 8 // 3
    for row_, column in ((0, 0), (5, 2), (11, 11), (12, 3)):
        rows = [8 * row_ + one for one in looked if 8 * row_ + one < 101]
        expected = reduce(whole[rows, 8 * column : 8 * column + 8])
        assert found.values[row_, column] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("causal", "window", "cap", "noted"),
    [
        (True, 7, None, ""),
        (False, 9, 3.0, ""),
        (False, None, None, ""),
        (True, None, None, "ranges"),
        (False, None, None, "parts"),
    ],
)
def test_windows_caps_ranges_parts_and_both_directions(causal, window, cap, noted):
    dataset = xr.Dataset(
        {
            "q": (("layer", "head", "query", "dim"), RANDOM.normal(0, 2, (1, 4, 37, 5))),
            "k": (("layer", "kv_head", "key", "dim"), RANDOM.normal(0, 2, (1, 2, 37, 5))),
            "lse": (("layer", "head", "query"), RANDOM.normal(3, 0.1, (1, 4, 37))),
            "visible": (("layer", "key"), np.where(np.arange(37) == 11, 0, 5)[None]),
        },
        coords={"layer": [0]},
        attrs={"scale": [0.4], "softcap": cap, "causal": causal, "windows": [window]},
    )
    if noted == "parts":
        dataset.attrs["partition"] = {"of": [0], "parts": [(np.arange(37) * 7 % 4).tolist()]}
        dataset.attrs["cells"] = [divmod(place, 8) for place in range(37)]
        table = RANDOM.normal(0, 2, (1, 4, 9, 15))
        dataset["bias"] = (("layer", "head", "row_offset", "column_offset"), table)
    if noted == "ranges":
        at = np.arange(37)
        ranges = np.stack([at // 5 * 5, np.minimum(at // 5 * 5 + 9, at + 1)])
        dataset.attrs["seen"] = {"of": [0], "ranges": [ranges.tolist()]}
    head = HeadId(0, 3)
    exact = exact_tile(dataset, head, (4, 37), (2, 35))
    after = np.arange(2, 35) > np.arange(4, 37)[:, None]
    known = np.where(after & causal, np.nan, exact)
    for cell in (2, 5):
        for pooling in ("max", "mean"):
            found = pixels.pooled(dataset, head, (4, 37), (2, 35), cell, pooling=pooling)
            expected = np.nan_to_num(module.pool(known, cell, pooling))
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    if noted == "parts":
        assert {len(np.unique(row > 0)) for row in exact} == {2}
        own = exact_tile(dataset, head, (4, 37), (0, 35))
        some = own[:, 0] < 0.9  # of made-up sums
        rest = (own[:, 1:] / (1 - own[:, :1]))[some]
        found = pixels.pooled(dataset, head, (4, 37), (0, 35), 1, without_first=True)
        np.testing.assert_allclose(found[some, 1:], rest, rtol=2e-4, atol=1e-6)
