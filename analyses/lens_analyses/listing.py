"""`lens list` and `lens validate`: what runs there are, and whether one is whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens.common.files import alone_in
from lens.runs import BrokenRun, Run, list_runs, open_run
from lens.runs.commands import again
from lens.runs.manifest import remove_own
from lens_analyses.console import ERROR, OK, PARTIAL


@dataclass(frozen=True)
class Listing:
    """The runs of a folder, newest first."""

    folder: Path
    runs: list[Run | BrokenRun]

    def text(self) -> str:
        """One line a run."""
        if not self.runs:
            return f"no runs in {self.folder}; `lens demo` or `lens run --out {self.folder}` makes some"
        rows = [("STATUS", "PROMPTS", "RUN", "")]
        rows += [_row(run) for run in self.runs]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join(
                cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)
            ).rstrip()
            for row in rows
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"folder": str(self.folder), "runs": [_record(run) for run in self.runs]}


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a run folder, if anything."""

    run: Run
    problems: list[str]

    @property
    def exit_code(self) -> int:
        """1 with problems, 3 for a run that is not finished, else 0."""
        if self.problems:
            return ERROR
        return OK if self.run.status == "success" else PARTIAL

    def text(self) -> str:
        """One line a problem."""
        if self.problems:
            return "\n".join(f"{self.run.id}: {problem}" for problem in self.problems)
        whole = "valid" if self.run.status == "success" else f"valid so far ({self.run.status})"
        unknown = (
            "" if self.run.door.manifest else "; no manifest: later changes of files are not seen"
        )
        return f"{self.run.id}: {whole}{unknown}"

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "id": self.run.id,
            "status": self.run.status,
            "problems": self.problems,
            "manifest": bool(self.problems or self.run.door.manifest),
        }


def listing_of(folder: Path) -> Listing:
    """All runs in `folder`.

    Raises:
        LensError: no such folder.
    """
    return Listing(folder, list_runs(folder))


def verdict_on(run: Run) -> Verdict:
    """Check a run folder: schema, files, row sums, NaN."""
    from lens.runs.validation import validate

    return Verdict(run, validate(run))


def resolve(name: str, folder: Path) -> Run:
    """The run that a person means: a path of a run folder, its id in `folder`, or the end of one id.

    Raises:
        LensError: there is none, there are several, or it cannot be read.
    """
    if not name.strip():
        raise LensError("a run must be named, got an empty text; `lens list` shows the runs")
    path = Path(name)
    if path.is_dir():
        return open_run(path)
    runs = list_runs(folder) if folder.is_dir() else []
    found = [run for run in runs if run.id == name] or [
        run for run in runs if run.id.endswith(name)
    ]
    if not found:
        raise LensError(
            f"no run {name!r}, neither as a folder nor in {folder}; `lens list` shows the runs"
        )
    if len(found) > 1:
        listed = ", ".join(run.id for run in found)
        raise LensError(f"{name!r} could be any of {listed}; give more of the id")
    if isinstance(found[0], BrokenRun):
        raise LensError(found[0].problem)
    return found[0]


def delete_run(run: Run) -> int:
    """Remove what a run wrote, and its folder if that is all; how many files of others stay.

    Raises:
        LensError: it is being computed right now.
    """
    with alone_in(run.path.parent):
        # as it is now: it may have been gone on with since it was looked up
        run = open_run(run.path)
        if run.status == "started":
            raise LensError(f"{run.path} is being computed right now; stop it first")
        remove_own(run.path, run.meta["files"])
    return sum(not path.is_dir() for path in run.path.rglob("*")) if run.path.exists() else 0


def _row(run: Run | BrokenRun) -> tuple[str, str, str, str]:
    if isinstance(run, BrokenRun):
        return ("broken", "", run.id, run.problem)
    prompts = run.meta["prompts"]
    error = run.meta["error"] or {}
    note = error.get("message", "") if run.status == "error" else run.title
    if run.status == "partial":
        failed = f"{error['message']}; " if error else ""
        note = f"{failed}complete it: {again(run.path, run.meta)}"
    return (run.status, f"{prompts['done']}/{prompts['total']}", run.id, note)


def _record(run: Run | BrokenRun) -> dict[str, Any]:
    if isinstance(run, BrokenRun):
        return {"id": run.id, "path": str(run.path), "status": run.status, "problem": run.problem}
    keys = ("title", "what", "created", "updated", "seconds", "prompts", "warnings", "error")
    return {
        "id": run.id,
        "path": str(run.path),
        "status": run.status,
        "model": run.meta["model"]["name"],
        **{key: run.meta.get(key) for key in keys},
    }
