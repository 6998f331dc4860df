"""Writes rows as CSV, and as a page with the goals beside what was reached."""

from __future__ import annotations

import csv
import io
import math
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.benchmarks import goals, measure
from tests.benchmarks.measure import Row

Record = dict[str, str]


def records(rows: Sequence[Row]) -> list[Record]:
    """Rows as text, with device and versions in each."""
    commit = _commit()
    return [
        {
            "case": row.case.name,
            "device": row.case.device,
            "device_name": _device_name(row.case.device),
            "dtype": row.case.dtype,
            "heads": str(row.case.heads),
            "kv_heads": str(row.case.kv_heads),
            "queries": str(row.case.queries),
            "keys": str(row.case.keys),
            "head_dim": str(row.case.head_dim),
            "contender": row.contender,
            "statistics": row.statistics,
            "rounds": str(row.rounds),
            "median_ms": _number(row.median_ms, 2),
            "min_ms": _number(row.min_ms, 2),
            "ratio_to_sdpa": _number(row.ratio, 3),
            "ratio_low": _number(row.ratio_low, 3),
            "ratio_high": _number(row.ratio_high, 3),
            "min_ratio_to_sdpa": _number(row.min_ratio, 3),
            "tflops": _number(row.tflops, 4),
            "peak_mb": _number(row.peak_mb, 1),
            "error": "" if math.isnan(row.error) else f"{row.error:.1e}",
            "note": row.note,
            "load": f"{row.load:.1f}",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit,
        }
        for row in rows
    ]


def machine(device: str) -> tuple[str, ...]:
    """What makes rows comparable: device, torch and commit."""
    return device, _device_name(device), torch.__version__, _commit()


def machine_of(record: Record) -> tuple[str, ...]:
    """`machine` of a row."""
    return tuple(record[name] for name in ("device", "device_name", "torch", "commit"))


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    model = ""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":")[1].strip()
                break
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model or platform.processor()}, {capability}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """Short hash, with a + when the sources differ from it."""
    root = Path(__file__).parents[2]
    try:
        name = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "kernels"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed else "")


def read_csv(path: Path) -> list[Record]:
    """Earlier rows, or none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def merge(old: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """New rows in place of the old; measured rows of a device that is absent now stay."""
    measured = {record["device"] for record in new if record["median_ms"]}
    asked = {record["device"] for record in new}
    kept = [
        record
        for record in old
        if record["device"] not in measured
        and (record["median_ms"] or record["device"] not in asked)
    ]
    devices = {record["device"] for record in kept}
    return [record for record in new if record["device"] not in devices] + kept


def to_csv(rows: Sequence[Record]) -> str:
    """CSV text, one line per row."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# --- the page ---


def _short(text: str, digits: int) -> str:
    return f"{float(text):.{digits}f}" if text else "-"


def _with_ends(row: Record) -> str:
    """The ratio to SDPA, with its interval where rows hold one."""
    ratio = _short(row["ratio_to_sdpa"], 2)
    if not row["ratio_low"] or row["contender"] == "SDPA":
        return ratio
    return f"{ratio} [{_short(row['ratio_low'], 2)}, {_short(row['ratio_high'], 2)}]"


def to_markdown(rows: Sequence[Record], command: str) -> str:
    """The page: goals, then one table per case."""
    lines = [
        "# Speed and memory",
        "",
        f"Made by `{command}`.",
        "Every contender of a case ran in the same process, in turn. `ms` is the median, `ratio` the",
        "median over rounds of the time against `scaled_dot_product_attention` in the same round, with its",
        "95 % interval over the rounds where there are six or more (the next run may lie outside: neighbours on the",
        "machine change between runs), `min` the ratio of the fastest rounds. What is three times slower than",
        f"SDPA joins {measure.FEW} rounds alone. A goal between the ends of its interval is undecided.",
        "*Matrix products alone* are `torch.mm` with as many operations and nothing else: less than that no attention",
        "by float32 can be expected to take. TFLOP/s count the visible half of causal attention. Memory is",
        "the highest point of one call beyond its inputs, outputs included, in a process of its own;",
        "for `lens.capture` it is the whole process. Before timing, every statistic was held against",
        "the float64 reference with the same flags, and the full-size output against SDPA's.",
        "",
        *goals.table(rows),
    ]
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        versions = (
            f"torch {mine[0]['torch']}, Python {mine[0]['python']}, commit {mine[0]['commit']}; "
            f"load average during the run up to {max(float(row['load']) for row in mine):.1f}, "
            "the run itself included"
        )
        lines += [f"## {device.upper()}: {mine[0]['device_name']}", "", versions, ""]
        if not any(row["median_ms"] for row in mine):
            names = ", ".join(dict.fromkeys(row["case"] for row in mine))
            lines += [f"not measured (no such device here): {names}", ""]
            continue
        for case in dict.fromkeys(row["case"] for row in mine):
            lines += _table(case, [row for row in mine if row["case"] == case])
    return "\n".join(lines).rstrip() + "\n"


def _table(case: str, rows: Sequence[Record]) -> list[str]:
    first = rows[0]
    shape = f"{first['heads']} heads x {first['head_dim']}, {first['dtype']}"
    lines = [
        f"### {case} ({shape})",
        "",
        "| | statistics | ms | ratio | min | TFLOP/s | extra MB |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        name = f"| {row['contender']} | {row['statistics'] or '-'} |"
        if row["note"]:
            lines.append(f"{name} {row['note']} | | | | |")
            continue
        numbers = (
            _short(row["median_ms"], 1),
            _with_ends(row),
            _short(row["min_ratio_to_sdpa"], 2),
            _short(row["tflops"], 3),
            _short(row["peak_mb"], 1),
        )
        lines.append(f"{name} {' | '.join(numbers)} |")
    return [*lines, ""]
