"""The page of sparse policies in a real browser, wide and narrow."""

import pytest

from lens.runs import open_run
from tests.tiers import first

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def policies_run(tmp_path_factory):
    from lens_analyses.cli import main

    folder = tmp_path_factory.mktemp("policies")
    command = (
        "policies --model text-lm-3l --text-name lily --tokens 48 --windows 2 --n 2 --copied 2 --copied-length 16 "
        "--set analysis.length=48 --sections policies,search --levels 2 --loss 0.1 --quiet --out"
    )
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), str(folder)])
    assert ended.value.code == 0
    return open_run(next(path.parent for path in folder.glob("*/run.json")))


@pytest.fixture(scope="module")
def where(serve, policies_run):
    return f"{serve(policies_run.path.parent)}/run/{policies_run.id}/policies"


def test_a_head_and_a_policy_are_chosen_and_kept_in_the_link(page, where, policies_run):
    page.goto(f"{where}?head=L1H2&policy=Sparge()")
    page.wait_for_selector("#kept-map .heatmaplayer")
    title = page.locator("#kept-map .gtitle").first.text_content()
    assert title.startswith("L1H2 under Sparge(): ")
    assert page.locator("#policy-heads .heatmaplayer").count() == 1
    table = policies_run.section("search").tables["heads"].set_index("name")
    said = page.locator("#advice").inner_text()
    policy = table.loc["L1H2", "policy"]
    assert said.startswith("Keep full: " if policy == "Full()" else f"Sparse: {policy} keeps ")
    page.locator('[id="{\\"option\\":\\"head\\"}"]').click()
    page.get_by_role("option", name="L2H0").click()
    page.wait_for_url("**head=L2H0**")
    page.wait_for_selector("#kept-map .gtitle:has-text('L2H0')")


@pytest.mark.parametrize("width", first([1440, 430], 430))
def test_axe_is_content_and_nothing_scrolls_sideways(browser, where, width):
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(bypass_csp=True, viewport={"width": width, "height": 900})
    tab = context.new_page()
    tab.goto(where)
    tab.wait_for_selector("#kept-map .main-svg")
    tab.wait_for_selector("#policy-heads .main-svg")
    found = Axe().run(tab).response["violations"]
    scroll = tab.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert {item["id"] for item in found if item["impact"] in ("serious", "critical")} == set()
    assert scroll <= width
