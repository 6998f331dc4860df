"""What a run wrote: size and SHA-256 of each of its files, in `manifest.json`, written last.

`validate` holds every file against it; whoever reads a file holds its size against it, so that what was
changed after the run is refused and not shown. What is not in it is not the run's own, and never removed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from lens.common.errors import LensError
from lens.common.files import PART, lies_in, open_regular, read_json, write_json
from lens.common.schema import validated

MANIFEST = "manifest.json"
GROWING = "log.txt"
"""Not held against its size: a run that goes on writes more of it."""
_MOST = 2**40
_OWN = re.compile(
    r"run\.json|manifest\.json|config\.toml|log\.txt|report\.(html|json)|(prompts|heads)\.parquet|"
    r"trace/p\d{3,}/(trace\.json|layer-\d{2,}\.safetensors)|work/[^/]+\.npz"
)


class _Entry(BaseModel):
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    schema_version: Annotated[int, Field(ge=1, le=1)]
    files: dict[str, _Entry]


def read_manifest(folder: Path) -> Mapping[str, _Entry] | None:
    """Relative path -> `bytes` and `sha256` of every file that the run wrote; None without a manifest.

    Raises:
        LensError: it is damaged.
    """
    path = folder / MANIFEST
    if not path.exists() and not path.is_symlink():
        return None
    return validated(_Manifest, read_json(path, within=folder), path).files


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Enter files (relative paths) beside what is entered, as they are now."""
    files = {name: one.model_dump() for name, one in (read_manifest(folder) or {}).items()}
    for name in names:
        size, digest = _measured(folder, name)
        files[name] = {"bytes": size, "sha256": digest}
    entries = dict(sorted(files.items()))
    write_json(
        folder / MANIFEST,
        {"schema": "attention-lens/manifest", "schema_version": 1, "files": entries},
    )


def size_problem(folder: Path, name: str, files: Mapping[str, _Entry] | None) -> str:
    """Why a file is not what the run wrote, by its size; "" where it is, or nobody knows."""
    entry = (files or {}).get(name)
    if entry is None or name == GROWING:
        return ""
    try:
        size = (folder / name).stat().st_size
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return f"{name} is missing; run it again"
    if size == entry.bytes:
        return ""
    return f"{name} has {size} bytes instead of {entry.bytes}: it was changed after the run; run it again"


def changed_files(folder: Path, files: Mapping[str, _Entry]) -> list[str]:
    """One sentence for each file whose contents are not those that the run wrote."""
    found = []
    for name, entry in files.items():
        problem = size_problem(folder, name, files)
        if not problem and name != GROWING:
            try:
                _, digest = _measured(folder, name)
                if digest != entry.sha256:
                    problem = (
                        f"{name} was changed after the run: its SHA-256 is another; run it again"
                    )
            except LensError as error:
                problem = str(error)
        found += [problem] * bool(problem)
    return found


def remove_own(folder: Path, recorded: Iterable[str]) -> None:
    """Remove what a run wrote into its folder, and the folders that it leaves empty; all else stays.

    Args:
        folder: of the run.
        recorded: relative paths that its `run.json` names.
    """
    recorded = set(recorded)
    for path in [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]:
        name = path.relative_to(folder).as_posix()
        if not (_OWN.fullmatch(name) or name.endswith(PART) or name in recorded):
            continue
        if not lies_in(path.parent, folder):
            continue
        path.unlink()
        remove_if_empty(path.parent, folder)


def remove_if_empty(folder: Path, last: Path) -> None:
    """Remove a folder if it holds nothing, and then those around it up to `last`."""
    while folder.is_relative_to(last) and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _measured(folder: Path, name: str) -> tuple[int, str]:
    with open_regular(folder / name, most=_MOST, within=folder) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
        return file.tell(), digest
