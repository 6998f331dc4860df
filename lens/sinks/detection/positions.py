"""Where the sinks are: the keys of one prompt, and the rate at every position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence, described
from lens.sinks.detection.alphas import Samples, alpha_of, as_list, check_epsilon, samples_of
from lens.traces.scores import FEWEST_VIEWERS, SINK_EPSILON

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

COMMON = 0.25
"""A key is a common sink where its rate exceeds this."""

_NAMED = 5  # keys that findings name


@dataclass(frozen=True, eq=False)
class SinkKeys(Result):
    """The (layer, head, key) of one prompt whose alpha exceeds epsilon, strongest first.

    Attributes:
        layer, head, key: [sinks] integers.
        alpha: [sinks], mean attention that the key receives from the queries that see it.
        token: [sinks], the key's token.
        epsilon: threshold.
        samples: model, dtype, T and BOS policy; n is 1.
        unscored: number of (layer, key) too near the end to say.
    """

    layer: np.ndarray
    head: np.ndarray
    key: np.ndarray
    alpha: np.ndarray
    token: tuple[str, ...]
    epsilon: float
    samples: Samples
    unscored: int

    @property
    def keys(self) -> list[int]:
        """Positions that are a sink in some head, ascending."""
        return sorted(set(self.key.tolist()))

    @property
    def heads(self) -> list[HeadId]:
        """Heads that have a sink, by layer and head."""
        pairs = set(zip(self.layer.tolist(), self.head.tolist(), strict=True))
        return [HeadId(*pair) for pair in sorted(pairs)]

    @property
    def first_layer(self) -> int | None:
        """The first layer that has a sink, or None."""
        return int(self.layer.min()) if len(self.layer) else None

    def table(self) -> pd.DataFrame:
        """One row per sink."""
        return pd.DataFrame(
            {
                "layer": self.layer,
                "head": self.head,
                "key": self.key,
                "token": list(self.token),
                "alpha": self.alpha,
                "epsilon": self.epsilon,
                "tokens": self.samples.tokens,
                "bos": self.samples.bos,
            }
        )

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> tuple[Sentence, ...]:
        """Which keys, in how many heads, and what was not judged."""
        settings = (
            f"(ε = {self.epsilon}, T = {self.samples.tokens}, BOS {self.samples.bos}, one prompt)"
        )
        if not len(self.key):
            found = [Sentence(f"No key is a sink in any head {settings}.", kind="heads")]
        else:
            found = [
                Sentence(
                    f"Sinks: {_count(len(self.keys), 'key')} in {_count(len(self.heads), 'head')}, from "
                    f"layer {self.first_layer} on {settings}.",
                    kind="heads",
                )
            ]
            for key in self.keys[:_NAMED]:
                here = self.key == key
                token = self.token[int(np.flatnonzero(here)[0])]
                text = (
                    f"Key {key} ({token!r}) is a sink in {_count(int(here.sum()), 'head')}, with α up to "
                    f"{self.alpha[here].max():.2f}."
                )
                found.append(Sentence(text, kind="key"))
        limit = (
            f"{self.unscored} pairs of layer and key near the end were not judged: fewer than "
            f"{FEWEST_VIEWERS} queries see them."
        )
        return (*found, Sentence(limit, kind="limit"))


@dataclass(frozen=True, eq=False)
class SinkProfile(Result):
    """Sink rate and mean alpha at every position.

    Attributes:
        rate: [keys], share of (sample, layer, head) with alpha above epsilon; NaN where a layer
            shows the key to too few queries.
        alpha: [layers, heads, keys], mean over samples, NaN likewise.
        layers: numbers of the layers.
        epsilon, samples: as in `SinkRate`.
    """

    rate: np.ndarray
    alpha: np.ndarray = field(repr=False)
    layers: tuple[int, ...]
    epsilon: float
    samples: Samples

    def common(self, threshold: float = COMMON) -> list[int]:
        """Positions whose rate exceeds `threshold`."""
        return np.flatnonzero(np.nan_to_num(self.rate) > threshold).tolist()

    def table(self) -> pd.DataFrame:
        """One row per position; `alpha` is the mean over heads, `largest_alpha` the largest."""
        flat = self.alpha.reshape(-1, self.alpha.shape[-1])
        return pd.DataFrame(
            {
                "key": np.arange(len(self.rate)),
                "rate": self.rate,
                "alpha": flat.mean(0),
                "largest_alpha": flat.max(0),
                "epsilon": self.epsilon,
                "tokens": self.samples.tokens,
                "bos": self.samples.bos,
                "n": self.samples.n,
            }
        )

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> tuple[Sentence, ...]:
        """Which positions are sinks in common, and how much the strongest receives."""
        common = self.common()
        named = ", ".join(map(str, common[:_NAMED])) + (", ..." if len(common) > _NAMED else "")
        settings = f"(ε = {self.epsilon}, {self.samples})"
        text = (
            f"No position is a sink in more than {COMMON:.0%} of heads {settings}."
            if not common
            else f"Sinks in more than {COMMON:.0%} of heads: position {named} {settings}."
        )
        unscored = int(np.isnan(self.rate).sum())
        limit = f"{unscored} positions near the end were not judged."
        return (Sentence(text, kind="positions"), Sentence(limit, kind="limit"))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def find(trace: AttentionTrace, *, epsilon: float = SINK_EPSILON) -> SinkKeys:
    """The keys that heads park their attention on: `alpha_k > epsilon`.

    Keys behind the first that fewer than 16 queries see are not judged.

    Raises:
        LensError: several traces, no `received`, an epsilon that every first key exceeds.

    Example:
        >>> lens.sinks.find(trace).table().head()
    """
    check_epsilon(epsilon)
    if isinstance(trace, Sequence):
        raise LensError("find takes one trace; use lens.sinks.profile for several prompts")
    if epsilon * trace.length <= 1:
        raise LensError(
            f"epsilon {epsilon} says nothing at {trace.length} tokens: the first key receives at "
            f"least 1 / T = {1 / trace.length:.3g} by definition; use a longer prompt"
        )
    alpha = alpha_of(trace)
    found = np.argwhere(np.nan_to_num(alpha) > epsilon)
    strength = alpha[tuple(found.T)]
    order = np.argsort(-strength, kind="stable")
    layer, head, key = found[order].T
    return SinkKeys(
        layer=np.array(trace.layers)[layer],
        head=head,
        key=key,
        alpha=strength[order],
        token=tuple(trace.tokens[position] for position in key),
        epsilon=epsilon,
        samples=samples_of([trace]),
        unscored=int(np.isnan(alpha).all(1).sum()),
    )


def profile(
    traces: AttentionTrace | Sequence[AttentionTrace], *, epsilon: float = SINK_EPSILON
) -> SinkProfile:
    """The sink rate at every position, thresholded per sample and then averaged.

    Raises:
        LensError: as `lens.sinks.rate`.
    """
    check_epsilon(epsilon)
    several = as_list(traces)
    samples = samples_of(several)
    alpha = np.stack([alpha_of(trace) for trace in several])
    unscored = np.isnan(alpha).any((0, 1, 2))
    is_sink = np.where(np.isnan(alpha), 0, alpha) > epsilon
    return SinkProfile(
        rate=np.where(unscored, np.nan, is_sink.mean((0, 1, 2))),
        alpha=alpha.mean(0),
        layers=several[0].layers,
        epsilon=epsilon,
        samples=samples,
    )
