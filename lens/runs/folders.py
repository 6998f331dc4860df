"""Run folders, read: what was computed, whether it is whole, and its tables and traces.

The layout is docs/schema/run-folder.md. Nothing here needs torch; nothing is loaded from a pickle.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens.common.errors import LensError
from lens.common.files import read_json
from lens.runs.processes import is_writing

if TYPE_CHECKING:
    import pandas as pd

    from lens.runs.sections import Section
    from lens.traces.trace import AttentionTrace

SCHEMA = "attention-lens/run"
SCHEMA_VERSION = 1
INDEX = "run.json"
STATUSES = ("started", "success", "partial", "error")
REQUIRED = {
    "id": str,
    "title": str,
    "what": str,
    "status": str,
    "created": str,
    "model": dict,
    "prompts": dict,
    "versions": dict,
    "files": dict,
}
"""Entries that `run.json` cannot do without, with their types."""
_JSON = {str: "a string", dict: "an object"}
_PROMPT_ID = re.compile(r"p\d{3,}")


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    Attributes:
        path: the folder.
        meta: contents of `run.json`.
    """

    path: Path
    meta: dict[str, Any]

    @property
    def id(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def title(self) -> str:
        """One line for people."""
        return self.meta["title"]

    @property
    def status(self) -> str:
        """`started`, `success`, `partial` or `error`.

        A run that says `started` while its process is gone counts as `partial`.
        """
        status = self.meta["status"]
        return "partial" if status == "started" and not is_writing(self.meta) else status

    @property
    def config(self) -> dict[str, Any]:
        """Contents of `config.toml`."""
        path = self.path / "config.toml"
        try:
            return tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise LensError(f"{path} cannot be read ({error}); run the analysis again") from error

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """One row per prompt; columns in docs/schema/run-folder.md."""
        return self._table("prompts.parquet")

    @cached_property
    def heads(self) -> pd.DataFrame:
        """Long table of head metrics; columns in docs/schema/run-folder.md."""
        return self._table("heads.parquet")

    @property
    def traces(self) -> list[str]:
        """Ids of the prompts that have a finished trace."""
        from lens.traces.store import INDEX as TRACE_INDEX

        folder = self.path / "trace"
        if not folder.is_dir():
            return []
        return sorted(
            entry.name
            for entry in folder.iterdir()
            if _PROMPT_ID.fullmatch(entry.name) and (entry / TRACE_INDEX).exists()
        )

    def trace(self, prompt_id: str) -> AttentionTrace:
        """The trace of one prompt, read when it is used.

        Raises:
            LensError: there is none, or it is damaged.
        """
        from lens.traces.trace import AttentionTrace

        if prompt_id not in self.traces:
            have = ", ".join(self.traces) or "none"
            raise LensError(f"run {self.id} has no trace of prompt {prompt_id!r}; it has: {have}")
        return AttentionTrace.load(self.path / "trace" / prompt_id)

    @property
    def sections(self) -> list[str]:
        """Names of the finished sections, in the order in which they were computed: what `lens heads`,
        `lens sinks` and others found."""
        from lens.runs.sections import FOLDER, INDEX, section_names

        written = list(self.meta.get("files", {}))
        places = {name: place for place, name in enumerate(written)}

        def place(name: str) -> int:
            return places.get(f"{FOLDER}/{name}/{INDEX}", len(places))

        return sorted(section_names(self.path), key=place)

    @property
    def unsupported(self) -> dict[str, str]:
        """Name of each section that this model or its prompts do not allow -> why not."""
        return self.meta.get("unsupported", {})

    def section(self, name: str) -> Section:
        """One section with its tables and figures.

        Raises:
            LensError: there is none, or it is damaged.
        """
        from lens.runs.sections import load_section

        if name in self.unsupported:
            raise LensError(f"the section {name} is unsupported here: {self.unsupported[name]}")
        return load_section(self.path, name)

    def _table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        path = self.path / name
        if not path.exists():
            raise LensError(
                f"{path} is missing: the run is {self.status}; "
                f"complete it with `lens run -c {self.path / 'config.toml'}`"
            )
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise LensError(
                f"{path} is damaged ({error}); delete it and complete the run with "
                f"`lens run -c {self.path / 'config.toml'}`"
            ) from error

    def __repr__(self) -> str:
        prompts, model = self.meta["prompts"], self.meta["model"]
        return (
            f"<Run {self.id}: {self.status}, {model['name']}, "
            f"{prompts['done']} of {prompts['total']} prompts>"
        )


@dataclass(frozen=True)
class BrokenRun:
    """A folder that looks like a run and cannot be read.

    Attributes:
        path: the folder.
        problem: why not, and what to do.
    """

    path: Path
    problem: str

    @property
    def id(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def status(self) -> str:
        """Always `error`."""
        return "error"


def open_run(folder: str | Path) -> Run:
    """Open a run folder.

    Raises:
        LensError: no run folder, damaged, or of another schema version.

    Example:
        >>> lens.runs.open_run(run.path).status
        'success'
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.exists():
        raise LensError(
            f"{folder} is no run folder ({INDEX} is missing); `lens list` shows the runs"
        )
    meta = read_json(path)
    version = meta.get("schema_version")
    if meta.get("schema") != SCHEMA or version != SCHEMA_VERSION:
        versions = meta.get("versions")
        writer = versions.get("attention-lens", "?") if isinstance(versions, dict) else "?"
        raise LensError(
            f"{path} has schema {meta.get('schema')!r} version {version!r}, this attention-lens reads "
            f"{SCHEMA!r} version {SCHEMA_VERSION}; it was written by attention-lens {writer}: "
            f"read it with that version"
        )
    if missing := [key for key in REQUIRED if key not in meta]:
        raise LensError(f"{path} lacks {', '.join(missing)}; run the analysis again")
    for key, kind in REQUIRED.items():
        if not isinstance(meta[key], kind):
            raise LensError(
                f"{path}: {key} must be {_JSON[kind]}, got {meta[key]!r}; run the analysis again"
            )
    counts = [meta["prompts"].get(key) for key in ("done", "total")]
    if "name" not in meta["model"] or not all(isinstance(count, int) for count in counts):
        raise LensError(
            f"{path}: model must have a name and prompts the counts done and total; "
            "run the analysis again"
        )
    if meta["status"] not in STATUSES:
        raise LensError(f"{path} has status {meta['status']!r}, must be one of {STATUSES}")
    return Run(folder.resolve(), meta)


def list_runs(folder: str | Path) -> list[Run | BrokenRun]:
    """Every run in a folder of runs, newest first; a damaged one is listed with its problem.

    Raises:
        LensError: the folder does not exist.

    Example:
        >>> len(lens.runs.list_runs(run.path.parent))
        2
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LensError(f"there is no folder {folder}; `lens demo` or `lens run` makes runs")
    runs: list[Run | BrokenRun] = []
    for entry in folder.iterdir():
        try:
            if (entry / INDEX).exists():
                runs.append(open_run(entry))
        except (LensError, OSError) as error:
            runs.append(BrokenRun(entry.absolute(), str(error)))
    return sorted(runs, key=_newest_first)


def find_run(folder: str | Path, run_id: str) -> Run:
    """The run of this id in a folder of runs; the id is looked up, never joined to a path.

    Raises:
        LensError: there is none, or it cannot be read.

    Example:
        >>> lens.runs.find_run(run.path.parent, run.id).status
        'success'
    """
    folder = Path(folder)
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name == run_id and (entry / INDEX).exists():
            return open_run(entry)
    raise LensError(f"there is no run {run_id!r} in {folder}; `lens list` shows the runs")


def _newest_first(run: Run | BrokenRun) -> tuple[float, str]:
    try:
        changed = (run.path / INDEX).stat().st_mtime
    except OSError:  # deleted meanwhile
        changed = 0.0
    return (-changed, run.id)
