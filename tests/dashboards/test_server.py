"""The server: what it answers, whom it answers, and what it never does."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, suppress

import numpy as np
import pytest
from dash import Dash, html
from lens_dashboards import listening
from lens_dashboards.guard import LARGEST_BODY, names_of
from lens_dashboards.library import Library
from lens_dashboards.pages.runs import PART
from lens_dashboards.server import create_app, serve
from lens_dashboards.views import render
from waitress import wasyncore

from lens.common.errors import LensError
from lens.common.files import write_json
from lens.runs import open_run
from lens.runs.exchange.tables import csv_text


@pytest.fixture
def client(runs):
    return create_app(runs).server.test_client()


def text_of(components) -> str:
    return json.dumps([component.to_plotly_json() for component in components], default=_plain)


def _plain(value):
    return value.to_plotly_json() if hasattr(value, "to_plotly_json") else str(value)


def test_it_starts_without_torch_and_transformers(runs):
    code = (
        "import sys; from lens_dashboards.server import create_app;"
        f"app = create_app({str(runs)!r});"
        "client = app.server.test_client(); assert client.get('/').status_code == 200;"
        "from lens_dashboards.views import render; from lens_dashboards.library import Library;"
        f"library = Library({str(runs)!r}); run = library.runs()[0].id;"
        "render(library, f'/run/{run}', ''); render(library, f'/run/{run}/head/1/2', '');"
        "assert client.get(f'/api/run/{run}/raster/p000/L1H2').status_code == 200;"
        "print({'torch', 'transformers', 'transformer_lens'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_env()
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "set()"


def _env():
    import os

    return {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}


def test_raster_carries_the_numbers_and_an_etag(client, run):
    url = f"/api/run/{run.id}/raster/p000/L1H2"
    answer = client.get(url)
    [header] = json.loads(answer.headers["X-Raster"])
    values = np.frombuffer(answer.data, "<f4").reshape(header["rows"], header["columns"])
    expected = run.trace("p000").tile(1, 2, (0, 101), (0, 101)).astype("f4")
    np.testing.assert_array_equal(np.nan_to_num(values), expected)
    again = client.get(url, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_the_rasters_of_several_heads_are_one_answer(client, run):
    names = ("L1H2", "L0H3", "L2H5")
    where = f"/api/run/{run.id}/raster/p000/"
    how = "?q0=20&q1=101&k0=3&k1=90&pooling=mean&cells=30"
    both = client.get(f"{where}{','.join(names)}{how}")
    alone = [client.get(f"{where}{name}{how}") for name in names]
    assert both.data == b"".join(one.data for one in alone)
    headers = json.loads(both.headers["X-Raster"])
    assert headers == [json.loads(one.headers["X-Raster"])[0] for one in alone]
    assert {(one["rows"], one["cell"], one["level"]) for one in headers} == {(27, 3, "pixels")}


def test_tables_tokens_and_report_are_there(client, run):
    csv = client.get(f"/api/run/{run.id}/heads.csv")
    assert csv.data.decode() == csv_text(run.heads)
    assert json.loads(client.get(f"/api/run/{run.id}/tokens/p000").data) == run.trace("p000").tokens
    report = client.get(f"/api/run/{run.id}/report.html")
    assert report.data == (run.path / "report.html").read_bytes()
    assert "default-src 'none'" in report.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/api/run/none/raster/p000/L0H0", "there is no run 'none'"),
        ("/api/run/{run}/raster/p999/L0H0", "has no trace of prompt 'p999'"),
        ("/api/run/{run}/raster/p000/L9H0", "there is no L9H0"),
        ("/api/run/{run}/raster/p000/L0H0?q0=1", "needs q0, q1, k0 and k1"),
        ("/api/run/{run}/raster/p000/L0H0?pooling=x", "pooling must be one of 'max', 'mean'"),
        ("/api/run/{run}/raster/p000/L0H0?cells=513", "1 to 512 cells a side"),
        ("/api/run/{run}/raster/p000/L0H0,L0?", "a head is"),
        (f"/api/run/{{run}}/raster/p000/{'L0H0,' * 9}L0H1", "at most 9 heads"),
        ("/api/run/{run}/row/p000/0/0/999", "there is no query 999"),
        ("/api/run/..%2f..%2fetc/heads.csv", None),
        ("/api/run/%2e%2e/heads.csv", None),
    ],
)
def test_what_is_not_there_is_a_404_that_says_so(client, run, path, message):
    answer = client.get(path.format(run=run.id))
    assert answer.status_code == 404
    if message:
        assert message in answer.data.decode()


def test_only_this_machine_is_answered(client):
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Host": "example.org"}).status_code == 400
    assert client.get("/", headers={"Host": "127.0.0.1:8765"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "asked", "foreign"),
    [
        ("127.0.0.1", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST."], ["10.1.2.3", "[::2]", "", "a:b:c"]),
        ("::1", ["[::1]", "[0:0:0:0:0:0:0:1]", "localhost"], ["[::2]", "::1"]),
        ("10.1.2.3", ["10.1.2.3", "[::1]"], ["10.1.2.4"]),
        ("0.0.0.0", ["127.0.0.1", socket.gethostname(), "[::1]"], ["example.org", "10.1.2.3.example.org"]),
    ],
)  # fmt: skip
def test_it_is_asked_for_by_the_address_that_it_listens_on(runs, host, asked, foreign):
    client = create_app(runs, hosts=names_of(host)).server.test_client()
    for port in ("", ":8765"):
        assert {client.get("/", headers={"Host": name + port}).status_code for name in asked} == {
            200
        }
        assert {client.get("/", headers={"Host": name + port}).status_code for name in foreign} == {
            400
        }


CALLBACK = "/_dash-update-component"


@pytest.mark.parametrize(
    "body",
    [
        "{}",
        "[]",
        "5",
        "null",
        "{",
        "[" * 100_000,
        '{"output": "x"}',
        '{"output": []}',
        '{"output": "page.children", "inputs": 3}',
        '{"output": "page.children", "inputs": [{"id": "url", "property": "pathname", "value": 5}]}',
        '{"output": "page.children", "inputs": [{"value": "/"}, {"value": []}], "changedPropIds": 7}',
        '{"output": "loaded-circuit.children", "inputs": [{"id": "circuit-file", "property": "contents",'
        ' "value": "x"}], "state": [{"id": "a", "property": "b", "value": {}}]}',
    ],
)
def test_a_callback_that_makes_no_sense_is_refused(client, body):
    answer = client.post(CALLBACK, data=body, content_type="application/json")
    assert (answer.status_code, b"Traceback" in answer.data) == (400, False)


@pytest.mark.parametrize("path", ["x/x.js", "../x", "dash/no-such-file.js", "plotly/x", "%00/x"])
def test_files_that_dash_has_not_are_not_there(client, path):
    assert client.get(f"/_dash-component-suites/{path}").status_code in (404, 405)


def test_a_callback_of_the_page_is_answered(client):
    ids = {"pathname": "/", "search": ""}
    inputs = [{"id": "url", "property": name, "value": value} for name, value in ids.items()]
    outputs = {"id": "page", "property": "children"}
    sent = {"output": "page.children", "outputs": outputs, "inputs": inputs, "changedPropIds": []}
    answer = client.post(CALLBACK, json=sent)
    assert (answer.status_code, b"text-lm-3l" in answer.data) == (200, True)


def test_a_body_that_is_too_large_is_refused(client):
    sent = b"x" * (LARGEST_BODY + 1)
    assert client.post(CALLBACK, data=sent, content_type="application/json").status_code == 413


def test_connections_without_a_request_do_not_block_others(runs, monkeypatch):
    monkeypatch.setattr(listening, "PATIENCE", 1)
    monkeypatch.setattr(listening, "_CONNECTIONS", 100)
    server = listening.make_server(create_app(runs).server, listening.listen("127.0.0.1", 0), 2)
    thread = threading.Thread(target=server.run)
    thread.start()
    address = ("127.0.0.1", server.effective_port)
    with ExitStack() as silent:
        for _ in range(120):
            connection = silent.enter_context(socket.create_connection(address))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        with urllib.request.urlopen(f"http://127.0.0.1:{address[1]}/", timeout=20) as answer:
            assert answer.status == 200
        connection.settimeout(20)
        slow = silent.enter_context(socket.create_connection(address))
        with suppress(OSError):  # closed, although it never rests
            for sent in range(200):  # noqa: B007
                slow.sendall(b"G")
                time.sleep(0.1)
        assert sent < 199
        assert connection.recv(1) == b""
    server.task_dispatcher.shutdown()
    server.trigger.pull_trigger(lambda: wasyncore.close_all(server._map, ignore_all=True))
    thread.join()


def test_every_answer_is_locked_down(client, run):
    for path in ("/", f"/api/run/{run.id}/tokens/p000", "/_dash-layout"):
        headers = client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self'")
        script = next(part for part in policy.split("; ") if part.startswith("script-src"))
        assert "unsafe" not in script
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "SAMEORIGIN"


def test_no_setting_of_the_environment_opens_tools_for_others(runs, monkeypatch):
    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    for name in ("DASH_MCP_ENABLED", "DASH_DEBUG", "FLASK_DEBUG"):
        monkeypatch.setenv(name, "true")
    bare = Dash("bare")
    bare.layout = html.Div()
    answer = bare.server.test_client().post("/_mcp", json=asked)
    assert answer.status_code == 200  # what Dash alone would do
    app = create_app(runs)
    client = app.server.test_client()
    assert client.post("/_mcp", json=asked).status_code == 405
    assert app.server.debug is False
    assert b'"ui":false' in client.get("/").data  # no tools of Dash on the page


def test_the_page_names_nothing_outside(client):
    page = client.get("/").data.decode()
    assert 'lang="en"' in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_token_is_asked_for_once(runs):
    client = create_app(runs, token="secret").server.test_client()
    assert client.get("/").status_code == 403
    assert client.get("/?token=wrong").status_code == 403
    answer = client.get("/compare?a=1&token=secret&b=%2F")
    assert (answer.status_code, answer.headers["Location"]) == (302, "/compare?a=1&b=%2F")
    assert client.get("/").status_code == 200
    elsewhere = {"PATH_INFO": "//example.org/\\"}
    answer = client.get("/?token=secret", environ_overrides=elsewhere)
    assert answer.headers["Location"] == "/example.org/%5C"


def test_a_foreign_address_needs_a_token(runs):
    with pytest.raises(LensError, match=r"0\.0\.0\.0 can be reached by others: give a token"):
        serve(runs, host="0.0.0.0", port=0)


def test_a_busy_port_says_what_to_do(runs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LensError, match=r"cannot be used .* choose another with --port"):
            serve(runs, port=taken.getsockname()[1])


def test_an_empty_or_missing_folder_says_what_fills_it(tmp_path):
    assert "lens demo" in text_of(render(Library(tmp_path), "/", ""))
    assert "there is no folder" in text_of(render(Library(tmp_path / "none"), "/", ""))


def test_a_partial_run_says_so_and_shows_what_there_is(run, tmp_path):
    copy = tmp_path / run.id
    copy.mkdir()
    meta = {**run.meta, "status": "partial", "prompts": {"total": 4, "done": 1}}
    write_json(copy / "run.json", meta)
    shown = text_of(render(Library(tmp_path), f"/run/{run.id}", ""))
    assert "This run is unfinished: 1 of 4 prompts are done. Complete it with" in shown
    assert "heads.parquet is missing" in shown
    assert "no finished trace" in text_of(render(Library(tmp_path), f"/run/{run.id}/head/0/0", ""))


def test_a_run_at_work_is_not_to_be_completed_by_hand(run, tmp_path):
    copy = tmp_path / run.id
    copy.mkdir()
    alive = {"status": "started", "pid": os.getpid(), "host": socket.gethostname()}
    meta = {**run.meta, **alive, "process_started": None, "prompts": {"total": 4, "done": 4}}
    write_json(copy / "run.json", meta)
    shown = text_of(render(Library(tmp_path), f"/run/{run.id}", ""))
    assert "This run is still running: 4 of 4 prompts are done. Its analyses are not." in shown
    assert "Load the page again for what has come since; if it was broken off, complete it" in shown


def test_damage_is_a_card_and_not_a_traceback(run, tmp_path):
    copy = tmp_path / run.id
    copy.mkdir()
    (copy / "run.json").write_text("{")
    library = Library(tmp_path)
    assert "cannot be read" in text_of(render(library, "/", ""))
    assert "cannot be read" in text_of(render(library, f"/run/{run.id}", ""))
    assert "there is no run" in text_of(render(library, "/run/other", ""))
    assert "is no page" in text_of(render(library, "/nowhere", ""))


def test_a_head_that_is_not_there_is_a_card(runs, run):
    shown = text_of(render(Library(runs), f"/run/{run.id}/head/7/0", ""))
    assert "there is no L7H0" in shown


def test_a_run_that_changes_is_read_again(run, tmp_path):
    copy = tmp_path / run.id
    copy.mkdir()
    library = Library(tmp_path)
    for title in ("one", "another title"):
        write_json(copy / "run.json", {**run.meta, "title": title})
        assert library.run(run.id).title == title


def test_a_finished_run_is_listed_without_being_read_again(run, tmp_path, monkeypatch):
    for name, status in (("whole", "success"), ("stopped", "partial")):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", {**run.meta, "id": name, "status": status})
    library, read = Library(tmp_path), []
    monkeypatch.setattr(
        "lens_dashboards.library.open_run",
        lambda folder: read.append(folder.name) or open_run(folder),
    )
    for _ in range(2):
        assert {one.path.name for one in library.runs()} == {"whole", "stopped"}
    assert sorted(read) == ["stopped", "stopped", "whole"]
    write_json(
        tmp_path / "whole/run.json",
        {**run.meta, "id": "whole", "title": "another title that is long"},
    )
    assert "another title" in str([one.title for one in library.runs()])


def test_runs_are_found_by_their_words_and_put_in_order(run, tmp_path):
    made = {
        "a": ("heads", "ioi", 3.0),
        "b": ("profile", None, 20.0),
        "c": ("heads", "induction", 100.0),
    }
    for name, (what, task, seconds) in made.items():
        (tmp_path / name).mkdir()
        given = {"id": name, "title": f"run {name}", "what": what, "task": task, "seconds": seconds}
        write_json(tmp_path / name / "run.json", {**run.meta, **given})
    library = Library(tmp_path)

    def shown(search):
        return re.findall(r'"href": "/run/(\w)"', text_of(render(library, "/", search)))

    assert shown("?sort=seconds") == ["a", "b", "c"]
    assert shown("?sort=-seconds") == ["c", "b", "a"]
    assert shown("?find=IOI+heads") == ["a"]
    assert shown("?what=heads&sort=task") == ["c", "a"]
    text = text_of(render(library, "/", "?sort=seconds"))
    assert '"aria-sort": "ascending"' in text
    assert '"href": "/?sort=-seconds"' in text
    assert "3 in " in text
    assert "1 of them shown" in text_of(render(library, "/", "?find=ioi"))
    assert "data-delete" not in text
    assert text_of(render(Library(tmp_path, True), "/", "")).count('"data-delete": ') == 3


def test_many_runs_are_shown_in_parts(run, tmp_path):
    for number in range(PART + 2):
        copy = tmp_path / f"2026-01-01-{number:04d}"
        copy.mkdir()
        write_json(copy / "run.json", {**run.meta, "id": copy.name, "title": f"run {number}"})
    library = Library(tmp_path)
    first, second = (text_of(render(library, "/", search)) for search in ("", "?part=2"))
    assert (first.count("/run/2026"), second.count("/run/2026")) == (PART, 2)
    assert "part 1 of 2" in first
    assert '"href": "/?part=2"' in first
    assert text_of(render(library, "/", "?part=99")) == second
    assert "no such part" in text_of(render(library, "/", "?part=x"))
