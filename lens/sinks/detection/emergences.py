"""Where and when a sink emerges: over layers, over prompt length, and not at all on control prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from lens.common.choices import Seed, check_choice
from lens.common.errors import LensError
from lens.common.given import given_traces
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, ends, if_known
from lens.models.loaded import LoadedModel
from lens.sinks.detection.alphas import DIVIDED, Normalise
from lens.sinks.detection.conditions import bos_pair, by_length, control_prompts
from lens.sinks.detection.rates import SinkRate, rate
from lens.stats import over_units
from lens.traces.scores import SINK_EPSILON

Over = Literal["controls", "length", "bos"]


@dataclass(frozen=True, repr=False, eq=False)
class SinkEmergence(Result):
    """Sink rate of one key by condition and layer.

    Attributes:
        rates: condition -> its `SinkRate`.
        rows: one per condition and layer, and one per condition with layer NaN for all layers: `rate`
            with `low` and `high` (95 % over prompts), `alpha` (mean), and what it depends on.
    """

    rates: dict[str, SinkRate] = field(repr=False)
    rows: pd.DataFrame = field(repr=False)

    def table(self) -> pd.DataFrame:
        """The rows."""
        return self.rows

    def first_layer(self, condition: str) -> int | None:
        """The first layer in which some head has the sink in more than half of the prompts, or None.

        Raises:
            LensError: another condition.
        """
        one = self.rates[check_choice("condition", condition, tuple(self.rates))]
        found = np.flatnonzero(one.by_head.max(1) > 0.5)
        return int(one.layers[found[0]]) if len(found) else None

    def findings(self) -> tuple[Sentence, ...]:
        """The rate of each condition beside uniform attention, its first layer, and what it depends on."""
        found = []
        for condition, one in self.rates.items():
            first = self.first_layer(condition)
            where = (
                "in no head in more than half of the prompts"
                if first is None
                else f"in more than half of the prompts from layer {first} on"
            )
            interval = ends(one.low, one.high, ".1%")
            text = (
                f'Prompts "{condition}": key {one.key} is a sink in {one.value:.1%}{interval} of layers × heads, '
                f"{where} (with uniform attention {if_known(one.uniform)}; α above {one.epsilon:g}, "
                f"{DIVIDED[one.normalise]}; T = {one.samples.tokens}{one.samples.start}, "
                f"n = {one.samples.n})."
            )
            found.append(Sentence(text, kind="rate"))
        limit = "The rate is a share of heads, no mass, and does not compare between lengths or epsilons."
        return (*found, Sentence(limit, kind="limit"))


def emergence(
    model: LoadedModel,
    prompts: Any,
    over: Over | Sequence[int] | Mapping[str, Any] = "controls",
    *,
    key: int = 0,
    epsilon: float = SINK_EPSILON,
    normalise: Normalise = "visible",
    seed: Seed = 0,
    progress: bool = True,
) -> SinkEmergence:
    """The sink rate by layer, on the prompts and on what `over` makes of them.

    Args:
        model: a causal model, as `lens.load` returns it.
        prompts: of one length, as for `lens.capture`.
        over: "controls": the prompts beside as many of random tokens and of one token repeated;
            "length": cut to 16, 32, 64, ... tokens, or to those given; "bos": with the model's BOS
            in front and without; or a name for each other kind of prompts, `{"code": more_prompts}`.
        key, epsilon, normalise, seed: as for `lens.sinks.rate`.
        progress: show a bar.

    Raises:
        LensError: another `over`, lengths that the prompts do not have, no BOS, and as `lens.sinks.rate`.

    Example:
        >>> lens.sinks.emergence(model, texts, over="length").findings()
    """
    from lens.traces.captures import capture

    conditions = _conditions(model, prompts, over, seed)
    rates, rows = {}, []
    with advancing("sinks", len(conditions), progress) as advance:
        for condition, asked in conditions.items():
            traces = given_traces(capture(model, asked, statistics=["received"], progress=False))
            found = rate(traces, key=key, epsilon=epsilon, normalise=normalise, seed=seed)
            rates[condition] = found
            rows.append(_rows(found).assign(condition=condition))
            advance(1)
    return SinkEmergence(rates, pd.concat(rows, ignore_index=True))


def _conditions(
    model: LoadedModel, prompts: Any, over: Over | Sequence[int] | Mapping[str, Any], seed: int
) -> Mapping[str, Any]:
    if isinstance(over, Mapping):
        if not over or "text" in over:
            raise LensError(
                'over needs a name for each other kind of prompts, such as {"code": prompts}; "text" is '
                f"the prompts themselves; got {list(over)}"
            )
        return {"text": prompts, **over}
    if not isinstance(over, str):
        return by_length(model, prompts, over)
    if check_choice("over", over, Over) == "controls":
        return {"text": prompts, **control_prompts(model, prompts, seed)}
    return by_length(model, prompts) if over == "length" else bos_pair(model, prompts)


def _rows(found: SinkRate) -> pd.DataFrame:
    """The rate over all layers, as layer NaN, and of each layer."""
    by_layer = (found.alphas > found.epsilon).mean(2)  # [prompts, layers]
    low, high = over_units(by_layer, np.ones_like(by_layer), found.seed)
    columns = {
        "layer": [np.nan, *found.layers],
        "rate": [found.value, *by_layer.mean(0)],
        "low": [found.low, *low],
        "high": [found.high, *high],
        "alpha": [found.alpha.mean(), *found.alpha.mean(1)],
    }
    settings = {"dtype": found.samples.dtype, "epsilon": found.epsilon, **found.settings()}
    return pd.DataFrame(columns).assign(**settings)
