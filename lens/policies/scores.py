"""What `lens.policies.evaluate` found, as tables and sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lens.common.choices import check_choice
from lens.common.head_ids import HeadId, all_heads, head_columns
from lens.common.results import Result, Sentence, ends, few, with_ends
from lens.stats.intervals import columns
from lens.stats.verdicts import of_many_told, rivals

COLUMNS = {
    "density": "kept blocks among those that are seen",
    "recall": "mass on the kept blocks, mean over rows",
    "recall_p5": "its 5th percentile over rows",
    "recall_min": "its least over rows",
    "oracle_recall": "with as many blocks, the best ones for each row",
    "random_recall": "expected with as many blocks drawn at random",
    "output_error": "mean over rows of |o' - o| / |o|",
    "projected_error": "the same after the output projection; NaN where that is not known",
    "layer_error": "mean over rows of |(o' - o) W_O| / |what all heads of the layer write|; NaN where unknown",
    "budget_90": "blocks that the best choice for each row needs for a recall of 0.9",
    "budget_95": "of 0.95",
    "budget_99": "of 0.99",
    "predicted": "the recall that the policy expected; NaN where it says nothing",
    "cost": "products q·k that choosing took, as a share of those of dense attention",
}
"""What is measured of each head and prompt, over the rows that see a key; all are shares."""
POOR = 0.9
"""Heads whose whole interval of the recall lies below this are named."""


@dataclass(frozen=True, repr=False, eq=False)
class PolicyScores(Result):
    """What each head keeps under each policy.

    Attributes:
        values: [policies, columns, layers, heads, prompts], those of `COLUMNS`.
        dense_loss: [prompts], mean next-token loss of the model as it is, nats; NaN where not measured.
        sparse_loss: [policies, prompts], with the policy in all heads.
        policies: as they write themselves.
        references: which of them are bounds and baselines: full, oracle, random.
        layers: the model's numbers of those that have softmax attention.
        block_sizes: (query_block, key_block) of each.
        tokens: length of each prompt.
        unprojected: why the error after the output projection is not known, or "".
        seed: of the intervals.
        model: its name.
    """

    values: np.ndarray
    dense_loss: np.ndarray
    sparse_loss: np.ndarray
    policies: tuple[str, ...]
    references: tuple[bool, ...]
    layers: tuple[int, ...]
    block_sizes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    unprojected: str
    seed: int
    model: str

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.values.shape[-1]

    @property
    def heads(self) -> list[HeadId]:
        """Every head, in the order of the table."""
        return all_heads(self.layers, self.values.shape[3])

    def of(self, column: str) -> np.ndarray:
        """[policies, layers, heads, prompts] of a column.

        Raises:
            LensError: no such column.
        """
        check_choice("column", column, COLUMNS)
        return self.values[:, list(COLUMNS).index(column)]

    @property
    def price(self) -> np.ndarray:
        """[policies, layers, heads]: density and cost of choosing together, mean over prompts; 1 is dense."""
        return (self.of("density") + self.of("cost")).mean(-1)

    @property
    def error(self) -> np.ndarray:
        """[policies, layers, heads]: `layer_error`, mean over prompts; `output_error` where that is not known."""
        found = self.of("layer_error").mean(-1)
        return self.of("output_error").mean(-1) if np.isnan(found).any() else found

    def table(self) -> pd.DataFrame:
        """One row per policy and head: `policy`, `layer`, `head`, `name`, `n`, every column as its mean over
        prompts with the 95 % interval (`_low`, `_high`, NaN for one prompt), `gap` (oracle_recall - recall)
        and `calibration` (recall - predicted)."""
        heads = head_columns(self.heads * len(self.policies))
        table: dict[str, Any] = {"policy": np.repeat(self.policies, len(self.heads))}
        table |= {name: heads[name] for name in ("layer", "head", "name")} | {"n": self.n}
        found = {name: self.of(name) for name in COLUMNS}
        found["gap"] = found["oracle_recall"] - found["recall"]
        found["calibration"] = found["recall"] - found["predicted"]
        for name, values in found.items():
            table |= columns(name, values, self.seed)
        return pd.DataFrame(table)

    def summary(self) -> pd.DataFrame:
        """One row per policy: `policy`, `block_size`, the means over heads of every column with intervals over
        prompts, and `loss_change` (sparse - dense, nats per token, paired) with its interval."""
        table = {"policy": self.policies, "block_size": self.block_sizes, "n": self.n}
        for name in COLUMNS:
            table |= columns(name, self.of(name).mean((1, 2)), self.seed)
        return pd.DataFrame(
            table
            | columns("loss_change", self.sparse_loss - self.dense_loss, self.seed, shares=False)
        )

    def findings(self) -> tuple[Sentence, ...]:
        """Which costs least ("best"), what each keeps ("recall"), which heads lose by it ("heads"), its loss
        ("loss"), and limits ("limit")."""
        rows = self.summary()
        said = self._best(rows)
        for place in range(len(self.policies)):
            said += self._of_policy(place, rows.iloc[place])
        lengths = f"{min(self.tokens)} to {max(self.tokens)}"
        said.append(
            Sentence(
                f"Measured on {self.n} prompt{'s' if self.n != 1 else ''} of {lengths} tokens; recall and errors "
                "are those of a dense pass, one layer at a time"
                + ("; with one prompt there are no intervals." if self.n == 1 else "."),
                kind="limit",
            )
        )
        if self.unprojected:
            said.append(
                Sentence(
                    f"Errors after the output projection are not known: {self.unprojected}",
                    kind="limit",
                )
            )
        return tuple(said)

    def _best(self, rows: pd.DataFrame) -> list[Sentence]:
        """Of several policies with a loss, the one that costs least, beside the references."""
        reference = np.array(self.references)
        own, others = rows[~reference], rows[reference]
        if len(own) < 2 or rows["loss_change_low"].isna().any():
            return []  # not measured, or of a single prompt, which tells nothing apart
        best = own.iloc[int(own["loss_change"].to_numpy().argmin())]
        which = np.flatnonzero(~reference)
        changes = (self.sparse_loss - self.dense_loss)[which]
        alike = rivals(-changes, int(changes.mean(1).argmin()), self.seed)
        told = (
            f", not told apart from {few([self.policies[which[at]] for at in alike])}"
            if alike
            else ""
        )
        beside = "; ".join(
            f"{row['policy']} {row['loss_change']:+z.4f} at {row['density']:.1%}"
            for _, row in others.iterrows()
        )
        return [
            Sentence(
                f"Of {len(own)} policies in all heads {best['policy']} costs least{told}: "
                f"{best['loss_change']:+z.4f}{_ends(best, 'loss_change')} nats per token with "
                f"{best['density']:.1%} of the blocks and {best['recall']:.1%} of the attention"
                f"{f' (beside it: {beside})' if beside else ''}. They differ in density: the figure has both.",
                kind="best",
            )
        ]

    def _of_policy(self, place: int, row: pd.Series) -> list[Sentence]:
        said = [
            Sentence(
                f"{row['policy']} keeps {row['density']:.1%} of the blocks and "
                f"{with_ends(row, 'recall', '.1%')} of the attention; the best choice of as many blocks "
                f"keeps {row['oracle_recall']:.1%}, a random one {row['random_recall']:.1%}.",
                kind="recall",
            )
        ]
        heads = pd.DataFrame({"name": list(map(str, self.heads))})
        for name in ("recall", "output_error"):
            heads = heads.assign(**columns(name, self.of(name)[place], self.seed))
        poor = heads[heads["recall_high"] < POOR].sort_values("recall", kind="stable")
        if len(poor):
            least = poor.iloc[0]
            said.append(
                Sentence(
                    f"{len(poor)} of {len(heads)} heads keep less than {POOR:.0%} under {row['policy']}, with the whole "
                    f"interval: {few(poor['name'].tolist())}; the poorest keeps "
                    f"{of_many_told(least, 'recall', '.1%', len(heads), row['n'], least=0, most=1)}, and its output is off by "
                    f"{with_ends(least, 'output_error', '.1%')}.",
                    kind="heads",
                )
            )
        if not np.isnan(row["loss_change"]):
            said.append(
                Sentence(
                    f"With {row['policy']} in all heads the loss changes by "
                    f"{row['loss_change']:+z.4f}{_ends(row, 'loss_change')} nats per token from "
                    f"{self.dense_loss.mean():.4f}.",
                    kind="loss",
                )
            )
        return said

    def __repr__(self) -> str:
        return f"PolicyScores({self.model}: {few(self.policies, 3)}; {self.n} prompts)"


def _ends(row: pd.Series, name: str) -> str:
    return ends(row[f"{name}_low"], row[f"{name}_high"], ".4f")
