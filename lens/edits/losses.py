"""Predictions of a prompt with an edit and without, and what lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens.common.errors import LensError, told
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt
from lens.passes.interface import image_token
from lens.passes.logits import labels_of
from lens.passes.sessions import OnLayer, listening

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

MEASURES: tuple[str, ...] = ("delta_loss", "kl", "flip_rate")


def two_tokens(ids: list[int] | None) -> list[int]:
    """The ids of a prompt whose loss can be measured.

    Raises:
        LensError: fewer than two tokens.
    """
    if ids is None or len(ids) < 2:
        raise LensError("this needs prompts of at least two tokens: the second is predicted")
    return ids


def predictions(
    model: LoadedModel, prompt: Prompt, on_layer: OnLayer, *, parts: bool = False
) -> Float[Tensor, "tokens vocab"]:
    """Log probabilities [tokens, vocab] with `on_layer` in place of the model's attention; of a
    classifier [1, labels].

    `parts` as of `lens.passes.sessions.listening`.

    Raises:
        LensError: a model without a language model's logits.
    """
    ids = prompt.predicted or []
    said = told(lambda why: f"{model.info.class_name} cannot run this prompt: {why}")
    attended = (
        listening(model, on_layer, exclusive=True, parts=parts)
        if model.info.attending
        else nullcontext()  # mixers alone, whose edits are hooks
    )
    with torch.no_grad(), said, attended:
        if prompt.inputs.keys() <= {"input_ids"}:
            output = model.model(torch.tensor([ids], device=model.device))
        else:  # an image, positions, segments
            output = model.model(**prompt.inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is not None and logits.dim() == 2 and labels_of(model) is not None:
        return logits.float().log_softmax(-1)
    if logits is None or logits.shape[:2] != (1, len(ids)):
        raise LensError(
            f"{model.info.class_name} gives no logits [1, tokens, vocab]; effect needs a language model"
        )
    return logits[0].float().log_softmax(-1)


def log_probabilities(
    model: LoadedModel, ids: list[int], on_layer: OnLayer
) -> Float[Tensor, "predicted vocab"]:
    """Of every next token; see `predictions`."""
    return predictions(model, Prompt({}, ids), on_layer)[:-1]


def predicted(model: LoadedModel, prompt: Prompt) -> Bool[Tensor, "predicted"]:
    """Positions whose next token is text; those of an image are not predicted, nor those of a hole in the mask, or from one.

    Raises:
        LensError: there is none.
    """
    target = torch.tensor((prompt.predicted or [])[1:], device=model.device)
    scored = torch.ones_like(target, dtype=torch.bool)
    if "pixel_values" in prompt.inputs and prompt.target is None:
        scored = target != image_token(model.model.config)
    hides = prompt.inputs.get("attention_mask")
    if prompt.target is None and hides is not None and hides.shape == (1, len(target) + 1):
        seen = hides[0].to(target.device) != 0
        scored = scored & seen[1:] & seen[:-1]
    if not bool(scored.any()):
        raise LensError(
            "effects are measured on the loss of next tokens; each prompt needs at least two tokens, "
            "the second or a later one of text"
        )
    return scored


def changes(
    base: Float[Tensor, "predicted vocab"],
    edited: Float[Tensor, "predicted vocab"],
    ids: Sequence[int],
) -> tuple[float, float, float]:
    """`changes_of` over every next token of a prompt."""
    return changes_of(base, edited, torch.tensor(ids[1:], device=base.device))


def changes_of(
    base: Float[Tensor, "tokens vocab"],
    edited: Float[Tensor, "tokens vocab"],
    target: Int[Tensor, "tokens"],
) -> tuple[float, float, float]:
    """Change of the loss, KL of the edited from the unedited prediction, share of changed top tokens.

    Args:
        base, edited: log probabilities.
        target: what follows.
    """
    delta = (base - edited).gather(1, target[:, None]).mean()
    kl = (base.exp() * (base - edited)).sum(-1).mean()
    flips = (base.argmax(-1) != edited.argmax(-1)).float().mean()
    return float(delta), float(kl), float(flips)


def bos_policy(model: LoadedModel, prompts: Sequence[Sequence[int]]) -> str:
    """ "added", "absent" or "mixed": whether the prompts begin with the model's BOS token."""
    starts = {model.bos_id is not None and ids[0] == model.bos_id for ids in prompts}
    return "mixed" if len(starts) > 1 else "added" if starts.pop() else "absent"
