"""Logits of token ids or pictures, from any model that has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from lens.common.errors import LensError, told
from lens.models.loaded import LoadedModel, check_loaded

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Given: TypeAlias = (
        Int[Tensor, "batch tokens"]
        | Float[Tensor, "batch channels height width"]
        | Mapping[str, Tensor]
    )
else:
    Given: TypeAlias = Tensor | Mapping[str, Tensor]
"""Token ids [rows, tokens] or pixel values; of an encoder-decoder its inputs by name."""
_WHOLE = ("ForSequenceClassification", "ForImageClassification")


def labels_of(model: LoadedModel) -> int | None:
    """How many labels a classifier of whole texts or pictures chooses from; None: it is none."""
    if model.is_bridge or not any(kind in model.info.class_name for kind in _WHOLE):
        return None
    return int(model.model.config.num_labels)


def check_predicts_tokens(model: LoadedModel, *, next_tokens: bool = True) -> None:
    """Refuses classifiers where tokens are to be predicted, and, of `next_tokens`, models that have read these.

    Raises:
        LensError: a classifier of prompts or of tokens, or a model whose tokens see later ones and that fills in no
            masked ones; it says what to use.
    """
    check_loaded(model)
    if labels_of(model) is not None:
        raise LensError(
            f"{model.info.class_name} chooses one label for a whole prompt and predicts no token; its task "
            "is lens.tasks.classification(model, prompts, labels)"
        )
    if "Classification" in model.info.class_name:
        raise LensError(
            f"{model.info.class_name} gives labels and predicts no token; there is no task for it: load the "
            "language model of the same weights, or a classifier of whole prompts"
        )
    reads = model.info.vocab is not None and not model.is_encoder_decoder
    if next_tokens and model.info.sees_later and reads and predicts_next(model):
        raise LensError(
            f"{model.info.class_name} lets tokens see later ones, so that a next token was read before it is "
            "predicted; load a causal language model (of BERT with is_decoder=True), or the masked one of its weights"
        )


def fills_masks(model: LoadedModel) -> bool:
    """Whether the model fills in masked tokens rather than predicting the next one."""
    return not model.is_bridge and "MaskedLM" in model.info.class_name


def predicts_next(model: LoadedModel) -> bool:
    """Whether it is next tokens that the model predicts: no labels of prompts, and no masked tokens."""
    return labels_of(model) is None and not fills_masks(model)


def logits_of(
    model: LoadedModel, ids: Given, **options: Any
) -> Float[Tensor, "batch tokens vocab"]:
    """Logits of token ids or pixel values; of a classifier [batch, 1, labels], of an encoder-decoder of the target.

    `options` are the model's own, such as `use_cache=False`.

    Raises:
        LensError: the model returns none, or cannot run them.
    """
    with told(lambda why: f"{model.info.class_name} cannot run these prompts: {why}"):
        if isinstance(ids, Mapping):
            result: Any = model.model(**ids, **options)
        else:
            dtype = model.dtype if ids.is_floating_point() else None
            result = model.model(ids.to(model.device, dtype), **options)
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if isinstance(logits, Tensor) and logits.dim() == 2 and labels_of(model) is not None:
        logits = logits[:, None]
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise LensError(f"{model.info.class_name} returns no logits [prompts, tokens, vocab]")
    return logits
