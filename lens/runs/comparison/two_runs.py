"""`compare_runs`: two run folders to one result with tables, sentences and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.results import Result, Sentence
from lens.runs.comparison.circuits import compare_circuits
from lens.runs.comparison.pairing import compare_losses, compare_scores, paired_prompts
from lens.runs.comparison.settings import differing_settings
from lens.runs.comparison.tables import compare_sections
from lens.runs.comparison.words import limits, sentences
from lens.runs.folders import Run

DEFINITIONS: Mapping[str, str] = {
    "prompts": "kind of prompt: text, or copied random tokens",
    "metric": "score of a head, see lens.traces.metrics",
    "variant": "raw, or sink_excluded: keys from 1 on only",
    "name": "of the head",
    "layer": "from 0",
    "head": "from 0",
    "a": "mean in A over the prompts that both runs have; A's own mean where they share none",
    "b": "the same in B",
    "difference": "b - a",
    "low": "low end of the 95 % bootstrap interval of the difference over shared prompts",
    "high": "its high end",
    "n": "shared prompts of this kind; 0: each run's own mean, no interval",
    "rank_correlation": "Spearman's correlation of A and B over the heads (or rows); 1: same order",
    "largest": "head (or row) with the largest absolute difference",
    "largest_difference": "b - a there",
    "section": "analysis",
    "table": "its table",
    "column": "of that table",
    "rows": "rows that both runs have",
    "circuit_a": "circuit of A",
    "circuit_b": "circuit of B",
    "part": "nodes (input, heads and MLPs that write) or edges",
    "shared": "in both circuits",
    "only_a": "only in that of A",
    "only_b": "only in that of B",
    "jaccard": "shared / in either",
    "by_chance": "the same for two sets of these sizes drawn from the whole graph",
    "setting": "of the configuration, the model or the versions",
    "what": "loss of a prompt, or of the second copy of random tokens; nats a token",
}


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """Two runs, A and B; every difference is B - A.

    Attributes:
        a, b: the runs.
        refusal: why heads of the same number are not compared; "" where they are.
        heads: one row per kind of prompt, score and head; empty where refused.
        metrics: one row per kind of prompt and score: means over all heads, rank correlation, the
            head that differs most (the last two NaN and "" where heads are not compared).
        losses: of the models on the prompts that both have.
        sections: one row per column of the tables that both runs' sections have.
        summaries: section that both have -> its title, and what it found in A and in B.
        circuits: what the circuits of both share, beside chance; empty without any.
        settings: what differs in configuration, model and versions.
        shared: kind of prompt that both runs have -> how many prompts are in both.
        sentences: findings in plain words, most telling first.
        limits: what they do not show.
        seed: of the bootstrap.
    """

    a: Run
    b: Run
    refusal: str
    heads: pd.DataFrame
    metrics: pd.DataFrame
    losses: pd.DataFrame
    sections: pd.DataFrame
    summaries: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]]
    circuits: pd.DataFrame
    settings: pd.DataFrame
    shared: Mapping[str, int]
    sentences: tuple[Sentence, ...]
    limits: tuple[Sentence, ...]
    seed: int

    @property
    def aligned(self) -> bool:
        """Whether heads of the same number are compared."""
        return not self.refusal

    def table(self) -> pd.DataFrame:
        """`heads`, or `metrics` where heads are not compared."""
        return self.heads if self.aligned else self.metrics

    def findings(self) -> tuple[Sentence, ...]:
        """`sentences`: what differs, most telling first."""
        return self.sentences

    def __repr__(self) -> str:
        shared = ", ".join(f"{count} {kind}" for kind, count in self.shared.items())
        heads = "heads aligned" if self.aligned else "heads not aligned"
        return f"Comparison({self.a.id} and {self.b.id}: {heads}, shared prompts: {shared})"


def compare_runs(a: Run, b: Run, *, seed: Seed = 0) -> Comparison:
    """What differs between two runs, head by head where both models have the same number of them.

    Score of head (l, h) and prompt p in A: `a_p`; in B: `b_p`. Difference: mean over the prompts that
    both runs have of `b_p - a_p`, with a 95 % bootstrap interval over them.

    Args:
        a, b: finished runs, or partial ones that have their tables.
        seed: of the bootstrap.

    Raises:
        LensError: one run twice, or runs of which nothing can be compared.

    Example:
        >>> lens.runs.compare_runs(run, other).table().head()
    """
    if a.path == b.path:
        raise LensError(f"A and B are the same run, {a.id}; name two runs: `lens list` shows them")
    (a, damaged_a), (b, damaged_b) = a.readable_tables(), b.readable_tables()
    damaged = [*damaged_a.values(), *damaged_b.values()]
    refusal = f"{'; '.join(dict.fromkeys(damaged))}." if damaged else _refusal(a, b)
    same_sizes = all(a.meta["model"][name] == b.meta["model"][name] for name in ("layers", "heads"))
    heads, metrics = compare_scores(a, b, aligned=not refusal, seed=seed)
    kinds = set(a.prompts["kind"]) & set(b.prompts["kind"])
    shared = {kind: len(pairs) for kind, pairs in paired_prompts(a, b).items() if kind in kinds}
    tables = compare_sections(a, b, aligned=same_sizes if damaged else not refusal)
    circuits, unread = compare_circuits(a, b)
    if damaged and not tables.summaries and circuits.empty:
        raise LensError(refusal)
    settings, unknown = differing_settings(a, b)
    losses = compare_losses(a, b, seed=seed)
    return Comparison(
        a,
        b,
        refusal,
        heads,
        metrics,
        losses,
        tables.table,
        tables.summaries,
        circuits,
        settings,
        shared,
        tuple(sentences(a, b, heads, metrics, losses, circuits, shared, refusal)),
        tuple(
            limits(heads, shared, settings, circuits, (*unknown, *tables.refused, *unread), refusal)
        ),
        seed,
    )


def _refusal(a: Run, b: Run) -> str:
    shapes = [run.heads.groupby("layer")["head"].nunique().to_dict() for run in (a, b)]
    if shapes[0] == shapes[1] != {}:
        return ""
    if bare := [
        run.meta["model"]["name"] for run, shape in zip((a, b), shapes, strict=True) if not shape
    ]:
        return (
            f"Heads of attention are not compared: the runs of {' and '.join(dict.fromkeys(bare))} have no scores of any; "
            "the tables of the analyses that both have are."
        )
    sizes = [
        f"{run.meta['model']['name']} has {len(shape)} layers of {max(shape.values())} heads"
        for run, shape in zip((a, b), shapes, strict=True)
    ]
    return (
        f"Heads cannot be matched by their number: {' and '.join(sizes)}. Only means over all heads are "
        "compared."
    )
