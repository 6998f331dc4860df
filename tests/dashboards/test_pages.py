"""Pages with controls: what they show is what the run holds, and the link keeps every choice."""

import csv
import io
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from dash import html
from lens_dashboards.circuit_edges import circuit_edges
from lens_dashboards.head_columns import head_columns
from lens_dashboards.library import Library
from lens_dashboards.pages.circuits import _worth
from lens_dashboards.pages.compare import _heads
from lens_dashboards.pages.tabs import NEEDS
from lens_dashboards.selection import Selection
from lens_dashboards.server import create_app
from lens_dashboards.views import RENDER, render

from lens.common.errors import LensError
from lens.runs import compare_runs

CIRCUIT = """[id='{"points":"circuit"}']"""
WORTH = re.compile(r"([\d,]+) edges.*faithfulness (-?[\d.]+)")


@pytest.fixture(scope="module")
def every_run(tmp_path_factory, run, heads_run, circuit_run, sinks_run, redistribute_run):
    """One folder with a run of each kind."""
    folder = tmp_path_factory.mktemp("every")
    for one in (run, heads_run, circuit_run, sinks_run, redistribute_run):
        (folder / one.id).symlink_to(one.path)
    return folder


@pytest.fixture(scope="module")
def site(serve, every_run):
    return serve(every_run)


def words(parts):
    """All text of a page, as one string."""
    return json.dumps(
        [part.to_plotly_json() for part in parts],
        default=lambda o: o.to_plotly_json() if hasattr(o, "to_plotly_json") else o.tolist(),
    )


def test_columns_of_heads_are_those_of_profile_and_analyses(heads_run):
    found = head_columns(heads_run, "copied", "raw")
    table = found.table.set_index("name")
    profile = heads_run.heads.query(
        "prompt_id == 'copied' and metric == 'induction' and variant == 'raw'"
    )
    np.testing.assert_allclose(
        table["induction"], profile.sort_values(["layer", "head"])["value"].to_numpy()
    )
    scores = heads_run.section("importance").tables["scores"].set_index("name")
    np.testing.assert_allclose(
        table["importance: ablation (mean)"], scores["ablation (mean)"].loc[table.index]
    )
    assert set(found.labels) == set(found.definitions) == set(table.columns) - {"layer", "head"}
    assert "patterns: pattern" in found.classes


@pytest.mark.browser
def test_heads_axes_selection_and_the_way_back(page, site, heads_run):
    page.goto(f"{site}/run/{heads_run.id}/heads")
    page.wait_for_selector(".scatterlayer .point")
    scores = heads_run.section("importance").tables["scores"].set_index("name")
    first = page.locator(".tall tbody tr").first.inner_text().split()
    assert first[0] == scores["ablation (mean)"].idxmax()
    assert float(first[1]) == pytest.approx(scores["ablation (mean)"].max(), rel=1e-2)
    page.get_by_role("link", name="select").nth(1).click()
    page.wait_for_url(re.compile("heads=L"))
    page.wait_for_selector("tr.marked")
    page.locator('[id="{\\"option\\":\\"show\\"}"]').click()
    page.get_by_role("option", name="one score, as a grid").click()
    grid = """[id='{"points":"heads"}']"""
    page.wait_for_selector(f"{grid} .heatmaplayer")
    assert "show=grid" in page.url
    kept = page.url
    plot = page.locator(f"{grid} .nsewdrag")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.375, box["y"] + box["height"] * 0.75)
    page.wait_for_selector("#map[data-ready]")
    assert "/head/1/1" in page.url
    page.go_back()
    page.wait_for_selector("tr.marked")
    assert page.url == kept


def test_filters_of_heads_hold_and_say_when_they_cannot(every_run, heads_run):
    library, where = Library(every_run), f"/run/{heads_run.id}/heads"
    shown = words(render(library, where, "layers=1-1"))
    assert "L1H0" in shown
    assert "L0H0" not in shown
    assert "Layers are two numbers" in words(render(library, where, "layers=x"))
    assert "no x 'magic'" in words(render(library, where, "x=magic"))
    assert "No head passes these filters" in words(render(library, where, "layers=7-9"))


def test_the_page_of_circuits_quotes_the_circuit_and_no_neighbour_of_its_size(
    every_run, circuit_run
):
    section = circuit_run.section("circuit")
    own = section.tables["same_size"].set_index("circuit").loc["circuit"]
    curve = section.tables["faithfulness"]
    assert own["edges"] not in set(curve["edges"])  # so a neighbour would be another circuit
    shown = words(render(Library(every_run), f"/run/{circuit_run.id}/circuits", ""))
    quoted = f"{own['edges']:,.0f} edges, the circuit of this run: faithfulness {own['faithfulness']:.2f} "
    assert quoted in shown
    assert "the nearest size that was run" not in shown
    usual = section.summary[0]
    assert f"faithfulness of {own['faithfulness']:.2f} " in usual


def test_a_circuit_without_others_of_its_size_is_quoted_alone():
    """All edges, or a single prompt: no interval, and no random circuit that would be another."""
    own = pd.DataFrame(
        {"faithfulness": [1.0, np.nan], "low": np.nan, "high": np.nan}, index=["circuit", "uniform"]
    )
    said = _worth(pd.DataFrame(), own, "signed", 81)
    assert said == "81 edges, the circuit of this run: faithfulness 1.00 on held-out prompts."
    curve = {"faithfulness": 0.5, "low": 0.4, "high": 0.6, "random": np.nan, "random_low": np.nan}
    curve = pd.DataFrame(
        [curve | {"random_high": np.nan, "kl": 0.25, "edges": 9, "ranking": "signed"}]
    )
    said = _worth(curve, None, "signed", 9)
    assert said == (
        "9 edges: faithfulness 0.50 [0.40, 0.60] on held-out prompts; KL divergence from the model 0.25 nats."
    )
    said = _worth(curve.assign(random=0.1, random_low=0.0, random_high=0.2), None, "signed", 9)
    assert "on held-out prompts; random circuits of that size 0.10 [0.00, 0.20]; KL" in said


@pytest.mark.browser
def test_the_number_of_edges_moves_graph_and_curve_together(page, site, circuit_run):
    page.goto(f"{site}/run/{circuit_run.id}/circuits")
    page.wait_for_selector(f"{CIRCUIT} .point")
    curve = circuit_run.section("circuit").tables["faithfulness"]
    absolute = curve[curve["ranking"] == "absolute"]
    row = absolute.loc[(absolute["share"] - 0.2).abs().idxmin()]
    page.goto(f"{site}/run/{circuit_run.id}/circuits?ranking=absolute&edges={row['edges']:.0f}")
    page.wait_for_selector(f"{CIRCUIT} .point")
    count, value = WORTH.search(page.locator("#worth").inner_text()).groups()
    assert int(count) == row["edges"]
    assert float(value) == pytest.approx(row["faithfulness"], abs=0.005)
    page.locator("#edge-slider [role=slider]").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_url(lambda url: f"edges={row['edges']:.0f}" not in url)
    page.locator("#worth", has_not_text=re.compile(rf"^{row['edges']:.0f} edges")).wait_for()
    bigger = int(WORTH.search(page.locator("#worth").inner_text()).group(1).replace(",", ""))
    assert bigger > row["edges"]


@pytest.mark.browser
def test_a_circuit_is_saved_loaded_and_refused(page, site, circuit_run, tmp_path):
    from lens.circuits import load_circuit

    page.goto(f"{site}/run/{circuit_run.id}/circuits?ranking=absolute&edges=12")
    page.wait_for_selector(f"{CIRCUIT} .point")
    with page.expect_download() as download:
        page.get_by_role("link", name="save this circuit").click()
    saved = tmp_path / "circuit.json"
    download.value.save_as(saved)
    circuit = load_circuit(saved)
    edges = circuit_edges(circuit_run)
    assert list(circuit.edges) == [edges.names[edge] for edge in edges.top(12, "absolute")]
    page.locator("#circuit-file input").set_input_files(saved)
    page.wait_for_selector("""[id='{"points":"loaded"}'] .point""")
    assert f"{circuit.n} edges" in page.locator("#loaded-circuit h3").inner_text()
    other = tmp_path / "other.json"
    other.write_text('{"format": "something"}')
    page.locator("#circuit-file input").set_input_files(other)
    page.get_by_text("other.json: this is no circuit of lens").wait_for()


def test_edges_of_the_page_are_those_of_the_library(circuit_run):
    from lens import circuits

    edges = circuit_edges(circuit_run)
    scores = circuits.exports.from_mib(circuit_run.path / "circuits" / "mib" / "importances.json")
    for count in (5, 16, 33):
        for ranking in ("absolute", "signed"):
            expected = scores.top(count, absolute=ranking == "absolute")
            assert {edges.names[edge] for edge in edges.top(count, ranking)} == set(expected.edges)
    size, path = edges.paths(list(range(len(edges.names))))[0]
    assert path[0] == "input"
    assert path[-1] == "logits"
    joined = [
        max(
            abs(score)
            for name, score in zip(edges.names, edges.scores, strict=True)
            if name.startswith(f"{a}->{b}") and name[len(f"{a}->{b}") :][:1] in ("", "<")
        )
        for a, b in itertools.pairwise(path)
    ]
    assert size == pytest.approx(min(joined))
    with pytest.raises(LensError, match=r"has no edge 'a9\.h9->logits'"):
        edges.find(["a9.h9->logits"])


@pytest.mark.browser
def test_the_threshold_of_sinks_counts_the_stored_heads(page, site, sinks_run):
    heads = sinks_run.section("detection").tables["heads"]
    for epsilon in (0.2, 0.6):
        page.goto(f"{site}/run/{sinks_run.id}/sinks?epsilon={epsilon}")
        page.wait_for_selector("#epsilon .point")
        links = page.locator("#sink-heads a").all_inner_texts()
        above = heads[heads["alpha"] > epsilon].sort_values("alpha", ascending=False)
        assert links == [f"L{a}H{b}" for a, b in zip(above["layer"], above["head"], strict=True)]


@pytest.mark.browser
def test_one_amount_of_redistribution_shows_its_numbers(page, site, redistribute_run):
    table = redistribute_run.section("dose").tables["response"].set_index("amount")
    page.goto(f"{site}/run/{redistribute_run.id}/redistribution?amount=0.5")
    shown = page.locator("#dose-rows tr").first.inner_text().split("\t")
    assert float(shown[2]) == pytest.approx(table.loc[0.5, "gain"], rel=1e-2)


@pytest.mark.browser
def test_runs_without_induction_are_compared_by_a_metric_that_they_have(heads_run, circuit_run):
    found = compare_runs(heads_run, circuit_run)
    unknown = found.heads["metric"] == "induction"
    assert unknown.any()
    heads = found.heads.assign(difference=found.heads["difference"].mask(unknown))
    (shown,) = _heads(replace(found, heads=heads), Selection(page="compare"))
    words = str(shown)
    assert "Entropy" in words
    assert "Induction" not in words
    none = heads.assign(difference=np.nan)
    (card,) = _heads(replace(found, heads=none), Selection(page="compare"))
    assert "share no score of a head" in str(card)


def test_two_runs_are_compared_and_one_with_itself_refused(page, site, heads_run, circuit_run):
    page.goto(f"{site}/compare?a={heads_run.id}&b={circuit_run.id}&metric=previous_token")
    page.wait_for_selector("#scatter .point")
    page.wait_for_selector("#difference .heatmaplayer")
    page.goto(f"{site}/compare?a={heads_run.id}&b={heads_run.id}")
    page.get_by_text("are the same run").wait_for()


@pytest.mark.browser
def test_a_pinned_head_stays_beside_the_others(page, site, run):
    page.goto(f"{site}/run/{run.id}/head/0/2")
    page.locator("#pin").click()
    page.wait_for_url(re.compile("pin=0.2"))
    page.get_by_role("link", name="unpin this head").wait_for()
    page.locator("#next-head").click()
    page.wait_for_selector("#pinned #map-pinned .heatmaplayer")
    assert "/head/0/3" in page.url
    assert page.locator("#pinned h2").all_inner_texts() == ["This head: L0H3", "Pinned: L0H2"]


@pytest.mark.browser
def test_the_menu_of_a_figure_saves_its_numbers(page, site, heads_run):
    page.goto(f"{site}/run/{heads_run.id}/analysis/importance")
    page.wait_for_selector("#figure-grid_0 .heatmaplayer")
    menu = page.get_by_role("group", name="Menu: Which heads matter: grid 0")
    with page.expect_download() as download:
        menu.get_by_role("button", name="CSV").click()
    assert download.value.suggested_filename == f"{heads_run.id}_analysis_importance_grid_0.csv"
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text())))
    scores = heads_run.section("importance").tables["scores"].set_index(["layer", "head"])
    assert len(rows) == len(scores)
    for row in rows:
        value = scores.loc[(int(row["y"]), int(row["x"])), "ablation (mean)"]
        assert float(row["z"]) == pytest.approx(value, rel=1e-5)
    with page.expect_download() as download:
        menu.get_by_role("button", name="PNG").click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")
    with page.expect_download() as download:
        menu.get_by_role("button", name="JSON").click()
    assert json.loads(download.value.path().read_text())["data"][0]["type"] == "heatmap"


def test_the_python_of_every_page_makes_its_numbers_again(
    every_run, heads_run, circuit_run, sinks_run, redistribute_run
):
    library = Library(every_run)
    links = [
        f"/run/{heads_run.id}/heads?layers=1-1&heads=L1H2&only=1",
        f"/run/{heads_run.id}/heads?show=grid&variant=sink_excluded&y=entropy",
        f"/run/{circuit_run.id}/circuits",
        f"/run/{circuit_run.id}/circuits?ranking=signed&edges=12",
        f"/run/{sinks_run.id}/sinks",
        f"/run/{redistribute_run.id}/redistribution",
        f"/compare?a={heads_run.id}&b={circuit_run.id}",
        f"/run/{heads_run.id}/analysis/importance",
    ]
    for link in links:
        path, _, search = link.partition("?")
        found = list(figures_of(render(library, path, search)))
        assert found, link
        for shown, code in found:
            *lines, last = code.strip().split("\n")
            names = {}
            exec("\n".join(lines), names)
            again = eval(last, names)
            again = again[-1] if isinstance(again, tuple) else again
            assert again.data, code
            for ours, theirs in zip(again.data, shown.data, strict=False):  # marks are added last
                for axis in "xyz":
                    same_numbers(getattr(ours, axis, None), getattr(theirs, axis, None))


def same_numbers(expected, got):
    """Two axes of traces hold the same numbers or words."""
    if expected is None or got is None:
        assert expected is got
    elif np.asarray(expected).dtype.kind in "fiu":
        np.testing.assert_allclose(np.asarray(got, float), np.asarray(expected, float), rtol=1e-6)
    else:
        assert list(got) == list(expected)


def test_commands_in_messages_are_code(circuit_run):
    library = Library(circuit_run.path.parent)
    (told,) = (
        part
        for part in _every(render(library, f"/run/{circuit_run.id}/policies", ""), "P")
        if getattr(part, "className", "") == "small"
    )
    assert [one.children for one in told.children if isinstance(one, html.Code)] == [
        "lens policies"
    ]
    assert told.children[1].startswith(" needs text, and this run has copied prompts alone;")


def test_no_page_shows_the_marks_of_code(every_run):
    library = Library(every_run)
    marked = [
        (run.id, page)
        for run in library.runs()
        for page in (
            "",
            *(f"/{name}" for name in ("heads", "maps", "atlas", "provenance", *NEEDS)),
            *(f"/analysis/{name}" for name in run.sections),
        )
        if "`" in words(render(library, f"/run/{run.id}{page}", ""))
    ]
    assert marked == []
    same = library.runs()[0].id
    for page in ("/jobs", "/compare", "/run/none", f"/compare?a={same}&b={same}"):
        assert "`" not in words(render(library, *page.partition("?")[::2]))


def test_no_figure_is_large(
    every_run, big_run, heads_run, circuit_run, sinks_run, redistribute_run
):
    most = 2 << 20
    pages = [
        f"/run/{heads_run.id}/heads",
        f"/run/{circuit_run.id}/circuits",
        f"/run/{sinks_run.id}/sinks",
        f"/run/{redistribute_run.id}/redistribution",
        f"/run/{heads_run.id}/head/1/1?pin=0.0",
    ]
    library = Library(every_run)
    parts = [render(library, *page.partition("?")[::2]) for page in pages]
    parts += [
        render(Library(big_run.path.parent), f"/run/{big_run.id}{page}", "")
        for page in ("", "/heads", "/head/31/31")
    ]
    for page in parts:
        for figure in _every(page, "Graph"):
            if getattr(figure, "figure", None) is not None:
                assert len(figure.figure.to_json()) < most, figure.id


@pytest.mark.browser
def test_a_thousand_heads_are_browsed(page, serve, big_run):
    site = serve(big_run.path.parent)
    page.goto(f"{site}/run/{big_run.id}/heads?show=grid")
    page.wait_for_selector(".heatmaplayer")
    assert page.locator(".tall tbody tr").count() == 200
    assert "1024 heads, the last 824 not shown" in page.locator("#page").inner_text()
    page.goto(f"{site}/run/{big_run.id}/heads?layers=31-31&sort=entropy&y=entropy")
    page.wait_for_selector(".scatterlayer .point")
    assert page.locator(".tall tbody tr").count() == 32
    page.goto(f"{site}/run/{big_run.id}/head/31/31")
    page.wait_for_selector("#map[data-ready]")
    page.goto(f"{site}/run/{big_run.id}/atlas")
    page.wait_for_selector("#atlas canvas")


def test_a_fault_of_the_dashboard_is_a_card_with_details(every_run, run, monkeypatch, caplog):
    def broken(library, view):
        raise ZeroDivisionError("the sky fell")

    monkeypatch.setitem(RENDER, "provenance", broken)
    shown = words(render(Library(every_run), f"/run/{run.id}/provenance", ""))
    assert "ZeroDivisionError: the sky fell" in shown
    assert f"page /run/{run.id}/provenance" in shown
    assert "Traceback" not in shown
    assert "the sky fell" in caplog.text


def test_downloads_equal_the_page(every_run, heads_run):
    client = create_app(every_run).server.test_client()
    answer = client.get(f"/api/run/{heads_run.id}/columns.csv?group=copied")
    read = pd.read_csv(io.StringIO(answer.get_data(as_text=True)))
    read, shown = (
        table.select_dtypes("number")
        for table in (read, head_columns(heads_run, "copied", "raw").table)
    )
    pd.testing.assert_frame_equal(read, shown, check_dtype=False)
    assert client.get(f"/api/run/{heads_run.id}/columns.csv?group=no").status_code == 404
    refused = client.get(f"/api/run/{heads_run.id}/circuit.json?edges=3")
    assert "has no circuit; make one: lens circuit" in refused.get_data(as_text=True)


@pytest.mark.parametrize(
    ("page_name", "command"),
    [
        ("sinks", "lens sinks -c "),
        ("redistribution", "lens redistribute -c "),
        ("circuits", "lens circuit -c "),
        ("heads", "lens heads -c "),
    ],
)
def test_an_empty_page_says_which_command_fills_it(every_run, run, page_name, command):
    assert command in words(render(Library(every_run), f"/run/{run.id}/{page_name}", ""))


@pytest.mark.parametrize("option", ["edit", "epsilon"])
def test_what_a_link_asks_of_sinks_and_cannot_have_is_said(every_run, sinks_run, option):
    shown = words(render(Library(every_run), f"/run/{sinks_run.id}/sinks", f"?{option}=nothing"))
    assert "'nothing'" in shown


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["heads", "circuits", "sinks", "redistribution", "compare"])
def test_axe_finds_nothing_serious_on_a_narrow_page(
    browser, site, kind, heads_run, circuit_run, sinks_run, redistribute_run
):
    from axe_playwright_python.sync_playwright import Axe

    of = {
        "heads": heads_run,
        "circuits": circuit_run,
        "sinks": sinks_run,
        "redistribution": redistribute_run,
    }
    path = f"/run/{of[kind].id}/{kind}" if kind in of else "/compare"
    context = browser.new_context(bypass_csp=True, viewport={"width": 430, "height": 900})
    tab = context.new_page()
    tab.goto(site + path)
    tab.wait_for_selector(".main-svg")
    width = tab.evaluate("document.documentElement.scrollWidth")
    found = Axe().run(tab).response["violations"]
    context.close()
    assert [item["id"] for item in found if item["impact"] in ("serious", "critical")] == []
    assert width <= 430


def _every(parts, kind):
    """Every component of a kind on a page, in order."""
    if isinstance(parts, (list, tuple)):
        for part in parts:
            yield from _every(part, kind)
    elif hasattr(parts, "to_plotly_json"):
        if type(parts).__name__ == kind:
            yield parts
        yield from _every(getattr(parts, "children", None), kind)


def figures_of(parts):
    """Every figure of a page that has a `Python` block, with the code."""
    for box in _every(parts, "Div"):
        if getattr(box, "className", "") == "figure":
            code = [part.children for part in _every(box.children[2:], "Code")]
            if code:
                yield box.children[0].figure, code[0]
