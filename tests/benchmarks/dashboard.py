"""How fast the dashboard is: from the command to its first answer, atlas, next head, and its memory.

A run of 32 layers × 32 heads whose trace was captured from a model of random weights (2 layers of 8
heads, repeated; only sizes matter here) is served by `lens view` in a process of its own, and browsed
in a real Chromium. Times are what the browser sees, until the picture is drawn. It starts from the
page's address, so the atlas' figures hold the whole page with Dash's own scripts.

    python tests/benchmarks/dashboard.py [--tokens 4096] [--block-size 16] [--heads 32] [--runs 1000] [--no-keep-qk]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "dashboards", "analyses")]

GOALS = {
    "viewer answers after": "4 s",
    "first page of many runs": "1 s",
    "atlas, warm": "1 s",
    "next head": "0.3 s",
    "nine linked maps": "1 s",
    "memory of the server": "1,000 MB",
}
SWITCHES = 60
MAPS = 9


def make_run(folder: Path, tokens: int, block_size: int, heads: int, keep_qk: bool = True) -> None:
    """A run of `heads` × `heads` heads on one prompt of random tokens."""
    import lens
    from lens.runs import open_run
    from tests.benchmarks.long_prompt import random_llama
    from tests.dashboards.repeated import repeat_run

    command = [sys.executable, "-m", "lens_analyses", "run", "--copied", "1"]
    command += ["--quiet", "--json", "--out", str(folder / "small")]
    subprocess.run(command, env=_environment(), check=True, stdout=subprocess.DEVNULL)
    small = open_run(next((folder / "small").glob("*/run.json")).parent)
    model, ids = random_llama(128, tokens)
    trace = lens.capture(model, ids, block_size=block_size, keep_qk=keep_qk, progress=False)
    assert isinstance(trace, lens.traces.AttentionTrace)
    repeat_run(folder / "runs", small, heads, heads, trace)


def make_many(folder: Path, count: int) -> None:
    """Copies of a small run without its trace."""
    small = next((folder / "small").glob("*/run.json")).parent
    for number in range(count):
        copy = folder / "many" / f"2026-01-01-copy-{number:06d}"
        shutil.copytree(small, copy, ignore=shutil.ignore_patterns("trace"))
        index = copy / "run.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "id": copy.name}))


def first_page(runs: Path) -> float:
    """Seconds until the browser shows the list of runs, which the server began to read when it started."""
    from playwright.sync_api import sync_playwright

    server, address, _ = _start(runs)
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(
                executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page()
            page.goto(f"{address}/jobs")  # Dash's own scripts, and no run
            page.wait_for_selector("#jobs-notice")
            start = time.perf_counter()
            page.goto(address)
            page.wait_for_selector("table.runs tbody tr")
            took = time.perf_counter() - start
            browser.close()
    finally:
        server.kill()
    return took


def browse(folder: Path) -> dict[str, float]:
    """Seconds and megabytes by name."""
    run = next((folder / "runs").glob("*/run.json")).parent.name
    found: dict[str, float] = {}
    starts = [_start(folder / "runs") for _ in range(3)]
    for server, _, _ in starts[:-1]:
        server.kill()
    server, address, _ = starts[-1]
    found["viewer answers after"] = statistics.median(seconds for _, _, seconds in starts)
    try:
        found |= _in_browser(f"{address}/run/{run}", server.pid)
    finally:
        server.kill()
    return found


def _in_browser(address: str, pid: int) -> dict[str, float]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1440, "height": 900})

        def load(path: str, ready: str) -> float:
            start = time.perf_counter()
            page.goto(address + path)
            page.wait_for_selector(ready)
            return time.perf_counter() - start

        before = _memory(pid)
        cold = load("/atlas", "#atlas[data-ready]")
        warm = [load("/atlas", "#atlas[data-ready]") for _ in range(5)]
        head = load("/head/0/0", "#map[data-ready]")
        names = ",".join(f"L0H{number}" for number in range(MAPS))
        wall = [load(f"/maps?heads={names}", _WALL) for _ in range(3)]
        load("/head/0/0", "#map[data-ready]")
        asked: list[Any] = []
        page.on("request", lambda one: asked.append(one.url))
        renderer = page.context.new_cdp_session(page)
        renderer.send("Performance.enable", {"timeDomain": "threadTicks"})
        used = _seconds(pid), _drawn(renderer)
        switches = [page.evaluate(_NEXT) / 1000 for _ in range(SWITCHES)]
        spent = _seconds(pid) - used[0], _drawn(renderer) - used[1]
        page.wait_for_selector(".curves .js-plotly-plot")
        browser.close()
    return {
        "atlas, the first time": cold,
        "atlas, warm": statistics.median(warm),
        "a head from its address": head,
        "nine linked maps": statistics.median(wall),
        "next head": statistics.median(switches),
        "next head, the slowest of 60": max(switches),
        "requests of a next head": len(asked) / SWITCHES,
        "next head, processor of the server": spent[0] / SWITCHES,
        "next head, processor of the page": spent[1] / SWITCHES,
        "memory of the server before": before,
        "memory of the server": _memory(pid),
    }


_WALL = f"#maps:not(:has(.map:not([data-ready]))):has(.map:nth-of-type({MAPS}))"
"""All maps are there and drawn."""
_NEXT = """() => new Promise((done) => {
    const start = performance.now(), before = document.getElementById("map").dataset.head;
    document.getElementById("next-head").click();
    const look = () => {
        const map = document.getElementById("map");
        const drawn = map && map.dataset.ready && map.dataset.head !== before;
        if (drawn) done(performance.now() - start); else requestAnimationFrame(look);
    };
    look();
})"""


def _start(runs: Path) -> tuple[subprocess.Popen[bytes], str, float]:
    """A viewer, its address, and how long it took until it answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.perf_counter()
    command = [sys.executable, "-m", "lens_analyses", "view", str(runs), "--port", str(port)]
    server = subprocess.Popen([*command, "--quiet"], env=_environment())
    address = f"http://127.0.0.1:{port}"
    while server.poll() is None and time.perf_counter() - start < 60:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return server, address, time.perf_counter() - start
        except OSError:
            time.sleep(0.02)
    server.kill()
    raise SystemExit(f"the viewer on {address} did not answer")


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def _seconds(pid: int) -> float:
    """Seconds of a processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _drawn(session: Any) -> float:
    """Seconds of a processor that the page's own thread has used."""
    found = session.send("Performance.getMetrics")["metrics"]
    return next(one["value"] for one in found if one["name"] == "TaskDuration")


def _memory(pid: int) -> float:
    """Megabytes of its own, without files that are mapped and can be dropped."""
    status = Path(f"/proc/{pid}/status").read_text()
    found: Any = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) / 2**10


def main() -> None:
    """Measure and print the lines of DASHBOARD.md's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--keep-qk", action=argparse.BooleanOptionalAction, default=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), asked.tokens, asked.block_size, asked.heads, asked.keep_qk)
        size = sum(file.stat().st_size for file in Path(folder, "runs").rglob("*.safetensors"))
        blocks = -(-asked.tokens // asked.block_size)
        make_many(Path(folder), asked.runs)
        found = {"first page of many runs": first_page(Path(folder, "many"))} | browse(Path(folder))
    sys.stdout.write(
        f"{asked.runs:,} runs; {asked.heads**2:,} heads, {asked.tokens:,} tokens, {blocks}² blocks a head, "
        f"{size / 1e9:.1f} GB of traces; load average {os.getloadavg()[0]:.1f}\n\n"
        "| | measured | goal |\n|---|--:|--:|\n"
    )
    for name, value in found.items():
        unit = {"memory": f"{value:,.0f} MB", "requests": f"{value:.1f}"}
        shown = unit.get(name.split()[0], f"{value:.2f} s")
        sys.stdout.write(f"| {name} | {shown} | {GOALS.get(name, '')} |\n")


if __name__ == "__main__":
    main()
