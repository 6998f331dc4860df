"""Sinks of classifiers, on labelled pictures or texts: where they are, whether they matter to the labels, what moves."""

from dataclasses import replace

import lens
from lens import sinks
from lens.common.given import given_traces
from lens.runs.sections import Section
from lens_analyses.steps.redistribute import redistribution_of
from lens_analyses.steps.sink_effects import dose_of, effects_of
from lens_analyses.steps.sinks import PARKED, detected
from lens_analyses.steps.subject import Subject

_LIMIT = "The loss is that of the label, one a prompt."
_COLUMNS = {
    "delta_loss": "Change of the loss of the label, nats a prompt; positive: worse.",
    "flip_rate": "Share of prompts whose most likely label changed.",
}


def detection(subject: Subject) -> Section:
    """Which keys are sinks, in how many heads, beside uniform attention."""
    given = subject.task.as_prompts
    asked = {"statistics": ["received"], "progress": subject.progress}
    traces = given_traces(lens.capture(subject.model, given, **asked))
    rate, keys = sinks.rate(traces, seed=subject.seed), sinks.find(traces, seed=subject.seed)
    return detected(
        rate,
        keys,
        f"The first position is {traces[0].tokens[0]}; ε = {rate.epsilon}, T = {rate.samples.tokens} positions, "
        f"n = {rate.samples.n}; rates compare only where these agree.",
        last=(PARKED,),
    )


def effects(subject: Subject) -> Section:
    """The first key edited away, beside as much of other keys, and the head that looks most at it switched off."""
    return _of_labels(effects_of(subject, subject.task))


def dose(subject: Subject) -> Section:
    """How the effect grows with the amount that is taken from the first key."""
    return _of_labels(dose_of(subject, subject.task))


def redistribution(subject: Subject) -> Section:
    """Attention moved from the first key to the others."""
    return _of_labels(redistribution_of(subject, subject.task))


def _of_labels(section: Section) -> Section:
    known = {name: _COLUMNS[name] for name in _COLUMNS.keys() & section.columns}
    columns = {**section.columns, **known}
    return replace(section, limits=(_LIMIT, *section.limits), columns=columns)
