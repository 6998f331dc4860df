"""`lens export`: what a run found, as files that other tools read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens.common.errors import LensError
from lens.common.files import write_text
from lens.runs import Run, to_csv, to_headvis, to_parquet
from lens.runs.folders import CIRCUITS
from lens_analyses.console import UsageError
from lens_analyses.exporting.pictures import PICTURES, write_pictures

if TYPE_CHECKING:
    import pandas as pd

    from lens.runs.sections import Section

FORMATS = ("headvis", "csv", "parquet", "graph", "figures")
FOLDER = "exports"
_MOST_CIRCUIT = 2**27
_LISTS = ("token_ids", "token_strings")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        files: relative to it.
        missing: why something was not written, "" if everything was.
    """

    folder: Path
    files: tuple[str, ...]
    missing: str = ""

    def text(self) -> str:
        """Where it lies."""
        warning = [f"warning: {self.missing}"] if self.missing else []
        count = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        return "\n".join([*warning, f"{count} in {self.folder}"])

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "missing": self.missing or None,
        }


def export_run(
    run: Run,
    kind: str,
    out: Path,
    *,
    pictures: tuple[str, ...] | None = None,
    width: str | None = None,
) -> Exported:
    """Write a run in one format of `FORMATS`.

    Args:
        run: a finished run, or a partial one that has what the format needs.
        kind: `headvis` (a tree as Neuronpedia reads it, from traces with q and k), `csv`, `parquet`
            (every table), `graph` (circuits as JSON) or `figures`.
        out: folder; for `headvis` one that does not exist.
        pictures, width: of `figures` alone, see `write_pictures`; None: SVG, PDF and PNG for a single column.

    Raises:
        UsageError: an unknown format, or pictures asked of another one.
        LensError: nothing of it in the run.
    """
    if kind == "figures":
        kinds = PICTURES if pictures is None else pictures
        written = write_pictures(run, out, kinds, "single" if width is None else width)
        missing = [*filter(None, [written.missing]), *run.readable()[1]]
        return Exported(out, written.files, "; ".join(missing))
    writers: dict[str, Callable[[Run, Path], list[str]]] = {
        "headvis": _headvis,
        "graph": _graph,
    }
    if kind not in FORMATS:
        raise UsageError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}")
    if (pictures, width) != (None, None):
        raise UsageError(f"--as and --width are of figures, and {kind} has none; leave them out")
    if kind not in ("csv", "parquet"):
        return Exported(out, tuple(writers[kind](run, out)))
    sections, damage = run.readable()
    write = _write_csv if kind == "csv" else to_parquet
    files = [write(table, out / f"{name}.{kind}").name for name, table in _tables(run, sections)]
    return Exported(out, tuple(files), "; ".join(damage))


def _headvis(run: Run, out: Path) -> list[str]:
    to_headvis([run.trace(name) for name in run.traces], out, dataset=run.title)
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def _write_csv(table: pd.DataFrame, path: Path) -> Path:
    """With the lists of tokens as JSON."""
    lists = {
        name: [json.dumps(list(cell), ensure_ascii=False, default=int) for cell in table[name]]
        for name in _LISTS
        if name in table
    }
    return to_csv(table.assign(**lists), path)


def _tables(run: Run, sections: Mapping[str, Section]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Scores, prompts, and every table of a section as `<section>-<table>`."""
    every = {"heads": run.heads, "prompts": run.prompts}
    for name, section in sections.items():
        every |= {f"{name}-{part}": table for part, table in section.tables.items()}
    if not any(map(len, every.values())):
        raise LensError(f"{run.id} has no table with a row; there is nothing to write")
    yield from ((name, table) for name, table in every.items() if len(table))


def _graph(run: Run, out: Path) -> list[str]:
    """Circuits, attribution graphs and edge scores, as the run has them."""
    folder = run.path / CIRCUITS
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))
    if not files:
        raise LensError(f"run {run.id} has no circuit; `lens circuit` finds one")
    for file in files:
        write_text(out / file, run.door.text(f"{CIRCUITS}/{file}", _MOST_CIRCUIT))
    return files
