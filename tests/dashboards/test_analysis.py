"""The page of an analysis: what its command wrote, with links, downloads and designed refusals."""

import io

import pandas as pd
import pytest
from lens_dashboards.library import Library
from lens_dashboards.server import create_app
from lens_dashboards.views import render


@pytest.fixture(scope="module")
def heads_address(serve, heads_run):
    return serve(heads_run.path.parent)


@pytest.fixture(scope="module")
def client(heads_run):
    return create_app(heads_run.path.parent).server.test_client()


@pytest.mark.browser
def test_the_overview_leads_to_an_analysis_and_on_to_a_head(page, heads_address, heads_run):
    section = heads_run.section("importance")
    page.goto(f"{heads_address}/run/{heads_run.id}")
    page.locator("#analyses").get_by_role("link", name=section.title).click()
    page.wait_for_url(f"**/run/{heads_run.id}/analysis/importance")
    page.wait_for_selector("#figure-grid_0 .heatmaplayer")
    shown = page.locator(".findings li").all_inner_texts()
    assert shown == list(section.summary)
    page.get_by_role("link", name="L1H3").first.click()
    page.wait_for_selector("#map[data-ready]")
    assert page.locator("h1").inner_text() == "L1H3 of induction-2l"
    page.go_back()
    page.wait_for_selector("#figure-grid_0 .heatmaplayer")


@pytest.mark.browser
def test_the_effect_of_a_head_stands_beside_its_attention(page, heads_address, heads_run):
    page.goto(f"{heads_address}/run/{heads_run.id}/head/0/1")
    page.wait_for_selector("#map[data-ready]")
    table = heads_run.section("importance").tables["scores"].set_index("name")
    row = page.get_by_role("row", name="ablation (mean)").inner_text()
    assert f"{table.loc['L0H1', 'ablation (mean)']:.3g}" in row


@pytest.mark.browser
@pytest.mark.parametrize("section", ["roles", "importance", "similarity", "heads"])
def test_every_analysis_draws_its_figures_and_axe_is_content(
    browser, heads_address, heads_run, section
):
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(bypass_csp=True, viewport={"width": 430, "height": 900})
    tab = context.new_page()
    tab.goto(f"{heads_address}/run/{heads_run.id}/analysis/{section}")
    for name in heads_run.section(section).figures:
        tab.wait_for_selector(f"#figure-{name} .main-svg")
    tab.wait_for_selector("h1")
    width = tab.evaluate("document.documentElement.scrollWidth")
    found = Axe().run(tab).response["violations"]
    context.close()
    assert {item["id"] for item in found if item["impact"] in ("serious", "critical")} == set()
    assert width <= 430


def test_a_download_equals_the_table(client, heads_run):
    answer = client.get(f"/api/run/{heads_run.id}/section/importance/scores.csv")
    assert answer.status_code == 200
    read = pd.read_csv(io.StringIO(answer.get_data(as_text=True)))
    pd.testing.assert_frame_equal(read, heads_run.section("importance").tables["scores"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("section/importance/magic.csv", "importance has no table 'magic'; it has: scores"),
        ("section/magic/scores.csv", "no section 'magic'"),
    ],
)
def test_what_is_not_there_is_a_404_that_says_so(client, heads_run, path, message):
    answer = client.get(f"/api/run/{heads_run.id}/{path}")
    assert answer.status_code == 404
    assert message in answer.get_data(as_text=True)


def test_an_analysis_that_was_not_made_says_which_command_makes_it(runs, run):
    page = str(render(Library(runs), f"/run/{run.id}/analysis/importance", ""))
    assert "no section" in page
    assert "lens heads" in page
    overview = str(render(Library(runs), f"/run/{run.id}", ""))
    assert "No analysis beyond the profile yet" in overview
