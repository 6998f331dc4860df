"""What `lens.reading.components` gives back: singular values and what each component carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence, ends
from lens.stats.intervals import around, columns, draws, over_units
from lens.stats.verdicts import of_many_told

if TYPE_CHECKING:
    from jaxtyping import Float

MAPS = ("query-key", "value-output")


@dataclass(frozen=True, repr=False, eq=False)
class ComponentShares(Result):
    """Singular components of a head's two maps, largest singular value first.

    Attributes:
        head: whose.
        distance: of the pairs, or None where the maps do not depend on it.
        pairs: which pairs, in words.
        values: singular values of the query-key map (times the scale of the logits) and of the value-output map.
        logits: [component, prompt], mean over the pairs of each one's part of the logit less its mean over the
            keys that the query sees, nats; they sum to the difference.
        energy: [component, prompt], share in the square of what the head writes at these queries; sums to 1.
        count: pairs in all.
        seed: of the bootstrap.
        model: its name.
    """

    head: HeadId
    distance: int | None
    pairs: str
    values: tuple[np.ndarray, np.ndarray]
    logits: Float[np.ndarray, "components prompts"]
    energy: Float[np.ndarray, "components prompts"]
    count: int
    seed: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per component of both maps.

        Columns: `map` ("query-key", "value-output"), `component` from 0, `singular_value`; `carried` (nats, or
        share of the square) with `_low`, `_high`; `share` of all that is carried with `_low`, `_high` (NaN where it is not above
        0 in every prompt); `n` prompts.
        """
        tables = []
        for name, values, carried in zip(
            MAPS, self.values, (self.logits, self.energy), strict=True
        ):
            mean, whole = carried.mean(1), carried.sum(0)
            low, high = np.full((2, len(mean)), np.nan)
            if (whole > 0).all():
                low, high = over_units(carried.T, np.tile(whole[:, None], len(mean)), self.seed)
            tables.append(
                pd.DataFrame(
                    {
                        "map": name,
                        "component": np.arange(len(mean)),
                        "singular_value": values,
                        **columns("carried", carried, self.seed, shares=False),
                        "share": mean / mean.sum(),
                        "share_low": low,
                        "share_high": high,
                        "n": carried.shape[1],
                    }
                )
            )
        return pd.concat(tables, ignore_index=True)

    @property
    def participation(self) -> tuple[float, float]:
        """Of each map, how many components of one size would share as these do: (sum |share|)² / sum share²."""
        one, other = (float(_participation(found.mean(1))) for found in (self.logits, self.energy))
        return one, other

    def _around(self) -> list[str]:
        """The interval of each of these, over prompts."""
        prompts = self.logits.shape[1]
        if prompts < 2:
            return ["", ""]
        drawn = draws(prompts, self.seed)
        maps = zip(self.participation, (self.logits, self.energy), strict=True)
        return [
            ends(*around(of, _participation(drawn @ one.T), prompts, least=1, most=len(one)), ".1f")
            for of, one in maps
        ]

    def findings(self) -> tuple[Sentence, ...]:
        """How many components carry each map ("participation"), and the first of them ("component")."""
        table, of, around = self.table(), self.participation, self._around()
        where = "" if self.distance is None else f" at distance {self.distance}"
        said = [
            Sentence(
                f"{self.head} on {self.count} {self.pairs}{where}: about {of[0]:.1f}{around[0]} of "
                f"{len(self.values[0])} components of its query-key map carry the logits, {of[1]:.1f}{around[1]} of "
                f"{len(self.values[1])} of its value-output map what it writes.",
                kind="participation",
            )
        ]
        for name in MAPS:
            rows = table[table["map"] == name]
            best = rows.iloc[int(np.argmax(rows["share"]))]
            # Parts of a logit have a sign.
            least, most = (-np.inf, np.inf) if name == MAPS[0] else (0, 1)
            held = of_many_told(
                best, "share", ".0%", len(rows), self.logits.shape[1], least=least, most=most
            )
            said.append(
                Sentence(
                    f"{name}: component {best['component']} (singular value {best['singular_value']:.3g}) carries "
                    f"{held} (the largest of {len(rows)}); all alike would {1 / len(rows):.0%}.",
                    kind="component",
                )
            )
        return tuple(said)


def _participation(carried: np.ndarray) -> np.ndarray:
    """[...] of what components [..., components] carry."""
    return np.abs(carried).sum(-1) ** 2 / (carried**2).sum(-1)
