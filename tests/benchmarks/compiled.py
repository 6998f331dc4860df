"""Compiles every Triton kernel that ships for sm_90 and sm_80, without a GPU, and writes the tables.

`python tests/benchmarks/compiled.py [--new]` writes compiled.csv (one row a kernel) and COMPILED.md
(the worst of each kernel and of each mask) beside this file; an hour on two cores, less where
Triton's cache has the kernels. `--new` compiles what the table lacks, kernels with another tile than
before, and keeps the other rows; each row tells the version of Triton and the sources it was made
from. The jobs are those of tests/kernels/triton_offline.py, and
tests/kernels/test_triton_compile.py holds the table to account.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.kernels import triton_offline  # noqa: E402

ARCHES = (90, 80)
TABLE = HERE / "compiled.csv"


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
        f"{(table['sources'] == triton_offline.sources()).sum()} of {len(table)} rows are compiled from "
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


def write(rows: list[dict]) -> None:
    """Both files."""
    table = pd.DataFrame(rows).replace("", None)
    for name in ("instructions", "matrix_instructions", "waits"):  # rows of old have none
        table[name] = pd.to_numeric(table[name]).astype("Int64")
    table.to_csv(TABLE, index=False)
    (HERE / "COMPILED.md").write_text(markdown(table), encoding="utf-8")


def known() -> list[dict]:
    """Rows of the table that ship as they stand there."""
    shipped = [triton_offline.start(arch, "--list") for arch in ARCHES]
    keys = {triton_offline.key(row) for process in shipped for row in triton_offline.rows(process)}
    old = pd.read_csv(TABLE, keep_default_na=False).to_dict("records")
    return [row for row in old if triton_offline.key(row) in keys]


def made(kept: list[dict]) -> list[dict]:
    """`kept`, and what is compiled beside it, in the order of the jobs."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([triton_offline.key(row) for row in kept], file)
        file.flush()
        started = [triton_offline.start(arch, "--known", file.name) for arch in ARCHES]
        rows = kept + [row for process in started for row in triton_offline.rows(process)]
    jobs = {str(job): place for place, job in enumerate(triton_offline.JOBS)}

    def place(row: dict) -> tuple[int, int]:
        job = triton_offline.Job(row["dtype"], row["head_dim"], row["mask"])
        return ARCHES.index(row["arch"]), jobs[str(job)]

    return sorted(rows, key=place)


if __name__ == "__main__":
    write(made(known() if "--new" in sys.argv else []))
