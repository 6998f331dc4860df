"""Damage run folders and model folders from seeds, and do with them what a person would: nothing may fail raw.

    python tests/benchmarks/damaged.py --folders 600 --models 60 [--first 1000] [--runs FOLDER]

Each damaged run stands beside a good one: list, validation, report, comparison, exports, pages and routes.
Each damaged model folder is captured by the library and by `lens run`. It prints at once what fails raw, hangs
or takes over a gigabyte, and at the end the counts and the damages that `lens validate` calls valid.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "dashboards", "analyses")]

from flask import Flask  # noqa: E402
from lens_analyses.cli import app  # noqa: E402
from lens_dashboards.api import make_api  # noqa: E402
from lens_dashboards.library import Library  # noqa: E402
from lens_dashboards.views import render  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import lens  # noqa: E402
from lens.common.errors import LensError  # noqa: E402
from lens.runs import open_run  # noqa: E402
from lens.runs.validation import validate  # noqa: E402
from tests.damage import damage, damage_model, make_model  # noqa: E402

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
    f"policies {ON_TEXT} --loss 0.05",
    "explain --model induction-2l --task induction --n 3 --copied 2",
    "patch --model induction-2l --task induction --n 3 --copied 2",
    "examples --model text-lm-3l --text-name moby-dick --tokens 64 --windows 4",
    "generate --model text-lm-3l --text-name moby-dick --tokens 24 --new 8",
)
SMALL = "run --model induction-2l --copied 1 --copied-length 5 --keep-qk --block-size 4"
SECONDS = 20
MOST_BYTES = 2**30
PAGES = (
    "",
    "/heads",
    "/atlas",
    "/sinks",
    "/redistribution",
    "/circuits",
    "/patching",
    "/policies",
    "/mixers",
    "/reading",
    "/vision",
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
    *("raster/p000/L0H1", "raster/p001/L1H0?variant=sink_excluded", "row/p000/0/0/5"),
)
FORMATS = ("csv", "parquet", "graph", "headvis")


@contextmanager
def soon(what: str):
    """Fails what computes or waits longer than `SECONDS`: ten times that where others have the machine."""
    start, computed = time.monotonic(), time.process_time()

    def stop(*_):
        took = max(time.process_time() - computed, (time.monotonic() - start) / 10)
        if took < SECONDS:
            signal.alarm(SECONDS)
            return
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


def tried(folder: Path, made: list[Path], seeds: Iterable[int]) -> Iterator[tuple[list[str], str]]:
    """Of each damage what fails raw, and the damage if `validate` calls it valid."""
    for seed in seeds:
        place = folder / f"seed-{seed}"
        source = made[seed % len(made)]
        bad, good = place / "bad", place / "good"
        shutil.copytree(source, bad)
        shutil.copytree(made[0], good)
        what = f"{seed}: {source.name}: {damage(bad, made[(seed + 1) % len(made)], seed)}"
        with _bounded() as failed:
            failed += complaints(place, bad, good)
        yield [f"{what}: {one}" for one in failed], what if _is_valid(bad) else ""
        shutil.rmtree(place)


def tried_models(folder: Path, seeds: Iterable[int]) -> Iterator[list[str]]:
    """Of each damage of a model folder what fails raw: the library's capture, and `lens run`."""
    for seed in seeds:
        place = folder / f"model-{seed}"
        make_model(place, seed)
        what = f"{seed}: {damage_model(place, seed)}"
        with _bounded() as failed:
            try:
                with soon("capture"):
                    lens.capture(lens.load(place), [[5, 6, 7, 8, 5, 6]], progress=False)
            except LensError:
                pass
            except Exception as error:
                failed.append(f"capture: {type(error).__name__}: {error}"[:300])
            words = f"run --model {place} --copied 1 --copied-length 5 --out {folder} --quiet"
            with soon(words):
                answer = CliRunner().invoke(app, words.split())
            if answer.exit_code not in (0, 1, 2, 3) or "not foreseen" in answer.stderr:
                failed.append(f"run: {answer.exit_code} {answer.stderr[-300:]}")
        yield [f"{what}: {one}" for one in failed]
        shutil.rmtree(place)


@contextmanager
def _bounded() -> Iterator[list[str]]:
    """What fails in it, to which a gigabyte more of memory and a time-out are added."""
    failed: list[str] = []
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    try:
        yield failed
    except TimeoutError as late:
        failed.append(str(late))
    if peak() - before > MOST_BYTES:
        failed.append(f"took {(peak() - before) / 1e9:.1f} GB")


def _is_valid(run: Path) -> bool:
    try:
        return not validate(open_run(run))
    except LensError:
        return False


def peak() -> int:
    """Most bytes in memory since `clear_refs`."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    return int(line.split()[1]) * 1024


def main() -> int:
    """Try as many as are asked for; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=int, default=0)
    parser.add_argument("--models", type=int, default=0)
    parser.add_argument(
        "--runs",
        type=Path,
        help="a folder of good runs to damage, of vision, mixers, diffusion, ...",
    )
    parser.add_argument("--first", type=int, default=1000, help="the first seed")
    given = parser.parse_args()
    count, valid = {"run folders": 0, "model folders": 0}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = bases(folder, COMMANDS) if given.folders and not given.runs else []
        if given.runs:
            made = [path.parent for path in sorted(given.runs.glob("*/run.json"))]
        for failed, whole in tried(folder, made, range(given.first, given.first + given.folders)):
            count["run folders"] += _told(failed)
            valid += [whole] if whole else []
        for failed in tried_models(folder, range(given.first, given.first + given.models)):
            count["model folders"] += _told(failed)
    for one in valid:
        print("valid:", one)
    print(
        f"{count['run folders']} of {given.folders} damaged run folders fail, {len(valid)} are valid"
    )
    print(f"{count['model folders']} of {given.models} damaged model folders fail")
    return int(any(count.values()))


def _told(failed: list[str]) -> int:
    for one in failed:
        print("FAILED", one, flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
