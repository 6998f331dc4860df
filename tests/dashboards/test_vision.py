"""The page of pictures in a real browser: hover both ways, exact numbers, wide and narrow."""

import base64
import json
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from lens.runs import open_run
from tests.tiers import first

pytestmark = pytest.mark.browser


STEPS_SHOWN = ("overlays", "classes", "rings", "pattern_summary", "structure")


@pytest.fixture(scope="module")
def vision_run(tmp_path_factory):
    """A run of two labelled pictures of noise, with the sections that the page shows."""
    from lens_analyses.cli import main
    from lens_analyses.steps import STEPS

    folder, random = tmp_path_factory.mktemp("vision"), np.random.default_rng(0)
    for label in (3, 8):
        (folder / "noise" / str(label)).mkdir(parents=True)
        noise = random.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "noise" / str(label) / "noise.png")
    command = ["vision", "--model", "vit-digits", "--images", str(folder / "noise"), "--quiet"]
    steps = tuple(step for step in STEPS["vision"] if step.name in STEPS_SHOWN)
    with mock.patch.dict(STEPS, {"vision": steps}), pytest.raises(SystemExit) as ended:
        main([*command, "--out", str(folder / "runs")])
    assert ended.value.code == 0
    return open_run(next(path.parent for path in (folder / "runs").glob("*/run.json")))


@pytest.fixture(scope="module")
def site(serve, vision_run):
    return serve(vision_run.path.parent)


def test_the_patch_under_the_mouse_is_the_one_that_looks(page, site, vision_run):
    page.goto(f"{site}/run/{vision_run.id}/vision?map=L1H2")
    page.wait_for_selector("#vision[data-ready]")
    trace = vision_run.trace("p000")
    for which in (0, 1):
        canvas = page.locator("#vision canvas").nth(which)
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        row, column = 1 + which, 3 - which
        page.mouse.move(
            box["x"] + box["width"] * (column + 0.5) / 4, box["y"] + box["height"] * (row + 0.5) / 4
        )
        page.wait_for_selector(f"#vision[data-patch='{row},{column}']")
        said = page.locator(".look-said").inner_text()
        for options in ({"query": (row, column)}, {"key": (row, column)}):
            values = trace.overlay("L1H2", **options).values[0]
            best = np.unravel_index(values.argmax(), values.shape)
            assert f"({best[0]}, {best[1]}) {values.max():.4f}" in said
    page.locator("#vision canvas").first.focus()
    page.keyboard.press("ArrowUp")
    page.wait_for_selector("#vision[data-patch='1,2']")
    page.get_by_role("group", name="Patches that all look at").get_by_text("left out").click()
    page.wait_for_url("**variant=sink_excluded*")
    page.get_by_role("heading", name="L1H2 on 3: noise.png").wait_for()


def test_the_numbers_of_the_page_are_those_of_the_trace(page, site, vision_run):
    answer = page.request.get(f"{site}/api/run/{vision_run.id}/look/p000/2/1?heads=L2")
    found = np.frombuffer(answer.body(), "<f4").reshape(2, 4, 4)
    paths = json.loads(answer.headers["x-raster"])["paths"]
    trace = vision_run.trace("p000")
    assert np.allclose(found[0], trace.overlay("L2", query=(2, 1)).values[0], atol=1e-6)
    assert np.allclose(found[1], trace.overlay("L2", key=(2, 1)).values[0], atol=1e-6)
    regions = trace.overlay("L2", key=(2, 1)).regions().head(8)
    assert np.allclose(paths[1], regions[["x", "y"]], atol=0.06)
    several = f"{site}/api/run/{vision_run.id}/look/p000/2/1?heads="
    answer = page.request.get(f"{several}L2,L0H1&way=key")
    own = trace.overlay(["L2", "L0H1"], key=(2, 1)).values
    assert np.allclose(np.frombuffer(answer.body(), "<f4").reshape(2, 4, 4), own, atol=1e-6)
    assert page.request.get(several + ",".join(["L2"] * 10)).status == 404
    picture = page.request.get(f"{site}/api/run/{vision_run.id}/picture/p000.png")
    assert picture.headers["content-type"] == "image/png"
    assert page.request.get(f"{site}/api/run/{vision_run.id}/look/p000/9/9").status == 404


@pytest.mark.parametrize("width", first([1440, 430], 430))
@pytest.mark.parametrize(
    "part", ["vision?by=loss&class=3&beside=L0H0,L2", *(f"analysis/{name}" for name in STEPS_SHOWN)]
)
def test_axe_is_content_and_nothing_scrolls_sideways(browser, site, vision_run, part, width):
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(bypass_csp=True, viewport={"width": width, "height": 900})
    tab = context.new_page()
    tab.goto(f"{site}/run/{vision_run.id}/{part}")
    tab.wait_for_selector("#vision[data-ready]" if part.startswith("vision") else ".main-svg")
    found = Axe().run(tab).response["violations"]
    scroll = tab.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert {item["id"] for item in found if item["impact"] in ("serious", "critical")} == set()
    assert scroll <= width


def test_several_heads_stand_side_by_side_under_one_patch_with_their_scan_paths(
    page, site, vision_run
):
    page.goto(f"{site}/run/{vision_run.id}/vision?map=L1H2&beside=L0H0,L2,L9&way=key")
    page.wait_for_selector("#vision[data-ready]")
    page.get_by_text("L9 is shown already, or no head or layer of this run.").wait_for()
    canvases = page.locator("#vision canvas")
    assert canvases.count() == 3
    canvases.nth(2).focus()
    page.keyboard.press("ArrowUp")
    page.wait_for_selector("#vision[data-patch='1,2']")
    found = vision_run.trace("p000").overlay(["L1H2", "L0H0", "L2"], key=(1, 2))
    said = page.locator(".look-said").inner_text()
    for name, values in zip(found.names, found.values, strict=True):
        best = np.unravel_index(values.argmax(), values.shape)
        assert f"{name} ({best[0]}, {best[1]}) {values.max():.4f}" in said
    pixel = """([which, x, y]) => { const canvas = document.querySelectorAll("#vision canvas")[which], scale = canvas.width / 8;
        return [...canvas.getContext("2d").getImageData(x * scale - 6, y * scale, 1, 1).data].slice(0, 3); }"""
    for which in range(3):
        first = found.regions(which).iloc[0]
        assert page.evaluate(pixel, [which, first["x"], first["y"]]) == [0x1D, 0x4E, 0xD8]
    page.goto(f"{site}/run/{vision_run.id}/vision?map=L1H2&beside=L0H0&way=key&path=off")
    page.wait_for_selector("#vision[data-ready]")
    assert page.evaluate(pixel, [0, first["x"], first["y"]]) != [0x1D, 0x4E, 0xD8]


def test_views_are_linked_and_show_the_tables_of_the_run(page, site, vision_run):
    page.goto(f"{site}/run/{vision_run.id}/vision?map=L1H2&by=js&class=8")
    page.wait_for_selector("#vision[data-ready]")
    data = "id => document.getElementById(id).querySelector('.js-plotly-plot').data"
    drawn = "id => document.getElementById(id)?.querySelector('.js-plotly-plot')?.data?.length"
    page.wait_for_function(drawn, arg='{"points":"importance"}')
    (matrix,) = page.evaluate(data, '{"points":"importance"}')
    rows = vision_run.section("classes").tables["classes"].query("metric == 'js' and `class` == 8")
    z = matrix["z"]
    if isinstance(z, dict):
        z = np.frombuffer(base64.b64decode(z["bdata"]), z["dtype"]).reshape(3, 4)
    assert np.allclose(np.ravel(z), rows["value"])
    page.evaluate(
        """() => { const plot = document.getElementById('{"points":"importance"}').querySelector('.js-plotly-plot');
        plot.emit('plotly_click', { points: [{ customdata: plot.data[0].customdata[2][1], curveNumber: 0, pointNumber: [2, 1],
          x: 1, y: "2", data: plot.data[0] }] }); }"""
    )
    page.wait_for_url("**map=L2H1*")
    assert "by=js" in page.url
    page.wait_for_selector("text=L2H1: attention by distance")
    page.wait_for_selector("text=L2H1 is ringed")
    points = page.evaluate(data, '{"points":"patterns"}')
    maps = vision_run.section("pattern_summary").tables["maps"]
    assert sum(len(one["text"]) for one in points) == len(maps) == 2 * 12
    links = [link for one in points for link in one["customdata"]]
    assert all(link.startswith(f"/run/{vision_run.id}/vision?") for link in links)
    assert any("prompt=p001" in link and "map=L0H3" in link for link in links)


def test_a_run_without_pictures_says_how_to_make_one(page, address, run):
    page.goto(f"{address}/run/{run.id}/vision")
    page.wait_for_selector("text=This run has no picture")
