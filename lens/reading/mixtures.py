"""What `lens.reading.mixing` gives back: how much of each token's next state comes from others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.results import Result, Sentence, ends
from lens.stats.intervals import columns

if TYPE_CHECKING:
    from jaxtyping import Float

MEASURES = (
    "weights",
    "norms",
    "weights_residual",
    "norms_residual",
    "norms_residual_norm",
)
"""Attn-W, Attn-N, AttnRes-W, AttnRes-N and AttnResLn-N of the paper."""


@dataclass(frozen=True, repr=False, eq=False)
class MixingRatios(Result):
    """Share of a token's next state that other tokens bring, mean over tokens.

    Attributes:
        layers: the model's own numbers.
        ratios: [measure of `MEASURES`, layer, prompt]; NaN where a layer has no norm behind the residual stream.
        uniform: the same with even attention to what each token sees.
        seed: of the bootstrap.
        model: its name.
    """

    layers: tuple[int, ...]
    ratios: Float[np.ndarray, "measures layers prompts"]
    uniform: Float[np.ndarray, "measures layers prompts"]
    seed: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per measure and layer: `measure`, `layer`, `ratio` with `_low`, `_high` (95 % bootstrap over prompts), `uniform`,
        the ratio with even attention; `n` prompts."""
        found = []
        for place, measure in enumerate(MEASURES):
            own: dict = {"measure": measure, "layer": self.layers}
            own |= columns("ratio", self.ratios[place], self.seed)
            found.append(pd.DataFrame(own | {"uniform": self.uniform[place].mean(-1)}))
        table = pd.concat(found, ignore_index=True).assign(n=self.ratios.shape[-1])
        return table.dropna(subset=["ratio"]).reset_index(drop=True)

    def findings(self) -> tuple[Sentence, ...]:
        """What weights say, and what is left of it with sizes and the residual stream ("mixing"); whether the one is more
        ("less"), beside even attention."""
        means = self.ratios.mean(1)  # [measure, prompt]
        own = columns("it", means, self.seed)
        even = self.uniform.mean((1, 2))
        words = [
            f"{own['it'][place]:.1%}{ends(own['it_low'][place], own['it_high'][place], '.1%')} (even attention {even[place]:.1%})"
            for place in range(len(MEASURES))
        ]
        last = 4 if np.isfinite(means[4]).all() else 3
        norm = " and its norm" if last == 4 else ""
        less = columns("it", (means[0] - means[last])[None], self.seed)
        said = "less" if less["it_low"][0] > 0 else "not surely less"
        return (
            Sentence(
                f"By attention weights other tokens bring {words[0]} of what a token becomes, by the sizes of what is written "
                f"{words[1]}.",
                kind="mixing",
            ),
            Sentence(
                f"With the residual stream{norm} that is {words[last]}: {said} than weights say.",
                kind="less",
            ),
        )
