"""`PositionScores`: what each edge is worth at each place of the prompts, and each head's way between places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.selection import top
from lens.circuits.graph.ways import PARTS
from lens.common.choices import check_counts, is_whole
from lens.common.errors import LensError
from lens.common.results import Result, Sentence, ends
from lens.stats.intervals import columns
from lens.stats.verdicts import of_many

_NAMED = 3  # scores that a sentence names


@dataclass(frozen=True, repr=False, eq=False)
class PositionScores(Result):
    """Scores in units of the metric, positive = the task needs it.

    Attributes:
        graph: the edges.
        spans: names of the places.
        where: [spans, prompts, tokens], which tokens they are.
        within: [prompts, spans, edges], of what a reader reads in a span.
        across: [prompts, part, layer, head, query span, key span]: of what a head's values, keys or queries (`PARTS`)
            carry from a span to another.
        method: "exact", "eap" or "eap-ig".
        ablation: what replaces what is left out.
        metric, task, model: names.
        steps, rule: of the integrated gradients, else None.
    """

    graph: Graph
    spans: tuple[str, ...]
    where: np.ndarray
    within: np.ndarray
    across: np.ndarray
    method: str
    ablation: Ablation
    metric: str
    task: str
    model: str
    steps: int | None = None
    rule: str | None = None

    def edges(self) -> EdgeScores:
        """Summed over the spans: of gradients what `lens.circuits.score_edges` gives without positions, of runs ("exact at
        places") something else."""
        method = "exact at places" if self.method == "exact" else self.method
        return EdgeScores(
            self.graph, self.within.sum(1), method, Ablation(kv=self.graph.kv), self.metric, self.task,
            self.model, self.steps, self.rule,
        )  # fmt: skip

    @property
    def cancelled(self) -> float:
        """Share of the size of all scores within spans that is lost when an edge's spans are summed."""
        values = self.within.mean(0)
        whole = np.abs(values).sum()
        return float(1 - np.abs(values.sum(0)).sum() / whole) if whole else float("nan")

    def top(self, count: int) -> np.ndarray:
        """[spans, edges], the `count` pairs of an edge and a span whose scores are largest by size.

        Raises:
            LensError: a count that is not of these.
        """
        values = np.abs(self.within.mean(0))
        if not (is_whole(count) and 0 <= count <= values.size):
            raise LensError(f"top takes 0 to {values.size:,} edges at spans, got {count}")
        return top(values, count)

    def table(self, count: int | None = None, *, seed: int = 0) -> pd.DataFrame:
        """One row per edge and span, and per head, part and pair of spans; largest by size first.

        Args:
            count: only so many rows.
            seed: of the bootstrap.

        Raises:
            LensError: a number of rows that is none.

        Columns: `edge` (across spans the head's part, such as "a1.h0<k>"), `span` (where it is read; across spans of the query),
        `key_span` ("" within a span), `value` with `low` and `high` (95 % bootstrap over prompts), `n` prompts.
        """
        if count is not None:
            check_counts(count=count)
        units = self._units()
        chosen = np.argsort(-np.abs(units.mean(0)), kind="stable")[:count]
        return self._rows(chosen, units[:, chosen], seed)

    def _units(self) -> np.ndarray:
        """[prompts, scores], those within spans before those across."""
        return np.concatenate(
            [one.reshape(len(self.within), -1) for one in (self.within, self.across)], 1
        )

    def _rows(self, chosen: np.ndarray, units: np.ndarray, seed: int = 0) -> pd.DataFrame:
        """The table of the scores of these numbers, `units` [prompts, chosen]."""
        names = [self._name(int(place)) for place in chosen]
        return pd.DataFrame(
            {
                **dict(zip(("edge", "span", "key_span"), zip(*names, strict=True), strict=True)),
                **columns("value", units.T, seed, plain=True, shares=False),
                "n": len(units),
            }
        )

    def _name(self, place: int) -> tuple[str, str, str]:
        inner = self.within[0].size
        if place < inner:
            span, edge = divmod(place, self.graph.n)
            return self.graph.edges[edge], self.spans[span], ""
        part, layer, head, query, key = np.unravel_index(place - inner, self.across.shape[1:])
        return f"a{layer}.h{head}<{PARTS[part]}>", self.spans[query], self.spans[key]

    def findings(self) -> tuple[Sentence, ...]:
        """The largest edges at a place ("within") and the largest ways between places ("across"), each beside the median size
        of all of its kind, and what sums over places hide ("cancelled")."""
        units, inside = self._units(), self.within[0].size
        sizes = np.abs(units.mean(0))
        said = []
        for kind, first, own in (("within", 0, sizes[:inside]), ("across", inside, sizes[inside:])):
            chosen = first + np.argsort(-own, kind="stable")[:_NAMED]
            rows = self._rows(chosen, units[:, chosen])
            best = ", ".join(
                f"{row['edge']} at {row['span']}" + (f" from {row['key_span']}" if row["key_span"] else "")
                + f" {row['value']:.3g}{ends(*of_many(row['value'], row['low'], row['high'], own.size, len(units)))}"
                for row in rows.to_dict("records")
            )  # fmt: skip
            median = f"the median size of {own.size:,} is {np.median(own):.2g}"
            said.append(
                Sentence(
                    f"Largest {kind} spans (intervals as of the largest of all): {best}; {median}.",
                    kind=kind,
                )
            )
        said.append(
            Sentence(
                f"Summed over {len(self.spans)} spans, {self.cancelled:.0%} of the size of the edges' scores cancels.",
                kind="cancelled",
            )
        )
        return tuple(said)
