"""Which edges of a circuit stand in every view of it: over resamples, methods, thresholds or ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from lens.circuits.checks._stability import Stability, jaccard
from lens.circuits.graph.circuit import Circuit
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.results import Result, Sentence


@dataclass(frozen=True, repr=False, eq=False)
class Consensus(Result):
    """Edges by the share of views that keep them.

    Attributes:
        core: circuit of the edges that every view keeps; it and `union` are run with the ablation of the first view, and
            `made` names the others.
        union: circuit of those that any keeps.
        stability: overlaps of the views, with the share of each edge.
        views: what each was made by; sizes: edges that each keeps.
    """

    core: Circuit
    union: Circuit
    stability: Stability = field(repr=False)
    views: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def by_chance(self) -> float:
        """Edges of the graph that random circuits of these sizes would have in common, on average."""
        every = self.core.graph.n
        return every * float(np.prod([size / every for size in self.sizes]))

    def table(self) -> pd.DataFrame:
        """One row per edge that any view keeps: `edge`, `share` of the views, `part` ("core", "contingent")."""
        share = self.stability.frequency
        kept = np.flatnonzero(share)
        order = kept[np.argsort(-share[kept], kind="stable")]
        return pd.DataFrame(
            {
                "edge": [self.core.graph.edges[edge] for edge in order],
                "share": share[order],
                "part": np.where(share[order] == 1, "core", "contingent"),
                "views": len(self.views),
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """How many edges every view keeps, of how many that any keeps (`core`), and what edges drawn at random would
        have in common (`chance`)."""
        core = (
            f"All {len(self.views)} views keep {self.core.n:,} of the {self.union.n:,} edges that any keeps; of "
            f"random circuits of these sizes {self.by_chance:.2g} would be in all."
        )
        chance = f"Two views share {self.stability.in_words}."
        return Sentence(core, kind="core"), Sentence(chance, kind="chance")


def consensus(circuits: Sequence[Circuit]) -> Consensus:
    """What several circuits of one task agree on.

    The core is no circuit by itself: run it (`lens.circuits.run_circuit`) beside the same number of top edges.

    Args:
        circuits: views, such as `scores.top(count)` of several methods, ablations, thresholds or draws of prompts.

    Raises:
        LensError: as `jaccard`, or circuits of several models.

    Reference: CIRCUS, 2026, arXiv 2603.00523.

    Example:
        >>> views = [lens.circuits.score_edges(small, copying, method=one).top(30) for one in ("eap", "eap-ig")]
        >>> found = lens.circuits.checks.consensus(views)
        >>> set(found.core.edges) <= set(views[0].edges)
        True
    """
    overlap = jaccard(circuits)
    circuits = [given_as("Circuit", circuits=one) for one in circuits]
    kept = np.stack([one.kept for one in circuits])
    models, tasks, ablations = (
        list(dict.fromkeys(of))
        for of in zip(*((one.model, one.task, one.ablation.value) for one in circuits), strict=True)
    )
    if len(models) > 1:
        raise LensError(
            f"the circuits are of several models ({', '.join(models)}), so what they share is a circuit of none; give "
            "those of one"
        )
    made = f"of {len(circuits)} views"
    if len(ablations) > 1:
        made += f" by {' and '.join(ablations)} ablation, run by {ablations[0]}"
    first = replace(circuits[0], task=" and ".join(tasks))
    return Consensus(
        core=replace(first, kept=kept.all(0), made=f"core {made}"),
        union=replace(first, kept=kept.any(0), made=f"union {made}"),
        stability=overlap,
        views=tuple(one.made for one in circuits),
        sizes=tuple(one.n for one in circuits),
    )
