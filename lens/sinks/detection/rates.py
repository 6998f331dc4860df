"""The sink rate of Gu et al. and how it depends on its threshold (arXiv 2410.10781)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from lens.common.checked import checked
from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.given import given_traces
from lens.common.head_ids import all_heads, head_columns
from lens.common.results import Result, Sentence, ends, few, if_known
from lens.sinks.detection.alphas import (
    DIVIDED,
    Normalise,
    Samples,
    alpha_at,
    check_epsilon,
    least_alpha,
    samples_of,
    uniform_alpha,
)
from lens.stats import over_units
from lens.stats.verdicts import rivals
from lens.traces.scores import SINK_EPSILON

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

Reduce = Literal["sample_first", "alpha_first"]
_GRID = tuple(np.round(np.arange(0.05, 1, 0.05), 2).tolist())


@dataclass(frozen=True, repr=False, eq=False)
class SinkRate(Result):
    """Share of (sample, layer, head) in which one key is a sink. Not a mass.

    Attributes:
        value: the rate over all layers and heads.
        low, high: 95 % bootstrap interval over samples; NaN for one sample or "alpha_first".
        uniform: the same share with uniform attention in every layer; NaN where a mask is neither
            causal nor two-way nor a window.
        even: [layers], alpha with uniform attention, NaN likewise.
        by_head: [layers, heads], share of the samples in which the head has the sink.
        alphas: [samples, layers, heads].
        layers: numbers of the layers.
        key: the key asked about.
        epsilon: threshold; alpha must exceed it.
        reduce: "sample_first" or "alpha_first".
        normalise: what alpha is divided by, "visible" or "all".
        samples: model, dtype, T, BOS policy and n.
        seed: of the bootstrap.
        least: alpha that a first key has by definition.
    """

    value: float
    low: float
    high: float
    uniform: float
    even: np.ndarray = field(repr=False)
    by_head: np.ndarray = field(repr=False)
    alphas: np.ndarray = field(repr=False)
    layers: tuple[int, ...] = field(repr=False)
    key: int
    epsilon: float
    reduce: Reduce
    normalise: Normalise
    samples: Samples
    seed: int
    least: float

    @property
    def alpha(self) -> np.ndarray:
        """[layers, heads], mean of alpha over the samples."""
        return self.alphas.mean(0)

    @checked
    def curve(self, epsilons: Sequence[float] = _GRID) -> SinkCurve:
        """The rate at each of `epsilons`, of which those that a first key exceeds anyway are left out.

        Args:
            epsilons: thresholds, by default 0.05, 0.1, ... 0.95.

        Raises:
            LensError: an epsilon outside 0 to 1, or none that is large enough.

        Example:
            >>> lens.sinks.rate(traces).curve((0.2, 0.4)).table()
        """
        for epsilon in epsilons:
            check_epsilon(epsilon)
        kept = [epsilon for epsilon in epsilons if epsilon > self.least]
        if not kept:
            raise LensError(
                f"no epsilon of {list(epsilons)} exceeds {self.least:.3g}, what the first key receives "
                "by definition; give larger ones or longer prompts"
            )
        points = [_rate(self.alphas, epsilon, self.reduce, self.seed)[:3] for epsilon in kept]
        values, low, high = np.array(points).T
        uniform = np.array([_uniform(self.even, epsilon) for epsilon in kept])
        return SinkCurve(np.array(kept), values, low, high, uniform, self)

    def settings(self) -> dict[str, Any]:
        """What the number depends on, as columns of a table."""
        return {
            "key": self.key,
            "reduce": self.reduce,
            "normalise": self.normalise,
            "tokens": self.samples.tokens,
            "bos": self.samples.bos,
            "n": self.samples.n,
        }

    def table(self) -> pd.DataFrame:
        """One row per head, with everything that the number depends on."""
        places = all_heads(self.layers, self.by_head.shape[1])
        columns = {"rate": self.by_head.ravel(), "alpha": self.alpha.ravel()}
        settings = {"epsilon": self.epsilon, **self.settings()}
        return pd.DataFrame(head_columns(places) | columns).assign(**settings)

    def findings(self) -> tuple[Sentence, ...]:
        """The rate beside uniform attention, the heads with most, and what the number depends on."""
        names, alpha = self.table()["name"], self.alpha.ravel()
        first = np.argsort(-alpha, kind="stable")[:3]
        heads = ", ".join(f"{names[at]} {alpha[at]:.2f}" for at in first)
        by_sample = self.alphas.reshape(len(self.alphas), -1).T
        alike = rivals(by_sample, int(first[0]), self.seed)
        beside = (
            f"; {names[first[0]]} is not told apart from {few(names[alike].tolist())}"
            if alike
            else ""
        )
        interval = ends(self.low, self.high, ".1%")
        even = if_known(self.uniform)
        place = "The first token" if self.key == 0 else f"Key {self.key}"
        return (
            Sentence(
                f"{place} is a sink in {self.value:.1%}{interval} of heads (with uniform attention {even}; α "
                f"above {self.epsilon:g}, {DIVIDED[self.normalise]}; T = {self.samples.tokens}"
                f"{self.samples.start}, n = {self.samples.n}).",
                kind="rate",
            ),
            Sentence(f"It receives most in {heads} (mean α){beside}.", kind="heads"),
            Sentence(
                "The rate is a share of heads, no mass, and compares only at equal ε, T, BOS and normalise.",
                kind="limit",
            ),
        )


@dataclass(frozen=True, repr=False, eq=False)
class SinkCurve(Result):
    """The sink rate of one key as a curve over epsilon.

    Attributes:
        epsilons, values, low, high, uniform: [points]; intervals and uniform attention as in `SinkRate`.
        of: the rate that it belongs to.
    """

    epsilons: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    uniform: np.ndarray
    of: SinkRate = field(repr=False)

    def table(self) -> pd.DataFrame:
        """One row per epsilon."""
        columns = {"epsilon": self.epsilons, "rate": self.values}
        columns |= {"low": self.low, "high": self.high, "uniform": self.uniform}
        return pd.DataFrame(columns).assign(**self.of.settings())

    def findings(self) -> tuple[Sentence, ...]:
        """How the rate falls from the smallest to the largest epsilon, beside uniform attention."""
        count = len(self.epsilons)
        points = [
            f"{self.values[place]:.1%}{ends(self.low[place], self.high[place], '.1%')} at ε = {self.epsilons[place]:g} "
            f"(with uniform attention {if_known(self.uniform[place])})"
            for place in dict.fromkeys((0, count // 2, count - 1))
        ]
        text = (
            f"The share of heads with a sink on key {self.of.key} is {', '.join(points)} "
            f"({DIVIDED[self.of.normalise]}; {self.of.samples})."
        )
        return (Sentence(text, kind="rate"),)


def rate(
    traces: AttentionTrace | Sequence[AttentionTrace],
    *,
    key: int = 0,
    epsilon: float = SINK_EPSILON,
    normalise: Normalise = "visible",
    reduce: Reduce = "sample_first",
    seed: Seed = 0,
) -> SinkRate:
    """`Sink_k = mean over samples, layers and heads of [alpha_k > epsilon]`.

    Args:
        traces: one or several of one model, with equal length and BOS policy.
        key: position counted from 0.
        epsilon: threshold, strict; `.curve()` of the result is the rate over many.
        normalise: "visible" divides what the key receives by the queries that see it, "all" by all
            that could without a window, as Gu et al. do. The same where no layer has a window.
        reduce: "sample_first" thresholds each sample and then averages, as the authors' code does;
            "alpha_first" averages alpha over the samples and then thresholds, another metric.
        seed: of the bootstrap.

    Raises:
        LensError: traces that do not compare, a key too near the end, an epsilon that the first key
            exceeds by definition (1 / T), an unknown `normalise` or `reduce`.

    Example:
        >>> result = lens.sinks.rate(traces)
        >>> result.value, result.samples.tokens, result.samples.bos, result.samples.n
    """
    several = given_traces(traces)
    samples = samples_of(several)
    alpha = alpha_at(several, key, normalise)
    least = max(least_alpha(trace, normalise) for trace in several)
    check_epsilon(epsilon, least)
    even = uniform_alpha(several[0], normalise)[:, key]
    value, low, high, by_head = _rate(alpha, epsilon, reduce, seed)
    return SinkRate(
        value=value,
        low=low,
        high=high,
        uniform=_uniform(even, epsilon),
        even=even,
        by_head=by_head,
        alphas=alpha,
        layers=several[0].layers,
        key=key,
        epsilon=epsilon,
        reduce=reduce,
        normalise=normalise,
        samples=samples,
        seed=seed,
        least=least,
    )


def _uniform(even: np.ndarray, epsilon: float) -> float:
    """Share of the layers [layers] whose alpha passes epsilon with uniform attention; NaN where one is not known."""
    return np.nan if np.isnan(even).any() else float((even > epsilon).mean())


def _rate(
    alpha: np.ndarray, epsilon: float, reduce: Reduce, seed: int
) -> tuple[float, float, float, np.ndarray]:
    """Rate, its interval, and the rate by head, of alpha [samples, layers, heads]."""
    if reduce == "alpha_first":
        by_head = (alpha.mean(0) > epsilon).astype(float)
        return float(by_head.mean()), np.nan, np.nan, by_head
    is_sink = (alpha > epsilon).astype(float)
    by_sample = is_sink.mean((1, 2))
    low, high = over_units(by_sample, np.ones(len(by_sample)), seed)
    return float(by_sample.mean()), float(low), float(high), is_sink.mean(0)
