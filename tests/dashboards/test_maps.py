"""Several heads side by side: one zoom, one cursor and one query, chosen on the page of heads or by name."""

import json
import shutil

import pytest
from lens_dashboards.library import Library
from lens_dashboards.pages import heads, maps
from lens_dashboards.pages.maps import _apart
from lens_dashboards.selection import Selection, read_url

from tests.dashboards.test_pages import figures_of


def _told(library, view):
    parts = maps.page(library, view)
    config = next(part.data for part in parts if getattr(part, "id", "") == "maps-config")
    return config, json.dumps(
        [part.to_plotly_json() for part in parts], default=lambda one: one.to_plotly_json()
    )


def test_a_selection_of_heads_opens_and_shares_zoom_and_row(page, address, run):
    asked = []
    page.on("request", lambda request: asked.append(request.url.partition("/api/")[2]))
    page.goto(f"{address}/run/{run.id}/heads?heads=L1H3,L0H2,L2H0")
    page.click("#to-maps")
    page.locator("#maps .map[data-ready]").nth(2).wait_for(timeout=60_000)
    page.wait_for_selector("#strip[data-query]")
    kinds = sorted(url.split("/")[2] for url in asked if "/p000" in url)
    assert kinds == ["raster", "row", "tokens"]  # one request for all maps
    assert "heads=L1H3%2CL0H2%2CL2H0" in page.url
    canvas = page.locator("#maps canvas").nth(1)
    canvas.click(position={"x": 120, "y": 120})
    before = _ready(page)
    page.keyboard.press("+")
    for _ in range(100):
        if len(now := _ready(page)) == 1 and now != before:
            break
        page.wait_for_timeout(200)
    assert len(now) == 1
    assert now != before
    assert {"q0", "k1", "query"} <= {part.split("=")[0] for part in page.url.split("&")}
    assert "L0H2" in page.locator("#strip p").first.inner_text()
    page.locator("#maps-chosen a").nth(1).click()  # without L0H2, at the same zoom
    page.wait_for_url("**heads=L1H3%2CL2H0*")
    two = "() => { const all = [...document.querySelectorAll('#maps .map')]; return all.length === 2 && all.every(one => one.dataset.ready) }"
    page.wait_for_function(two, timeout=60_000)
    assert _ready(page) == now


def test_maps_that_wait_for_their_numbers_take_pointer_and_keys(page, serve, run, tmp_path):
    shutil.copytree(run.path, tmp_path / "HEADS")  # a name that stands in no address
    held = []
    page.route("**/tokens/**", lambda route: held.append(route))
    page.goto(f"{serve(tmp_path)}/run/HEADS/maps?heads=L1H3,L0H2")
    canvas = page.locator("#maps canvas").first
    canvas.wait_for()
    _until(page, held)
    canvas.hover(position={"x": 90, "y": 90})
    canvas.press("+")
    page.locator("#maps .map").first.get_by_role("button", name="CSV").click()
    page.locator("#maps .map").first.get_by_role("button", name="show everything").click()
    for route in held:
        route.continue_()
    page.locator("#maps .map[data-ready]").nth(1).wait_for(timeout=60_000)
    assert page.problems == []


def test_full_screen_fills_the_screen(page, address, run):
    page.goto(f"{address}/run/{run.id}/maps?heads=L1H3,L0H2")
    page.locator("#maps .map[data-ready]").nth(1).wait_for(timeout=60_000)
    canvas = page.locator("#maps canvas").nth(1)
    before = canvas.bounding_box()["height"]
    page.locator("#maps .map").nth(1).get_by_role("button", name="full screen").click()
    page.wait_for_function("document.fullscreenElement")
    page.wait_for_timeout(500)
    assert canvas.bounding_box()["height"] > 0.75 * 900 > before
    side = page.locator("#maps .map-side").nth(1)
    beside, square = side.bounding_box(), canvas.bounding_box()
    assert (
        beside["x"] >= square["x"] + square["width"]
    )  # the row that is marked, where the square leaves room
    assert beside["x"] + beside["width"] > 1400
    assert side.locator(".token").count() == 101
    page.evaluate("document.exitFullscreen()")
    page.wait_for_function("!document.fullscreenElement")
    page.wait_for_timeout(500)
    assert canvas.bounding_box()["height"] == before


def test_heads_of_a_profile_stand_by_two_usual_scores(runs, run):
    parts = heads.page(Library(runs), Selection(page="heads", run=run.id))
    figure, _ = next(figures_of(parts))
    layout = figure.layout
    titles = [layout[axis].title.text.partition(" (")[0] for axis in ("xaxis", "yaxis")]
    assert titles == ["Induction", "Previous token"]


def _ready(page):
    """What the maps show: the level and the rectangle of each."""
    return {one.get_attribute("data-ready") for one in page.locator("#maps .map").all()}


def test_what_is_not_there_is_said_and_nine_are_the_most(runs, run):
    every = [f"L{layer}H{head}" for layer in range(3) for head in range(6)]
    view = Selection(page="maps", run=run.id).where(heads=",".join(["L9H9", *every]))
    config, said = _told(Library(runs), view)
    assert [(one["layer"], one["head"]) for one in config["maps"]] == [(0, h) for h in range(6)] + [
        (1, h) for h in range(3)
    ]
    assert "there is no L9H9" in said
    assert "At most 9 maps are shown" in said


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        (("2026-11-29-t5-profile-bba8", "2026-11-30-t5-profile-bba8"), ("2026-11-29", "2026-11-30")),
        (("2026-11-29-t5-profile-bba8", "2026-11-30-t5-profile-c0de"), ("bba8", "c0de")),
        (("2026-11-29-t5-encoder-profile-bba8", "2026-11-29-t5-cross-profile-bba8"), ("encoder", "cross")),
        (("run-1", "run-1-again"), ("run-1", "again")),
        (("a", "a-b-a"), ("a", "b-a")),
    ],
)  # fmt: skip
def test_runs_of_one_model_are_named_by_what_their_ids_do_not_share(ids, names):
    assert _apart(("m", "m"), ids) == names
    assert _apart(("m", "n"), ids) == ("m", "n")


def test_two_runs_are_shown_on_the_prompt_that_both_have(runs, run, tmp_path):
    shutil.copytree(run.path, tmp_path / run.id)
    other = tmp_path / f"{run.id[:-2]}zz"
    shutil.copytree(run.path, other)
    index = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(index | {"id": other.name}))
    (other / "manifest.json").unlink(missing_ok=True)
    view = Selection(page="maps", run=run.id).where(heads="L1H3", vs=other.name, others="L0H1,L1H3")
    config, said = _told(Library(tmp_path), view)
    assert [(one["run"], one["layer"], one["head"]) for one in config["maps"]] == [
        (run.id, 1, 3),
        (other.name, 0, 1),
        (other.name, 1, 3),
    ]
    a, b = (one.rpartition("-")[2] for one in (run.id, other.name))  # the model is one
    titles = [f"L1H3 of {a}", f"L0H1 of {b}", f"L1H3 of {b}"]
    assert [one["title"] for one in config["maps"]] == titles
    assert all(f"Remove {title}" in said for title in titles[1:])
    assert {one["prompt"] for one in config["maps"]} == {"p000"}
    elsewhere = shutil.copytree(other, tmp_path / f"{run.id[:-2]}zzz")  # later, of another model
    meta = index | {"id": elsewhere.name, "model": index["model"] | {"name": "another"}}
    (elsewhere / "run.json").write_text(json.dumps(meta))
    parts = json.dumps(
        [part.to_plotly_json() for part in maps.page(Library(tmp_path), view)],
        default=lambda one: one.to_plotly_json(),
    )
    offered = [f'"value": "{name}"' for name in (other.name, elsewhere.name)]
    assert parts.index(offered[0]) < parts.index(offered[1])
    nothing, said = _told(Library(tmp_path), view.where(vs="missing"))
    assert len(nothing["maps"]) == 1
    assert "missing" in said


@pytest.mark.parametrize(
    "search", ["heads=L0H1&q0=1&q1=9&k0=0&k1=8&query=3", "heads=L0H1%2CL1H1&vs=b"]
)
def test_a_link_restores_the_view(search):
    view, notes = read_url("/run/a/maps", search)
    assert (view.page, notes) == ("maps", [])
    assert read_url(*view.url().split("?")) == (view, [])


def test_a_pin_keeps_zoom_and_row_and_a_pressed_switch_is_readable(page, address, run):
    page.goto(f"{address}/run/{run.id}/head/1/3")
    page.wait_for_selector("#map[data-ready]")
    page.locator("#map canvas").click(position={"x": 200, "y": 200})
    page.keyboard.press("+")
    page.wait_for_url("**q0=*")
    zoom = {part for part in page.url.partition("?")[2].split("&") if part[0] in "qk"}
    page.click("#pin")
    page.wait_for_url("**pin=1.3*")
    assert zoom <= set(page.url.partition("?")[2].split("&"))
    page.wait_for_selector("#pin:has-text('unpin')")  # the page of the new address is drawn
    pressed = page.locator(".switch button[aria-pressed=true]")
    pressed.hover()
    colors = pressed.evaluate(
        "(one) => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor]"
    )
    assert colors[0] == "rgb(255, 255, 255)"
    assert colors[1] not in ("rgb(255, 255, 255)", "rgb(244, 245, 247)")


def test_an_answer_for_a_head_that_was_left_is_dropped(page, address, run):
    late, maps = [], []

    def hold(route):
        held = "map-mounted" in route.request.post_data and "curves" in route.request.post_data
        late.append(route) if held and not late else route.continue_()

    page.route("**/_dash-update-component*", hold)
    page.route("**/raster/**L1H4*", lambda route: maps.append(route))
    page.goto(f"{address}/run/{run.id}/head/1/3")
    _until(page, late)
    page.click("#next-head")
    page.wait_for_selector("h1:has-text('L1H4')")
    _until(page, maps)
    late[0].continue_()
    page.wait_for_timeout(800)
    assert page.locator(".curves > *").count() == 0
    for route in maps:
        route.continue_()
    page.wait_for_selector(".curves .js-plotly-plot", timeout=60_000)
    assert "L1H3" not in page.locator(".curves").inner_text()
    assert page.problems == []


def _until(page, held):
    while not held:
        page.wait_for_timeout(20)
