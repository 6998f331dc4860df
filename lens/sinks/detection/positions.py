"""Where the sinks are: the keys that heads park on, and the rate at every position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lens.common.choices import Seed
from lens.common.given import given_traces
from lens.common.head_ids import HeadId, head_columns
from lens.common.results import Result, Sentence, counted, few, if_known
from lens.sinks.detection.alphas import (
    DIVIDED,
    Normalise,
    Samples,
    alpha_of,
    check_epsilon,
    least_alpha,
    samples_of,
    uniform_alpha,
)
from lens.stats.intervals import columns
from lens.stats.verdicts import mean_told
from lens.traces.scores import FEWEST_VIEWERS, SINK_EPSILON

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

COMMON = 0.25
"""A key is a common sink where its rate exceeds this."""

_NAMED = 5  # keys that findings name


@dataclass(frozen=True, repr=False, eq=False)
class SinkKeys(Result):
    """The (prompt, layer, head, key) whose alpha exceeds epsilon, and the rate at every position.

    Attributes:
        rows: one per sink, the strongest of each prompt first: `prompt` (which trace), `name`, `layer`,
            `head`, `key`, `token`, and `alpha`, the mean attention that the key receives.
        profile: every position, over all prompts.
    """

    rows: pd.DataFrame = field(repr=False)
    profile: SinkProfile

    @property
    def keys(self) -> list[int]:
        """Positions that are a sink in some head, ascending."""
        return sorted(set(self.rows["key"].tolist()))

    @property
    def heads(self) -> list[HeadId]:
        """Heads that have a sink, by layer and head."""
        pairs = set(zip(self.rows["layer"].tolist(), self.rows["head"].tolist(), strict=True))
        return [HeadId(*pair) for pair in sorted(pairs)]

    def table(self) -> pd.DataFrame:
        """One row per sink, with what it depends on."""
        return self.rows.assign(**self.profile.settings())

    def findings(self) -> tuple[Sentence, ...]:
        """How many keys in how many heads, those that are a sink most often, which are common, and what was not judged."""
        settings = f"({self.profile.words()})"
        if not len(self.rows):
            found = [Sentence(f"No key is a sink in any head {settings}.", kind="heads")]
        else:
            found = [
                Sentence(
                    f"Sinks in at least one of {counted(self.profile.samples.n, 'prompt')}: "
                    f"{counted(len(self.keys), 'key')} in {counted(len(self.heads), 'head')}, from layer "
                    f"{self.heads[0].layer} on {settings}.",
                    kind="heads",
                )
            ]
            often = self.rows["key"].value_counts()
            for key in sorted(self.keys, key=lambda key: -often[key])[:_NAMED]:
                here = self.rows[self.rows["key"] == key]
                token = here["token"].mode()[0]
                told = (
                    f"{counted(here['name'].nunique(), 'head')} of the layers in which it is judged"
                    if np.isnan(self.profile.rate[key])
                    else self.profile.told(key)
                )
                text = f"Key {key} ({token!r}) is a sink in {told}, with α up to {here['alpha'].max():.2f}."
                found.append(Sentence(text, kind="key"))
        return (*found, *self.profile.findings())


@dataclass(frozen=True, repr=False, eq=False)
class SinkProfile(Result):
    """Sink rate and mean alpha at every position.

    Attributes:
        rate: [keys], share of (sample, layer, head) with alpha above epsilon; NaN where a layer
            shows the key to too few queries.
        by_prompt: [samples, keys], the same of each.
        uniform: [keys], the same with uniform attention in every layer; NaN as in `SinkRate`.
        alpha: [layers, heads, keys], mean over samples, NaN likewise.
        layers: numbers of the layers.
        epsilon, normalise, samples: as in `SinkRate`.
        seed: of the bootstrap.
    """

    rate: np.ndarray
    by_prompt: np.ndarray = field(repr=False)
    uniform: np.ndarray = field(repr=False)
    alpha: np.ndarray = field(repr=False)
    layers: tuple[int, ...]
    epsilon: float
    normalise: Normalise
    samples: Samples
    seed: int

    def common(self, threshold: float = COMMON) -> list[int]:
        """Positions whose rate exceeds `threshold`."""
        return np.flatnonzero(np.nan_to_num(self.rate) > threshold).tolist()

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, as columns of a table."""
        return {
            "epsilon": self.epsilon,
            "normalise": self.normalise,
            "tokens": self.samples.tokens,
            "bos": self.samples.bos,
            "n": self.samples.n,
        }

    def words(self) -> str:
        """The same for sentences."""
        return f"α above {self.epsilon:g}, {DIVIDED[self.normalise]}; {self.samples}"

    def table(self) -> pd.DataFrame:
        """One row per position: `rate` with `low` and `high` (95 % over prompts) and `uniform`; `alpha` is the mean over heads,
        `largest_alpha` the largest."""
        flat = self.alpha.reshape(-1, self.alpha.shape[-1])
        found = {"key": np.arange(len(self.rate))}
        found |= columns("rate", self.by_prompt.T, self.seed, plain=True)
        found |= {"uniform": self.uniform, "alpha": flat.mean(0), "largest_alpha": flat.max(0)}
        return pd.DataFrame(found).assign(**self.settings())

    def told(self, key: int) -> str:
        """The rate of a key that has one in words, with its interval and what uniform attention gives."""
        mean = mean_told(self.by_prompt[:, key], self.seed, ".1%")
        return f"{mean} of heads (with uniform attention {if_known(self.uniform[key])})"

    def findings(self) -> tuple[Sentence, ...]:
        """Which positions are sinks in common, and how many were not judged."""
        common = sorted(self.common(), key=lambda key: -self.rate[key])
        named = few([f"position {key} in {self.told(key)}" for key in common], _NAMED)
        text = (
            f"No position is a sink in more than {COMMON:.0%} of heads ({self.words()})."
            if not common
            else f"Sinks in more than {COMMON:.0%} of heads: {named} ({self.words()})."
        )
        unscored = int(np.isnan(self.rate).sum())
        limit = (
            f"{unscored} positions were not judged: in some layer fewer than {FEWEST_VIEWERS} queries count "
            "for them."
        )
        return (Sentence(text, kind="positions"), Sentence(limit, kind="limit"))


def find(
    traces: AttentionTrace | Sequence[AttentionTrace],
    *,
    epsilon: float = SINK_EPSILON,
    normalise: Normalise = "visible",
    seed: Seed = 0,
) -> SinkKeys:
    """The keys that heads park their attention on, `alpha_k > epsilon`; `.profile`: every position.

    Keys behind the first that fewer than 16 queries see are not judged.

    Args:
        traces, epsilon, normalise, seed: as for `lens.sinks.rate`.

    Raises:
        LensError: as `lens.sinks.rate`.

    Example:
        >>> found = lens.sinks.find(traces)
        >>> found.table().head(), found.profile.common()
    """
    several = given_traces(traces)
    samples = samples_of(several)
    check_epsilon(epsilon, max(least_alpha(trace, normalise) for trace in several))
    alpha = np.stack([alpha_of(trace, normalise) for trace in several])
    is_sink = np.nan_to_num(alpha) > epsilon
    places = np.argwhere(is_sink)
    strength = alpha[tuple(places.T)]
    prompt, layer, head, key = places[np.lexsort((-strength, places[:, 0]))].T
    numbers = np.array(several[0].layers)
    rows = pd.DataFrame(
        {
            "prompt": prompt,
            **head_columns(list(zip(numbers[layer], head, strict=True))),
            "key": key,
            "token": [
                several[one].tokens[position] for one, position in zip(prompt, key, strict=True)
            ],
            "alpha": alpha[prompt, layer, head, key],
        }
    )
    unscored = np.isnan(alpha).any((0, 1, 2))
    by_prompt = np.where(unscored, np.nan, is_sink.mean((1, 2)))
    even = uniform_alpha(several[0], normalise)
    profile = SinkProfile(
        rate=by_prompt.mean(0),
        by_prompt=by_prompt,
        uniform=np.where(np.isnan(even).any(0), np.nan, (even > epsilon).mean(0)),
        alpha=alpha.mean(0),
        layers=tuple(numbers.tolist()),
        epsilon=epsilon,
        normalise=normalise,
        samples=samples,
        seed=seed,
    )
    return SinkKeys(rows, profile)
