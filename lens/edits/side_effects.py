"""What an edit does to the predictions on text that it was not made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.errors import LensError
from lens.common.results import Result, Sentence, described
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.interface import image_token
from lens.passes.logits import logits_of
from lens.stats import over_units
from lens.traces.recorder import capturing

MEASURES = ("delta_loss", "kl", "flip_rate")


@dataclass(frozen=True, eq=False)
class SideEffects(Result):
    """Predictions with an edit beside those without, at each of its amounts.

    Attributes:
        amounts: of the edit, ascending.
        values: measure -> [amount, prompt]: delta_loss (nats per token), kl (of the edited from the
            unedited prediction, nats), flip_rate (share of positions whose most likely token changed).
        tokens: [prompt], number of predictions.
        model: its name.
        seed: of the bootstrap.
    """

    amounts: tuple[float, ...]
    values: dict[str, np.ndarray] = field(repr=False)
    tokens: tuple[int, ...]
    model: str
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per amount: means over prompts with 95 % bootstrap intervals over prompts."""
        rows = []
        for place, amount in enumerate(self.amounts):
            row: dict[str, Any] = {"amount": amount}
            for name in MEASURES:
                values = self.values[name][place]
                low, high = over_units(values, np.ones(len(values)), self.seed)
                row |= {name: values.mean(), f"{name}_low": float(low), f"{name}_high": float(high)}
            rows.append(row)
        return pd.DataFrame(rows).assign(n=len(self.tokens))

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> tuple[Sentence, ...]:
        """What the strongest edit does; the kind `cost`."""
        row = self.table().iloc[-1]
        delta = f"{row['delta_loss']:+.4f} [{row['delta_loss_low']:+.4f}, {row['delta_loss_high']:+.4f}]"
        judged = (
            "the interval holds 0"
            if row["delta_loss_low"] <= 0 <= row["delta_loss_high"]
            else "one prompt has no interval"
            if np.isnan(row["delta_loss_low"])
            else "the text is predicted worse"
            if row["delta_loss"] > 0
            else "the text is predicted better"
        )
        text = (
            f"With amount {row['amount']:g}, {self.model} changes its loss on {len(self.tokens)} held-out "
            f"prompts ({sum(self.tokens):,} predictions) by {delta} nats per token: {judged}. KL "
            f"{row['kl']:.4f} nats, {row['flip_rate']:.1%} of the top tokens change."
        )
        return (Sentence(text, kind="cost"),)


def side_effects(
    model: LoadedModel,
    prompts: Any,
    edit: Callable[[float], AbstractContextManager[Any]],
    *,
    amounts: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
) -> SideEffects:
    """Run held-out prompts with the edit at each amount and without it.

    Args:
        model: a causal language model.
        prompts: as for `lens.capture`, with images or without, that had no part in choosing the edit;
            of an image no token is predicted.
        edit: amount -> context manager, such as
            `lambda amount: lens.edit(model, lens.edits.Move("first", amount=amount))`.
        amounts: each once.
        seed: of the bootstrap.

    Raises:
        LensError: no amount or one twice, a prompt without a text token to predict, or no logits.

    Example:
        >>> lens.edits.side_effects(model, texts, edit).findings()
    """
    if not len(amounts) or len(set(amounts)) < len(amounts):
        raise LensError(f"amounts must be different, at least one; got {list(amounts)}")
    ordered = sorted(float(amount) for amount in amounts)
    found: list[list[tuple[float, float, float]]] = []
    tokens = []
    for prompt in read_prompts(model, prompts, with_images=True)[0]:
        target, scored = scored_tokens(model, prompt)
        with torch.no_grad():
            with capturing(model, statistics=()):  # the same kernel: nothing but the edit differs
                base = log_probabilities(model, prompt)[scored]
            changes = []
            for amount in ordered:
                with edit(amount):
                    edited = log_probabilities(model, prompt)[scored]
                changes.append(changes_of(base, edited, target[scored]))
        found.append(changes)
        tokens.append(int(scored.sum()))
    stacked = np.array(found)  # [prompt, amount, measure]
    values = {name: stacked[..., place].T for place, name in enumerate(MEASURES)}
    return SideEffects(tuple(ordered), values, tuple(tokens), model.name, seed)


def scored_tokens(model: LoadedModel, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token [tokens - 1] of each position, and whether it is text: images are not predicted.

    Raises:
        LensError: no text token to predict.
    """
    target = torch.tensor((prompt.ids or [])[1:], device=model.device)
    scored = torch.ones_like(target, dtype=torch.bool)
    if "pixel_values" in prompt.inputs:
        scored = target != image_token(model.model.config)
    if not bool(scored.any()):
        raise LensError(
            "effects are measured on the loss of next tokens; each prompt needs at least two tokens, "
            "the second or a later one of text"
        )
    return target, scored


def log_probabilities(model: LoadedModel, prompt: Prompt) -> torch.Tensor:
    """Of the next token, [tokens - 1, vocab], float32."""
    if "pixel_values" in prompt.inputs:
        logits = model.model(**prompt.inputs).logits
    else:
        logits = logits_of(model, torch.tensor([prompt.ids]))
    return logits[0, :-1].float().log_softmax(-1)


def changes_of(
    base: torch.Tensor, edited: torch.Tensor, target: torch.Tensor
) -> tuple[float, float, float]:
    """Change of the loss, KL of the edited from the unedited prediction, share of changed top tokens.

    Args:
        base, edited: log probabilities [tokens, vocab].
        target: [tokens].
    """
    delta = (base - edited).gather(1, target[:, None]).mean()
    kl = (base.exp() * (base - edited)).sum(-1).mean()
    flips = (base.argmax(-1) != edited.argmax(-1)).float().mean()
    return float(delta), float(kl), float(flips)
