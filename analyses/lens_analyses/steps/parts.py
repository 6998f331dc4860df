"""Of one attention of an encoder-decoder: what the strongest keys align, where sinks are, whether they matter."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens import sinks
from lens.common.results import ends
from lens.figures.cross import cross_map
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens.traces.alignment import Alignment
from lens.traces.alignment import alignment as aligned
from lens.traces.trace import AttentionTrace
from lens_analyses.steps.sink_effects import dose_of, effects_of
from lens_analyses.steps.sinks import detected
from lens_analyses.steps.subject import Subject

_SHOWN, _MOST_CELLS = 3, 1 << 16  # heads whose map a report has, and cells of one
_WORDS = {
    "encoder": "keys of the encoder, seen by the encoder itself",
    "decoder": "keys of the target, seen by the decoder",
    "cross": "keys of the source, seen by the decoder",
}


def alignment(subject: Subject) -> Section:
    """Which heads point at one place of the source, and go on there as the target does."""
    traces = [subject.run.trace(name) for name in subject.run.traces]
    found = aligned(traces, at="predicted")
    table = found.table(seed=subject.seed)
    named = ["name", "layer", "head", "monotonicity", "monotonicity_low", "monotonicity_high"]
    table = table[[*named, "confidence"]].assign(n=len(traces))
    table["uniform_confidence"] = float(np.mean([1 / trace.length for trace in traces]))
    return Section(
        name="alignment",
        title="Which heads align target and source",
        summary=found.findings(),
        limits=(
            "Monotonicity is order alone: a head that goes on as the target does need not point at the right place. "
            "Against labels lens.traces.alignment(traces, labels) measures that.",
            "Languages with another word order have aligning heads of low monotonicity.",
            *(["One prompt has no interval."] if len(traces) == 1 else []),
        ),
        columns=_COLUMNS,
        configuration={"prompts": len(traces), "seconds": found.seconds, "seed": subject.seed},
        tables={"heads": table},
        figures={"heads": found.plot()} | _maps(table, traces[0]),
        headlines=_aligned(table, found),
    )


def _maps(table: pd.DataFrame, trace: AttentionTrace) -> dict[str, go.Figure]:
    """The heads that align best, on the first prompt."""
    if trace.queries * trace.length > _MOST_CELLS:
        return {}
    best = table.dropna(subset=["monotonicity"]).head(_SHOWN)
    return {
        f"map_{number}": cross_map(trace, row["layer"], row["head"], {}, height=420)
        for number, row in enumerate(best.to_dict("records"))
    }


def _aligned(table: pd.DataFrame, found: Alignment) -> tuple[Headline, ...]:
    """The head of the highest monotonicity; strongest keys in random order have 0.

    None where the best of as many means of random orders, of targets with as few tokens, would have as much.
    """
    ordered = table.dropna(subset=["monotonicity"])
    if ordered.empty:
        return ()
    best = ordered.iloc[int(ordered["monotonicity"].to_numpy().argmax())]
    value, low, high = (float(best[f"monotonicity{end}"]) for end in ("", "_low", "_high"))
    if value <= found.random_order:
        return ()
    return (
        Headline(
            f"{best['name']} goes on through the source as the target does: Kendall's tau of its strongest keys is "
            f"{value:.2f}{ends(low, high, '.2f')}; keys in random order have 0.",
            value,
            low,
            high,
            0.0,
            "random order",
            figure="heads",
            many=len(ordered),
            units=found.per_prompt["monotonicity"].shape[1],
        ),
    )


def detection(subject: Subject) -> Section:
    """Which keys are sinks, and in how many heads, beside uniform attention."""
    traces = [subject.run.trace(name) for name in subject.run.traces]
    alike = _of_one_length(traces)
    rate, keys = sinks.rate(alike, seed=subject.seed), sinks.find(alike, seed=subject.seed)
    left = len(traces) - len(alike)
    return detected(
        rate,
        keys,
        f"These are {_WORDS[subject.model.chosen]}; ε = {rate.epsilon}, {rate.samples.tokens} keys, n = "
        f"{rate.samples.n}.",
        *([f"{left} prompts with another number of keys are left out."] if left else []),
        last=(
            "How sinks come with layers and lengths is measured on one row of tokens, not here.",
        ),
    )


def _of_one_length(traces: list[AttentionTrace]) -> list[AttentionTrace]:
    """Those with the number of keys that most of them have: rates of sinks compare only there."""
    ((length, _),) = Counter(trace.length for trace in traces).most_common(1)
    return [trace for trace in traces if trace.length == length]


def effects(subject: Subject) -> Section:
    """The first key edited away, beside as much of other keys, and the head that looks most at it switched off."""
    made = effects_of(subject, list(subject.given), "pooled_mean")
    limit = "The loss is that of the target's tokens, from the second on."
    return replace(made, limits=(limit, *made.limits))


def dose(subject: Subject) -> Section:
    """How the effect grows with the amount that is taken from the first key."""
    return dose_of(subject, list(subject.given))


_COLUMNS = {
    "name": "The head.",
    "layer": "Layer of the decoder, from 0.",
    "head": "Head in the layer, from 0.",
    "monotonicity": "Kendall's tau-b of the strongest keys with the order of the target's tokens, mean over prompts; "
    "missing where all rows have one strongest key.",
    "monotonicity_low": "Low end of its 95 % interval over prompts.",
    "monotonicity_high": "High end of it.",
    "confidence": "Mean of the largest probability of a row.",
    "uniform_confidence": "What uniform attention would have.",
    "n": "Number of prompts.",
}
