"""Run folders, written: every file whole or not at all, and resumable by the same configuration."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from lens.common.errors import LensError
from lens.common.files import (
    PART,
    alone_in,
    lies_in,
    read_json,
    write_atomically,
    write_json,
    write_text,
)
from lens.runs.commands import CONFIG
from lens.runs.folders import INDEX, Run, open_run
from lens.runs.manifest import MANIFEST, read_manifest, remove_own, write_manifest
from lens.runs.processes import this_process
from lens.runs.schema import SCHEMA, SCHEMA_VERSION

if TYPE_CHECKING:
    import pandas as pd


def config_hash(config: Mapping[str, Any]) -> str:
    """First 8 hex digits of the SHA-256 of the configuration's canonical JSON."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


_DATED = re.compile(r"\d{4}-\d\d-\d\d-.+-[0-9a-f]{8}")


def find_by_config(runs: str | Path, config: Mapping[str, Any]) -> Path | None:
    """The folder of an earlier run of this configuration, or None.

    A copy under another name, or a folder of something else whose name ends alike, is not it.
    """
    runs = Path(runs)
    if not runs.is_dir():
        return None
    suffix = f"-{config_hash(config)}"
    found = [
        entry
        for entry in runs.iterdir()
        if entry.name.endswith(suffix) and _DATED.fullmatch(entry.name) and _is_its_own(entry)
    ]
    return max(found, key=lambda entry: entry.name, default=None)


def _is_its_own(folder: Path) -> bool:
    """Whether `run.json` is of a run of this name; a damaged one is, as nothing says otherwise."""
    return (folder / INDEX).exists() and _identity(folder) in (folder.name, None)


def _identity(folder: Path) -> str | None:
    """The id in `run.json`, of whatever version; None where it cannot be read."""
    try:
        return str(read_json(folder / INDEX, within=folder).get("id"))
    except LensError:
        return None


class RunWriter:
    """Writes one run folder.

    `RunWriter.start` takes a new folder, or the unfinished folder of the same configuration. Each
    change rewrites `run.json`, so the folder is readable at any moment.

    Attributes:
        path: the folder.
        meta: what `run.json` holds.
        resumed: whether the folder was there.
    """

    def __init__(self, path: Path, meta: dict[str, Any], *, resumed: bool) -> None:
        self.path = path
        self.meta = meta
        self.resumed = resumed
        self._before = float(meta.get("seconds", 0.0))
        self._since = time.monotonic()

    @classmethod
    def start(
        cls,
        runs: str | Path,
        config: Mapping[str, Any],
        meta: Mapping[str, Any],
        *,
        again: bool = False,
    ) -> RunWriter:
        """Begin or resume the run of `config`; of two that begin at once, the second is refused.

        Args:
            runs: folder of runs; made if it is not there.
            config: plain values, without None (TOML has none).
            meta: entries of `run.json` known from the start: title, what, command, model, device,
                backend, block_size, seed, bos, prompts, versions.
            again: begin anew: what the earlier run wrote is removed first, and nothing else.

        Raises:
            LensError: another process is writing this run, or it is damaged or of another version.
        """
        runs = Path(runs)
        runs.mkdir(parents=True, exist_ok=True)
        with alone_in(runs):
            return cls._start(runs, config, meta, again)

    @classmethod
    def _start(
        cls, runs: Path, config: Mapping[str, Any], meta: Mapping[str, Any], again: bool
    ) -> RunWriter:
        path = find_by_config(runs, config)
        earlier: dict[str, Any] = {}
        if path is not None:
            earlier = _earlier(path, again)
        else:
            date = datetime.now(UTC).date().isoformat()
            slug = re.sub(r"[^A-Za-z0-9.]+", "-", str(meta["model"]["name"])).strip("-.") or "model"
            path = runs / f"{date}-{slug[:60]}-{meta['what']}-{config_hash(config)}"
        entries = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "id": path.name,
            **meta,
            "status": "started",
            "created": earlier.get("created", _now()),
            "seconds": earlier.get("seconds", 0.0),
            "files": _still_whole(path, earlier.get("files", {})),
            "warnings": [],
            "unsupported": {},
            "error": None,
            "manifest": MANIFEST,
            **this_process(),
        }
        path.mkdir(parents=True, exist_ok=True)
        for leftover in (path / MANIFEST, *path.rglob(f".*{PART}")):
            leftover.unlink(missing_ok=True)
        writer = cls(path, entries, resumed=bool(earlier))
        writer.update()
        write_text(path / CONFIG, tomli_w.dumps(dict(config)))
        writer.record(CONFIG)
        return writer

    def update(self, **entries: Any) -> None:
        """Change entries of `run.json`."""
        self.meta.update(entries)
        self.meta["updated"] = _now()
        self.meta["seconds"] = round(self._before + time.monotonic() - self._since, 3)
        write_json(self.path / INDEX, self.meta)

    def warn(self, message: str) -> None:
        """Add a warning that every view of the run shows."""
        if message not in self.meta["warnings"]:
            self.update(warnings=[*self.meta["warnings"], message])

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Write `<name>.parquet`."""
        file = f"{name}.parquet"
        write_atomically(self.path / file, lambda path: frame.to_parquet(path, index=False))
        self.record(file)

    def text(self, name: str, text: str) -> None:
        """Write a text file, such as report.html."""
        write_text(self.path / name, text)
        self.record(name)

    def record(self, *names: str) -> None:
        """Enter finished files (relative paths) in `run.json`, and in the manifest of a finished run."""
        sizes = {name: (self.path / name).stat().st_size for name in names}
        self.update(files={**self.meta["files"], **sizes})
        if (self.path / MANIFEST).exists():
            write_manifest(self.path, [*names, INDEX])

    def finish(self, status: str = "success", error: BaseException | None = None) -> Run:
        """Close the run with its last status, and write its manifest."""
        self.update(
            status=status,
            error=None if error is None else {"type": type(error).__name__, "message": str(error)},
        )
        write_manifest(self.path, [*self.meta["files"], INDEX])
        return open_run(self.path)


def _earlier(folder: Path, again: bool) -> dict[str, Any]:
    """Entries of the run that is there; none where it is to be made again, and then its files are gone.

    Raises:
        LensError: another process is writing it, or it is damaged or of another version.
    """
    try:
        run = open_run(folder)
    except LensError as error:
        if not again or _identity(folder) is None:
            raise LensError(f"{error}, or move {folder} away to start afresh") from error
        remove_own(folder, read_manifest(folder) or ())
        return {}
    if run.status == "started" and run.meta.get("pid") != os.getpid():
        raise LensError(
            f"process {run.meta.get('pid')} is writing {folder} right now on {run.meta.get('host')}; "
            "wait for it or stop it, or move the folder away if that machine is gone"
        )
    if not again:
        return run.meta
    remove_own(folder, run.meta["files"])
    return {}


def _still_whole(folder: Path, files: Mapping[str, int]) -> dict[str, int]:
    """Those of the recorded files that are there in their size."""
    return {
        name: size
        for name, size in files.items()
        if lies_in(folder / name, folder)
        and (folder / name).is_file()
        and (folder / name).stat().st_size == size
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
