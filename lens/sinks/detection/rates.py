"""The sink rate of Gu et al. and how it depends on its threshold (arXiv 2410.10781)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence, described
from lens.sinks.detection.alphas import Samples, alpha_at, as_list, check_epsilon, samples_of
from lens.stats import over_units
from lens.traces.scores import SINK_EPSILON

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

Reduce = Literal["sample_first", "alpha_first"]
_GRID = tuple(np.round(np.arange(0.05, 1, 0.05), 2).tolist())


@dataclass(frozen=True, eq=False)
class SinkRate(Result):
    """Share of (sample, layer, head) in which one key is a sink. Not a mass.

    Attributes:
        value: the rate over all layers and heads.
        low, high: 95 % bootstrap interval over samples; NaN for one sample or "alpha_first".
        by_head: [layers, heads], share of the samples in which the head has the sink.
        alpha: [layers, heads], mean of alpha over the samples.
        layers: numbers of the layers.
        key: the key asked about.
        epsilon: threshold; alpha must exceed it.
        reduce: "sample_first" or "alpha_first".
        samples: model, dtype, T, BOS policy and n.
    """

    value: float
    low: float
    high: float
    by_head: np.ndarray = field(repr=False)
    alpha: np.ndarray = field(repr=False)
    layers: tuple[int, ...] = field(repr=False)
    key: int
    epsilon: float
    reduce: str
    samples: Samples

    def table(self) -> pd.DataFrame:
        """One row per head, with everything that the number depends on."""
        layers, heads = self.by_head.shape
        return pd.DataFrame(
            {
                "layer": np.repeat(self.layers, heads),
                "head": np.tile(np.arange(heads), layers),
                "name": [
                    str(HeadId(layer, head)) for layer in self.layers for head in range(heads)
                ],
                "rate": self.by_head.ravel(),
                "alpha": self.alpha.ravel(),
                "key": self.key,
                "epsilon": self.epsilon,
                "reduce": self.reduce,
                "tokens": self.samples.tokens,
                "bos": self.samples.bos,
                "n": self.samples.n,
            }
        )

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> tuple[Sentence, ...]:
        """The rate, the heads with most, and what the number depends on."""
        top = self.table().sort_values("alpha", ascending=False, kind="stable").head(3)
        heads = ", ".join(
            f"{HeadId(int(row['layer']), int(row['head']))} {row['alpha']:.2f}"
            for row in top.to_dict("records")
        )
        interval = "" if np.isnan(self.low) else f" [{self.low:.1%}, {self.high:.1%}]"
        place = "The first token" if self.key == 0 else f"Key {self.key}"
        return (
            Sentence(
                f"{place} is a sink in {self.value:.1%}{interval} of heads (ε = {self.epsilon}, T = "
                f"{self.samples.tokens}, BOS {self.samples.bos}, n = {self.samples.n}).",
                kind="rate",
            ),
            Sentence(f"It receives most in {heads} (mean α).", kind="heads"),
            Sentence(
                "The rate is a share of heads, no mass, and compares only at equal ε, T and BOS.",
                kind="limit",
            ),
        )


@dataclass(frozen=True, eq=False)
class SinkSensitivity(Result):
    """The sink rate of one key as a curve over epsilon.

    Attributes:
        epsilons, values, low, high: [points]; intervals as in `SinkRate`.
        key, reduce, samples: as in `SinkRate`.
    """

    epsilons: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    key: int
    reduce: str
    samples: Samples

    def table(self) -> pd.DataFrame:
        """One row per epsilon."""
        return pd.DataFrame(
            {
                "epsilon": self.epsilons,
                "rate": self.values,
                "low": self.low,
                "high": self.high,
                "key": self.key,
                "reduce": self.reduce,
                "tokens": self.samples.tokens,
                "bos": self.samples.bos,
                "n": self.samples.n,
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """How the rate falls from the smallest to the largest epsilon."""
        points = [
            f"{self.values[place]:.1%} at ε = {self.epsilons[place]:g}"
            for place in (0, len(self.epsilons) // 2, -1)
        ]
        text = f"The share of heads with a sink on key {self.key} is {', '.join(points)} ({self.samples})."
        return (Sentence(text, kind="rate"),)

    def __repr__(self) -> str:
        return described(self)


def rate(
    traces: AttentionTrace | Sequence[AttentionTrace],
    *,
    key: int = 0,
    epsilon: float = SINK_EPSILON,
    reduce: Reduce = "sample_first",
    seed: int = 0,
) -> SinkRate:
    """`Sink_k = mean over samples, layers and heads of [alpha_k > epsilon]`.

    Args:
        traces: one or several of one model, with equal length and BOS policy.
        key: position counted from 0.
        epsilon: threshold, strict.
        reduce: "sample_first" thresholds each sample and then averages, as the authors' code does;
            "alpha_first" averages alpha over the samples and then thresholds, another metric.
        seed: of the bootstrap.

    Raises:
        LensError: traces that do not compare, a key too near the end, an epsilon at or below
            1 / T (the first key exceeds that by definition), an unknown `reduce`.

    Example:
        >>> result = lens.sinks.rate(traces)
        >>> result.value, result.samples.tokens, result.samples.bos, result.samples.n
    """
    several = as_list(traces)
    samples = samples_of(several)
    alpha = alpha_at(several, key)
    value, low, high, by_head = _rate(several, alpha, epsilon, reduce, seed)
    return SinkRate(
        value=value,
        low=low,
        high=high,
        by_head=by_head,
        alpha=alpha.mean(0),
        layers=several[0].layers,
        key=key,
        epsilon=epsilon,
        reduce=reduce,
        samples=samples,
    )


def sensitivity(
    traces: AttentionTrace | Sequence[AttentionTrace],
    *,
    key: int = 0,
    epsilons: Sequence[float] = _GRID,
    reduce: Reduce = "sample_first",
    seed: int = 0,
) -> SinkSensitivity:
    """The rate at each of `epsilons`, of which those at or below 1 / T are left out.

    Args:
        traces, key, reduce, seed: as for `rate`.
        epsilons: thresholds, by default 0.05, 0.1, ... 0.95.

    Raises:
        LensError: as `rate`; no epsilon above 1 / T.
    """
    several = as_list(traces)
    samples = samples_of(several)
    alpha = alpha_at(several, key)
    for epsilon in epsilons:
        check_epsilon(epsilon)
    kept = [epsilon for epsilon in epsilons if epsilon * samples.tokens > 1]
    if not kept:
        raise LensError(
            f"no epsilon of {list(epsilons)} exceeds 1 / T = {1 / samples.tokens:.3g}; "
            "give larger ones or longer prompts"
        )
    points = [_rate(several, alpha, epsilon, reduce, seed)[:3] for epsilon in kept]
    values, low, high = np.array(points).T
    return SinkSensitivity(np.array(kept), values, low, high, key, reduce, samples)


def _rate(
    traces: Sequence[AttentionTrace],
    alpha: np.ndarray,
    epsilon: float,
    reduce: str,
    seed: int,
) -> tuple[float, float, float, np.ndarray]:
    """Rate, its interval, and the rate by head, of alpha [samples, layers, heads]."""
    check_epsilon(epsilon)
    length = traces[0].length
    if epsilon * length <= 1:
        raise LensError(
            f"epsilon {epsilon} says nothing at {length} tokens: the first key receives at least "
            f"1 / T = {1 / length:.3g} by definition; use longer prompts or a larger epsilon"
        )
    if reduce == "alpha_first":
        by_head = (alpha.mean(0) > epsilon).astype(float)
        return float(by_head.mean()), np.nan, np.nan, by_head
    if reduce != "sample_first":
        raise LensError(f"reduce must be 'sample_first' or 'alpha_first', got {reduce!r}")
    is_sink = (alpha > epsilon).astype(float)
    by_sample = is_sink.mean((1, 2))
    low, high = over_units(by_sample, np.ones(len(by_sample)), seed)
    return float(by_sample.mean()), float(low), float(high), is_sink.mean(0)
