"""The page of jobs: read-only by default, nothing for other sites, and an analysis started from it."""

import shutil
import sys
import threading

import pytest
from lens_analyses.jobs.desk import JobDesk
from lens_analyses.jobs.worker import work
from lens_dashboards.job_routes import LARGEST_BODY
from lens_dashboards.server import create_app

from lens.common.files import write_json

from .conftest import served

SMALL = {"model.name": "induction-2l", "prompts.copied": 2}


@pytest.fixture
def client(tmp_path):
    return create_app(tmp_path, jobs=JobDesk(tmp_path)).server.test_client()


def test_a_dashboard_is_read_only_without_a_desk(runs):
    client = create_app(runs).server.test_client()
    for path in ("/api/jobs", "/api/jobs/form", "/api/jobs/1/log"):
        answer = client.get(path)
        assert (answer.status_code, "lens view --jobs" in answer.json["error"]) == (403, True)
    assert client.post("/api/jobs", json={"settings": SMALL}).status_code == 403
    assert not (runs / "jobs.sqlite").exists()


def test_a_job_is_queued_listed_and_cancelled(client):
    assert client.post("/api/jobs", json={"kind": "run", "settings": SMALL}).json == {"id": 1}
    state = client.get("/api/jobs").json
    assert state["workers"] == 0
    assert state["start"].startswith("lens worker --runs ")
    assert [(job["id"], job["status"]) for job in state["jobs"]] == [(1, "queued")]
    assert client.get("/api/jobs/1/log").json == {"lines": []}
    assert client.post("/api/jobs/1/cancel", json={}).json == {"id": 1}
    assert client.get("/api/jobs").json["jobs"][0]["status"] == "cancelled"
    assert client.post("/api/jobs/1/retry", json={}).status_code == 200


@pytest.mark.parametrize(
    ("path", "sent", "status", "reason"),
    [
        ("/api/jobs", {"data": "settings=1", "content_type": "application/x-www-form-urlencoded"}, 415, "send JSON"),
        ("/api/jobs", {"data": "{}", "content_type": "text/plain"}, 415, "send JSON"),
        ("/api/jobs", {"json": {}, "headers": {"Origin": "http://evil.example"}}, 403, "another site"),
        ("/api/jobs", {"json": {}, "headers": {"Origin": "null"}}, 403, "another site"),
        ("/api/jobs", {"json": []}, 400, "a job is"),
        ("/api/jobs", {"json": {"settings": {"modl.name": 3}}}, 400, "unknown setting modl"),
        ("/api/jobs", {"json": {"settings": {"prompts.text": "/etc/passwd"}}}, 400, "names a file"),
        ("/api/jobs", {"json": {"kind": "sh", "settings": {}}}, 400, "a job is one of run, estimate"),
        ("/api/jobs/delete", {"json": {"run": "../x"}}, 400, "there is no run '../x'"),
        ("/api/jobs/delete", {"json": ["x"]}, 400, "what is deleted is"),
        ("/api/jobs/4/cancel", {"json": {}}, 400, "there is no job 4"),
        (f"/api/jobs/{10**20}/retry", {"json": {}}, 400, f"there is no job {10**20}"),
        ("/api/jobs", {"data": "{", "content_type": "application/json"}, 400, "this is no JSON"),
        ("/api/jobs", {"data": "[" * 60000, "content_type": "application/json"}, 400, "this is no JSON"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_or_comes_from_elsewhere_is_refused(client, path, sent, status, reason):
    answer = client.post(path, **sent)
    assert answer.status_code == status
    assert reason in answer.json["error"]
    assert client.get("/api/jobs").json["jobs"] == []


def test_a_body_that_is_too_large_is_refused(client):
    sent = {"settings": {"model.name": "a" * LARGEST_BODY}}
    answer = client.post("/api/jobs", json=sent)
    assert answer.status_code == 413
    assert answer.json["error"] == "more than 65,536 bytes, which no job is"
    answer = client.post("/api/jobs/form", json={})
    assert (answer.status_code, "GET" in answer.headers["Allow"]) == (405, True)
    assert "not allowed" in answer.json["error"]


def test_a_foreign_host_is_refused(client):
    assert client.get("/api/jobs", headers={"Host": "evil.example"}).status_code == 400


def test_other_actions_do_not_exist(client):
    assert client.post("/api/jobs/1/delete", json={}).status_code in (404, 405)
    assert client.get("/api/jobs/..%2Frun.json/log").status_code == 404


@pytest.mark.browser
def test_a_run_is_deleted_from_the_list_once_that_is_confirmed(page, tmp_path, run):
    kept, gone = (shutil.copytree(run.path, tmp_path / name) for name in ("kept", "gone"))
    for folder in (kept, gone):
        write_json(folder / "run.json", {**run.meta, "id": folder.name})
    asked = []
    page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
    with served(create_app(tmp_path, jobs=JobDesk(tmp_path))) as address:
        page.goto(address)
        page.route("**/api/jobs/delete", lambda route: route.fulfill(body="no JSON"))
        page.get_by_title("delete gone:").click()
        page.get_by_role("alert").get_by_text("not valid JSON").wait_for()
        page.unroute("**/api/jobs/delete")
        page.get_by_title("delete gone:").click()
        page.wait_for_selector("[data-delete=gone]", state="detached")
        assert page.locator("table.runs tbody tr").count() == 1
    assert (asked, kept.exists(), gone.exists()) == (
        ["Delete gone? The files that the run wrote go."] * 2,
        True,
        False,
    )


COPY = """
import json, shutil, sys
from pathlib import Path
print("scoring 18 heads", file=sys.stderr, flush=True)
made = Path(sys.argv[1])
shutil.copytree(made, Path(sys.argv[sys.argv.index("--out") + 1]) / made.name)
print(json.dumps({"id": made.name}))
"""


@pytest.fixture
def at_work(tmp_path, run):
    """A dashboard with a desk, and a worker whose jobs are a run that was made before; their address."""
    stopped = threading.Event()
    how = {"stopped": stopped.is_set, "child": (sys.executable, "-c", COPY, str(run.path))}
    worker = threading.Thread(target=work, args=(tmp_path,), kwargs=how)
    worker.start()
    with served(create_app(tmp_path, jobs=JobDesk(tmp_path))) as address:
        yield address
    stopped.set()
    worker.join()


@pytest.mark.browser
def test_an_analysis_is_started_watched_and_opened(page, at_work):
    page.goto(f"{at_work}/jobs")
    page.get_by_label("model", exact=True).fill("text-lm-3l")
    page.get_by_label("copied prompts", exact=True).fill("1")
    page.get_by_label("tokens of each prompt").fill("40")
    page.get_by_label("windows").fill("2")
    page.get_by_role("button", name="Start").click()
    page.wait_for_selector("#job-row-1")
    page.get_by_role("button", name="log of job 1").click()
    page.wait_for_selector("#job-row-1[data-status=success]")
    page.wait_for_selector(".job-log:has-text('scoring 18 heads')")
    page.get_by_role("link", name="open run").click()
    page.wait_for_selector("""[id='{"points":"grid"}'] .heatmaplayer""")
    assert "text-lm-3l" in page.locator("h1").inner_text()


@pytest.mark.browser
def test_the_page_says_what_is_wrong(page, serve, runs, tmp_path):
    page.goto(f"{serve(runs)}/jobs")
    page.wait_for_selector("#jobs-notice:has-text('lens view --jobs')")
    assert not page.locator("#jobs-form").is_visible()
    assert page.problems == []  # nothing is asked for that would be refused


@pytest.mark.browser
def test_words_of_ones_own_take_the_place_of_the_text_that_the_form_begins_with(page, tmp_path):
    with served(create_app(tmp_path, jobs=JobDesk(tmp_path))) as address:
        page.goto(f"{address}/jobs")
        text, tokens = (
            page.get_by_label(name, exact=True) for name in ("text", "tokens of each prompt")
        )
        page.get_by_label("prompt", exact=True).fill("Call me")
        assert (text.input_value(), tokens.input_value()) == ("", "")
        page.get_by_label("prompt", exact=True).fill("")
        assert (text.input_value(), tokens.input_value()) == ("moby-dick", "128")
        for own in ("64", ""):  # what was typed, and all of the text
            tokens.fill(own)
            page.get_by_label("prompt", exact=True).fill("Call")
            assert (text.input_value(), tokens.input_value()) == ("", "")
            page.get_by_label("prompt", exact=True).fill("")
            assert (text.input_value(), tokens.input_value()) == ("moby-dick", own)
        page.get_by_label("prompt", exact=True).fill("Call me")
        tokens.fill("3")
        page.get_by_label("prompt", exact=True).fill("Call me Ishmael")
        assert (text.input_value(), tokens.input_value()) == ("", "3")
        tokens.fill("")
        page.get_by_role("button", name="Start").click()
        page.wait_for_selector("#job-row-1")
        assert "--prompt 'Call me Ishmael'" in page.locator("#job-row-1").inner_text()


@pytest.mark.browser
def test_the_form_follows_the_analysis_and_shows_refusals(page, tmp_path):
    with served(create_app(tmp_path, jobs=JobDesk(tmp_path))) as address:
        page.goto(f"{address}/jobs")
        page.wait_for_selector("#jobs-notice:has-text('No worker is running')")
        rule = page.locator("#job-analysis-rule")
        assert not rule.is_visible()
        page.get_by_label("analysis", exact=True).select_option("redistribute")
        assert rule.is_visible()
        page.get_by_label("tokens of each prompt").fill("0")
        page.get_by_role("button", name="Start").click()
        page.wait_for_selector("#jobs-problem:has-text('prompts.tokens must be at least 1, got 0')")
        assert "Nothing waits" in page.locator("#jobs-list").inner_text()
        page.get_by_label("tokens of each prompt").fill("64")
        page.get_by_role("button", name="Start").click()
        page.wait_for_selector("#job-row-1[data-status=queued]")
        page.wait_for_function(
            "() => document.getElementById('job-row-1').getBoundingClientRect().top >= 0"
        )
        page.get_by_role("button", name="cancel job 1").click()
        page.wait_for_selector("#job-row-1[data-status=cancelled]")
        found = axe(page)
        page.problems[:] = [text for text in page.problems if "400 (BAD REQUEST)" not in text]
    assert found == []


def axe(page):
    """Serious violations; the policy of the page lets no script in, so axe is evaluated."""
    from axe_playwright_python.sync_playwright import Axe

    return [
        (violation["id"], [node["html"][:120] for node in violation["nodes"]])
        for violation in Axe().run(page).response["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
