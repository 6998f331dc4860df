"""Links that people follow: back and forth, with and without the first token, pins and zoom kept."""

import re

import pytest
from lens_dashboards.library import Library
from lens_dashboards.views import render

MAP = "#map[data-ready]"


@pytest.mark.browser
def test_the_way_back_leads_through_pages_with_controls(page, address, run):
    page.goto(f"{address}/run/{run.id}")
    page.wait_for_selector("[data-figure]")
    page.get_by_role("link", name="Heads", exact=True).click()
    page.wait_for_selector("h1:has-text('Heads')")
    page.wait_for_selector(".tall tbody a")
    assert page.title() == f"Heads · {run.id} · attention-lens"
    page.wait_for_timeout(500)  # for a callback that would write the controls into the link
    assert page.url == f"{address}/run/{run.id}/heads"
    page.locator(".tall tbody a").first.click()
    page.wait_for_selector(MAP)
    page.go_back()
    page.wait_for_selector("h1:has-text('Heads')")
    page.go_back()
    page.wait_for_selector("h1:has-text('text-lm-3l on')")


@pytest.mark.browser
def test_the_first_token_is_left_out_on_every_page_until_it_is_counted_again(page, address, run):
    page.goto(f"{address}/run/{run.id}/head/1/0?prompt=p001&q0=8&q1=40&k0=0&k1=32")
    page.wait_for_selector(MAP)
    page.get_by_role("button", name="left out (sink excluded)").click()
    page.wait_for_selector("[data-variant=sink_excluded][aria-pressed=true]")
    page.wait_for_selector(".map-level:has-text('first token left out')")
    assert "q0=8" in page.url  # the zoom stays
    row = page.locator(".scores tr", has_text="Induction").first.inner_text().split("\t")
    scores = run.heads.query(
        "layer == 1 and head == 0 and metric == 'induction' and variant == 'sink_excluded'"
    ).set_index("prompt_id")["value"]
    assert float(row[2]) == pytest.approx(scores["text"], rel=1e-2)
    assert "Entropy is drawn both ways" in page.locator("#no-form").inner_text()
    for tab in ("Atlas", "Sinks", "Heads", "Overview"):
        page.get_by_role("link", name=re.compile(rf"^{tab}( \(empty\))?$")).click()
        page.wait_for_url(re.compile("variant=sink_excluded"))
        page.locator(".current", has_text=tab).wait_for()
    assert page.locator("[data-variant]").count() == 2
    assert "first key left out" in page.locator("#metric-definition").inner_text()
    page.get_by_role("button", name="counted (raw)").click()
    page.wait_for_selector("[data-variant=raw][aria-pressed=true]")
    assert "variant" not in page.url


@pytest.mark.browser
def test_another_prompt_keeps_the_pin_and_the_next_head_the_zoom(page, address, run):
    page.goto(f"{address}/run/{run.id}/head/0/1?prompt=p000&pin=0.2&q0=0&q1=20&k0=0&k1=20")
    page.wait_for_selector(MAP)
    page.wait_for_selector("#strip[data-query]")  # the page grows no more
    page.locator('[id="{\\"option\\":\\"prompt\\"}"]').click()
    page.get_by_role("option", name=re.compile("^p001")).click()
    page.wait_for_selector(f"{MAP}[data-prompt=p001]")
    page.wait_for_selector("#pinned")
    assert "pin=0.2" in page.url
    assert "q0" not in page.url
    page.locator(".map-canvas").focus()
    page.keyboard.press("+")
    page.wait_for_url(re.compile("q0="))
    zoom = page.url.partition("?")[2]
    page.locator("#next-head").click()
    page.wait_for_selector("h1:has-text('L0H2')")
    page.wait_for_url(re.compile("q0="))
    assert re.findall(r"[qk][01]=\d+", page.url) == re.findall(r"[qk][01]=\d+", zoom)


def test_scores_without_such_a_form_say_so(runs, run):
    library = Library(runs)

    def text(path):
        return str(render(library, f"/run/{run.id}{path}", "variant=sink_excluded&x=first_token"))

    assert "No sink-excluded form, so the first token is counted: First token" in text("/heads")
    assert "Sink mass (counts the first token)" in text("/head/0/0")
    shown = str(render(library, f"/run/{run.id}", "variant=sink_excluded&metric=first_token"))
    assert "has no sink-excluded form; raw is shown" in shown
    assert "blocks of tokens, which have no sink-excluded form" in text("/atlas")
    assert "data-variant" not in text("/provenance")
