"""A gate on every key-value head, learned: 1 needs all keys, 0 sees enough with the first and the last ones.

Each key-value head mixes its full and its streaming output (`lens.heads.streaming`); what the model's own
last hidden states do not need is closed, as in DuoAttention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.common.choices import Count, Seed, check_between
from lens.common.head_ids import HeadId, all_heads, head_columns
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, few
from lens.heads.behaviour.near_keys import Streamer, read_long_prompts
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall
from lens.passes.inputs import Prompt
from lens.passes.sessions import base, listening

OPEN = 0.5
"""Gate from which on a head is said to need all keys."""


@dataclass(frozen=True, repr=False, eq=False)
class StreamingGate(Result):
    """The trained gate of each key-value head: 1 needs all keys, 0 streams.

    Attributes:
        alpha: [layer, kv_head].
        losses: [step], of the training: distance of the last hidden states + penalty × mean gate.
        heads: query heads of a layer.
        first, last: numbers of keys that a streaming head sees.
        penalty, rate, seed: of the training.
        n: number of prompts.
        model: its name.
    """

    alpha: np.ndarray
    losses: np.ndarray
    heads: int
    first: int
    last: int
    penalty: float
    rate: float
    seed: int
    n: int
    model: str

    @property
    def values(self) -> np.ndarray:
        """[layer, head]: the gate of the key-value head that each head reads."""
        return self.alpha.repeat(self.heads // self.alpha.shape[1], 1)

    def retrieval_heads(self, threshold: float = OPEN) -> list[HeadId]:
        """Heads whose gate lies above the threshold, in order of layer and head."""
        return [HeadId(*at) for at in np.argwhere(self.values > threshold).tolist()]

    def table(self) -> pd.DataFrame:
        """One row per head: `name`, `layer`, `head`, `alpha`, `n`."""
        found = head_columns(all_heads(range(len(self.values)), self.values.shape[1]))
        return pd.DataFrame(found | {"alpha": self.values.ravel(), "n": self.n})

    def findings(self) -> tuple[Sentence, ...]:
        """Which heads the gate keeps in full, and from which value on ("gate"); of one training, which has no interval."""
        kept = self.retrieval_heads()
        named = f": {few(kept)}" if kept else ""
        return (
            Sentence(
                f"The trained gate keeps {len(kept)} of {self.values.size} heads in full, with a gate above {OPEN:g}"
                f"{named}; the others see the first {self.first} and the last {self.last} keys. Gates lie from "
                f"{self.alpha.min():.2f} to {self.alpha.max():.2f}, of one training (seed {self.seed}, n = {self.n}).",
                kind="gate",
            ),
        )

    def __repr__(self) -> str:
        return (
            f"StreamingGate({self.model}: {len(self.retrieval_heads())} of {self.values.size} heads above "
            f"0.5 with {self.first} first + {self.last} last keys; {len(self.losses)} steps, loss "
            f"{self.losses[0]:.3g} to {self.losses[-1]:.3g})"
        )


def gate(
    model: LoadedModel,
    prompts: Any,
    *,
    first: int = 4,
    last: int = 32,
    steps: Count = 100,
    rate: float = 0.02,
    penalty: float = 0.05,
    seed: Seed = 0,
    progress: bool = True,
) -> StreamingGate:
    """Learn which key-value heads the model needs in full, with its weights as they are.

        z = alpha z_full + (1 - alpha) z_streaming;  loss = mean (h - h')^2 / mean h^2 + penalty mean alpha

    over the last hidden states h of the model as it is and h' with the gates. alpha starts at 1, is
    trained by Adam on one prompt a step, and stays in [0, 1]. The authors do not divide by the size
    of h; it makes `penalty` mean the same for all models.

    Args:
        model, prompts, first, last, progress: as in `streaming`; prompts must hold something to
            retrieve, such as `lens.tasks.copied`.
        steps, rate: of Adam.
        penalty: what an open gate costs.
        seed: of the order of the prompts.

    Reference: Xiao et al., DuoAttention, 2024, arXiv 2410.10819.

    Raises:
        LensError: as in `streaming`, or fewer than one step.

    Example:
        >>> lens.heads.pruning.gate(model, texts, first=1, last=8, steps=20).retrieval_heads()
    """
    check_between(0, math.inf, rate=[rate])
    read = read_long_prompts(model, prompts, first, last)
    info = model.info
    alpha = torch.ones(info.layers, info.kv_heads, device=model.device, requires_grad=True)
    optimiser = torch.optim.Adam([alpha], lr=rate)
    order = np.random.default_rng(seed).integers(len(read), size=steps)
    clean: dict[int, Tensor] = {}
    losses = np.empty(steps)
    with advancing(f"{model.name}: gate", steps, progress) as advance:
        for step, number in enumerate(order.tolist()):
            if number not in clean:
                with torch.no_grad():
                    clean[number] = _last_hidden(model, read[number], None)
            wanted = clean[number]
            with torch.enable_grad():
                found = _last_hidden(model, read[number], _Gate(first, last, alpha))
                distance = (found - wanted).square().mean() / wanted.square().mean()
                loss = distance + penalty * alpha.mean()
                (alpha.grad,) = torch.autograd.grad(loss, [alpha])
            optimiser.step()
            with torch.no_grad():
                alpha.clamp_(0, 1)
            losses[step] = loss.item()
            advance(1)
    return StreamingGate(
        alpha=alpha.detach().cpu().numpy(),
        losses=losses,
        heads=info.heads,
        first=first,
        last=last,
        penalty=penalty,
        rate=rate,
        seed=seed,
        n=len(set(order.tolist())),
        model=model.name,
    )


class _Gate(Streamer):
    """Mixes both outputs by the gates."""

    def __init__(self, first: int, last: int, alpha: Tensor) -> None:
        super().__init__(first, last)
        self._alpha = alpha

    def on_layer(self, call: LayerCall) -> Tensor:
        """See `lens.passes.sessions.listening`."""
        full, near, _ = self.states(call)
        share = call.query.shape[1] // call.key.shape[1]
        alpha = self._alpha[call.layer].repeat_interleave(share)[:, None, None]
        return alpha * full.output + (1 - alpha) * near.output


def _last_hidden(model: LoadedModel, prompt: Prompt, gate: _Gate | None) -> Tensor:
    """[tokens, d_model] after the last norm (logits of a model that has nothing apart from its head)."""
    if gate is None:
        return base(model)(**prompt.inputs)[0][0].float()
    with listening(model, gate.on_layer):
        return base(model)(**prompt.inputs)[0][0].float()
