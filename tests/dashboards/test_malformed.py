"""What a live server does with requests that no page makes: refused, told nothing, and answering the next one."""

import http.client
import json
import logging
import random
import socket
from urllib.parse import urlsplit

import pytest
from lens_dashboards.server import serve_beside

DASH = "/_dash-update-component"
ODD = (
    *(
        "..",
        "%2e%2e",
        "..%2f..%2fetc%2fpasswd",
        "%00",
        "%ff%fe",
        "%C0%AF",
        "%",
        "%zz",
        "//",
        "'",
        "<x>",
    ),
    *(
        "a" * 3000,
        "-1",
        "99999999999999999999",
        "1e9",
        "nan",
        "L0H0",
        "p000",
        "%D9%A1",
        "*",
        "0",
        "1",
    ),
)
PAGES = (
    "head",
    "maps",
    "atlas",
    "heads",
    "sinks",
    "circuits",
    "reading",
    "vision",
    "analysis",
    "compare",
    "jobs",
)
DATA = (
    "raster/{}/{}/{}",
    "row/{}/{}/{}/{}",
    "look/{}/{}/{}",
    "atlas/{}",
    "section/{}/{}.csv",
    "circuit.json",
)
ASKED = (
    "prompt",
    "head",
    "variant",
    "edges",
    "q0",
    "k1",
    "sort",
    "part",
    "heads",
    "section",
    "query",
    "a",
)
HEAD = b" HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def live(runs):
    """Host and port of a server over the runs."""
    address, close = serve_beside(runs)
    parts = urlsplit(address)
    yield parts.hostname, parts.port
    close()


def _junk(draw: random.Random, depth: int = 0):
    kinds = [None, 0, -1, 10**30, True, "", "..", "\ud800", "x" * 9000, "url", "/run/..", "?part=x"]
    if depth < 3:
        kinds.append([_junk(draw, depth + 1) for _ in range(draw.randrange(4))])
        kinds.append({name: _junk(draw, depth + 1) for name in ("id", "property", "value")})
    return draw.choice(kinds)


def _request(draw: random.Random, run: str) -> tuple[str, str, str | None]:
    """Method, path and body."""
    run = draw.choice([run, run, draw.choice(ODD)])
    data = draw.choice(DATA)
    odd = [draw.choice(ODD) for _ in range(4)]
    page = f"/run/{run}/{draw.choice(PAGES)}/{'/'.join(odd[: draw.randrange(3)])}"
    path = draw.choice(
        [f"/api/run/{run}/{data.format(*odd)}", page, f"/{odd[0]}", f"/assets/{odd[0]}"]
    )
    query = "&".join(f"{draw.choice(ASKED)}={draw.choice(ODD)}" for _ in range(draw.randrange(3)))
    if draw.random() < 0.4:
        return (
            draw.choice(["GET", "GET", "HEAD", "PUT", "DELETE", "TRACE"]),
            f"{path}?{query}",
            None,
        )
    whole = draw.choice([*(f"/run/{run}/{name}" for name in PAGES), f"/run/{run}/head/0/1"])
    given = {
        "pathname": draw.choice([whole, whole, page, _junk(draw)]),
        "search": draw.choice([f"?{query}", f"?{query}", _junk(draw)]),
    }
    inputs = [{"id": "url", "property": name, "value": value} for name, value in given.items()]
    sent = {
        "output": "page.children",
        "outputs": {"id": "page", "property": "children"},
        "inputs": inputs,
    }
    for name in draw.sample([*sent, "state"], max(0, draw.randrange(-2, 3))):
        sent[name] = _junk(draw)
    return "POST", DASH, json.dumps(sent)


def test_malformed_requests_are_refused_by_a_live_server(live, run, capfd, caplog):
    draw = random.Random(0)
    answers = set()
    for _ in range(250):
        method, path, body = _request(draw, run.id)
        connection = http.client.HTTPConnection(*live, timeout=20)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        told = answer.read()
        answers.add(answer.status)
        connection.close()
        assert answer.status < 500, (method, path, body)
        for fault in (b"Traceback", b"This page failed"):
            assert fault not in told, (method, path, body)
    assert {200, 400, 404, 405} <= answers
    logged = capfd.readouterr()
    assert "Traceback" not in logged.out + logged.err
    faults = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert [one.getMessage() for one in faults] == []


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET http://[::1" + HEAD + b"\r\n", 400),  # no address
        (b"GET /" + HEAD + b"Expect: 100-continue\r\n\r\n", 200),  # and no body
        (b"GET /" + HEAD + b"X: y\r\n" * 100_000 + b"\r\n", 431),
        (b"POST /" + HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (b"POST /" + HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
    ],
)
def test_what_is_no_http_is_answered_at_once(live, sent, status):
    with socket.create_connection(live, 10) as connection:
        connection.sendall(sent)
        told = connection.recv(1 << 16)
    assert told.split(b" ")[1] == b"%d" % status
