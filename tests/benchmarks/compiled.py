"""Compiles the Triton kernels that ship for sm_90 and sm_80, without a GPU, and writes the tables.

    python tests/benchmarks/compiled.py [--all] [--minutes 13]

writes compiled.csv (one row a kernel) and COMPILED.md (the worst of each kernel and of each mask) beside this file.
Compiled is what the table lacks, and what stands there from other sources than today's; with `--all` everything: first
what most models run, causal attention in bfloat16 with heads of 64 and 128. Both files are written once a minute, and
after `--minutes` it stops: the rows that were reached are new, the others stay, and the next call goes on with them. Each row
tells the version of Triton and the sources it was made from. The jobs are those of tests/kernels/triton_offline.py,
and tests/kernels/test_triton_compile.py holds the table to account.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from threading import Thread
from typing import Any

import pandas as pd

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.kernels import triton_offline  # noqa: E402

ARCHES = (90, 80)
_MASKS = ("causal", "apart", "decoding", "none", "window", "padding")
"""Those that most models run, in that order."""
TABLE = HERE / "compiled.csv"
COLUMNS = (
    *triton_offline.CHOSEN,
    *("registers", "stack", "local", "shared", "products"),
    *("instructions", "matrix_instructions", "waits", "serialised", "triton", "sources"),
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
        "(compiled.csv has them one by one): registers of a thread (255 at most), bytes spilled, KB "
        "of shared memory",
        "(227 on sm_90, 163 on sm_80), and what multiplies. wgmma takes tiles of 64 rows or more; "
        "`fma` is float32 without",
        "tensor cores, where three tf32 products would need more registers than there are.",
        f"{sum(map(_today, table.to_dict('records')))} of {len(table)} rows are compiled from "
        "today's kernels, the others from earlier ones with the same tiles.",
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
    table = pd.DataFrame(rows, columns=list(COLUMNS)).replace("", None)
    for name in ("instructions", "matrix_instructions", "waits"):  # rows of old have none
        table[name] = pd.to_numeric(table[name]).astype("Int64")
    table.to_csv(TABLE, index=False)
    (HERE / "COMPILED.md").write_text(markdown(table), encoding="utf-8")


def shipped() -> list[Row]:
    """What is chosen today, with nothing compiled, in the order of the jobs."""
    started = [triton_offline.start(arch, "--list") for arch in ARCHES]
    return [row for process in started for row in triton_offline.rows(process)]


def _importance(job: triton_offline.Job) -> tuple[bool, bool, int]:
    """The least comes first."""
    place = _MASKS.index(job.mask) if job.mask in _MASKS else len(_MASKS)
    return job.dtype != "bfloat16", job.dim not in (64, 128), place


def compile_beside(known: list[Row], minutes: float, keep: Callable[[list[Row]], None]) -> None:
    """Compile what is not `known`, for that time; `keep` is handed all that there is, once a minute and at the end."""
    found: list[Row] = []

    def read(process: Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            found.append(json.loads(line))

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([triton_offline.key(row) for row in known], file)
        file.flush()
        jobs = [str(job) for job in sorted(triton_offline.JOBS, key=_importance)]
        words = ("--known", file.name)
        started = [triton_offline.start(arch, *jobs, *words, complaints=None) for arch in ARCHES]
        readers = [Thread(target=read, args=(process,)) for process in started]
        end = time.monotonic() + 60 * minutes
        for reader in readers:
            reader.start()
        while (left := end - time.monotonic()) > 0 and any(one.is_alive() for one in readers):
            next(one for one in readers if one.is_alive()).join(min(60.0, left))
            keep(list(found))
        for reader, process in zip(readers, started, strict=True):
            late = reader.is_alive()
            if late:
                process.terminate()
                reader.join()
            if process.wait() and not late:
                raise SystemExit("the compiler failed; what it said stands above")
    keep(found)


def main() -> None:
    """Compile, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="what is up to date too")
    parser.add_argument("--minutes", type=float, default=13.0)
    given = parser.parse_args()
    old = _by_key(pd.read_csv(TABLE, keep_default_na=False).to_dict("records"))
    fresh = [rows for rows in old.values() if not given.all and all(map(_today, rows))]
    chosen = _by_key(shipped())

    def keep(found: list[Row]) -> None:
        new = _by_key(found)
        whole = {key: rows for key, rows in new.items() if len(rows) == len(chosen[key])}
        rows = [row for key in chosen for row in (old | whole).get(key, [])]
        write(rows)
        missing = chosen.keys() - old.keys() - whole.keys()
        stale = sum(not _today(row) for row in rows)
        print(
            f"{len(whole)} compiled; {len(missing)} are missing, {stale} from other sources",
            flush=True,
        )

    compile_beside([row for rows in fresh for row in rows], given.minutes, keep)


def _by_key(rows: list[Row]) -> dict[tuple, list[Row]]:
    """Keys and values have a kernel each where one launch for both does not fit."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(triton_offline.key(row), []).append(row)
    return found


def _today(row: Row) -> bool:
    return row["sources"] == triton_offline.sources(row["kernel"])


if __name__ == "__main__":
    main()
