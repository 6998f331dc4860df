"""Measures speed and memory: `python tests/benchmarks/run.py [--quick] [--only TEXT] [--device cuda [--go-on]]`.

The full run (about ten minutes on 2 cores) rewrites results.csv and RESULTS.md beside this file, or
in the folder `--out`, after every row: what is measured stays when the machine is taken away.
With `--go-on` what was measured of this device at this commit is kept, and the rest is measured: after a run that was
cut off, or a kernel that broke the device (which starts the command anew by itself).
`--quick` and `--only` print the page and write nothing. Rows of a GPU that were measured elsewhere
stay when this machine has none.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


if TYPE_CHECKING:
    from tests.benchmarks import measure
    from tests.benchmarks.report import Record


def main(arguments: list[str] | None = None) -> int:
    """Runs the registry; 0, or 1 when a kernel is wrong."""
    import torch

    from tests.benchmarks import cases, measure, report

    parser = argparse.ArgumentParser(description=__doc__, prog="tests/benchmarks/run.py")
    parser.add_argument("--quick", action="store_true", help="two CPU cases, under a minute")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cases of this device alone")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--go-on",
        action="store_true",
        help="measure what results.csv of --out lacks (with --device)",
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one thread, on a machine with other work"
    )
    options = parser.parse_args(arguments)
    if options.cpu_time:
        if not (options.quick or options.only):
            parser.error("--cpu-time is for --quick and --only: the tables hold wall-clock times")
        torch.set_num_threads(1)
        measure.clock = time.thread_time
    chosen = cases.QUICK if options.quick else cases.CASES
    chosen = [
        case
        for case in chosen
        if options.only in case.name and options.device in (None, case.device)
    ]
    if not chosen:
        names = "; ".join(case.name for case in cases.CASES)
        parser.error(f"no case contains {options.only!r}; there are: {names}")
    folder = options.out or HERE
    start = time.monotonic()
    rows: list[measure.Row] = []
    if options.go_on and not options.device:
        parser.error("--go-on needs --device: rows are kept of one device")
    known = known_records(folder, options.device) if options.go_on else []
    if known:
        write(rows, folder, known)

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {text}", file=sys.stderr, flush=True)

    def keep(row: measure.Row) -> None:
        rows.append(row)
        if not options.quick and not options.only:
            write(rows, folder, known)

    try:
        for case in chosen:
            done = {
                (row["contender"], row["statistics"]) for row in known if row["case"] == case.name
            }
            seconds = 3.0 if options.quick else 15.0 if case.device == "cpu" else 5.0
            for row in measure.measure_case(case, seconds, progress, done):
                keep(row)
    except measure.LostDeviceError as error:
        keep(replace(rows.pop(), note=f"{BROKE}{error}"))
        if (
            options.quick or options.only or not options.device
        ):  # nothing that a new process would know
            print(f"the device is lost, and with it the rest: {error}", file=sys.stderr)
            return 1
        progress(f"the device is lost to this process, which starts anew: {error}")
        words = [*(sys.argv[1:] if arguments is None else arguments)]
        os.execv(
            sys.executable,
            [sys.executable, __file__, *words, *([] if options.go_on else ["--go-on"])],
        )
    if not options.quick and not options.only and options.device != "cuda":
        try:
            keep(measure.measure_long_prompt(progress))
        except measure.WrongResultError as error:
            print(f"the long prompt is not reported: {error}", file=sys.stderr)
            return 1
    if options.quick or options.only:
        words = sys.argv[1:] if arguments is None else arguments
        command = " ".join(["python tests/benchmarks/run.py", *words])
        page = report.to_markdown(report.records(rows), command)
    else:
        page = (folder / "RESULTS.md").read_text()
    print(page)
    wrong = [row for row in rows if row.wrong]
    for row in wrong:
        print(f"{row.contender} [{row.statistics}] is not reported: {row.note}", file=sys.stderr)
    return 1 if wrong else 0


BROKE = "broke the device: "


def known_records(folder: Path, device: str | None) -> list[Record]:
    """Rows of this device at this commit, in the folder or else HERE, that a run need not measure again."""
    from tests.benchmarks import report

    own = report.machine(device) if device else None
    found = report.read_csv(folder / "results.csv") or report.read_csv(HERE / "results.csv")
    return [
        row
        for row in found
        if report.machine_of(row) == own and (row["median_ms"] or row["note"].startswith(BROKE))
    ]


def write(rows: list[measure.Row], folder: Path, known: Sequence[Record] = ()) -> None:
    """Both files, with these rows, those known before, and what earlier ones of other devices HERE has."""
    from tests.benchmarks import report

    folder.mkdir(parents=True, exist_ok=True)
    records = report.merge(report.read_csv(HERE / "results.csv"), [*known, *report.records(rows)])
    _replace(folder / "results.csv", report.to_csv(records))
    page = report.to_markdown(records, "python tests/benchmarks/run.py")
    _replace(folder / "RESULTS.md", page)


def _replace(path: Path, text: str) -> None:
    """Never half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
