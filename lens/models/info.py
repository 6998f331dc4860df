"""`ModelInfo`: sizes and origin of a model, and which of its layers have softmax attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId, all_heads, head_id, layers_in_words


@dataclass(frozen=True)
class ModelInfo:
    """Sizes and origin of a model; None where the model has no such thing (a vision model has no vocabulary).

    Attributes:
        layers: of the model, with attention or without.
        heads, kv_heads, head_dim: of the attention; `kv_heads < heads` is grouped-query attention. A model of recurrent
            mixers alone counts as one head of its whole width.
        vocab: size of the vocabulary.
        context: most tokens that it takes.
        parameters: number of weights.
        licence: of the weights, "unknown" where nothing says it.
        class_name: Python class of the model.
        attending: layers with softmax attention, by the model's own number; the others (linear
            attention, recurrence, convolution) have no heads here.
        twice: those of them that attend twice, with two parts of the values (DiffLlama).
        sees_later: whether some token of a tiny prompt saw a later one; None where it was not run.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int | None
    context: int | None
    parameters: int
    licence: str
    class_name: str
    attending: tuple[int, ...]
    twice: tuple[int, ...] = ()
    sees_later: bool | None = None

    @property
    def without_attention(self) -> tuple[int, ...]:
        """Layers without softmax attention."""
        return tuple(sorted(set(range(self.layers)) - set(self.attending)))

    @property
    def every_head(self) -> list[HeadId]:
        """Every head of every layer that has softmax attention."""
        return all_heads(self.attending, self.heads)

    def head(self, head: AnyHead) -> HeadId:
        """The head that is meant: `"L3H5"`, `"3.5"` or `(3, 5)`.

        Raises:
            LensError: not a head, or not one of this model.
        """
        found = head_id(head, layers=self.layers, heads=self.heads)
        self.check_layer(found.layer, str(found))
        return found

    def check_attends(self) -> None:
        """Raises LensError: no layer has softmax attention."""
        if not self.attending:
            raise LensError(
                f"{self.class_name} has no softmax attention, which this is about; for recurrent mixers there are "
                "lens.mixers.capture and Ablate, and lens.circuits score_edges, find and evaluate"
            )

    def check_layer(self, layer: int, what: str) -> None:
        """Raises LensError, which says what was asked for, where a layer has no softmax attention."""
        self.check_attends()
        if layer not in self.attending:
            raise LensError(
                f"there is no {what}: layer {layer} of {self.class_name} has no softmax attention; "
                f"{layers_in_words(self.attending)} have"
            )

    def check_all_attend(self, what: str) -> None:
        """Raises LensError, which says what was asked for, where some layer has no softmax attention."""
        self.check_attends()
        if self.without_attention:
            raise LensError(
                f"{what} takes models with softmax attention in every layer; "
                f"{layers_in_words(self.without_attention)} of {self.class_name} have none"
            )

    def by_layer(self, found: np.ndarray) -> np.ndarray:
        """[attending layers, ...] as [layers, ...], with NaN where a layer has no softmax attention."""
        if len(self.attending) == self.layers:
            return found
        whole = np.full((self.layers, *found.shape[1:]), np.nan)
        whole[list(self.attending)] = found
        return whole
