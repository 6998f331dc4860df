"""What `lens.reading.retrieval` gives back: three scores of every head, and recall without the best of each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.choices import check_choice, check_counts
from lens.common.head_ids import HeadId, all_heads, head_columns
from lens.common.results import Result, Sentence, with_ends
from lens.stats.intervals import columns
from lens.stats.orders import random_orders, spearman
from lens.stats.verdicts import mean_told

if TYPE_CHECKING:
    from jaxtyping import Float

KINDS = ("literal", "query", "output")


_WORDS = {
    "literal": "by where they look while the needle is written",
    "query": "by how much more the question looks at it",
    "output": "by what they bring from it to the answer",
}


@dataclass(frozen=True, repr=False, eq=False)
class RetrievalKinds(Result):
    """Retrieval heads by three definitions; trials that the model answered count.

    Attributes:
        values: [kind, layer, head, trial] in the order of `KINDS`: share of the needle's positions; attention; logit.
        masked: how many heads were masked together.
        clean: [trial], recall of the needle as the model is.
        recalls: [kind, masked, trial], without the first heads of each kind.
        random: [masked, trial], without as many others that are in no list's first, mean over the draws; NaN where there
            are fewer.
        trials: that there were.
        seed: of the bootstrap.
        model: its name.
    """

    values: Float[np.ndarray, "kinds layers heads trials"]
    masked: tuple[int, ...]
    clean: Float[np.ndarray, " trials"]
    recalls: Float[np.ndarray, "kinds counts trials"]
    random: Float[np.ndarray, "counts trials"]
    trials: int
    seed: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per head: `name`, `layer`, `head`; `literal`, `query`, `output`, each with `_low` and `_high` (95 % bootstrap over
        trials); `n` trials that count of `trials`."""
        found = head_columns(all_heads(range(self.values.shape[1]), self.values.shape[2]))
        for kind, values in zip(KINDS, self.values, strict=True):
            found |= columns(kind, values, self.seed)
        return pd.DataFrame(found).assign(n=len(self.clean), trials=self.trials)

    def recall(self) -> pd.DataFrame:
        """One row per kind (and "random") and number of masked heads: `by`, `masked`, `recall` with `_low`, `_high`, `clean`, `n`."""
        tables = []
        for by, found in zip((*KINDS, "random"), (*self.recalls, self.random), strict=True):
            rows = columns("recall", found, self.seed, trials=True)
            tables.append(pd.DataFrame({"by": by, "masked": self.masked, **rows}))
        return pd.concat(tables, ignore_index=True).assign(
            clean=self.clean.mean(), n=len(self.clean)
        )

    def agreement(self) -> pd.DataFrame:
        """One row per pair of kinds: `a`, `b`, `correlation` of the ranks of all heads."""
        means = dict(zip(KINDS, self.values.mean(-1), strict=True))
        rows = [
            (one, other, spearman(means[one].ravel(), means[other].ravel()))
            for one, other in combinations(KINDS, 2)
        ]
        return pd.DataFrame(rows, columns=["a", "b", "correlation"])

    def heads(self, kind: str, count: int = 5) -> list[HeadId]:
        """The first heads by one of `KINDS`.

        Raises:
            LensError: another kind, or a number of heads that is none.
        """
        check_counts(count=count)
        values = self.values[KINDS.index(check_choice("kind", kind, KINDS))].mean(-1)
        order = np.argsort(-values, axis=None, kind="stable")[:count]
        return [HeadId(*map(int, np.unravel_index(place, values.shape))) for place in order]

    def findings(self) -> tuple[Sentence, ...]:
        """The first heads of each kind ("heads"), recall without them ("masked"), and how far they agree ("agreement")."""
        table = self.table().set_index("name")
        said = []
        for kind in KINDS:
            first = table.loc[[str(head) for head in self.heads(kind, 3)]].to_dict("index")
            named = ", ".join(
                f"{name} {with_ends(row, kind, '.2g')}" for name, row in first.items()
            )
            said.append(
                Sentence(
                    f"Retrieval heads {_WORDS[kind]} ({kind}): {named} come first; the median head has {table[kind].median():.2g}.",
                    kind="heads",
                )
            )
        clean = mean_told(self.clean, self.seed, ".2f", trials=True)
        rows = {(row["by"], row["masked"]): row for row in self.recall().to_dict("records")}
        for count in self.masked:
            parts, random = [], rows["random", count]
            for kind in KINDS:
                row = rows[kind, count]
                parts.append(f"{kind} {with_ends(row, 'recall', '.2f')}")
            beside = f"without random others {with_ends(random, 'recall', '.2f')}"
            if np.isnan(random["recall"]):
                beside = f"fewer than {count} heads are in no list, so that none stand beside"
            said.append(
                Sentence(
                    f"Recall is {clean} over {len(self.clean)} trials; without the first {count}: "
                    f"{', '.join(parts)}; {beside}.",
                    kind="masked",
                )
            )
        pairs = [
            f"{row['a']} and {row['b']} {row['correlation']:.2f}"
            for _, row in self.agreement().iterrows()
        ]
        beside = "; ".join(filter(None, (", ".join(pairs), random_orders(len(table)))))
        said.append(
            Sentence(
                f"Rank correlations of {len(table)} heads: {beside}.",
                kind="agreement",
            )
        )
        return tuple(said)
