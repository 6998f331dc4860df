"""What `lens.reading.perturb` gives back: loss against the size of a change of attention logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.head_ids import HeadId, head_columns
from lens.common.results import Result, Sentence, described
from lens.stats.intervals import columns

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, repr=False, eq=False)
class Robustness(Result):
    """Change of the loss of the model's own answer when the logits of one head's attention are changed.

    Attributes:
        heads: whose.
        sizes: of the change, L2 over all logits of the head that are seen, nats.
        worst: [head, size, prompt], along the gradient of the loss.
        random: [head, size, prompt], mean over random directions of the same size.
        seed: of the draws.
        model: its name.
        along: "logits", any change; "pairs", from one token to another in all rows.
    """

    heads: tuple[HeadId, ...]
    sizes: tuple[float, ...]
    worst: Float[np.ndarray, "heads sizes prompts"]
    random: Float[np.ndarray, "heads sizes prompts"]
    seed: int
    model: str
    along: str = "logits"

    def table(self) -> pd.DataFrame:
        """One row per head and size: `name`, `layer`, `head`, `size`; `worst` and `random`, change of loss (nats) with `_low` and
        `_high` (95 % bootstrap over prompts); `n` prompts."""
        tables = []
        for place, size in enumerate(self.sizes):
            found = head_columns(self.heads) | {"size": size}
            found |= columns("worst", self.worst[:, place], self.seed)
            found |= columns("random", self.random[:, place], self.seed)
            tables.append(pd.DataFrame(found))
        return pd.concat(tables, ignore_index=True).assign(n=self.worst.shape[-1])

    def findings(self) -> tuple[Sentence, ...]:
        """The head whose attention the answer hangs on most ("head")."""
        worst = self.worst[:, -1].mean(-1)
        way = ("along their gradient", "in a random direction")
        if self.along == "pairs":
            way = ("from one token to another, the pair of the gradient,", "between random tokens")
        most = int(np.argmax(worst))
        return (
            Sentence(
                f"A change of size {self.sizes[-1]:g} of the attention logits of {self.heads[most]} {way[0]} "
                f"costs {worst[most]:+.3g} nats, {way[1]} {self.random[most, -1].mean():+.3g}.",
                kind="head",
            ),
        )

    def __repr__(self) -> str:
        return described(self)
