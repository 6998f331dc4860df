"""The page of pictures in a real browser: hover both ways, exact numbers, wide and narrow."""

import numpy as np
import pytest
from PIL import Image

from lens.runs import open_run

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def vision_run(tmp_path_factory):
    from lens_analyses.cli import main

    folder = tmp_path_factory.mktemp("vision")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / "noise.png")
    command = ["vision", "--model", "vit-digits", "--image", str(folder / "noise.png"), "--quiet"]
    with pytest.raises(SystemExit) as ended:
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


def test_the_numbers_of_the_page_are_those_of_the_trace(page, site, vision_run):
    answer = page.request.get(f"{site}/api/run/{vision_run.id}/look/p000/2/1?heads=L2")
    found = np.frombuffer(answer.body(), "<f4").reshape(2, 4, 4)
    trace = vision_run.trace("p000")
    assert np.allclose(found[0], trace.overlay("L2", query=(2, 1)).values[0], atol=1e-6)
    assert np.allclose(found[1], trace.overlay("L2", key=(2, 1)).values[0], atol=1e-6)
    picture = page.request.get(f"{site}/api/run/{vision_run.id}/picture/p000.png")
    assert picture.headers["content-type"] == "image/png"
    assert page.request.get(f"{site}/api/run/{vision_run.id}/look/p000/9/9").status == 404


@pytest.mark.parametrize("width", [1440, 430])
@pytest.mark.parametrize(
    "part", ["vision", "analysis/overlays", "analysis/rings", "analysis/structure"]
)
def test_axe_is_content_and_nothing_scrolls_sideways(browser, site, vision_run, part, width):
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(bypass_csp=True, viewport={"width": width, "height": 900})
    tab = context.new_page()
    tab.goto(f"{site}/run/{vision_run.id}/{part}")
    tab.wait_for_selector("#vision[data-ready]" if part == "vision" else ".main-svg")
    found = Axe().run(tab).response["violations"]
    scroll = tab.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert {item["id"] for item in found if item["impact"] in ("serious", "critical")} == set()
    assert scroll <= width


def test_a_run_without_pictures_says_how_to_make_one(page, address, run):
    page.goto(f"{address}/run/{run.id}/vision")
    page.wait_for_selector("text=This run has no picture")
