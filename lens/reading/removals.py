"""What `lens.reading.removal` gives back: predicted beside measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence, with_ends
from lens.stats.intervals import columns
from lens.stats.orders import random_orders, spearman
from lens.stats.verdicts import mean_told, of_many_told

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, repr=False, eq=False)
class Removals(Result):
    """Attention to keys of a kind without each part; numbers of a prompt are means over its pairs.

    Attributes:
        head: whose attention.
        side: "key" or "query", out of what the parts are taken.
        parts: their writers.
        pairs: which pairs, in words.
        clean: [prompt], attention to the keys as the model is.
        predicted: [part, prompt], norms held.
        measured: [part, prompt], by the model without the part.
        seed: of the bootstrap.
        model: its name.
    """

    head: HeadId
    side: str
    parts: tuple[str, ...]
    pairs: str
    clean: Float[np.ndarray, " prompts"]
    predicted: Float[np.ndarray, "parts prompts"]
    measured: Float[np.ndarray, "parts prompts"]
    seed: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per part, in the order of the model.

        Columns: `part`, `side`; attention `clean`; `predicted` and `measured` without the part, each with `_low` and
        `_high` (95 % bootstrap over prompts); `error`, the mean absolute difference of the two; `n` prompts.
        """
        return pd.DataFrame(
            {
                "part": self.parts,
                "side": self.side,
                "clean": self.clean.mean(),
                **columns("predicted", self.predicted, self.seed),
                **columns("measured", self.measured, self.seed),
                "error": np.abs(self.predicted - self.measured).mean(1),
                "n": len(self.clean),
            }
        )

    @property
    def agreement(self) -> float:
        """Rank correlation of predicted and measured over the parts; NaN for fewer than three."""
        if len(self.parts) < 3:
            return float("nan")
        return float(spearman(self.predicted.mean(1), self.measured.mean(1)))

    def findings(self) -> tuple[Sentence, ...]:
        """The part without which the attention falls most ("part"), and how far predictions are off ("agreement")."""
        table = self.table()
        least = table.iloc[int(np.argmin(table["measured"]))]
        told = of_many_told(
            least, "measured", ".1%", len(table), self.measured.shape[-1], least=0, most=1
        )
        others = table.drop(index=least.name)["measured"]
        beside = (
            f"; without one of the others {others.median():.1%} (median)" if len(others) else ""
        )
        said = [
            Sentence(
                f"{self.head} gives {self.pairs} {self.clean.mean():.1%}; without what {least['part']} wrote on the "
                f"{self.side} side {told} (predicted {with_ends(least, 'predicted', '.1%')}){beside}.",
                kind="part",
            )
        ]
        worst = table.iloc[int(np.argmax(table["error"]))]
        off = mean_told(np.abs(self.predicted - self.measured).mean(0), self.seed, ".1%")
        ranks = ""
        if not np.isnan(self.agreement):
            beside = random_orders(len(self.parts))
            ranks = f", rank correlation {self.agreement:.2f}" + (f" ({beside})" if beside else "")
        said.append(
            Sentence(
                f"Over {len(self.parts)} parts predictions are off by {off} of a row on average"
                f"{ranks}; most for {worst['part']} ({worst['predicted']:.1%} predicted, {worst['measured']:.1%} measured).",
                kind="agreement",
            )
        )
        return tuple(said)
