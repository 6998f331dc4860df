"""Compiles the Triton kernels that ship for sm_90 and sm_80, without a GPU, and writes the tables.

    python tests/benchmarks/compiled.py [--all] [--minutes 60]

writes compiled.csv (one row a kernel) and COMPILED.md (the worst of each kernel and of each mask) beside this file.
Compiled is what the table lacks: a row holds while what is compiled, its tile and the version of Triton stay the same;
with `--all` everything. Both files are written at the end and once a minute, with today's kernels alone, the commonest first, and after
`--minutes` it stops: the next call goes on. The jobs are those of tests/kernels/triton_offline.py,
and tests/kernels/test_triton_compile.py holds the table to account.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.kernels import triton_offline  # noqa: E402

ARCHES = (90, 80)
TABLE = HERE / "compiled.csv"
COLUMNS = (
    *triton_offline.CHOSEN,
    *("registers", "stack", "local", "shared", "products"),
    *("instructions", "matrix_instructions", "waits", "serialised", "triton"),
)
Row = dict[str, Any]


def worst(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Largest use of registers, spilled bytes and shared memory (KB), and what multiplies."""
    table = table.assign(shared=(table["shared"] / 1024).round(1), spilled=table["stack"])
    groups = table.groupby(by)
    used = groups["products"].agg(lambda names: ", ".join(sorted(set(names))))
    return groups[["registers", "spilled", "shared"]].max().assign(products=used).reset_index()


def lines_of(table: pd.DataFrame, by: list[str]) -> list[str]:
    """Markdown lines of `worst`."""
    titles = [*by, "registers", "spilled", "shared", "products"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(by) + "|--:|--:|--:|---|"]
    for row in worst(table, by).itertuples(index=False):
        cells = (f"sm_{row.arch}", *row[1:])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def markdown(table: pd.DataFrame) -> str:
    """The page."""
    table = table.rename(columns={"dtype": "type", "head_dim": "head dim"})
    lines = [
        "# Compiled kernels",
        "",
        "Made by `python tests/benchmarks/compiled.py` with "
        f"triton {', '.join(sorted(set(table['triton'])))}; nothing here ran on a GPU. Each "
        "line is the worst of several kernels",
        f"(compiled.csv has the {len(table)} one by one): registers of a thread (255 at most), bytes "
        "spilled, KB of shared memory",
        "(227 on sm_90, 163 on sm_80), and what multiplies. wgmma takes tiles of 64 rows or more; "
        "`fma` is float32 without",
        "tensor cores, where three tf32 products would need more registers than there are.",
        "",
        "## By kernel",
        "",
        *lines_of(table, ["arch", "kernel", "type", "head dim"]),
        "",
        "## By mask",
        "",
        "What each stands for is in tests/kernels/triton_offline.py.",
        "",
        *lines_of(table[table["kernel"] != "levels"], ["arch", "mask", "type"]),
    ]
    return "\n".join(lines) + "\n"


def write(rows: list[Row]) -> None:
    """Both files."""
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.to_csv(TABLE, index=False)
    (HERE / "COMPILED.md").write_text(markdown(table), encoding="utf-8")


def compiled(known: list[str]) -> Iterator[Row]:
    """Each kernel whose `code` is not known, when it is made."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(known, file)
        file.flush()
        process = triton_offline.start(*ARCHES, "--known", file.name, complaints=None)
        assert process.stdout is not None
        try:
            yield from map(json.loads, process.stdout)
        except GeneratorExit:
            process.terminate()
            process.wait()
            raise
    if process.wait():
        raise SystemExit("the compiler failed; what it said stands above")


def main() -> None:
    """Compile, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="what is up to date too")
    parser.add_argument("--minutes", type=float, default=60.0)
    given = parser.parse_args()
    chosen = [row["code"] for row in triton_offline.rows(triton_offline.start(*ARCHES, "--list"))]
    version = metadata.version("triton")
    old: Any = pd.read_csv(TABLE, keep_default_na=False).to_dict("records")
    rows = {row["code"]: row for row in old if row["triton"] == version and not given.all}
    start = written = time.monotonic()
    for row in compiled(list(rows)):
        rows[row["code"]] = row
        now = time.monotonic()
        late = now - start > 60 * given.minutes
        if now - written > 60 or late:
            keep(rows, chosen)
            written = now
        if late:
            break
    keep(rows, chosen)


def keep(rows: dict[str, Row], chosen: list[str]) -> None:
    """Write those of today by their `code`, in that order."""
    found = [rows[code] for code in chosen if code in rows]
    write(found)
    print(f"{len(found)} of {len(chosen)} kernels compiled", flush=True)


if __name__ == "__main__":
    main()
