"""What `lens.reading.subspace` gives back: what is left when directions are taken out, beside controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence, with_ends
from lens.stats.intervals import columns, known_mean
from lens.stats.verdicts import verdict

if TYPE_CHECKING:
    from jaxtyping import Float

BASES = ("none", "contrast", "queries", "keys", "other head", "random")
"""What is taken out: nothing; the contrast; principal components of queries or keys; another head's contrast (NaN in layers of one head);
chance."""


@dataclass(frozen=True, repr=False, eq=False)
class SubspaceRemovals(Result):
    """A head without some directions of its queries; prompts are those that the directions do not come from.

    Attributes:
        head: whose queries.
        pairs, beside: kinds of pairs that the contrast is of, and others.
        rank, width: directions that are taken out, of so many.
        mass: [basis of `BASES`, prompt], attention to the keys of the pairs; NaN where a prompt has none.
        other: [basis, prompt], attention to those of the other pairs, likewise.
        loss: [basis, prompt], next-token loss at the queries of the pairs, nats, likewise.
        spectrum: singular values of the contrast.
        basis: [width, rank], the directions of the contrast, orthonormal: `lens.edits.Subspace(found.basis, heads=[...])`.
        seed: of the bootstrap.
        model: its name.
    """

    head: HeadId
    pairs: str
    beside: str
    rank: int
    width: int
    mass: Float[np.ndarray, "bases prompts"]
    other: Float[np.ndarray, "bases prompts"]
    loss: Float[np.ndarray, "bases prompts"]
    spectrum: np.ndarray
    basis: Float[np.ndarray, "width rank"]
    seed: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per basis: `basis`, `rank`; `mass` and `other`, attention that is left, and `loss_change` against nothing taken out, nats,
        each with `_low` and `_high` (95 % bootstrap over prompts); `clean` and `clean_other`, attention with nothing taken out; `n` and `n_other`,
        prompts that have such pairs, and the other ones: those that the means are over."""
        found = {"basis": BASES[1:], "rank": self.rank}
        found |= columns("mass", self.mass[1:], self.seed, known=True)
        found |= columns("other", self.other[1:], self.seed, known=True)
        found |= columns(
            "loss_change", self.loss[1:] - self.loss[0], self.seed, known=True, shares=False
        )
        clean, other = self.mass[0], self.other[0]
        return pd.DataFrame(found).assign(
            clean=known_mean(clean),
            clean_other=known_mean(other),
            n=np.isfinite(clean).sum(),
            n_other=np.isfinite(other).sum(),
        )

    def findings(self) -> tuple[Sentence, ...]:
        """What the contrast takes away ("contrast"), beside what does ("control"), and whether it is specific ("specific")."""
        rows: dict[Any, Any] = self.table().set_index("basis").to_dict("index")
        own, chance = rows["contrast"], rows["random"]
        other = f", another head's contrast {with_ends(rows['other head'], 'mass', '.1%')}"
        if np.isnan(rows["other head"]["mass"]):
            other = ""
        said = [
            Sentence(
                f"{self.head} gives {self.pairs!r} pairs {own['clean']:.1%}; without {self.rank} of {self.width} directions "
                f"of its queries, found by contrast on other prompts, {with_ends(own, 'mass', '.1%')}, "
                f"without as many random ones {with_ends(chance, 'mass', '.1%')}{self._left_out(own['n'])}.",
                kind="contrast",
            ),
            Sentence(
                f"As many principal components of its queries leave {with_ends(rows['queries'], 'mass', '.1%')}, of its keys "
                f"{with_ends(rows['keys'], 'mass', '.1%')}{other}: the drop alone {self._beside()}",
                kind="control",
            ),
        ]
        if np.isfinite(own["other"]):
            said.append(
                Sentence(
                    f"The same removal takes its {self.beside!r} pairs from {own['clean_other']:.1%} to "
                    f"{with_ends(own, 'other', '.1%')}, random directions to {with_ends(chance, 'other', '.1%')}{self._left_out(own['n_other'])}; "
                    f"the loss at these queries changes by {with_ends(own, 'loss_change', '+.3g')} nats, without "
                    f"random directions by {with_ends(chance, 'loss_change', '+.3g')}.",
                    kind="specific",
                )
            )
        return tuple(said)

    def _left_out(self, counted: int) -> str:
        """On how many of the prompts, where some have no such pairs."""
        every = self.mass.shape[1]
        return "" if counted == every else f" (on the {counted} of {every} prompts with such pairs)"

    def _beside(self) -> str:
        """How the drop compares with those of the controls, prompt by prompt."""
        more = self.mass[2:] - self.mass[1]  # that a control leaves and the contrast does not
        more = more[np.isfinite(more).any(1)]
        beside = columns("more", more, self.seed, known=True)
        said = {
            verdict(*ends) for ends in zip(beside["more_low"], beside["more_high"], strict=True)
        }
        if "below" in said:
            return "is smaller than that of a control."
        if said == {"above"}:
            return "is larger than that of every control."
        counted = np.isfinite(self.mass[0]).sum()
        return f"is not told apart from that of every control on {counted} prompts."
