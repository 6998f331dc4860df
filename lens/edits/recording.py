"""Collects what edits did to one prompt after the other, until it is an `Effect`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from lens.common.head_ids import HeadId
from lens.edits.clean_runs import CleanRun
from lens.edits.effect_results import Effect
from lens.edits.losses import bos_policy, changes, migration, moved
from lens.edits.side_effects import MEASURES
from lens.models.loaded import LoadedModel


class EffectRecorder:
    """The numbers of every condition, prompt by prompt, and where attention went in "edit".

    Prompts come one after the other; of each, every condition comes at every amount, these in order.
    """

    def __init__(self, conditions: Iterable[str], amounts: Sequence[float] = (1.0,)) -> None:
        self._amounts = tuple(float(amount) for amount in amounts)
        self._values: dict[str, dict[str, list[float]]] = {
            name: {key: [] for key in (*MEASURES, "keys", "mass")} for name in conditions
        }
        self._moves: list[np.ndarray] = []
        self._alphas: list[np.ndarray] = []
        self._read: list[list[int]] = []

    @property
    def conditions(self) -> tuple[str, ...]:
        """ "edit" and the controls."""
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

    def result(self, model: LoadedModel, chosen: torch.Tensor, *, edit: str, seed: int) -> Effect:
        """All of it; `chosen`: bool [layers, heads], the heads that were edited."""
        return Effect(
            values={
                name: {key: self._by_amount(numbers) for key, numbers in found.items()}
                for name, found in self._values.items()
            },
            migration=migration(self._moves),
            alphas=tuple(self._alphas),
            edit=edit,
            amounts=self._amounts,
            scope=scope_of(chosen),
            tokens=tuple(len(ids) for ids in self._read),
            bos=bos_policy(model, self._read),
            seed=seed,
        )

    def _by_amount(self, numbers: list[float]) -> np.ndarray:
        """[amounts, prompts]"""
        return np.array(numbers).reshape(-1, len(self._amounts)).T


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
