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
from lens.common.files import write_atomically, write_json, write_text
from lens.runs.folders import INDEX, SCHEMA, SCHEMA_VERSION, Run, open_run
from lens.runs.processes import this_process

if TYPE_CHECKING:
    import pandas as pd


def config_hash(config: Mapping[str, Any]) -> str:
    """First 8 hex digits of the SHA-256 of the configuration's canonical JSON."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def find_by_config(runs: str | Path, config: Mapping[str, Any]) -> Path | None:
    """The folder of an earlier run of this configuration, or None."""
    runs = Path(runs)
    if not runs.is_dir():
        return None
    suffix = f"-{config_hash(config)}"
    found = [entry for entry in runs.iterdir() if entry.name.endswith(suffix) and entry.is_dir()]
    return max(found, key=lambda entry: entry.name, default=None)


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
        cls, runs: str | Path, config: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> RunWriter:
        """Begin or resume the run of `config`.

        Args:
            runs: folder of runs; made if it is not there.
            config: plain values, without None (TOML has none).
            meta: entries of `run.json` known from the start: title, what, command, model, device,
                backend, block_size, seed, bos, prompts, versions.

        Raises:
            LensError: another process is writing this run, or it is damaged or of another version.
        """
        runs = Path(runs)
        path = find_by_config(runs, config)
        earlier: dict[str, Any] = {}
        if path is not None and (path / INDEX).exists():
            try:
                run = open_run(path)
            except LensError as error:
                raise LensError(f"{error}, or delete {path} to start afresh") from error
            if run.status == "started" and run.meta.get("pid") != os.getpid():
                raise LensError(
                    f"process {run.meta.get('pid')} is writing {path} right now on "
                    f"{run.meta.get('host')}; wait for it or stop it, or delete the folder if that "
                    "machine is gone"
                )
            earlier = run.meta
        elif path is None:
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
            "files": earlier.get("files", {}),
            "warnings": [],
            "error": None,
            **this_process(),
        }
        path.mkdir(parents=True, exist_ok=True)
        for leftover in path.rglob(".*"):
            if leftover.is_file():
                leftover.unlink()
        writer = cls(path, entries, resumed=bool(earlier))
        write_text(path / "config.toml", tomli_w.dumps(dict(config)))
        writer.update(files={**entries["files"], **writer._size("config.toml")})
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
        """Enter finished files (relative paths; folders with all they hold) in `run.json`."""
        files = dict(self.meta["files"])
        for name in names:
            files.update(self._size(name))
        self.update(files=files)

    def finish(self, status: str = "success", error: BaseException | None = None) -> Run:
        """Close the run with its last status."""
        self.update(
            status=status,
            error=None if error is None else {"type": type(error).__name__, "message": str(error)},
        )
        return open_run(self.path)

    def _size(self, name: str) -> dict[str, int]:
        path = self.path / name
        parts = (
            sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
        )
        return {part.relative_to(self.path).as_posix(): part.stat().st_size for part in parts}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
