"""What an edit does to the predictions of a prompt, and how alpha moves: shared by the causal tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from lens.common.errors import LensError
from lens.edits.side_effects import changes_of
from lens.models.loaded import LoadedModel
from lens.passes.sessions import OnLayer, listening


def two_tokens(ids: list[int] | None) -> list[int]:
    """The ids of a prompt whose loss can be measured.

    Raises:
        LensError: fewer than two tokens.
    """
    if ids is None or len(ids) < 2:
        raise LensError("effect needs prompts of at least two tokens: it measures their loss")
    return ids


def log_probabilities(model: LoadedModel, ids: list[int], on_layer: OnLayer) -> torch.Tensor:
    """[tokens - 1, vocab] of every next token, with `on_layer` in place of the model's attention.

    Raises:
        LensError: a model without a language model's logits.
    """
    with torch.no_grad(), listening(model, on_layer):
        output = model.model(torch.tensor([ids], device=model.device))
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != (1, len(ids)):
        raise LensError(
            f"{model.info.class_name} gives no logits [1, tokens, vocab]; effect needs a language model"
        )
    return logits[0, :-1].float().log_softmax(-1)


def changes(base: torch.Tensor, edited: torch.Tensor, ids: list[int]) -> tuple[float, float, float]:
    """`changes_of` over every next token of a prompt."""
    return changes_of(base, edited, torch.tensor(ids[1:], device=base.device))


def moved(before: torch.Tensor, after: torch.Tensor, source: torch.Tensor) -> np.ndarray:
    """[5, layers, heads]: the columns of `Effect.migration` for one prompt."""

    def largest(alpha: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = alpha.nan_to_num(nan=-1).masked_fill(~keys, -1).max(-1)
        return found.values.masked_fill(found.values < 0, torch.nan), found.indices

    columns = [largest(alpha, keys) for keys in (source, ~source) for alpha in (before, after)]
    return torch.stack([*(value for value, _ in columns), columns[-1][1]]).double().numpy()


def migration(moves: Sequence[np.ndarray]) -> pd.DataFrame:
    """One row per layer and head out of `moved` of every prompt."""
    stacked = np.stack(moves)
    _, _, layers, heads = stacked.shape
    names = ("source_before", "source_after", "other_before", "other_after")
    table = pd.DataFrame(
        {"layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers)}
    )
    for place, name in enumerate(names):
        table[name] = stacked[:, place].mean(0).ravel()
    places = stacked[:, 4].reshape(len(moves), -1).astype(int)
    table["other_key"] = [np.bincount(column).argmax() for column in places.T]
    return table


def bos_policy(model: LoadedModel, prompts: Sequence[Sequence[int]]) -> str:
    """ "added", "absent" or "mixed": whether the prompts begin with the model's BOS token."""
    starts = {model.bos_id is not None and ids[0] == model.bos_id for ids in prompts}
    return "mixed" if len(starts) > 1 else "added" if starts.pop() else "absent"
