"""Sinks of classifiers, on labelled pictures or texts: where they are, whether they matter to the labels, what moves."""

from dataclasses import replace

import lens
from lens import edits, sinks
from lens.common.errors import LensError
from lens.common.given import given_traces
from lens.common.results import of_kind
from lens.figures.sink_effects import migration_maps
from lens.runs.sections import Section
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_edits
from lens_analyses.steps.redistribute import redistribution_of
from lens_analyses.steps.sink_effects import (
    EDITS,
    OF_TASKS,
    dose_of,
    edits_of,
    effect_figures,
    in_short,
    migration_of,
    strongest_heads,
)
from lens_analyses.steps.sinks import COLUMNS, shown
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
    rate, keys = sinks.rate(traces, seed=subject.seed), sinks.find(traces)
    tables, figures = shown(rate, keys)
    return Section(
        name="detection",
        title="Sinks: where attention is parked",
        summary=(
            *of_kind(rate.findings(), "rate", "heads"),
            *of_kind(keys.profile.findings(), "positions"),
        ),
        limits=(
            f"The first position is {traces[0].tokens[0]}; ε = {rate.epsilon}, T = {rate.samples.tokens} positions, "
            f"n = {rate.samples.n}; rates compare only where these agree.",
            *of_kind(keys.profile.findings(), "limit"),
            "Where attention is parked says nothing about what it does: see the edits.",
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={
            "epsilon": rate.epsilon,
            "normalise": rate.normalise,
            "rate": rate.value,
            "tokens": rate.samples.tokens,
            "bos": rate.samples.bos,
        },
        tables=tables,
        figures=figures,
    )


def effects(subject: Subject) -> Section:
    """The first key edited away, beside as much of other keys, and the head that looks most at it switched off.

    Raises:
        LensError: none of the edits can be made in this model.
    """
    (strongest,) = strongest_heads(subject, 1)
    alike = {"seed": subject.seed, "progress": subject.progress}
    found, left = [], {}
    for word in subject.settings.edited:
        try:
            found.append(lens.effect(subject.model, subject.task, EDITS[word], **alike))
        except LensError as reason:
            left[word] = str(reason)
    if not found:
        raise LensError("; ".join(f"{word}: {reason}" for word, reason in left.items()))
    off = edits.Ablate(strongest)
    one = lens.effect(subject.model, subject.task, off, controls=("size", "mass"), **alike)
    found.append(replace(one, edit="heads off"))
    tables = {"edits": edits_of(found), "migration": migration_of(found)}
    return Section(
        name="effects",
        title="Sinks: do they matter?",
        summary=tuple(in_short(one) for one in found),
        limits=(
            _LIMIT,
            *(f"The edit {word} is not made: {reason}." for word, reason in left.items()),
            "A small change of loss does not prove that a sink is of no use: attention moves to other keys, as the "
            "migration table says.",
        ),
        columns=defined(tables.values(), COLUMNS | OF_TASKS | _COLUMNS),
        configuration={"sources": "first", "edits": subject.settings.edits, "head": str(strongest)},
        tables=tables,
        figures={
            **{f"edit_{number}": one.plot("excess") for number, one in enumerate(found)},
            "migration": migration_maps(found[0]),
        },
        headlines=tuple(of_edits(tables["edits"], effect_figures(found), one.per)),
    )


def dose(subject: Subject) -> Section:
    """How the effect grows with the amount that is taken from the first key."""
    return _of_labels(dose_of(subject, subject.task))


def redistribution(subject: Subject) -> Section:
    """Attention moved from the first key to the others."""
    return _of_labels(redistribution_of(subject, subject.task))


def _of_labels(section: Section) -> Section:
    columns = section.columns | {name: _COLUMNS[name] for name in _COLUMNS.keys() & section.columns}
    return replace(section, limits=(_LIMIT, *section.limits), columns=columns)
