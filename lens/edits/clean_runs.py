"""Each prompt run once as it is, for all the edits that are compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lens.common.errors import LensError
from lens.edits.losses import log_probabilities
from lens.edits.watching import Watch
from lens.models.loaded import LoadedModel


@dataclass(frozen=True, eq=False)
class CleanRun:
    """What one prompt gives without an edit.

    Attributes:
        log_probabilities: [tokens - 1, vocab], of every next token.
        received: [layers, heads, keys], attention that each key receives, summed over the queries.
        alpha: [layers, heads, keys], mean over the queries that see it; NaN where too few do.
    """

    log_probabilities: torch.Tensor
    received: torch.Tensor
    alpha: torch.Tensor


class CleanRuns:
    """Remembers the clean run of each prompt of one model: 4 bytes × tokens × vocabulary a prompt.

    Give the same object to several tests of one model and its prompts are run without an edit once.

    Example:
        >>> clean = CleanRuns(model)
        >>> found = [lens.effect(model, texts, e, clean=clean) for e in (lens.edits.Mask(), lens.edits.Drop())]
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self._runs: dict[tuple[int, ...], CleanRun] = {}

    def __len__(self) -> int:
        """Prompts run so far."""
        return len(self._runs)

    def of(self, ids: list[int]) -> CleanRun:
        """The run of a prompt. Errors as in `lens.effect`."""
        if tuple(ids) not in self._runs:
            watcher = Watch()
            base = log_probabilities(self.model, ids, watcher.on_layer)
            self._runs[tuple(ids)] = CleanRun(base, torch.stack(watcher.received), watcher.alpha())
        return self._runs[tuple(ids)]


def clean_runs(model: LoadedModel, clean: CleanRuns | None) -> CleanRuns:
    """The given clean runs, or new ones.

    Raises:
        LensError: they are of another model.
    """
    if clean is not None and clean.model is not model:
        raise LensError("clean holds runs of another model; make one CleanRuns for each model")
    return CleanRuns(model) if clean is None else clean
