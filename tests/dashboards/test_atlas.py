"""The atlas: one picture per head, with the numbers of the trace, in a browser with mouse and keyboard."""

import json
import re

import numpy as np
import pytest
from lens_dashboards.atlas import CELLS, atlas
from lens_dashboards.library import Library
from lens_dashboards.server import create_app
from lens_dashboards.views import render

import lens


def naive_pool(values, step):
    """The largest finite number of each square of `step` cells, NaN where there is none."""
    rows, columns = (-(-length // step) for length in values.shape)
    found = np.full((rows, columns), np.nan)
    for row in range(rows):
        for column in range(columns):
            part = values[row * step : (row + 1) * step, column * step : (column + 1) * step]
            if np.isfinite(part).any():
                found[row, column] = np.nanmax(part)
    return found


def visible(length, step):
    """Which cells of `step` tokens a side hold a key that a query may see."""
    starts = np.arange(0, length, step)
    last = np.minimum(starts + step, length) - 1
    return starts[None] <= last[:, None]


@pytest.mark.parametrize("size", [1, 7, 16])
def test_every_head_is_its_block_map_pooled(size):
    model = lens.load("text-lm-3l")
    ids = lens.tasks.copied(model, 51, seed=3)
    trace = lens.capture(model, ids, block_size=size, progress=False)
    found = atlas(trace)
    blocks = len(trace.dataset["query_block"])
    step = -(-blocks // CELLS)
    assert found.shape == (3, 6, -(-blocks // step), -(-blocks // step))
    for layer, head in ((0, 0), (1, 3), (2, 5)):
        full = trace.block_mass.sel(layer=layer, head=head).values
        expected = naive_pool(full, step)
        seen = visible(len(ids), size * step)
        np.testing.assert_array_equal(np.isfinite(found[layer, head]), seen)
        np.testing.assert_array_equal(found[layer, head][seen], expected[seen].astype(np.float32))


def test_a_short_prompt_is_drawn_from_exact_probabilities():
    model = lens.load("text-lm-3l")
    ids = lens.tasks.copied(model, 24, seed=3)
    trace = lens.capture(model, ids, block_size=64, keep_qk=True, progress=False)
    found = atlas(trace)
    exact = trace.tile(1, 3, (0, len(ids)), (0, len(ids)))
    step = -(-len(ids) // CELLS)
    expected, seen = naive_pool(exact, step), visible(len(ids), step)
    np.testing.assert_allclose(found[1, 3][seen], expected[seen], rtol=1e-6)


def test_the_server_sends_the_atlas_of_a_prompt(runs, run):
    client = create_app(runs).server.test_client()
    answer = client.get(f"/api/run/{run.id}/atlas/p000")
    shape = json.loads(answer.headers["X-Raster"])
    assert tuple(shape.pop("numbers")) == run.trace("p000").layers
    values = np.frombuffer(answer.data, "<f4").reshape(*shape.values())
    np.testing.assert_array_equal(values, atlas(run.trace("p000")))
    refused = client.get(f"/api/run/{run.id}/atlas/p999")
    assert refused.status_code == 404
    assert "no trace of prompt 'p999'" in refused.get_data(as_text=True)


def test_a_prompt_that_is_not_there_falls_back_with_a_note(runs, run):
    page = str(render(Library(runs), f"/run/{run.id}/atlas", "?prompt=p777"))
    assert "no trace of prompt 'p777'; p000 is shown" in page


@pytest.mark.browser
def test_mouse_and_keyboard_lead_to_a_head(page, address, run):
    page.goto(f"{address}/run/{run.id}")
    page.wait_for_selector("""[id='{"points":"grid"}'] .heatmaplayer""")
    page.get_by_role("link", name="Maps of all heads").click()
    page.wait_for_selector("#atlas[data-ready='3 6']")
    page.locator("#atlas canvas").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.locator("#atlas p").inner_text() == "L1H1"
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/head/1/1\?prompt=p000"))
    page.wait_for_selector("#map[data-ready]")
    page.go_back()
    page.wait_for_selector("#atlas[data-ready]")
    box = page.locator("#atlas canvas").bounding_box()
    pitch = (box["width"] - 34) / 6
    page.mouse.click(box["x"] + 34 + 3.5 * pitch, box["y"] + 22 + 2.5 * pitch)
    page.wait_for_url(re.compile(r"/head/2/3\?prompt=p000"))
