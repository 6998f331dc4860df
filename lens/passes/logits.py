"""Logits of token ids, from any model that has them."""

from typing import Any

from torch import Tensor

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel


def logits_of(model: LoadedModel, ids: Tensor) -> Tensor:
    """Logits [prompts, tokens, vocab] of token ids [prompts, tokens].

    Raises:
        LensError: the model returns none.
    """
    result: Any = model.model(ids.to(model.device))
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise LensError(f"{model.info.class_name} returns no logits [prompts, tokens, vocab]")
    return logits
