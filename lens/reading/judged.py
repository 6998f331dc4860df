"""What `lens.reading.faithfulness` gives back: how well scores of tokens say what the answer rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.results import Result, Sentence, few, with_ends
from lens.stats.intervals import columns, known_mean
from lens.stats.verdicts import mean_told, rivals

if TYPE_CHECKING:
    from jaxtyping import Float

MEASURES = ("comprehensiveness", "sufficiency", "soft_comprehensiveness", "soft_sufficiency")
RANDOM, ORACLE = "random", "leave_one_out"
APPROXIMATE = ("rollout", "flow", "gradient_rollout")
"""Methods that multiply, or send flows through, maps of layers, of which blocks have means alone."""


@dataclass(frozen=True, repr=False, eq=False)
class Faithfulness(Result):
    """Deletion curves of each method.

    Attributes:
        methods: as in `lens.reading.attribute`, and "random", the mean over its draws (of the soft measures over two).
        shares: of the tokens, that are deleted or kept.
        comprehensiveness: [method, prompt, share], probability of the answer less that without the tokens
            that score highest; more is better.
        sufficiency: the same less that with those alone; less is better.
        soft_comprehensiveness, soft_sufficiency: [method, prompt, share] in 0 to 1, more is better for both, at
            an expected share of kept tokens that is the same for all methods; NaN where the answer does not
            depend on the tokens.
        agreement: [method, prompt, reference], rank correlation with leave-one-out and with integrated gradients.
        drawn: [draw, prompt, curve, share], comprehensiveness and sufficiency of random scores.
        block: tokens that are scored, deleted and kept together; None: one by one.
        left_out: method -> why it could not be computed for this model.
        sums: method -> [prompt, 2], the sum of its scores, and what they would sum to with nothing lost; of the methods
            whose scores are parts of a logit.
        seed: of the draws.
        model: its name.
    """

    methods: tuple[str, ...]
    shares: tuple[float, ...]
    comprehensiveness: Float[np.ndarray, "methods prompts shares"]
    sufficiency: Float[np.ndarray, "methods prompts shares"]
    soft_comprehensiveness: Float[np.ndarray, "methods prompts shares"]
    soft_sufficiency: Float[np.ndarray, "methods prompts shares"]
    agreement: Float[np.ndarray, "methods prompts references"]
    drawn: Float[np.ndarray, "draws prompts curves shares"]
    left_out: dict[str, str]
    sums: dict[str, Float[np.ndarray, "prompts two"]]
    seed: int
    model: str
    block: int | None = None

    def table(self) -> pd.DataFrame:
        """One row per method.

        Columns: `method`; `comprehensiveness`, `sufficiency`, `soft_comprehensiveness`, `soft_sufficiency`, means over
        shares and prompts with `_low` and `_high` (95 % bootstrap over prompts); `as_leave_one_out`,
        `as_integrated_gradients`, mean rank correlations; `above_random`, share of the random draws whose
        comprehensiveness is lower; `missing`, how far the sum of the scores is from what they are parts of (mean size,
        logits; NaN where they are no parts of one); `n` prompts, and `n_soft` of them, whose answer depends on the tokens.
        """
        found: dict = {"method": self.methods}
        for name in MEASURES:
            found |= columns(name, getattr(self, name).mean(-1), self.seed, known=True)
        for place, name in enumerate(("as_leave_one_out", "as_integrated_gradients")):
            found[name] = known_mean(self.agreement[..., place])
        means = self.comprehensiveness.mean((1, 2))
        found["above_random"] = (self.drawn[:, :, 0].mean((1, 2)) < means[:, None]).mean(1)
        found["missing"] = [np.abs(self._missing(name)).mean() for name in self.methods]
        found["n_soft"] = np.isfinite(self.soft_comprehensiveness.mean(-1)).sum(1)
        return pd.DataFrame(found).assign(n=self.comprehensiveness.shape[1])

    def _missing(self, method: str) -> np.ndarray:
        """[prompts], logits."""
        return np.subtract(*self.sums[method].T) if method in self.sums else np.array([np.nan])

    def _beside(self, measure: str, best: str, sign: int) -> str:
        """The methods, and random tokens, that the best one is not told apart from, prompt by prompt."""
        values = sign * getattr(self, measure).mean(-1)
        known = [at for at, name in enumerate(self.methods) if name != ORACLE]
        names = [self.methods[at] for at in known]
        alike = [names[at] for at in rivals(values[known], names.index(best), self.seed)]
        return f", not told apart from {few(alike)}" if alike else ""

    def findings(self) -> tuple[Sentence, ...]:
        """Which methods find what the answer rests on ("best", "sufficiency"), which are no better than random order ("none"),
        what could not be computed ("unsupported"), and the limit ("limit")."""
        table = self.table().set_index("method")
        chance = table.loc[RANDOM]
        others = table.drop(index=[RANDOM, ORACLE], errors="ignore")
        said = []
        if len(others):
            ranked = others["comprehensiveness"].sort_values(ascending=False)
            best = others.loc[ranked.index[0]]
            said.append(
                Sentence(
                    f"Deleting what {ranked.index[0]} scores highest costs the answer {with_ends(best, 'comprehensiveness', '.3f')} of "
                    f"probability, random tokens {with_ends(chance, 'comprehensiveness', '.3f')}{_oracle(table, 'comprehensiveness')}{self._beside('comprehensiveness', str(ranked.index[0]), 1)}; "
                    f"{int(best['n'])} prompts.",
                    kind="best",
                )
            )
            ranked = others["sufficiency"].sort_values()
            best = others.loc[ranked.index[0]]
            said.append(
                Sentence(
                    f"With what {ranked.index[0]} scores highest alone the answer loses {with_ends(best, 'sufficiency', '.3f')}, with "
                    f"random tokens alone {with_ends(chance, 'sufficiency', '.3f')}{_oracle(table, 'sufficiency')}{self._beside('sufficiency', str(ranked.index[0]), -1)}.",
                    kind="sufficiency",
                )
            )
            values = self.comprehensiveness.mean(-1)
            more = columns("more", values - values[self.methods.index(RANDOM)], self.seed)
            poor = [
                name
                for name, low in zip(self.methods, more["more_low"], strict=True)
                if name in others.index and low <= 0  # NaN of one prompt tells nothing apart
            ]
            if poor:
                said.append(
                    Sentence(
                        f"Deleted, no better than random order, as far as {int(best['n'])} prompts tell: {few(poor)}.",
                        kind="none",
                    )
                )
        if self.sums:
            parts = [
                f"{name} {mean_told(np.abs(self._missing(name)), self.seed, '.2g')} of {np.abs(sums[:, 1]).mean():.2g}"
                + " (from all tokens deleted)" * (name == "integrated_gradients")
                for name, sums in self.sums.items()
            ]
            text = f"How far sums of scores are from the logit that they are parts of, mean size: {', '.join(parts)}."
            said.append(Sentence(text, kind="limit"))
        said += [
            Sentence(f"{name} is not scored: {why}.", kind="unsupported")
            for name, why in self.left_out.items()
        ]
        if self.block is not None:
            named = [one for one in APPROXIMATE if one in self.methods and self.block > 1]
            said.append(
                Sentence(
                    f"Blocks of {self.block} tokens are scored and deleted; approximate by products of block means: "
                    f"{', '.join(named) or 'none'}.",
                    kind="limit",
                )
            )
        said.append(
            Sentence(
                "A deleted token is the mean embedding at its place, which the model was not trained on.",
                kind="limit",
            )
        )
        return tuple(said)


def _oracle(table: pd.DataFrame, measure: str) -> str:
    """What leave-one-out does, where it was asked for."""
    if ORACLE not in table.index:
        return ""
    return f" (leave-one-out {with_ends(table.loc[ORACLE], measure, '.3f')})"
