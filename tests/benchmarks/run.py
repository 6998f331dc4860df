"""Measures speed and memory: `python tests/benchmarks/run.py [--quick] [--only TEXT]`.

The full run (about five minutes on 2 cores) rewrites results.csv and RESULTS.md beside this file;
`--quick` and `--only` print the page and write nothing. Rows of a GPU that were measured elsewhere
stay when this machine has none.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def main(arguments: list[str] | None = None) -> int:
    """Runs the registry; 0, or 1 when a kernel is wrong."""
    from tests.benchmarks import cases, measure, report

    parser = argparse.ArgumentParser(description=__doc__, prog="tests/benchmarks/run.py")
    parser.add_argument("--quick", action="store_true", help="two CPU cases, under a minute")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    options = parser.parse_args(arguments)
    chosen = cases.QUICK if options.quick else cases.CASES
    chosen = [case for case in chosen if options.only in case.name]
    if not chosen:
        names = "; ".join(case.name for case in cases.CASES)
        parser.error(f"no case contains {options.only!r}; there are: {names}")
    start = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {text}", file=sys.stderr, flush=True)

    rows: list[measure.Row] = []
    try:
        for case in chosen:
            rows += measure.measure_case(case, 3.0 if options.quick else 5.0, progress)
        if not options.quick and not options.only:
            rows.append(measure.measure_long_prompt(progress))
    except measure.WrongResultError as error:
        print(f"wrong result, nothing is reported: {error}", file=sys.stderr)
        return 1
    records = report.records(rows)
    if options.quick or options.only:
        print(report.to_markdown(records, "python tests/benchmarks/run.py --quick"))
        return 0
    records = report.merge(report.read_csv(HERE / "results.csv"), records)
    (HERE / "results.csv").write_text(report.to_csv(records))
    page = report.to_markdown(records, "python tests/benchmarks/run.py")
    (HERE / "RESULTS.md").write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
