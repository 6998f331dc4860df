"""Logits of token ids, from any model that has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def logits_of(
    model: LoadedModel, ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens vocab"]:
    """Logits of token ids.

    Raises:
        LensError: the model returns none.
    """
    result: Any = model.model(ids.to(model.device))
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise LensError(f"{model.info.class_name} returns no logits [prompts, tokens, vocab]")
    return logits
