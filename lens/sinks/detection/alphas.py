"""`alpha`, the mean attention that a key receives, out of traces: over the queries that see it, or over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from lens.common.choices import check_choice, is_number, is_whole
from lens.common.errors import LensError
from lens.traces.scores import FEWEST_VIEWERS, SINK_EPSILON
from lens.traces.uniform import UniformRows, visible_queries

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

Normalise = Literal["visible", "all"]
"""What received mass is divided by: the queries that see the key, or all that could without a window.

The two differ where layers have windows. Gu et al. (arXiv 2410.10781) divide by all, `T - k` counted from 0.
"""

DIVIDED = {
    "visible": "mean over the queries that see it",
    "all": "mean over all queries from it on",
}
"""How sentences say it."""


@dataclass(frozen=True)
class Samples:
    """What must be told with every number about sinks.

    Attributes:
        model, dtype: of the traces.
        tokens: T, the same in all of them.
        bos: "added" or "absent", the same in all of them; "" of prompts that are no tokens.
        n: number of traces.
    """

    model: str
    dtype: str
    tokens: int
    bos: str
    n: int

    @property
    def start(self) -> str:
        """What sentences say behind T, such as `, BOS absent`; nothing of prompts that are no tokens."""
        return f", BOS {self.bos}" if self.bos else ""

    def __str__(self) -> str:
        return f"{self.model}, T = {self.tokens}{self.start}, n = {self.n}, {self.dtype}"


def samples_of(traces: Sequence[AttentionTrace]) -> Samples:
    """What the traces have in common.

    Raises:
        LensError: they differ in model, type, length or BOS, so that their rates do not compare.
    """
    for name, values in (
        ("model", [trace.model for trace in traces]),
        ("dtype", [trace.attrs["dtype"] for trace in traces]),
        ("number of tokens", [trace.length for trace in traces]),
        ("BOS", [trace.attrs["bos"] for trace in traces]),
        ("layers × heads", [(trace.layers, trace.heads) for trace in traces]),
    ):
        if len(set(values)) > 1:
            raise LensError(
                f"sink rates compare only at one {name}; the traces have "
                f"{sorted(set(values))}: cut the prompts alike, or measure each kind apart"
            )
    first = traces[0]
    of_tokens = bool((first.dataset["token_id"].values >= 0).any())
    bos = first.attrs["bos"] if of_tokens else ""
    return Samples(first.model, first.attrs["dtype"], first.length, bos, len(traces))


def divisors(trace: AttentionTrace, normalise: Normalise = "visible") -> np.ndarray:
    """[layers, keys]: what the received mass of a key is divided by.

    Raises:
        LensError: an unknown `normalise`.
    """
    visible = trace.visible.values.astype(float)
    if check_choice("normalise", normalise, Normalise) == "visible" or trace.cross:
        return visible
    every = visible_queries(trace.length, causal=trace.attrs["causal"], window=None)
    return np.broadcast_to(every.astype(float), visible.shape)


def alpha_of(trace: AttentionTrace, normalise: Normalise = "visible") -> np.ndarray:
    """`alpha_k = received_k / divisor_k`, [layers, heads, keys]; the divisor is a number of queries.

    NaN for keys behind the first one whose divisor is below `FEWEST_VIEWERS`, and for keys that no
    query sees. On the uniform causal head `alpha_k = (H_T - H_(k-1)) / (T - k + 1)` counting from 1.

    Raises:
        LensError: the trace has no `received`.
    """
    if "received" not in trace.dataset:
        raise LensError(
            "sinks need received; capture it: lens.capture(..., statistics=['received'])"
        )
    divisor = divisors(trace, normalise)[:, None]  # [layers, 1, keys]
    enough = divisor >= np.where(np.arange(trace.length) == 0, 1, FEWEST_VIEWERS)
    received = trace.received.values.astype(float)
    return np.where(enough, received / np.where(enough, divisor, 1), np.nan)


def uniform_alpha(trace: AttentionTrace, normalise: Normalise = "visible") -> np.ndarray:
    """[layers, keys]: alpha of a head that looks at all keys that it sees alike.

    NaN in layers whose mask is more than causal, two-way or a window.
    """
    layers, divisor = trace.layers, divisors(trace, normalise)
    found = np.full(divisor.shape, np.nan)
    for place, layer in enumerate(layers):
        if trace.has_plain_mask(layer):
            ids, causal = np.arange(trace.length), trace.attrs["causal"]
            queries = trace.queries if trace.cross else None
            rows = UniformRows(
                ids, causal=causal, window=trace.window(layer), prefix=1, queries=queries
            )
            found[place] = rows.variable("received")[0] / divisor[place]
    return found


def alpha_at(
    traces: Sequence[AttentionTrace], key: int, normalise: Normalise = "visible"
) -> np.ndarray:
    """`alpha` of one key, [traces, layers, heads].

    Raises:
        LensError: a key that is not there or too close to the edge.
    """
    found = []
    for trace in traces:
        if not is_whole(key) or not 0 <= key < trace.length:
            raise LensError(f"key must be a position 0 to {trace.length - 1}, got {key!r}")
        alpha = alpha_of(trace, normalise)[..., key]
        if np.isnan(alpha).any():
            divisor = divisors(trace, normalise)
            seen, first = int(divisor[:, key].min()), int(divisor.min(0).max())
            what = (
                "near the end a key's attention to itself looks like a sink; take an earlier key"
                if first >= FEWEST_VIEWERS
                else f"a window of {first} shows no key to more; take normalise='all' or key 0"
                if normalise == "visible" and trace.length >= FEWEST_VIEWERS
                else "the prompts are too short for another key than 0; take longer ones"
            )
            raise LensError(
                f"key {key} is seen by {seen} queries in some layer and needs {FEWEST_VIEWERS}: {what}"
            )
        found.append(alpha)
    return np.stack(found)


def check_epsilon(epsilon: float, least: float = 0.0) -> None:
    """Raises LensError unless epsilon lies between 0 and 1 and above what a first key receives anyway.

    Args:
        epsilon: threshold of alpha.
        least: alpha of a first key that only its own query looks at (`least_alpha`).
    """
    if not (is_number(epsilon) and 0 < epsilon < 1):
        raise LensError(
            f"epsilon must lie between 0 and 1, got {epsilon}; Gu et al. use {SINK_EPSILON}"
        )
    if epsilon <= least:
        raise LensError(
            f"epsilon {epsilon} says nothing here: the first key receives at least {least:.3g} by "
            "definition, as its own query sees nothing else; use longer prompts or a larger epsilon, or "
            "normalise='all' where layers have short windows"
        )


def least_alpha(trace: AttentionTrace, normalise: Normalise = "visible") -> float:
    """Largest alpha that the first key of a layer has because its own query sees no other; 0 if it does.

    So too with learned sinks: they take of the first query what they will.
    """
    if trace.attrs.get("learned_sinks", False):
        return 0.0
    return float(trace.attrs["causal"] / divisors(trace, normalise)[:, 0].min())
