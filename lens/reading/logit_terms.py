"""What `lens.reading.disentangle` gives back: what each term of a head's logits does to its attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.head_ids import HeadId, head_columns
from lens.common.results import Result, Sentence
from lens.stats import over_units
from lens.stats.intervals import columns
from lens.stats.verdicts import by_chance, mean_told, of_many, verdict

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, repr=False, eq=False)
class LogitTerms(Result):
    """The terms of the logits of every head, by what they do.

    Attributes:
        terms: their names: "content" and "position", of DeBERTa "c2c", "c2p", "p2c".
        layers: numbers of the layers.
        lift: [layer, head, term, prompt], by how much the term of the keys that are attended to is above that of the keys
            that are seen, nats: its mean under the attention less its plain mean, over the rows that see several keys.
        change: [layer, head, term, prompt], mean total variation distance between the attention and the same without
            the term, 0 to 1.
        head: of `logits`, or None.
        logits: [term, query, key] of that head on the first prompt, NaN where a key is not seen; their sum is the
            logit. None: no head was asked for.
        tokens: of the first prompt, as they stand on both axes.
        seed: of the bootstrap over prompts.
        model: its name.
    """

    terms: tuple[str, ...]
    layers: tuple[int, ...]
    lift: Float[np.ndarray, "layers heads terms prompts"] = field(repr=False)
    change: Float[np.ndarray, "layers heads terms prompts"] = field(repr=False)
    head: HeadId | None
    logits: Float[np.ndarray, "terms queries keys"] | None
    tokens: tuple[str, ...]
    seed: int
    model: str

    @property
    def by_position(self) -> np.ndarray:
        """bool [layer, head]: heads whose attention changes more without its terms of position than without content."""
        change = self.change.mean(-1)
        return change[:, :, 1:].max(-1) > change[:, :, 0]

    def table(self) -> pd.DataFrame:
        """Every head and term: `name`, `layer`, `head`, `term`; `lift` (nats) and `change` with `_low` and `_high`
        over prompts; `n` prompts."""
        layers, heads, _, prompts = self.lift.shape
        rows = [(layer, head) for layer in self.layers for head in range(heads) for _ in self.terms]
        return pd.DataFrame(
            {
                **head_columns(rows),
                "term": list(self.terms) * (layers * heads),
                **columns("lift", self.lift, self.seed, shares=False),
                **columns("change", self.change, self.seed, shares=False),
                "n": prompts,
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """How many heads rest on position, and the one that does so most."""
        change = self.change.mean(-1)
        position = change[:, :, 1:].max(-1)
        layer, head = np.unravel_index(position.argmax(), position.shape)
        term = self.terms[1 + int(change[layer, head, 1:].argmax())]
        name = HeadId(self.layers[layer], int(head))
        best = 1 + change[:, :, 1:].argmax(-1)
        content = self.change[:, :, 0]
        more = np.take_along_axis(self.change, best[..., None, None], 2)[:, :, 0] - content
        low, high = over_units(
            np.moveaxis(more, -1, 0), np.ones_like(np.moveaxis(more, -1, 0)), self.seed
        )
        sure = ""
        if np.isfinite(low).all():
            sure = f", {int((low > 0).sum())} of them beyond the interval ({by_chance(low.size, sides=1):.1f} of all by chance)"
        told = verdict(
            *of_many(
                float(more[layer, head].mean()),
                float(low[layer, head]),
                float(high[layer, head]),
                low.size,
                more.shape[-1],
            )
        )
        without = [mean_told(one, self.seed, ".0%") for one in self.change[layer, head]]
        unlike = "" if np.isnan(low[layer, head]) or told == "above" else ", not told apart"
        return (
            Sentence(
                f"{int(self.by_position.sum())} of {position.size} heads of {self.model} change more without a term of "
                f"position than without {self.terms[0]}{sure}.",
                kind="position",
            ),
            Sentence(
                f"{name} rests on position most: without {term} {without[best[layer, head]]} of its attention lies "
                f"elsewhere, without {self.terms[0]} {without[0]}{unlike}.",
                kind="head",
            ),
        )
