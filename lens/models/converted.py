"""Models out of packages of the index: converted once, into the user's cache folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lens.common.errors import LensError
from lens.models.catalogue import KNOWN


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/attention-lens` or `~/.cache/attention-lens`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "attention-lens"


@dataclass(frozen=True)
class Packaged:
    """A model in a package.

    Attributes:
        name: as given to `lens.load`.
        revision: the package with its version.
        package, module: its name on the index and in Python.
        file: of the weights, in its folder.
        reader: the Python package that reads the file.
        folder_name: in the cache: the package's version and that of the conversion.
        size: of the converted model, in words.
        convert: writes what transformers reads, from the file into a folder.
    """

    name: str
    revision: str
    package: str
    module: str
    file: str
    reader: str
    folder_name: str
    size: str
    convert: Callable[[Path, Path], None]

    def source(self) -> Path | None:
        """The file in the installed package; found, never imported: that imports what is not needed."""
        spec = importlib.util.find_spec(self.module)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(place) / self.file).is_file():
                return path
        return None

    def available(self) -> bool:
        """Whether `folder` would work without installing anything."""
        return (cache_folder() / self.folder_name).is_dir() or not self._missing()

    def folder(self) -> Path:
        """Folder of the converted model; converts on the first call.

        Raises:
            LensError: the package or its reader is not installed, or the cache cannot be written.
        """
        target = cache_folder() / self.folder_name
        if target.is_dir():
            return target
        source = self.source()
        if source is None or self._missing():
            raise LensError(
                f"{self.name} needs {' and '.join(self._missing())}, not installed here; get it with "
                f"{KNOWN[self.name].remedy}"
            )
        try:
            self._convert_into(source, target)
        except OSError as error:
            raise LensError(
                f"cannot keep the converted model in {target} ({error}); it takes {self.size}: make room, or "
                "set XDG_CACHE_HOME to another folder"
            ) from error
        return target

    def _missing(self) -> list[str]:
        there = {
            self.package: self.source() is not None,
            self.reader: importlib.util.find_spec(self.reader) is not None,
        }
        return [name for name, found in there.items() if not found]

    def _convert_into(self, source: Path, target: Path) -> None:
        """Convert under a temporary name, then rename: `target` is whole or not there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{self.folder_name}-", dir=target.parent))
        try:
            with Console(stderr=True).status(f"Converting {self.name} once into {target} ..."):
                self.convert(source, temporary)
            temporary.chmod(0o755)
            try:
                temporary.rename(target)
            except OSError:
                if not target.is_dir():  # another process was first: its folder is as good
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
