"""Collects what edits did to one prompt after the other, until it is a `SinkEffect`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from lens.common.head_ids import HeadId
from lens.edits.losses import bos_policy, changes, migration, moved
from lens.edits.side_effects import MEASURES
from lens.models.loaded import LoadedModel
from lens.sinks.effects.clean import CleanRun
from lens.sinks.effects.results import SinkEffect


class EffectRecorder:
    """The numbers of every condition, prompt by prompt, and where attention went in "sources"."""

    def __init__(self, conditions: Iterable[str]) -> None:
        self._values: dict[str, dict[str, list[float]]] = {
            name: {key: [] for key in (*MEASURES, "keys", "mass")} for name in conditions
        }
        self._moves: list[np.ndarray] = []
        self._alphas: list[np.ndarray] = []
        self._read: list[list[int]] = []

    @property
    def conditions(self) -> tuple[str, ...]:
        """ "sources" and the controls."""
        return tuple(self._values)

    def add(
        self,
        condition: str,
        ids: list[int],
        before: CleanRun,
        edited: torch.Tensor,
        *,
        keys: int,
        mass: float,
    ) -> None:
        """One condition of one prompt.

        Args:
            ids: the prompt.
            before: the prompt without an edit.
            edited: [tokens - 1, vocab], log probabilities with it.
            keys: how many keys, heads or activations were edited.
            mass: share of the attention that they held before.
        """
        measured = changes(before.log_probabilities, edited, ids)
        found = dict(zip(MEASURES, measured, strict=True)) | {"keys": keys, "mass": mass}
        for name, value in found.items():
            self._values[condition][name].append(float(value))

    def add_migration(
        self, ids: list[int], before: CleanRun, alpha: torch.Tensor, source: torch.Tensor
    ) -> None:
        """Where the attention of one prompt went; once a prompt.

        Args:
            alpha: [layers, heads, keys], with the sources edited.
            source: bool [keys].
        """
        self._alphas.append(torch.stack([before.alpha, alpha]).float().numpy())
        self._moves.append(moved(before.alpha, alpha, source))
        self._read.append(ids)

    def result(
        self, model: LoadedModel, chosen: torch.Tensor, *, edit: str, amount: float, seed: int
    ) -> SinkEffect:
        """All of it; `chosen`: bool [layers, heads], the heads that were edited."""
        return SinkEffect(
            values={
                name: {key: np.array(numbers) for key, numbers in found.items()}
                for name, found in self._values.items()
            },
            migration=migration(self._moves),
            alphas=tuple(self._alphas),
            edit=edit,
            amount=amount,
            scope=scope_of(chosen),
            tokens=tuple(len(ids) for ids in self._read),
            bos=bos_policy(model, self._read),
            seed=seed,
        )


def scope_of(chosen: torch.Tensor) -> str:
    """The chosen heads, bool [layers, heads], in words: "all heads", "layers 1 to 2", "L1H0"."""
    if bool(chosen.all()):
        return "all heads"
    whole = chosen.all(1)
    if bool((whole == chosen.any(1)).all()):
        layers = whole.nonzero()[:, 0].tolist()
        if layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1:
            return f"layers {layers[0]} to {layers[-1]}"
        return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    names = [str(HeadId(*pair)) for pair in chosen.nonzero().tolist()]
    return ", ".join(names) if len(names) < 9 else f"{len(names)} heads"
