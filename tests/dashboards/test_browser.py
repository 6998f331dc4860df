"""The pages in a real browser: no error, no request elsewhere, links that hold, exact numbers."""

import re
import shutil

import pytest

from lens.runs.exchange.tables import csv_text
from tests.tiers import first

pytestmark = pytest.mark.browser
GRID = """[id='{"points":"grid"}']"""


@pytest.mark.parametrize("test", ["one", "the next"])
def test_pages_that_a_test_leaves_open_end_with_it(browser, test):
    assert browser.contexts == []
    browser.new_page()


def ready(page):
    """Wait until the map shows what its address says."""
    page.wait_for_selector("#map[data-ready]")


def test_runs_lead_to_overview_to_head_and_back(page, address, run):
    page.goto(address)
    page.get_by_role("link", name=run.title).click()
    page.wait_for_selector(f"{GRID} .heatmaplayer")
    page.locator('[id="{\\"option\\":\\"metric\\"}"]').click()
    page.get_by_role("option", name="Previous token").click()
    page.wait_for_url(re.compile("metric=previous_token"))
    page.wait_for_selector("#strongest li:has-text('L0H0')")
    page.locator(f"{GRID} .nsewdrag").scroll_into_view_if_needed()  # below the findings
    cell = page.locator(f"{GRID} .nsewdrag").bounding_box()
    page.mouse.click(cell["x"] + cell["width"] * 2.5 / 6, cell["y"] + cell["height"] * 1.5 / 3)
    ready(page)
    assert "/head/1/2" in page.url
    assert page.locator("h1").inner_text() == "L1H2 of text-lm-3l"
    page.go_back()
    page.wait_for_selector("#strongest li:has-text('L0H0')")
    assert "metric=previous_token" in page.url


def test_the_tabs_of_a_run_with_many_empty_ones_fit_in_one_row(page, address, run):
    page.set_viewport_size({"width": 1280, "height": 900})  # 1440 with one tab more
    page.goto(f"{address}/run/{run.id}")
    tabs = page.locator(".tabs.pages")
    tabs.wait_for()
    assert tabs.locator(".vacant").count() > 5
    rows = tabs.evaluate("(nav) => nav.clientHeight / parseFloat(getComputedStyle(nav).lineHeight)")
    assert rows < 1.5


def test_a_link_restores_the_overview(page, address, run):
    page.goto(f"{address}/run/{run.id}?group=text&metric=entropy&variant=sink_excluded")
    page.wait_for_selector(f"{GRID} .heatmaplayer")
    title = page.locator(f"{GRID} .gtitle").first.text_content()
    assert title.startswith("Entropy, sink excluded (nats)")
    rows = run.heads.query(
        "prompt_id == 'text' and metric == 'entropy' and variant == 'sink_excluded'"
    )
    best = rows.loc[rows["value"].idxmax()]
    assert f"L{best['layer']}H{best['head']}" in title


def test_hover_shows_the_number_of_the_trace(page, address, run):
    page.goto(f"{address}/run/{run.id}/head/1/3?prompt=p002&q0=40&q1=80&k0=10&k1=50")
    ready(page)
    box = page.locator(".map-canvas").bounding_box()
    plot = page.locator(".map-canvas").get_attribute("data-plot")
    left, top, side = map(float, plot.split())
    assert left > 64  # forty tokens have their names on the axes
    query, key = 61, 19
    page.mouse.move(
        box["x"] + left + (key - 10 + 0.5) / 40 * side,
        box["y"] + top + (query - 40 + 0.5) / 40 * side,
    )
    shown = page.locator(".map-tip")
    shown.wait_for()
    exact = run.trace("p002").tile(1, 3, (query, query + 1), (key, key + 1)).astype("f4")[0, 0]
    assert float(shown.get_attribute("data-value")) == pytest.approx(float(exact), rel=1e-6)
    assert f"query {query} " in shown.inner_text()
    assert f"key {key} " in shown.inner_text()


def test_few_queries_of_many_keys_have_their_names(page, address, run):
    """A word heard in a long sound: each axis has names where it has room for them."""
    page.goto(f"{address}/run/{run.id}/head/1/3?prompt=p000&q0=20&q1=30&k0=0&k1=101")
    ready(page)
    left, _, side = map(float, page.locator(".map-canvas").get_attribute("data-plot").split())
    low = page.locator(".map-canvas").bounding_box()["height"] - 34 - side
    assert (left, low) == pytest.approx((124, 30), abs=1)


def test_zoom_and_row_are_kept_in_the_link(page, address, run):
    page.goto(f"{address}/run/{run.id}/head/0/0?prompt=p001")
    ready(page)
    page.wait_for_selector("#strip .token.query")
    page.locator(".map-canvas").focus()
    page.keyboard.press("+")
    page.wait_for_url(re.compile("q0="))
    page.locator("#strip .token").nth(50).click()
    page.wait_for_selector("#strip[data-query='50']")
    page.wait_for_url(re.compile("query=50"))
    seen = page.locator("#map").get_attribute("data-ready")
    page.reload()
    ready(page)
    page.wait_for_selector("#strip[data-query='50']")
    assert page.locator("#map").get_attribute("data-ready") == seen
    strongest = page.locator("#strip b").nth(1).inner_text()
    before = run.trace("p001").tokens[49].replace("\n", "⏎")
    assert strongest == f"“{before}”"  # L0H0 looks at the token before


def test_the_keyboard_goes_from_head_to_head(page, address, run):
    page.goto(f"{address}/run/{run.id}/head/0/5")
    ready(page)
    page.keyboard.press("n")
    page.wait_for_selector("h1:has-text('L1H0')")
    ready(page)
    page.keyboard.press("p")
    page.wait_for_selector("h1:has-text('L0H5')")
    ready(page)


def test_each_step_counts_from_the_head_that_was_asked_for_last(page, address, run):
    page.goto(f"{address}/run/{run.id}/head/0/4")
    ready(page)
    clicks = "(id) => { for (let i = 0; i < 5; i += 1) document.getElementById(id).click(); }"
    for id_, there in (("next-head", "L1H3"), ("previous-head", "L0H4")):
        page.evaluate(clicks, id_)
        page.wait_for_selector(f"h1:has-text('{there}')")
        page.wait_for_selector(f"#map[data-head='{there}'][data-ready]")
    link = page.locator("#next-head").bounding_box()
    page.mouse.move(link["x"] + 9, link["y"] + 9)
    page.mouse.down()
    page.keyboard.press("n")  # the link is another one when the button is let go
    page.wait_for_selector("h1:has-text('L0H5')")
    page.mouse.up()
    page.wait_for_selector("h1:has-text('L1H0')")


def test_the_table_downloads_as_it_is(page, address, run):
    page.goto(f"{address}/run/{run.id}")
    page.wait_for_selector(f"{GRID} .heatmaplayer")
    with page.expect_download() as download:
        page.get_by_role("link", name="heads.csv").click()
    text = download.value.path().read_text()
    assert text == csv_text(run.heads)
    assert download.value.suggested_filename == f"{run.id}_heads.csv"
    with page.expect_download() as download:
        page.locator(".figure-menu").last.locator("[data-figure=csv]").click()
    assert download.value.suggested_filename == f"{run.id}_by-layer.csv"
    with page.expect_download() as download:
        page.locator(f".figure:has({GRID}) [data-figure=csv]").click()
    assert download.value.suggested_filename == f"{run.id}_grid.csv"


@pytest.mark.parametrize("ending", first(["PNG", "CSV", "JSON"], "CSV"))
def test_what_a_map_saves_is_named_after_run_prompt_and_head(page, address, run, ending):
    page.goto(f"{address}/run/{run.id}/head/1/3?prompt=p002")
    ready(page)
    with page.expect_download() as download:
        page.locator("#map").get_by_role("button", name=ending).click()
    assert download.value.suggested_filename == f"{run.id}_p002_L1H3.{ending.lower()}"


def test_a_narrow_window_needs_no_sideways_scrolling(page, address, run):
    page.set_viewport_size({"width": 420, "height": 900})
    for path in ("/", f"/run/{run.id}", f"/run/{run.id}/head/1/3", f"/run/{run.id}/provenance"):
        page.goto(address + path)
        page.wait_for_selector("h1")
        page.wait_for_timeout(700)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 420, path


def test_bad_links_show_a_card(page, address, run):
    for path, text in (
        ("/run/none", "there is no run"),
        (f"/run/{run.id}/head/9/9", "there is no L9H9"),
        ("/nowhere", "is no page"),
    ):
        page.goto(address + path)
        page.wait_for_selector(f"text={text}")


def serious(browser, address, width=1280):
    """What axe finds serious, by rule."""
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(bypass_csp=True, viewport={"width": width, "height": 900})
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("h1")
    page.wait_for_timeout(1500)
    found = Axe().run(page).response["violations"]
    context.close()
    return {
        item["id"]: [node["target"] for node in item["nodes"]]
        for item in found
        if item["impact"] in ("serious", "critical")
    }


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/run/{id}", "/run/{id}/head/1/3", "/run/{id}/atlas", "/run/{id}/provenance"),
        *("/run/{id}/maps?heads=L1H3,L0H2", "/run/{id}/mixers"),
    ],
)
def test_axe_finds_nothing_serious(browser, address, run, path):
    assert serious(browser, address + path.format(id=run.id)) == {}


@pytest.mark.parametrize("width", first([1440, 430], 430))
def test_axe_finds_nothing_serious_on_patching_and_on_many_runs(
    browser, serve, patch_run, tmp_path, width
):
    for name in ("one", "two"):
        shutil.copytree(patch_run.path, tmp_path / name)
    address = serve(tmp_path)
    assert serious(browser, address, width) == {}
    assert serious(browser, f"{address}/run/one/patching", width) == {}


def test_the_title_of_a_figure_keeps_off_what_stands_above_it(page, serve, patch_run):
    page.set_viewport_size({"width": 430, "height": 900})
    page.goto(f"{serve(patch_run.path.parent)}/run/{patch_run.id}/patching")
    page.wait_for_selector(".gtitle")
    page.wait_for_timeout(700)
    title = page.locator(".gtitle").first.bounding_box()
    control = page.locator(".controls button.dash-dropdown").first.bounding_box()
    assert title["y"] - control["y"] - control["height"] >= 8
    assert title["x"] + title["width"] <= 430


def test_the_keyboard_reaches_a_dropdown_and_chooses(page, address, run):
    page.goto(f"{address}/run/{run.id}/heads")
    page.wait_for_selector(".tall tbody a")
    dropdown = page.locator("button.dash-dropdown").first
    dropdown.wait_for()
    page.locator("[data-variant=sink_excluded]").focus()  # the control before it
    page.keyboard.press("Tab")
    assert dropdown.evaluate("one => one === document.activeElement")
    page.keyboard.press("Enter")
    page.wait_for_selector("[role=option] input[value=scatter]:focus")  # a slow page opens late
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("[role=option] input[value=grid]:focus")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("show=grid"))
