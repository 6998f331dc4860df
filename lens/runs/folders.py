"""Run folders, read: what was computed, whether it is whole, and its tables and traces.

The layout is docs/schema/run-folder.md. Nothing here needs torch; nothing is loaded from a pickle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lens.common.errors import LensError
from lens.common.files import as_path, printable, read_json
from lens.common.schema import validated
from lens.runs.commands import CONFIG, again
from lens.runs.contents import head_problems, prompt_problems, section_problems, trace_problems
from lens.runs.door import Door
from lens.runs.processes import is_writing
from lens.runs.schema import (
    HEADS,
    PROMPT_KINDS,
    PROMPTS,
    CircuitFile,
    ConfigFile,
    ImportancesFile,
    Kind,
    run_entries,
)
from lens.traces.metrics import METRICS, VARIANTS

if TYPE_CHECKING:
    from lens.runs.sections import Section
    from lens.traces.trace import AttentionTrace

INDEX = "run.json"
CIRCUITS = "circuits"
IMPORTANCES = f"{CIRCUITS}/mib/importances.json"
_MOST_META = 2**22
_MOST_IMPORTANCES = 2**27
_PROMPT_ID = re.compile(r"p\d{3,}")


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    Attributes:
        path: the folder.
        meta: contents of `run.json`.
        damage: what of it does not fit the schema and is left out, a sentence each.
    """

    path: Path
    meta: dict[str, Any]
    damage: tuple[str, ...] = ()

    @cached_property
    def door(self) -> Door:
        """To the files of the folder."""
        return Door(self.path)

    @property
    def id(self) -> str:
        """Name of the folder."""
        return printable(self.path.name)

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
        found = self.door.toml(CONFIG)
        validated(ConfigFile, found, self.path / CONFIG)
        return found

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """One row per prompt; columns in docs/schema/run-folder.md."""
        table = self._table("prompts.parquet", PROMPTS, max(1, self.meta["prompts"]["total"]))
        self._hold("prompts.parquet", prompt_problems(table))
        return table

    @cached_property
    def heads(self) -> pd.DataFrame:
        """Long table of head metrics; columns in docs/schema/run-folder.md."""
        model, prompts = self.meta["model"], self.meta["prompts"]["total"] + len(PROMPT_KINDS)
        most = prompts * model["layers"] * model["heads"] * len(METRICS) * len(VARIANTS)
        table = self._table("heads.parquet", HEADS, most)
        self._hold("heads.parquet", head_problems(table, model, self.prompts))
        return table

    @cached_property
    def circuits(self) -> tuple[str, ...]:
        """Names of the circuits that were found."""
        return tuple(sorted(path.stem for path in (self.path / CIRCUITS).glob("*.json")))

    def circuit(self, name: str) -> CircuitFile:
        """One circuit, as its file has it.

        Raises:
            LensError: it is damaged.
        """
        return self.door.entries(CircuitFile, f"{CIRCUITS}/{name}.json")

    def importances(self) -> ImportancesFile:
        """Every edge of the model with its score.

        Raises:
            LensError: there are none, or they are damaged.
        """
        return self.door.entries(ImportancesFile, IMPORTANCES, _MOST_IMPORTANCES)

    @property
    def bos(self) -> str | None:
        """Whether prompts begin with the tokenizer's BOS, "added" or "absent"; None where they have no tokens."""
        try:
            ids = self.prompts["token_ids"]
        except LensError:
            return self.meta["bos"]
        return self.meta["bos"] if any(max(one, default=-1) >= 0 for one in ids) else None

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
        folder = self.path / "trace" / prompt_id
        self.door.check(*(f"trace/{prompt_id}/{path.name}" for path in folder.iterdir()))
        trace = AttentionTrace.load(folder)
        self._hold(
            f"trace/{prompt_id}", trace_problems(trace, self.meta["model"], self._tokens(prompt_id))
        )
        return trace

    def _tokens(self, prompt_id: str) -> list[str] | None:
        """Of a prompt; None where the table has none, or is damaged, which is said where it is shown."""
        try:
            found = self.prompts.loc[self.prompts["prompt_id"] == prompt_id, "token_strings"]
        except LensError:
            return None
        return list(found.iloc[0]) if len(found) else None

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
        return self.meta["unsupported"]

    def section(self, name: str) -> Section:
        """One section with its tables and figures.

        Raises:
            LensError: there is none, or it is damaged.
        """
        from lens.runs.sections import load_section

        if name in self.unsupported:
            raise LensError(f"the section {name} is unsupported here: {self.unsupported[name]}")
        section = load_section(self.door, name)
        self._hold(f"sections/{name}", section_problems(section, self.meta["model"]))
        return section

    def readable(
        self, read: Callable[[Run, str], Section] | None = None
    ) -> tuple[dict[str, Section], list[str]]:
        """Sections that can be read, by name, and why the others cannot; `read` in place of `section`."""
        read = read or Run.section
        found, problems = {}, []
        for name in self.sections:
            try:
                found[name] = read(self, name)
            except LensError as error:
                problems.append(str(error))
        return found, problems

    def readable_tables(self) -> tuple[Run, dict[str, str]]:
        """The run without rows in `prompts` and `heads` where they cannot be read, and why they cannot."""
        found, problems = replace(self), {}
        for name, columns in (("prompts", PROMPTS), ("heads", HEADS)):
            try:
                found.__dict__[name] = getattr(self, name)
            except LensError as error:
                found.__dict__[name] = pd.DataFrame(columns=[*columns])
                problems[name] = str(error)
        return found, problems

    def _table(self, name: str, kinds: Mapping[str, Kind], most_rows: int) -> pd.DataFrame:
        if not self.door.has(name):
            raise LensError(
                f"{self.path / name} is missing: the run is {self.status}; "
                f"complete it with `{again(self.path, self.meta)}`"
            )
        return self.door.table(name, kinds, most_rows=most_rows)

    def _hold(self, name: str, problems: Iterator[str]) -> None:
        """Raises LensError with the first of the problems, if there is one."""
        if problem := next(problems, ""):
            raise LensError(f"{self.path / name}: {problem}; run the analysis again")

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
        return printable(self.path.name)

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
    folder = as_path("folder", folder)
    path = folder / INDEX
    if not path.exists() and not path.is_symlink():
        raise LensError(
            f"{folder} is no run folder ({INDEX} is missing); `lens list` shows the runs"
        )
    meta, damage = run_entries(read_json(path, most=_MOST_META, within=folder), path)
    return Run(folder.resolve(), meta, damage)


def list_runs(folder: str | Path) -> list[Run | BrokenRun]:
    """Every run in a folder of runs, newest first; a damaged one is listed with its problem.

    Raises:
        LensError: the folder does not exist.

    Example:
        >>> len(lens.runs.list_runs(run.path.parent))
        2
    """
    return listed(folder, open_run)


def listed(folder: str | Path, opened: Callable[[Path], Run]) -> list[Run | BrokenRun]:
    """`list_runs`, with what opens a run: who asks often keeps those that did not change."""
    folder = as_path("folder", folder)
    if not folder.is_dir():
        raise LensError(f"there is no folder {folder}; `lens demo` or `lens run` makes runs")
    runs: list[Run | BrokenRun] = []
    for entry in folder.iterdir():
        try:
            if (entry / INDEX).exists() or (entry / INDEX).is_symlink():
                runs.append(opened(entry))
        except (LensError, OSError) as error:
            runs.append(BrokenRun(entry.absolute(), printable(str(error))))
    return sorted(runs, key=_newest_first)


def find_run(folder: str | Path, run_id: str) -> Run:
    """The run of this id in a folder of runs; the id is looked up, never joined to a path.

    Raises:
        LensError: there is none, or it cannot be read.

    Example:
        >>> lens.runs.find_run(run.path.parent, run.id).status
        'success'
    """
    folder = as_path("folder", folder)
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
