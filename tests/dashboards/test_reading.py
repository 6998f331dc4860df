"""The page Reading, with any of its sections; in a real browser a pair is picked, and taken apart in words and numbers."""

import pandas as pd
import plotly.graph_objects as go
import pytest
from lens_dashboards.library import Library
from lens_dashboards.pages import reading, section_page
from lens_dashboards.pages.tabs import NEEDS
from lens_dashboards.selection import Selection

from lens.runs.sections import Section
from tests.tiers import first


@pytest.fixture(scope="module")
def where(serve, explain_run):
    return f"{serve(explain_run.path.parent)}/run/{explain_run.id}/reading"


@pytest.mark.parametrize(
    ("name", "figure", "told"),
    [
        ("faithfulness", "sufficiency", "the highest tokens alone"),
        ("retrieval_kinds", "recall", "Needles without retrieval heads"),
        ("removal", "removal_l1h0", "predicted and measured"),
        ("groups", "offset_l1h0", "Parts by distance"),
        ("subspace", "subspace_l1h0", "Without a subspace"),
        ("mixing", "mixing", "How much tokens mix"),
        ("adversary", "adversary", "Other attention with the same answer"),
        ("perturbation", "pairs", "moves from token to token"),
    ],
)
def test_a_run_with_one_of_its_sections_has_the_page(explain_run, monkeypatch, name, figure, told):
    tables = {name: pd.DataFrame({"name": ["L1H0"]})}
    one = Section(name, "One", columns={"name": "Head."}, tables=tables, figures={figure: go.Figure()})  # fmt: skip
    monkeypatch.setattr(section_page, "sections", lambda _: {name: one})
    view = Selection(page="reading", run=explain_run.id)
    said = str(reading.page(Library(explain_run.path.parent), view))
    assert told in said
    assert "no explained heads" not in said
    assert name in NEEDS["reading"]
    assert ("Why does this head attend" in said) == (name in ("removal", "groups", "subspace"))


@pytest.mark.browser
def test_a_pair_is_picked_on_the_map_and_taken_apart(page, where, explain_run):
    pairs = explain_run.section("explain").tables["pairs"].query("name == 'L1H2'")
    one = pairs.sort_values(["query", "key"]).iloc[0]
    page.goto(f"{where}?head=L1H2&pair={one['query']}-{one['key']}")
    page.wait_for_selector("#pair-products .heatmaplayer")
    said = page.locator("#pair-said").inner_text()
    assert said.split("\n")[0] in str(one["said"])
    assert "L0H1" in said
    own = """[id='{"points":"reading"}'] .scatterlayer .trace"""
    point = page.locator(own).locator("path.point").nth(len(pairs) - 1)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    last = pairs.sort_values(["query", "key"]).iloc[-1]
    page.wait_for_url(f"**pair={last['query']}-{last['key']}**")
    page.wait_for_selector(f"h2:has-text('at {last['query']} to')")


@pytest.mark.browser
@pytest.mark.parametrize("width", first([1440, 430], 430))
def test_axe_is_content_and_nothing_scrolls_sideways(browser, where, width):
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(bypass_csp=True, viewport={"width": width, "height": 900})
    tab = context.new_page()
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(where)
    tab.wait_for_selector("#pair-products .main-svg")
    found = Axe().run(tab).response["violations"]
    scroll = tab.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert {item["id"] for item in found if item["impact"] in ("serious", "critical")} == set()
    assert scroll <= width
    assert [text for text in said if "error" in text.lower()] == []
