"""How alike the heads of a model are: by what they attend to, or by what they write.

>>> similar = lens.heads.similarity(model, texts, method="cka")
>>> similar.neighbours("L1H0")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from lens import stats
from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId, head_id
from lens.common.results import Result

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel
    from lens.traces.trace import AttentionTrace

Likeness = Literal["js", "log_odds", "cka"]
SIMILARITIES = {
    "js": "Jensen-Shannon divergence of attention (nats)",
    "log_odds": "cosine of attention log-odds",
    "cka": "CKA of head outputs",
}
_LARGEST = 1 << 22  # resampled numbers that are in memory at a time


@dataclass(frozen=True, repr=False, eq=False)
class HeadSimilarity(Result):
    """Every head compared with every other one; heads of all layers in one row, as in `names`.

    Attributes:
        sums, counts: [prompt, head, head], what each prompt adds. "js": sum over queries of the
            divergence, and the number of queries. "log_odds" and "cka": inner products, and 1.
        method: "js", "log_odds" or "cka".
        sink_excluded: whether the first key (and a learned sink) was left out and rows renormalised.
        exactness: "exact", or "lower bound" where only block maps were compared.
        floor: [head, head], the same value between a head on one prompt and a head on the next: what
            position, mask and sinks alone make alike. None if it was not measured.
        shape: layers and heads; model: its name.
    """

    sums: np.ndarray
    counts: np.ndarray
    method: str
    sink_excluded: bool
    exactness: str
    shape: tuple[int, int]
    model: str
    floor: np.ndarray | None = None

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.sums)

    @property
    def names(self) -> list[str]:
        """`L0H0`, `L0H1`, ... in the order of the rows."""
        return [
            str(HeadId(layer, head))
            for layer in range(self.shape[0])
            for head in range(self.shape[1])
        ]

    @property
    def values(self) -> np.ndarray:
        """[head, head]: divergence in nats ("js", 0 = the same), or cosine ("log_odds", "cka").

        NaN where a head has nothing to compare: an output that is the same at every position.
        """
        sums = self.sums.sum(0)
        if self.method == "js":
            return _ratio(sums, self.counts.sum(0))
        own = np.diagonal(sums)
        return _cosine(sums, own, own)

    @property
    def distances(self) -> np.ndarray:
        """[head, head] for clustering: root of the divergence (a metric), or `1 - cosine`."""
        return self.distances_of(self.values)

    @property
    def closeness(self) -> np.ndarray:
        """[head, head], 1 = the same: `1 - JS / ln 2`, or the cosine."""
        return self.closeness_of(self.values)

    def resampled(self, resamples: int, seed: int) -> Iterator[np.ndarray]:
        """`resamples` times the values of the pairs above the diagonal, row by row, on prompts drawn again.

        Raises:
            LensError: a single prompt, or no resample.
        """
        if self.n < 2:
            raise LensError("one prompt cannot be resampled; compare the heads on several")
        weights = stats.draws(self.n, seed, resamples)
        pairs = np.triu_indices(len(self.names), 1)
        step = max(1, _LARGEST // len(pairs[0]))
        parts = (weights[start : start + step] for start in range(0, resamples, step))
        return (values for part in parts for values in self._of_pairs(part, *pairs))

    def interval(self, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Low and high end [head, head] of the 95 % bootstrap interval over prompts; NaN for one."""
        ends = np.full((2, *self.sums.shape[1:]), np.nan)
        if self.n > 1:
            weights = stats.draws(self.n, seed)
            rows, columns = np.triu_indices(len(self.names))
            step = max(1, _LARGEST // len(weights))
            for start in range(0, len(rows), step):
                a, b = rows[start : start + step], columns[start : start + step]
                ends[:, a, b] = ends[:, b, a] = stats.interval(self._of_pairs(weights, a, b))
        return ends[0], ends[1]

    def _of_pairs(self, weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """[draw, pair] values of heads `a` and `b` on prompts weighed by [draw, prompt]."""
        sums = weights @ self.sums[:, a, b]
        if self.method == "js":
            return _ratio(sums, weights @ self.counts[:, a, b])
        own = weights @ np.diagonal(self.sums, axis1=1, axis2=2)
        norm = np.sqrt(np.where(own > 0, own, np.nan))
        return sums / (norm[:, a] * norm[:, b])

    def neighbours(self, head: AnyHead, count: int = 5) -> pd.DataFrame:
        """The heads most like one head: columns `name`, `layer`, `head`, `value`, `low`,
        `high`, `n`, closest first.

        Raises:
            LensError: not a head of this model.
        """
        found = head_id(head, layers=self.shape[0], heads=self.shape[1])
        row = found.layer * self.shape[1] + found.head
        low, high = self.interval()
        table = pd.DataFrame(
            {
                "name": self.names,
                "layer": np.repeat(np.arange(self.shape[0]), self.shape[1]),
                "head": np.tile(np.arange(self.shape[1]), self.shape[0]),
                "value": self.values[row],
                "low": low[row],
                "high": high[row],
                "n": self.n,
            }
        )
        order = np.argsort(self.distances[row], kind="stable")
        return table.iloc[order[order != row][:count]].reset_index(drop=True)

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per pair: `first`, `second`, `value`, `low`, `high`, `floor`, `n`; closest first."""
        low, high = self.interval(seed=seed)
        a, b = np.triu_indices(len(self.names), 1)
        floor = np.full(low.shape, np.nan) if self.floor is None else self.floor
        names = np.array(self.names)
        table = pd.DataFrame(
            {
                "first": names[a],
                "second": names[b],
                "value": self.values[a, b],
                "low": low[a, b],
                "high": high[a, b],
                "floor": (floor[a, b] + floor[b, a]) / 2,
                "n": self.n,
            }
        )
        order = np.argsort(self.distances[a, b], kind="stable")
        return table.iloc[order].reset_index(drop=True)

    def distances_of(self, values: np.ndarray) -> np.ndarray:
        """`distances` of other values, such as resampled ones."""
        return np.sqrt(values.clip(0)) if self.method == "js" else (1 - values).clip(0)

    def closeness_of(self, values: np.ndarray) -> np.ndarray:
        """`closeness` of other values, such as resampled ones."""
        return 1 - values / np.log(2) if self.method == "js" else values

    def __repr__(self) -> str:
        nearest = self.table().iloc[0]
        without = ", sink excluded" if self.sink_excluded else ""
        exact = "" if self.exactness == "exact" else f", {self.exactness}"
        return (
            f"HeadSimilarity({SIMILARITIES[self.method]}{without}{exact}; {self.model}, "
            f"{len(self.names)} heads, {self.n} prompts; closest {nearest['first']} and "
            f"{nearest['second']}, {nearest['value']:.3g})"
        )


def similarity(
    model: LoadedModel,
    texts: Any,
    *,
    method: Likeness = "js",
    sink_excluded: bool = False,
    floor: bool = False,
    progress: bool = True,
) -> HeadSimilarity:
    """Compare every head with every other one on the same prompts; exact, rows in chunks.

        js         mean over queries of JS(A_i, B_i) = H((A_i + B_i) / 2) - (H(A_i) + H(B_i)) / 2
        log_odds   cosine of log(A / uniform), each row smoothed with 0.1 % of the uniform one
        cka        unbiased HSIC of the outputs z, summed over prompts, as a cosine; it does not
                   change when an output is rotated or scaled. It can be a little below 0.

    Queries that see a single key are left out: all heads agree there. Time grows with
    `heads^2 * tokens^2` for "js", with `heads * tokens^2` for the others; memory is that of one chunk
    of rows, never [heads, tokens, tokens].

    Args:
        model: as `lens.load` returns it.
        texts: prompts as in `lens.capture`.
        method: "js", "log_odds" or "cka".
        sink_excluded: leave out the first key (and a learned sink) and renormalise, in the attention
            and in the outputs.
        floor: also compare heads across prompts (each with the next), which must be equally long.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Reference: Clark et al., What Does BERT Look At?, 2019, arXiv 1906.04341; Kornblith et al., 2019,
        arXiv 1905.00414; Nguyen et al. (CKA from parts), 2021, arXiv 2010.15327.

    Raises:
        LensError: an unknown `method`, prompts that are too short, or a floor of one prompt or of prompts
            that differ in length.
    """
    from lens.common.progress import advancing
    from lens.heads.likeness.states import read_states
    from lens.passes.inputs import read_prompts

    check_choice("method", method, Likeness)
    prompts, _ = read_prompts(model, texts)
    parts, across = [], []
    first = before = None
    with advancing(f"{model.name}: similarity", len(prompts), progress) as advance:
        for prompt in prompts:
            states = read_states(model, prompt, sink_excluded=sink_excluded)
            if states.length - states.first_row < 1:
                raise LensError(
                    f"a prompt of {states.length} tokens has no query that sees two of the keys "
                    "compared; take longer prompts"
                )
            parts.append(_sums(method, states, states))
            if floor and before is not None:
                across.append(_across(method, before, states))
            first, before = first or states, states
            advance(1)
        if floor:
            if len(prompts) < 2 or first is None or before is None:
                raise LensError("a floor compares each prompt with the next; give at least two")
            across.append(_across(method, before, first))
    found = HeadSimilarity(
        sums=np.stack([sums for sums, _ in parts]),
        counts=np.stack([counts for _, counts in parts]),
        method=method,
        sink_excluded=sink_excluded,
        exactness="exact",
        shape=(model.info.layers, model.info.heads),
        model=model.name,
    )
    return _with_floor(found, across) if floor else found


def trace_similarity(traces: AttentionTrace | Iterable[AttentionTrace]) -> HeadSimilarity:
    """Divergence of heads from the block maps of traces: a lower bound of `similarity(method="js")`.

    Merging keys into blocks and rows into their mean can only bring two heads closer (data
    processing, joint convexity), so heads that are far apart here are at least that far apart.

    Raises:
        LensError: no traces, of differing models, without `block_mass`, or with learned sinks.
    """
    from lens.traces.trace import AttentionTrace

    several = [traces] if isinstance(traces, AttentionTrace) else list(traces)
    if not several:
        raise LensError("no traces were given; pass at least one")
    sizes = {(trace.model, trace.layers, trace.heads) for trace in several}
    if len(sizes) > 1:
        raise LensError(f"traces must come from one model; got {sorted(sizes)}")
    parts = [_block_sums(trace) for trace in several]
    return HeadSimilarity(
        sums=np.stack([sums for sums, _ in parts]),
        counts=np.stack([counts for _, counts in parts]),
        method="js",
        sink_excluded=False,
        exactness="lower bound",
        shape=(several[0].layers, several[0].heads),
        model=several[0].model,
    )


def _sums(method: str, left: Any, right: Any) -> tuple[np.ndarray, np.ndarray]:
    from lens.heads.likeness.pairs import dependence, divergence, log_odds

    if method == "js":
        sums, counts = divergence(left, right)
        return sums.numpy(), counts.numpy()
    sums = (log_odds if method == "log_odds" else dependence)(left, right).numpy()
    return sums, np.ones_like(sums)


def _across(method: str, left: Any, right: Any) -> tuple[np.ndarray, np.ndarray]:
    if left.length != right.length:
        raise LensError(
            f"a floor needs prompts of one length, got {left.length} and {right.length} tokens; cut "
            "them: lens.tasks.take(model, text, tokens)"
        )
    return _sums(method, left, right)


def _with_floor(
    found: HeadSimilarity, across: list[tuple[np.ndarray, np.ndarray]]
) -> HeadSimilarity:
    sums = np.sum([part for part, _ in across], axis=0)
    if found.method == "js":
        return replace(found, floor=_ratio(sums, np.sum([part for _, part in across], axis=0)))
    own = np.diagonal(found.sums.sum(0))
    return replace(found, floor=_cosine(sums, own, own))


def _block_sums(trace: AttentionTrace) -> tuple[np.ndarray, np.ndarray]:
    if "block_mass" not in trace.dataset:
        raise LensError(
            "the trace has no block_mass; capture it with statistics including 'block_mass'"
        )
    if trace.attrs.get("learned_sinks", False):
        raise LensError(
            f"{trace.model} has learned sinks, whose share the block maps leave out; use "
            "lens.heads.similarity(model, texts)"
        )
    maps = trace.dataset["block_mass"].values.astype(float)
    maps = maps.reshape(-1, *maps.shape[2:])  # [heads, query_blocks, key_blocks]
    starts = np.arange(0, trace.length + 1, trace.attrs["block_size"])
    edges = starts if starts[-1] == trace.length else np.append(starts, trace.length)
    rows = np.array([last - first for first, last in pairwise(edges)], float)
    own = _entropy(maps)
    sums = np.stack(
        [
            ((_entropy((head + maps) / 2) - (own[index] + own) / 2).clip(0) * rows).sum(-1)
            for index, head in enumerate(maps)
        ]
    )
    return sums, np.full_like(sums, trace.length - int(trace.attrs["causal"]))


def _entropy(p: np.ndarray) -> np.ndarray:
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _cosine(sums: np.ndarray, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`sums / sqrt(own other)`, NaN where a head's product with itself is not positive."""
    left, right = (np.sqrt(np.where(one > 0, one, np.nan)) for one in (own, other))
    return sums / np.outer(left, right)
