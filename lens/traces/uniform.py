"""What a head scores that looks at all keys that it sees alike, in closed form from mask and labels.

Query i sees the keys low_i to high_i (causal, sliding window, or all), s_i of them, and gives each
1 / s_i: masses on labels are counts of matching keys over s_i. No attention is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lens.traces.labels import NONE


def visible_queries(length: int, *, causal: bool, window: int | None) -> np.ndarray:
    """[keys] int: how many queries of a prompt see each key."""
    position = np.arange(length)
    before = 0 if causal else position
    after = length - 1 - position
    if window is not None:
        before, after = np.minimum(before, window - 1), np.minimum(after, window - 1)
    return (before + after + 1).astype(np.int32)


class UniformRows:
    """The variables of a trace's layer (docs/schema/trace.md) for one head of uniform attention.

    Args:
        ids: [tokens].
        causal, window: of the layer, as in a trace; other masks have no closed form.
        prefix: first keys that `prefix_mass` counts.
        labels: a user's own, by name as in a trace.
        queries: how many, where they are of another sequence and see every key; what compares positions or
            labels is not to be asked for then.
    """

    def __init__(
        self,
        ids: np.ndarray,
        *,
        causal: bool,
        window: int | None,
        prefix: int,
        labels: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
        queries: int | None = None,
    ) -> None:
        self._ids, self._prefix, self._labels = ids, prefix, labels or {}
        self._position = np.arange(len(ids))
        self._causal = causal
        reach = len(ids) if window is None else window
        self._low = np.maximum(self._position - reach + 1, 0)
        self._high = (
            self._position if causal else np.minimum(self._position + reach - 1, len(ids) - 1)
        )
        if queries is not None:
            self._position = np.arange(queries)
            self._low, self._high = np.zeros(queries, int), np.full(queries, len(ids) - 1)
        self._seen = self._high - self._low + 1

    def variable(self, name: str) -> np.ndarray:
        """[1, queries] `first_mass`, `rest_mass`, `prefix_mass`, `entropy`, `concentration`, `distance`
        or a form of them without the first key, [1, keys] `received`, [1, offsets] `diagonal`, or [keys]
        `visible`.

        Raises:
            KeyError: another name.
        """
        low, high, seen = self._low, self._high, self._seen
        with np.errstate(divide="ignore", invalid="ignore"):
            match name:
                case "first_mass":
                    found = (low == 0) / seen
                case "rest_mass":
                    found = 1 - (low == 0) / seen
                case "prefix_mass":
                    found = np.clip(np.minimum(high + 1, self._prefix) - low, 0, None) / seen
                case "entropy":
                    found = np.log(seen)
                case "concentration":
                    found = 1 / seen
                case "distance":
                    found = self._position - (low + high) / 2
                case "entropy_sink_excluded":
                    rest = seen - (low == 0)
                    found = np.where(rest > 0, np.log(rest), np.nan)
                case "distance_sink_excluded":
                    first, rest = np.maximum(low, 1), seen - (low == 0)
                    found = np.where(rest > 0, self._position - (first + high) / 2, np.nan)
                case "received":
                    found = self._spread(low, high, 1 / seen, len(self._ids))
                case "visible":
                    return self._spread(low, high, np.ones(len(seen)), len(self._ids))
                case "diagonal":
                    before = 0 if self._causal else len(seen) - 1
                    nearest = self._position - high + before
                    farthest = self._position - low + before
                    found = self._spread(nearest, farthest, 1 / seen, len(seen) + before)
                case _:
                    raise KeyError(name)
        return found[None]

    def match(self, rule: str, *, skip_first: bool = False) -> np.ndarray:
        """[1, queries] `match_mass` by one of the trace's rules, or by a label; of the first key not if skipped.

        Raises:
            KeyError: another rule.
        """
        query, key = self._pair(rule)
        if skip_first:
            key = np.where(self._position == 0, NONE, key)
        # keys ordered by (label, position): those of one label within low..high stand together
        query = np.where(query < 0, NONE - 1, query)
        base, width = min(int(query.min()), int(key.min())), len(key)
        ordered = np.sort((key - base) * width + self._position)
        at = (query - base) * width
        count = np.searchsorted(ordered, at + self._high, "right")
        count = count - np.searchsorted(ordered, at + self._low, "left")
        return (count / self._seen)[None]

    def blocks(self, size: int) -> np.ndarray:
        """[query_block, key_block] `block_mass` with blocks of so many positions."""
        starts = np.arange(0, len(self._position), size)
        rows = np.diff(np.append(starts, len(self._position)))
        found = []
        for start in range(0, len(self._ids), size):
            inside = np.minimum(self._high + 1, start + size) - np.maximum(self._low, start)
            found.append(np.add.reduceat(np.maximum(inside, 0) / self._seen, starts) / rows)
        return np.stack(found, 1)

    def _pair(self, rule: str) -> tuple[np.ndarray, np.ndarray]:
        """[tokens] labels of the queries and of the keys; negative ones match nothing."""
        if rule in self._labels:
            own = self._labels[rule]
            return np.asarray(own["query"]), np.maximum(own["key"], NONE)
        before = np.concatenate([[NONE], self._ids[:-1]])
        return {
            "current_token_position": (self._position, self._position),
            "previous_token": (self._position - 1, self._position),
            "same_token": (self._ids, self._ids),
            "induction": (self._ids, before),
        }[rule]

    @staticmethod
    def _spread(first: np.ndarray, last: np.ndarray, amount: np.ndarray, size: int) -> np.ndarray:
        """[size]: the sum of the amounts of all ranges first..last that a place is in."""
        change = np.zeros(size + 1)
        np.add.at(change, first, amount)
        np.add.at(change, last + 1, -amount)
        return change.cumsum()[:-1]
