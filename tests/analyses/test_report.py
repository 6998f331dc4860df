"""The report: the same numbers as the run folder, in one page that loads nothing."""

import base64
import json
import re
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lens_analyses.comparison import write_comparison
from lens_analyses.report import render, write_report
from lens_analyses.report.charts import only_picture
from lens_analyses.report.limits import limits
from lens_analyses.report.maps import colored, png
from lens_analyses.report.page import embedded_json, interval, number, percent
from lens_dashboards import views
from lens_dashboards.library import Library

from lens.common.colors import VIRIDIS
from lens.common.errors import LensError
from lens.runs import open_run
from lens.runs.schema import RunFile, _ModelEntry
from lens.runs.sections import Section
from lens.traces.metrics import METRICS

from .conftest import ARGUMENTS, serious_violations


@pytest.fixture(scope="module")
def report(run_folder):
    return json.loads((run_folder / "report.json").read_text())


@pytest.fixture(scope="module")
def html(run_folder):
    return (run_folder / "report.html").read_text()


class Page(HTMLParser):
    """Elements with their attributes, and the text of table cells."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.cells = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] in ("td", "th") and data.strip():
            self.cells.append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_report_json_has_the_numbers_of_heads_parquet(report, run_folder):
    heads = open_run(run_folder).heads
    pooled = heads[heads["prompt_id"].isin(["text", "copied"])].reset_index(drop=True)
    written = pd.DataFrame(report["heads"]).rename(columns={"prompts": "prompt_id"})
    floats = dict.fromkeys(("value", "low", "high"), float)
    pd.testing.assert_frame_equal(written.astype(floats), pooled, check_dtype=False)
    columns = sum(1 + metric.sink_excluded for metric in METRICS.values())
    assert len(report["heads"]) == 2 * 18 * columns


def test_the_summary_rests_on_those_numbers(report):
    scores = {
        (row["prompts"], row["metric"], row["variant"], row["layer"], row["head"]): row
        for row in report["heads"]
    }
    kinds = [finding["kind"] for finding in report["summary"]]
    assert sorted(kinds) == ["duplicate_token", "induction", "previous_token", "sink"]
    for finding in report["summary"]:
        for head in finding["heads"]:
            row = scores[finding["prompts"], finding["metric"], "raw", head["layer"], head["head"]]
            assert (head["value"], head["low"], head["high"]) == (
                row["value"],
                row["low"],
                row["high"],
            )
            sure = row["low"] > max(finding["uniform"], finding["random_weights"])
            assert (row["value"] > finding["threshold"] and sure) == finding["found"]


def test_the_first_screen_says_value_interval_and_baseline(lens_command, tmp_path):
    """Of three copied prompts: two tell no head of induction apart."""
    arguments = [word if word != "2" else "3" for word in ARGUMENTS]
    folder = Path(lens_command(*arguments, "--out", tmp_path, "--json").json["path"])
    report = json.loads((folder / "report.json").read_text())
    page = Page((folder / "report.html").read_text())
    shown = report["headlines"]
    assert 2 <= len(shown) <= 5
    assert [one["surprise"] for one in shown] == sorted(
        (one["surprise"] for one in shown), reverse=True
    )
    for one in shown:
        assert one["low"] > one["baseline"] or one["high"] < one["baseline"]
        assert one["against"]
        assert f"{one['value']:.2f}" in one["text"]
    strips = [image for image in page.all("img") if image.get("class") == "strip"]
    assert len(strips) == len(shown)
    induction = next(one for one in shown if one["figure"] == "induction")
    rows = [
        row for row in report["heads"] if (row["prompts"], row["metric"]) == ("copied", "induction")
    ]
    best = max((row for row in rows if row["variant"] == "raw"), key=lambda row: row["value"])
    assert [induction[name] for name in ("value", "low", "high")] == [
        best[name] for name in ("value", "low", "high")
    ]
    assert induction["baseline"] == max(
        max(row["uniform"], row["random_weights"]) for row in rows if row["variant"] == "raw"
    )


def test_the_known_heads_are_named(report):
    named = {
        finding["kind"]: {(head["layer"], head["head"]) for head in finding["heads"]}
        for finding in report["summary"]
        if finding["found"]
    }
    assert named["induction"] == {(1, 2), (1, 3), (1, 5)}
    assert {(1, 0), (1, 5), (1, 3)} <= named["sink"]
    assert {(0, 0), (0, 5)} <= named["previous_token"]


def test_losses_and_chance(report, run_folder):
    prompts = open_run(run_folder).prompts
    text, copied, repeat = report["setup"]["losses"]
    assert text["value"] == pytest.approx(prompts["loss"][:3].mean())
    assert copied["value"] == pytest.approx(prompts["loss"][3:].mean())
    assert repeat["value"] == pytest.approx(prompts["loss_repeat"][3:].mean())
    assert text["chance"] == pytest.approx(np.log(512))
    assert text["low"] <= text["value"] <= text["high"]


def test_sink_rate_counts_heads_above_the_threshold_per_prompt(report, run_folder):
    run = open_run(run_folder)
    alpha = {
        name: run.trace(name).received.values[:, :, 0] / len(run.trace(name).tokens)
        for name in run.traces
    }
    for row in report["sinks"]["sensitivity"]:
        members = ("p000", "p001", "p002") if row["prompts"] == "text" else ("p003", "p004")
        shares = [(alpha[name] > row["epsilon"]).mean() for name in members]
        assert row["value"] == pytest.approx(np.mean(shares), abs=1e-12)
        assert row["n"] == len(members)
    assert [rate["epsilon"] for rate in report["sinks"]["rate"]] == [0.3, 0.3]


def test_provenance_is_complete(report, run_folder):
    run = open_run(run_folder)
    provenance = report["provenance"]
    assert provenance["command"] == run.meta["command"]
    assert provenance["config"] == run.config
    assert run.id.endswith(provenance["config_hash"])
    assert provenance["versions"]["torch"]
    assert "@software" in provenance["citation"]


def test_limits_speak_of_this_run(report):
    said = " ".join(report["limits"])
    assert (
        "Each text and copied prompt begins with the tokenizer's BOS token, '<|endoftext|>'."
        in said
    )
    assert "23 to 61 tokens" in said
    assert "cut into pieces of 61 tokens" in said
    assert "Moby-Dick, chapters 134 and 135, by Herman Melville, 183 tokens" in said
    assert "nothing here is about cause" in said
    assert report["limits"][-1] == (
        "Not measured: the effect of removing heads, circuits, the norm of what a head writes, attention after changing "
        "the prompt's first token, attention in another precision."
    )


def test_what_a_section_measured_is_not_told_as_missing(run_folder):
    run = open_run(run_folder)
    sinks = limits(run, run.config, {"detection", "first_token"})[-1]
    assert "first token" not in sinks
    assert sinks.startswith("Not measured: the effect of removing heads, circuits,")
    heads = limits(run, run.config, ["importance"])[-1]
    assert heads.startswith("Not measured: circuits,")
    assert "changing the prompt's first token" in heads
    assert "removing heads" not in limits(run, run.config, ["retrieval_kinds"])[-1]
    assert all("the norm" not in limits(run, run.config, [one])[-1] for one in ("roles", "mixing"))


def test_the_page_shows_the_numbers_of_the_json(report, page):
    shown = {}
    rows = [row for row in report["heads"] if row["variant"] == "raw"]
    for row in rows:
        if (row["prompts"], row["metric"]) == ("copied", "induction"):
            shown[row["layer"], row["head"]] = row["value"]
    cells = [float(cell["data-value"]) for cell in page.all("td") if cell.get("data-value")]
    columns = 9
    assert len(cells) == 18 * columns
    np.testing.assert_array_equal(cells[::columns], [shown[key] for key in sorted(shown)])
    for finding in report["summary"]:
        for head in finding["heads"]:
            assert f"{head['value']:.2f}" in finding["text"]


def test_nothing_is_loaded_from_anywhere(html, page):
    for tag, attribute in (
        ("script", "src"),
        ("link", "href"),
        ("img", "src"),
        ("iframe", "src"),
        ("source", "src"),
        ("object", "data"),
    ):
        for attrs in page.all(tag):
            assert not attrs.get(attribute, "data:").startswith(("http", "//", "/"))
    policy = next(
        attrs["content"]
        for attrs in page.all("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_plotly_is_inlined_once_and_the_page_stays_small(html):
    assert html.count("plotly.js v") == 1
    assert len(html.encode()) < 6e6


def test_the_page_can_be_read_without_seeing_it(page):
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert page.all("img")
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    assert all("scope" in heading for heading in page.all("th"))
    plots = [attrs for attrs in page.all("div") if "plot" in attrs.get("class", "").split()]
    assert plots
    assert all(attrs["aria-label"] for attrs in plots)


def test_a_title_from_the_outside_is_escaped(lens_command, tmp_path):
    file = tmp_path / "batch.jsonl"
    evil = "<script>alert(1)</script>"
    file.write_text(json.dumps({"text": f"It was {evil} and {evil} again.", "title": evil}) + "\n")
    answer = lens_command(
        "run", "--prompts", file, "--copied", "0", "--out", tmp_path / "runs", "--json"
    )
    assert answer.code == 0, answer.err
    html = (open_run(answer.json["path"]).path / "report.html").read_text()
    assert evil not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_data_cannot_end_its_script_element():
    text = embedded_json({"a": "</script><!--"})
    assert "<" not in text
    assert json.loads(text) == {"a": "</script><!--"}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "", "–"),
        (0.12345, "probability", "0.12"),
        (17.0, "position", "17"),
        (3.14159, "nats", "3.14"),
        (31.4159, "tokens", "31.4"),
        (3141.59, "tokens", "3,142"),
    ],
)
def test_numbers_for_people(value, unit, text):
    assert number(value, unit) == text


def test_shares_and_intervals_for_people():
    assert [percent(value) for value in (None, 0.0, 0.056, 0.27)] == ["–", "0%", "5.6%", "27%"]
    assert interval({"low": 0.123, "high": 0.456}, "probability") == "0.12–0.46"
    assert interval({"low": None, "high": 0.4}) == ""


def test_maps_are_coloured_on_a_log_scale_and_blank_where_nothing_is_seen():
    values = np.array([[1.0, 0.5], [1e-3, 0.0], [np.nan, np.sqrt(1e-3)]])
    hidden = np.array([[False, True], [False, False], [False, False]])
    pixels = colored(values, hidden)
    colors = ["#" + bytes(pixel[:3]).hex() for pixel in pixels.reshape(-1, 4)]
    assert colors[0] == VIRIDIS[-1]
    assert colors[2] == colors[3] == VIRIDIS[0]
    assert colors[5] == VIRIDIS[len(VIRIDIS) // 2]
    np.testing.assert_array_equal(pixels[..., 3], [[255, 0], [255, 255], [0, 255]])


def test_the_png_holds_the_pixels():
    pixels = np.arange(3 * 5 * 4, dtype=np.uint8).reshape(3, 5, 4)
    content = base64.b64decode(png(pixels).partition(",")[2])
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (5, 3)
    start = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[start - 4 : start])
    raw = zlib.decompress(content[start + 4 : start + 4 + length])
    rows = [raw[i * 21 : (i + 1) * 21] for i in range(3)]
    assert all(row[0] == 0 for row in rows)
    assert b"".join(row[1:] for row in rows) == pixels.tobytes()


def test_a_run_of_copied_prompts_alone_has_a_report(lens_command, tmp_path):
    answer = lens_command(
        "run",
        "--model",
        "induction-2l",
        "--copied",
        "1",
        "--no-keep-qk",
        "--out",
        tmp_path,
        "--json",
    )
    assert answer.code == 0, answer.err
    report = render(open_run(answer.json["path"])).numbers
    assert {row["prompts"] for row in report["heads"]} == {"copied"}
    assert [rate["low"] for rate in report["sinks"]["rate"]] == [None]


@pytest.fixture
def damaged_run(run_folder, tmp_path):
    """Copies the run with a section beside, and damages one of its files."""

    def made(name):
        copy = tmp_path / "damaged"
        shutil.copytree(run_folder, copy)
        table = pd.DataFrame({"amount": [0.5], "gain": [0.25]})
        columns = dict.fromkeys(table, "x")
        Section("dose", "How much", ("Half is enough.",), (), columns, {}, {"gains": table}).save(
            copy
        )
        (copy / name).write_bytes(b"PAR1")
        return open_run(copy)

    return made


@pytest.mark.parametrize(
    ("name", "cards"),
    [
        ("heads.parquet", {"scores of the heads", "sinks of the heads"}),
        ("prompts.parquet", {"scores of the heads", "sinks of the heads", "prompts"}),
        ("trace/p000/trace.json", set()),
    ],
)
def test_a_damaged_table_is_told_where_it_would_stand(damaged_run, browser, name, cards):
    run = damaged_run(name)
    written = write_report(run, run.path.parent)
    html = written.html.read_text()
    assert set(re.findall("<strong>The ([a-z ]*) cannot be shown.</strong>", html)) == cards
    assert html.count(f"{name} has 4 bytes instead of ") == len(cards)
    assert "Half is enough." in html
    context = browser.new_context(offline=True)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"file://{written.html}")
    assert complaints == []
    context.close()


def test_entries_that_can_be_done_without_are_left_out_of_the_pages(run_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    (copy / "manifest.json").unlink()
    entries = json.loads((copy / "run.json").read_text())
    for holder, model in ((entries, RunFile), (entries["model"], _ModelEntry)):
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        for name in holder.keys() & fields:
            if not fields[name].is_required():
                holder[name] = {"no": ["such", "thing"]}
    (copy / "run.json").write_text(json.dumps(entries))
    run = open_run(copy)
    assert len(run.damage) > 15
    html = render(run).html
    assert html.count("Warning:</strong> run.json: ") == len(run.damage)
    page = str(views.render(Library(tmp_path), f"/run/{copy.name}", ""))
    assert "This page failed" not in page
    written = write_comparison(open_run(run_folder), run, tmp_path / "c", command="lens compare")
    assert written.numbers["aligned"]


def test_a_run_of_which_nothing_can_be_read_gets_no_report(damaged_run):
    run = damaged_run("heads.parquet")
    shutil.rmtree(run.path / "sections")
    with pytest.raises(LensError, match=r"heads\.parquet has 4 bytes instead"):
        render(run)


def test_a_comparison_tells_a_damaged_table_and_compares_the_rest(
    damaged_run, run_folder, tmp_path
):
    run = damaged_run("heads.parquet")
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    with pytest.raises(LensError, match=r"heads\.parquet has 4 bytes instead"):
        write_comparison(run, open_run(other), tmp_path, command="lens compare")
    shutil.copytree(run.path / "sections", other / "sections")
    written = write_comparison(run, open_run(other), tmp_path, command="lens compare")
    assert not written.numbers["aligned"]
    assert "heads.parquet has 4 bytes instead of " in written.numbers["refusal"]
    [section] = written.numbers["sections"]
    assert [column["column"] for column in section["columns"]] == ["gain"]
    assert written.numbers["losses"]


def test_lens_report_writes_it_again(lens_command, run_folder, tmp_path, report):
    answer = lens_command("report", run_folder, "-o", tmp_path / "there", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["html"] == str(tmp_path / "there" / "report.html")
    again = json.loads((tmp_path / "there" / "report.json").read_text())
    assert again["heads"] == report["heads"]
    assert again["summary"] == report["summary"]


def test_lens_report_keeps_the_run_valid(lens_command, tmp_path):
    folder = lens_command(
        "run", "--model", "induction-2l", "--copied", "1", "--out", tmp_path, "--json"
    ).json["path"]
    (open_run(folder).path / "report.html").write_text("gone")
    assert lens_command("validate", folder).code == 1
    assert lens_command("report", folder).code == 0
    assert lens_command("validate", folder).code == 0


def test_a_run_that_is_being_written_gets_no_report(lens_command, run_folder, monkeypatch):
    monkeypatch.setattr("lens.runs.folders.Run.status", property(lambda self: "started"))
    answer = lens_command("report", run_folder)
    assert answer.code == 1
    assert "is being computed right now" in answer.err


@pytest.mark.browser
def test_in_a_browser(browser, run_folder, report):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"file://{run_folder}/report.html")
    page.wait_for_selector("#grid .main-svg")
    assert page.evaluate("document.documentElement.scrollHeight") < 6000
    assert 0 < page.locator(".headlines li").count() <= 5
    for picture in page.locator("[data-picture]").all()[:2]:  # on the first screen, drawn
        box = picture.bounding_box()
        assert box["y"] + box["height"] < 900
        assert picture.locator(".main-svg").count() > 0
    assert page.locator(".pair .main-svg").count() == 0  # what is folded is drawn when it is opened
    page.evaluate("location.hash = 'sinks'")
    page.locator("#sinks .pair .main-svg").first.wait_for()
    page.locator("#heads > details.fold > summary").click()

    page.select_option("#grid-kind", "text")
    page.locator(".grid-metric[data-kind=text]").select_option("entropy/sink_excluded")
    shown = page.evaluate("document.getElementById('grid').calcdata[0][0].z.map(row => [...row])")
    expected = np.full((3, 6), np.nan)
    for row in report["heads"]:
        if (row["prompts"], row["metric"], row["variant"]) == ("text", "entropy", "sink_excluded"):
            expected[row["layer"], row["head"]] = row["value"]
    np.testing.assert_allclose(shown, expected, rtol=1e-12)
    assert "Entropy" in page.locator("#grid .gtitle").text_content()
    assert "ln P" in page.locator("#grid-definition").text_content()

    page.locator(".open-map").first.click()
    zoomable = page.frame_locator("#map-frame")
    zoomable.locator("#map[data-ready]").wait_for()
    zoomable.locator(".map-canvas").focus()
    page.keyboard.press("+")
    zoomable.locator("#map:not([data-ready^='tokens 0,'])").wait_for()
    assert re.search(r"Largest: \d", zoomable.locator(".map-summary").inner_text())
    page.locator("#map-close").click()
    assert not page.locator("#map-dialog").is_visible()

    page.get_by_role("button", name="Induction", exact=True).click()
    first = page.locator("#heads-table tbody tr").first.locator("th").text_content()
    best = max(
        (
            row
            for row in report["heads"]
            if (row["prompts"], row["metric"]) == ("copied", "induction")
        ),
        key=lambda row: row["value"],
    )
    assert first == f"L{best['layer']}H{best['head']}"
    assert page.locator("th[aria-sort=descending]").count() == 1
    page.get_by_role("button", name="Head", exact=True).click()
    assert page.locator("#heads-table tbody th").first.text_content() == "L0H0"

    assert requests == [f"file://{run_folder}/report.html"]
    assert complaints == []
    context.close()


@pytest.mark.browser
def test_accessibility(browser, run_folder):
    assert serious_violations(browser, run_folder / "report.html", "#grid .main-svg") == []


def test_what_is_shown_where_nothing_stands_out_has_numbers():
    def figure(name, values):
        return {"data": [{"type": "heatmap", "z": values}], "layout": {"title": {"text": name}}}

    empty = {"dtype": "f8", "bdata": base64.b64encode(np.full(2, np.nan).tobytes()).decode()}
    figures = {
        "grid/text/entropy/raw": figure("other", [[1.0]]),
        "grid/copied/induction/raw": figure("the<br>grid", [[1.0]]),
        "section/patching/residual": figure("nothing", empty),
    }
    title, shown = only_picture(figures)
    assert (title, shown["layout"]["width"]) == ("the grid", 300)
    figures["section/patching/heads"] = figure("heads", [[None, 0.5]])
    assert only_picture(figures)[0] == "heads"
    assert only_picture({}) is None
