"""Damaged run folders beside a good one: nothing fails raw, hangs, or takes a gigabyte, and the good run is still shown.

`LENS_DAMAGES=600 pytest tests/analyses/test_damaged_runs.py -m slow` tries as many.
"""

import json
import os
import random
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from flask import Flask
from lens_analyses.cli import app
from lens_dashboards.api import make_api
from lens_dashboards.library import Library
from lens_dashboards.views import render
from typer.testing import CliRunner

from lens.common.errors import LensError
from lens.runs import open_run
from lens.runs.validation import validate
from tests.damage import damage

ON_TEXT = (
    "--model text-lm-3l --text-name moby-dick --tokens 64 --windows 4 --n 4 --set analysis.length=64 "
    "--set prompts.copied=0"
)
COMMANDS = (
    "run --model text-lm-3l --text-name moby-dick --tokens 64 --copied 2 --copied-length 11 --keep-qk",
    "circuit --model induction-2l --copied 2 --n 8",
    "heads --model induction-2l --copied 2 --n 4 --measures ablation/mean,gradient",
    f"sinks {ON_TEXT} --edits mask --amounts 0,1",
    f"redistribute {ON_TEXT} --task text --amounts 0,0.5,1",
)
SMALL = "run --model induction-2l --copied 1 --copied-length 5 --keep-qk --block-size 4"
QUICK = 50
SECONDS = 30
MOST_BYTES = 2**30
PAGES = (
    "",
    "/heads",
    "/atlas",
    "/sinks",
    "/redistribution",
    "/circuits",
    "/provenance",
    "/head/0/1",
    "/head/1/0",
)
ROUTES = (
    *(
        "heads.csv",
        "columns.csv",
        "report.html",
        "circuit.json?edges=3",
        "tokens/p000",
        "atlas/p000",
    ),
    *("raster/p000/0/1", "raster/p001/1/0?variant=sink_excluded", "row/p000/0/0/5"),
)
FORMATS = ("csv", "parquet", "graph", "headvis")


@contextmanager
def soon(what: str):
    """Fails what takes longer than `SECONDS`."""

    def stop(*_):
        raise TimeoutError(f"{what} took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def bases(folder: Path, commands) -> list[Path]:
    """A good run of each command."""
    found = []
    for number, command in enumerate(commands):
        out = folder / str(number)
        answer = CliRunner().invoke(app, [*command.split(), "--out", str(out), "--quiet"])
        assert answer.exit_code in (0, 3), answer.stderr
        found.append(next(path.parent for path in out.glob("*/run.json")))
    return found


def complaints(folder: Path, bad: Path, good: Path) -> list[str]:
    """What fails raw, by what a person would do with these two runs."""
    found: list[str] = []
    draw = random.Random(bad.parent.name)

    def command(*words: object, codes=(0, 1, 3)) -> str:
        with soon(" ".join(map(str, words))):
            answer = CliRunner().invoke(app, [str(word) for word in words])
        if (
            answer.exit_code not in codes
            or "not foreseen" in answer.stderr
            or "Traceback" in answer.stderr
        ):
            found.append(f"{words[0]} {words[-1]}: {answer.exit_code} {answer.stderr[-300:]}")
        return answer.stdout

    listed = json.loads(command("list", folder, "--json", codes=(0,)) or "{}")
    if len(listed.get("runs", ())) < 1 + (bad / "run.json").is_file():
        found.append("the list lacks a run")
    command("list", folder, codes=(0,))
    command("validate", bad)
    written = [
        ("report", bad, "--out", folder / "report"),
        ("compare", good, bad, "--out", folder / "compared"),
        *(("export", bad, "--out", folder / form, "--format", form) for form in FORMATS),
    ]
    for words in draw.sample(written, 1):
        command(*words)
    library = Library(folder)
    sections = [path.name for path in (bad / "sections").glob("*")]
    shown = draw.sample([*PAGES, *(f"/analysis/{name}" for name in sections)], 3)
    links = ["/", f"/run/{bad.name}", *(f"/run/{bad.name}{page}" for page in shown)]
    if draw.random() < 0.1:
        links.append(f"/run/{good.name}")
    for path, search in [
        *((link, "") for link in links),
        ("/compare", f"?a={good.name}&b={bad.name}"),
    ]:
        with soon(path):
            text = str(render(library, path, search))
        if "This page failed" in text or (good.name in path and "This cannot be shown" in text):
            found.append(f"page {path}: {text[text.find('attention-lens ') :][:300]}")
    server = Flask(__name__)
    server.register_blueprint(make_api(library))
    client = server.test_client()
    for route in ROUTES:
        with soon(route):
            status = client.get(f"/api/run/{bad.name}/{route}").status_code
        if status >= 500:
            found.append(f"route {route}: {status}")
    if client.get(f"/api/run/{good.name}/tokens/p000").status_code != 200:
        found.append("the good run's route is not 200")
    return found


def tried(folder: Path, made: list[Path], seeds) -> tuple[list[str], list[str]]:
    """Damages that make something fail raw, and those that `validate` calls valid."""
    failed, valid = [], []
    for seed in seeds:
        place = folder / f"seed-{seed}"
        source = made[seed % len(made)]
        bad, good = place / "bad", place / "good"
        shutil.copytree(source, bad)
        shutil.copytree(made[0], good)
        what = damage(bad, made[(seed + 1) % len(made)], seed)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        for one in complaints(place, bad, good):
            failed.append(f"{seed}: {what}: {one}")
        if peak() - before > MOST_BYTES:
            failed.append(f"{seed}: {what}: took {(peak() - before) / 1e9:.1f} GB")
        try:
            if not validate(open_run(bad)):
                valid.append(f"{seed}: {source.name}: {what}")
        except LensError:
            pass
        shutil.rmtree(place)
    return failed, valid


def peak() -> int:
    """Most bytes in memory since `clear_refs`."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_damage_fails_raw(tmp_path):
    made = bases(tmp_path, (SMALL, f"{SMALL} --seed 1"))
    failed, valid = tried(tmp_path / "damaged", made, range(QUICK))
    assert failed == []
    recorded = ("old folder", "all fitted")  # then nothing tells what was written
    assert [one for one in valid if not one.endswith(recorded) and "log.txt" not in one] == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif("LENS_DAMAGES" not in os.environ, reason="set LENS_DAMAGES to a number")
def test_many_damages(tmp_path):
    made = bases(tmp_path, COMMANDS)
    first = int(os.environ.get("LENS_DAMAGES_FROM", 1000))
    failed, valid = tried(
        tmp_path / "damaged", made, range(first, first + int(os.environ["LENS_DAMAGES"]))
    )
    print("\n".join(["valid:", *valid]))
    assert failed == []
