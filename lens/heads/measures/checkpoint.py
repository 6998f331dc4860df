"""Numbers of a long computation, kept in one file as they come, so that a killed run goes on."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lens.common.errors import LensError
from lens.common.files import as_path, plain, write_atomically
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task

_EVERY = 2.0  # seconds between writes
_CONFIGURATION = "configuration"


class Checkpoint:
    """Arrays by name in an .npz file, with the configuration that they belong to.

    Without a path nothing is written and everything is computed. The file appears whole or not at all
    and is written again at most every two seconds, so a kill loses no more than that.

    Args:
        path: of the file, or None.
        configuration: what the numbers depend on; JSON.

    Raises:
        LensError: the file belongs to another configuration, or cannot be read.
    """

    def __init__(self, path: str | Path | None, configuration: dict[str, Any]) -> None:
        self._path = None if path is None else as_path("path", path)
        self._configuration = json.loads(json.dumps(configuration, default=plain))
        self._kept: dict[str, np.ndarray] = {}
        self._written = time.monotonic()
        if self._path is not None and self._path.exists():
            self._kept = self._read(self._path)

    def remember(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of this name: from the file, or computed and kept."""
        if name not in self._kept:
            self._kept[name] = compute()
            if self._path is not None and time.monotonic() - self._written > _EVERY:
                self.write()
        return self._kept[name]

    def write(self) -> None:
        """Write the file now; nothing without a path."""
        if self._path is None:
            return
        arrays = {_CONFIGURATION: np.array(json.dumps(self._configuration)), **self._kept}

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)

        write_atomically(self._path, save)
        self._written = time.monotonic()

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            theirs = dict(json.loads(str(arrays.pop(_CONFIGURATION))))
        except Exception as error:
            raise LensError(
                f"{path} is no checkpoint of lens.heads ({error}); remove it or name another file"
            ) from error
        mine = self._configuration
        names = sorted({*theirs, *mine})
        if differing := [name for name in names if theirs.get(name) != mine.get(name)]:
            shown = "; ".join(
                f"{name} {theirs.get(name)!r} there, {mine.get(name)!r} now" for name in differing
            )
            raise LensError(
                f"{path} holds another computation ({shown}); remove it or name another file"
            )
        return arrays


def configuration(model: LoadedModel, task: Task, **arguments: Any) -> dict[str, Any]:
    """What the importance of heads depends on: model with its weights, task with its prompts, arguments."""
    weights = [
        [name, list(tensor.shape), float(tensor.detach().double().sum())]
        for name, tensor in model.model.named_parameters()
    ]
    prompts = [
        None if ids is None else ids.tolist()
        for ids in (
            task.clean,
            task.corrupt,
            task.targets,
            task.positions,
            task.correct,
            task.wrong,
        )
    ]
    return {
        "model": model.name,
        "revision": model.revision,
        "weights": _digest(weights),
        "dtype": str(model.dtype),
        "task": task.name,
        "metric": task.metric,
        "prompts": _digest(prompts),
        "rows at once": task.rows_at_once(model),
        "torch": torch.__version__,
        **arguments,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
