"""Scores of the heads of one layer on one prompt, from its trace: the definitions of `lens.traces.metrics`.

Row scores are means over the rows (queries) that can show the pattern; a row that cannot, because it
sees no matching key, does not count as 0, and neither does that of a token that is hidden from all. Without the sink, a row is restricted to the keys from 1 on
and renormalised, and counts if what is left can still show the pattern.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lens.common.errors import LensError
from lens.stats import over_rows
from lens.stats.intervals import known_mean
from lens.traces.metrics import METRICS
from lens.traces.token_rows import is_delimiter, nearest_copy
from lens.traces.uniform import UniformRows

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

SINK_EPSILON = 0.3
FEWEST_VIEWERS = 16
LOCAL = 8
_SMALLEST_REST = 1e-6  # of a row without key 0, below which it says nothing
_SMALLEST_DIFFERENCE = 1e-3  # the same where float32 masses are subtracted to get there
_SHORT = "the prompt is too short"
_NO_ATTENTION = "no attention at all"
_NO_REST = "no attention to keys from 1 on"
_NO_ROW = "positions are patches of a picture, not a row of tokens; see lens.vision.patch_distance"
_TWO_ROWS = "keys and queries are of two sequences (cross-attention)"
_COMPARING = (
    *("previous_token", "current_token", "duplicate_token", "induction", "distance"),
    *("locality", "positional", "positional_distance"),
)
_IN_A_ROW = (
    "previous_token",
    "prefix_mass",
    "distance",
    "locality",
    "positional",
    "positional_distance",
)
_OF_THE_WHOLE = (
    "locality",
    "positional",
    "positional_distance",
    "delimiter",
    "sink_rate",
    "top_key",
    "top_key_mass",
)


@dataclass(frozen=True)
class Score:
    """One metric of the heads of one layer; every array is [heads].

    Attributes:
        metric, variant: which score.
        value: NaN where it was not scored.
        low, high: 95 % interval over rows, NaN where there is none.
        n: rows that entered.
        detail: why it was not scored; the token of `top_key`; else "".
    """

    metric: str
    variant: str
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray
    detail: np.ndarray


def layer_scores(
    trace: AttentionTrace,
    layer: int,
    *,
    seed: int | None = 0,
    metrics: Collection[str] | None = None,
) -> list[Score]:
    """The scores of one layer, in the order of `lens.traces.metrics.METRICS`, raw before sink-excluded.

    A label of the user's own comes behind those: the mean mass on keys with the row's label over the
    rows that see one. None for all.

    The seed is that of the intervals over rows; None leaves them out (they are most of the time).

    Raises:
        LensError: the trace lacks a statistic that they need.
    """
    return list(_Layer(trace, layer).scores(seed, metrics))


def uniform_scores(
    trace: AttentionTrace, layer: int, metrics: Collection[str] | None = None
) -> list[float]:
    """What uniform attention over the keys that the layer sees has in `layer_scores`, exactly.

    NaN throughout where the layer's mask is neither causal nor a window, and where nothing is scored.
    """
    scores = list(_Uniform(trace, layer).scores(None, metrics))
    known = trace.has_plain_mask(layer) and bool((trace.visible.sel(layer=layer) > 0).all())
    places = ("top_key", "positional_distance")
    return [
        float(score.value[0]) if known and score.metric not in places else np.nan
        for score in scores
    ]


def row_score(metric: str, variant: str, rows: np.ndarray, reason: str, seed: int | None) -> Score:
    """Mean and interval over rows [heads, queries], NaN where a row does not count; `reason` if none does.

    No interval for the seed None.
    """
    n = (~np.isnan(rows)).sum(-1)
    value = known_mean(rows)
    if seed is None:
        low = high = np.full(value.shape, np.nan)
    else:
        low, high = over_rows(rows, seed)
    return Score(metric, variant, value, low, high, n, _reason(value, reason))


def whole_score(metric: str, variant: str, value: np.ndarray, reason: str, n: int) -> Score:
    """A score [heads] that is no mean over rows, so that it has no interval on one prompt."""
    unknown = np.full(value.shape, np.nan)
    count = np.where(np.isnan(value), 0, n)
    return Score(metric, variant, value, unknown, unknown, count, _reason(value, reason))


class _Layer:
    """One layer of a trace, with what decides which rows count."""

    def __init__(self, trace: AttentionTrace, layer: int) -> None:
        self._data = trace.dataset.sel(layer=layer)
        self._read: dict[str, np.ndarray] = {}
        self._tokens = trace.tokens
        self._length = trace.length
        self._heads = trace.heads
        self._cross = trace.cross
        self._position = np.arange(trace.queries)
        self._causal = bool(trace.attrs["causal"])
        self._prefix = int(trace.attrs["prefix"])
        self._window = trace.window(layer)
        self._is_picture = trace.attrs.get("patches") is not None
        visible = self._data["visible"].values > 0
        self._real = np.ones(trace.queries, bool) if trace.cross else visible
        self._plain = trace.has_plain_mask(layer) and bool(visible.all())
        ids = self._data["token_id"].values
        self._viewers = min(FEWEST_VIEWERS, trace.queries) if trace.cross else FEWEST_VIEWERS
        self._ids = None if (ids < 0).any() else ids
        self._labels: Mapping[str, Any] = trace.attrs.get("labels", {})
        self._even = UniformRows(
            ids,
            causal=self._causal,
            window=self._window,
            prefix=self._prefix,
            labels=self._labels,
            queries=trace.queries if trace.cross else None,
        )

    def scores(self, seed: int | None, metrics: Collection[str] | None) -> Iterator[Score]:
        metrics = (*METRICS, *self._labels) if metrics is None else metrics
        for metric in (METRICS[name] for name in METRICS if name in metrics):
            for variant in ("raw", "sink_excluded") if metric.sink_excluded else ("raw",):
                if self._is_picture and metric.name in _IN_A_ROW:
                    yield row_score(metric.name, variant, self._nothing(), _NO_ROW, None)
                    continue
                if self._cross and metric.name in _COMPARING:
                    yield row_score(metric.name, variant, self._nothing(), _TWO_ROWS, None)
                    continue
                if metric.name in _OF_THE_WHOLE:
                    yield self._whole(metric.name, variant)
                    continue
                rows, reason = self._rows(metric.name, variant == "sink_excluded")
                yield row_score(metric.name, variant, rows, reason, seed)

        for name in self._labels:
            for variant in ("raw", "sink_excluded") if name in metrics else ():
                rows = self._labelled(name, variant == "sink_excluded")
                yield row_score(name, variant, rows, "no row sees a key with its label", seed)

    def _rows(self, metric: str, excluded: bool) -> tuple[np.ndarray, str]:
        """[heads, queries], NaN for rows that do not count, and why none does if none does."""
        later = self._position >= (0 if self._cross else 1)
        match metric:
            case "previous_token":
                mass = self._match(metric)
                rows = self._showing(self._position >= (2 if excluded else 1), mass)
                return self._mass(mass, rows, excluded), _SHORT
            case "current_token":
                mass = self._match("current_token_position")
                return self._mass(mass, self._showing(later, mass), excluded), _SHORT
            case "duplicate_token":
                return self._duplicates(excluded)
            case "induction":
                return self._induction(excluded)
            case "first_token":
                return self._where(later, self._variable("first_mass")), _SHORT
            case "sink_mass":
                first = self._variable("first_mass")
                return self._where(self._sees_first(first), first), "no row sees the first token"
            case "prefix_mass":
                rows = self._position >= self._prefix
                if not self._causal:
                    rows = np.full(len(self._position), self._length > self._prefix)
                why = f"the prompt has no more than {self._prefix} tokens"
                return self._where(rows, self._variable(metric)), why
            case "effective_keys":
                concentration = self._variable("concentration")
                with np.errstate(divide="ignore"):
                    return self._where(later & (concentration > 0), 1 / concentration), _SHORT
            case _:
                name = f"{metric}_sink_excluded" if excluded else metric
                return self._where(later, self._variable(name)), _SHORT

    def _duplicates(self, excluded: bool) -> tuple[np.ndarray, str]:
        if self._ids is None:
            return self._nothing(), "the prompt has no token ids"
        mass = self._match("same_token") - self._match("current_token_position")
        smallest: float | np.ndarray = _SMALLEST_REST
        if excluded:
            like_first = (self._ids == self._ids[0]) & (self._position >= 1)
            mass, smallest = self._without_first(mass, like_first)
        ids = np.where(self._real, self._ids, -1 - self._position)  # a hidden token copies none
        distance = nearest_copy(ids, skip_first=excluded, both_ways=not self._causal)
        rows = self._showing(distance < (self._window or np.inf), mass)
        why = "no row sees another copy of its token"
        return self._mass(np.maximum(mass, 0), rows, excluded, smallest), why

    def _induction(self, excluded: bool) -> tuple[np.ndarray, str]:
        if not self._causal:
            return self._nothing(), "induction looks back only; this model also looks ahead"
        if self._ids is None:
            return self._nothing(), "the prompt has no token ids"
        distance = nearest_copy(self._ids) - 1  # of the key after the copy
        mass = self._match("induction")
        rows = self._showing(distance < (self._window or np.inf), mass)
        why = "no row sees a key that followed a copy of its token"
        return self._mass(mass, rows, excluded), why

    def _labelled(self, name: str, excluded: bool) -> np.ndarray:
        mass = self._match(name)
        rows = self._even.match(name, skip_first=excluded) > 0 if self._plain else mass > 0
        smallest: float | np.ndarray = _SMALLEST_REST
        if excluded:
            query, first = np.asarray(self._labels[name]["query"]), self._labels[name]["key"][0]
            mass, smallest = self._without_first(mass, (query == first) & (first >= 0))
        return self._mass(np.maximum(mass, 0), rows, excluded, smallest)

    def _without_first(self, mass: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mass less that on the first key in rows that it counts for, and below which rest a row says nothing."""
        mass = mass - np.where(rows, self._variable("first_mass"), 0)
        return mass, np.where(rows, _SMALLEST_DIFFERENCE, _SMALLEST_REST)

    def _showing(self, rows: np.ndarray, mass: np.ndarray) -> np.ndarray:
        """[queries] those of the rows that can show a pattern; for a mask without compact form, where a head does."""
        return rows if self._plain else rows & (mass > 0).any(0)

    def _sees_first(self, first: np.ndarray) -> np.ndarray:
        """Which rows see key 0; for a mask without compact form, those that have mass on it."""
        if not self._plain:
            return first > 0
        if self._cross:
            return self._position >= 0
        return self._position < (self._length if self._window is None else self._window)

    def _variable(self, name: str) -> np.ndarray:
        """Read from disk once: most scores are made of the same few."""
        if name not in self._data:
            raise LensError(
                f"the profile needs {name}, which this trace lacks; capture it with statistics='all'"
            )
        if name not in self._read:
            self._read[name] = self._data[name].values.astype(np.float64)
        return self._read[name]

    def _match(self, rule: str) -> np.ndarray:
        mass = self._variable("match_mass")  # [heads, queries, rules]
        return mass[..., self._data["match"].values.tolist().index(rule)]

    def _mass(
        self,
        mass: np.ndarray,
        rows: np.ndarray,
        excluded: bool,
        smallest: float | np.ndarray = _SMALLEST_REST,
    ) -> np.ndarray:
        if not excluded:
            return self._where(rows, mass)
        rest = self._variable("rest_mass")
        enough = rest > smallest
        return self._where(rows & enough, mass / np.where(enough, rest, 1))

    def _where(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.where(rows & self._real, values, np.nan)

    def _nothing(self) -> np.ndarray:
        return np.full((self._heads, len(self._position)), np.nan)

    def _whole(self, metric: str, variant: str) -> Score:
        """The scores that are no mean over rows."""
        detail, excluded = None, variant == "sink_excluded"
        match metric:
            case "locality":
                value, reason = self._locality(excluded), _NO_REST if excluded else _NO_ATTENTION
            case "delimiter":
                value, reason = self._delimiters(excluded)
            case "positional" | "positional_distance":
                reason = f"no distance is seen by {FEWEST_VIEWERS} queries"
                if not self._plain:
                    reason = "by its mask it is not known how many queries see a distance"
                value = self._best_distance()[metric == "positional"]
            case "sink_rate":
                value, reason = (self._alpha()[:, 0] > SINK_EPSILON).astype(np.float64), ""
            case _:
                reason = f"no key is seen by {FEWEST_VIEWERS} queries"
                position, value = self._strongest()
                if metric == "top_key":
                    value = position
                    names = [reason if np.isnan(at) else self._tokens[int(at)] for at in position]
                    detail = np.array(names, dtype=object)
        found = whole_score(metric, variant, value, reason, self._length)
        return found if detail is None else replace(found, detail=detail)

    def _alpha(self) -> np.ndarray:
        """alpha_k = received[k] / visible[k], [heads, keys] (Gu et al., arXiv 2410.10781)."""
        visible = self._variable("visible")
        return self._variable("received") / np.where(visible > 0, visible, np.nan)

    def _strongest(self) -> tuple[np.ndarray, np.ndarray]:
        """Position and alpha of the strongest key; the last keys have too few viewers to count."""
        seen = self._variable("visible") >= self._viewers
        alpha = np.where(seen, self._alpha(), -np.inf)
        mass = alpha.max(-1)
        none = np.isneginf(mass)
        return np.where(none, np.nan, alpha.argmax(-1)), np.where(none, np.nan, mass)

    def _locality(self, excluded: bool) -> np.ndarray:
        diagonal = self._variable("diagonal")
        near = np.abs(self._data["offset"].values) <= LOCAL
        mass, total = diagonal[:, near].sum(-1), diagonal.sum(-1)
        if excluded:
            first = self._variable("first_mass")
            mass, total = mass - first[:, : LOCAL + 1].sum(-1), self._variable("rest_mass").sum(-1)
        return self._share(mass, total)

    def _delimiters(self, excluded: bool) -> tuple[np.ndarray, str]:
        if self._ids is None:
            return np.full(self._heads, np.nan), "the prompt has no token ids"
        received = self._variable("received")
        chosen = np.array([is_delimiter(token) for token in self._tokens])
        if excluded:
            chosen, received = chosen[1:], received[:, 1:]
        if not chosen.any():
            return np.full(len(received), np.nan), "the prompt has no punctuation and no line break"
        total = received.sum(-1)
        reason = _NO_REST if excluded else _NO_ATTENTION
        return self._share(received[:, chosen].sum(-1), total), reason

    def _share(self, mass: np.ndarray, total: np.ndarray) -> np.ndarray:
        enough = total > _SMALLEST_DIFFERENCE * self._length
        return np.where(enough, np.maximum(mass, 0) / np.where(enough, total, 1), np.nan)

    def _best_distance(self) -> tuple[np.ndarray, np.ndarray]:
        """Distance with the largest mean mass, and that mass, [heads] each."""
        distance = self._data["offset"].values
        queries = self._length - np.abs(distance)
        if self._window is not None:
            queries = np.where(np.abs(distance) < self._window, queries, 0)
        mean = self._variable("diagonal") / np.maximum(queries, 1)
        mean = np.where((queries >= FEWEST_VIEWERS) & self._plain, mean, -np.inf)
        best = mean.max(-1)
        none = np.isneginf(best)
        return np.where(none, np.nan, distance[mean.argmax(-1)]), np.where(none, np.nan, best)


class _Uniform(_Layer):
    """The same layer with one head that looks at all keys that it sees alike."""

    def __init__(self, trace: AttentionTrace, layer: int) -> None:
        super().__init__(trace, layer)
        self._heads = 1

    def _variable(self, name: str) -> np.ndarray:
        return self._even.variable(name)

    def _match(self, rule: str) -> np.ndarray:
        return self._even.match(rule)


def _reason(value: np.ndarray, reason: str) -> np.ndarray:
    return np.where(np.isnan(value), reason, "").astype(object)
