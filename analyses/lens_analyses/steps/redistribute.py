"""What changes when attention is moved: on a task, on held-out text, and in which heads it helps."""

from typing import Any

import lens
from lens import edits as moving
from lens.common.errors import LensError
from lens.common.results import of_kind
from lens.edits.effect_results import Effect
from lens.figures.sink_effects import migration_maps
from lens.runs.sections import Section
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_edits, of_search
from lens_analyses.steps.sink_effects import EDITS, OF_TASKS, by_word
from lens_analyses.steps.sinks import COLUMNS
from lens_analyses.steps.subject import Subject


def dose(subject: Subject) -> Section:
    """The task's metric and the loss on text at each amount of the edit."""
    amounts = _amounts(subject)
    edit, at = EDIT_OF[subject.settings.rule], {"amounts": amounts, "controls": ()}
    at |= {"seed": subject.seed, "progress": False}
    response = lens.effect(subject.model, subject.task, edit, **at)
    summary: list[str] = [*of_kind(response.findings(), "gain", "best")]
    tables = {
        "response": response.table()[["amount", "metric", "gain", "gain_low", "gain_high", "n"]]
    }
    figures = {"response": response.plot("gain")}
    limits = [
        f"{_ACTS[subject.settings.rule]} All heads at once; which heads it helps is judged below."
    ]
    watched = _beside(subject, subject.task)
    if watched is None:
        limits.append(_NO_CONTROL)
    else:
        tables["control"] = by_word(watched.table())
        summary.append(_at_most(watched, "On the task: "))
    try:
        if subject.labelled:
            raise LensError("a classifier has one answer for a whole prompt, and predicts no text")
        side = lens.effect(subject.model, subject.text_windows, edit, **at)
    except LensError as error:
        limits.append(f"Side effects on text are not measured: {error}.")
    else:
        limits.append(
            "The text is the run's own: it had no part in choosing anything, but it is one text."
        )
        watched = _beside(subject, subject.text_windows)
        summary += _told(side, watched, "On text: ")
        tables["side_effects"] = side.table().assign(edit=subject.settings.rule)
        figures["loss"] = side.plot()
        if watched is not None:
            tables["side_control"] = by_word(watched.table())
    return Section(
        name="dose",
        title="Redistribution: dose, response and side effects",
        summary=tuple(summary),
        limits=tuple(limits),
        columns=defined(tables.values(), COLUMNS | _COLUMNS),
        configuration=_configuration(subject, amounts),
        tables=tables,
        figures=figures,
        headlines=tuple(
            of_edits(tables["side_control"], {subject.settings.rule: "loss"})
            if "side_control" in tables
            else ()
        ),
    )


def _beside(subject: Subject, prompts: Any) -> Effect | None:
    """The largest amount, beside the edit of as much attention to other keys; None where the rule has no such control."""
    edit = EDITS.get(subject.settings.rule)
    if edit is None:
        return None
    return lens.effect(
        subject.model,
        prompts,
        edit,
        amounts=[max(_amounts(subject))],
        controls=("mass",),
        seed=subject.seed,
        progress=False,
    )


def _told(found: Effect, watched: Effect | None, where: str = "") -> list[str]:
    """What the largest amount does, beside its control where there is one; the prediction; and each amount."""
    largest = of_kind(found.findings(), "effect") if watched is None else [_at_most(watched, where)]
    return [*largest, *of_kind(found.findings(), "prediction", "dose", "trend")]


def _at_most(watched: Effect, where: str) -> str:
    """What the largest amount does beside its control, and `where`: it is said of a task and of text."""
    return where + " ".join(of_kind(watched.findings(), "effect", "mass", "moved"))


_NO_CONTROL = "There is no control: what this rule does has no counterpart of as much attention to other keys."


def redistribution(subject: Subject) -> Section:
    """Attention moved from the first token to the others, as part of `lens sinks`: dose and response."""
    return redistribution_of(subject, subject.text_windows)


def redistribution_of(subject: Subject, prompts: Any) -> Section:
    """The same on prompts as `lens.effect` takes them."""
    amounts, rule = _amounts(subject), subject.settings.rule
    alike = {"seed": subject.seed, "progress": False}
    found = lens.effect(
        subject.model, prompts, EDIT_OF[rule], amounts=amounts, controls=(), **alike
    )
    tables = {"response": found.table().assign(edit=rule)}
    figures = {"response": found.plot()}
    watched = _beside(subject, prompts)
    if watched is not None:
        tables |= {"control": by_word(watched.table()), "migration": watched.migration}
        figures["maps"] = migration_maps(watched)
    return Section(
        name="redistribution",
        title="Sinks: attention moved to the other keys",
        summary=tuple(_told(found, watched)),
        limits=(
            f"{_ACTS[rule]} All heads at once; the command lens redistribute tries single heads and judges them on "
            "held-out prompts.",
            "These prompts are held out in so far as no head and no amount was chosen on them; they are those that "
            "the sinks were found on.",
            *([_NO_CONTROL] if watched is None else []),
        ),
        columns=defined(tables.values(), COLUMNS | _COLUMNS),
        configuration=_configuration(subject, amounts),
        tables=tables,
        figures=figures,
        headlines=tuple(
            of_edits(tables["control"], {rule: "response"}, found.per)
            if "control" in tables
            else ()
        ),
    )


def search(subject: Subject) -> Section:
    """Which heads are better off with the edit: chosen on half of the prompts, judged on the others."""
    amount = max(_amounts(subject), key=abs)
    found = moving.search_heads(
        subject.model,
        subject.task,
        EDIT_OF[subject.settings.rule].at(amount),
        seed=subject.seed,
        progress=subject.progress,
    )
    return Section(
        name="search",
        title="Redistribution: which heads it helps",
        summary=found.findings(),
        limits=(
            "Heads were tried one at a time; heads that help only together are not found.",
            "The best of many heads look good on the prompts that chose them; only the test prompts count.",
        ),
        columns=defined([found.table(), found.summary()], COLUMNS | _COLUMNS),
        configuration={"rule": subject.settings.rule, "amount": amount, "seed": subject.seed},
        tables={"heads": found.table(), "judged": found.summary()},
        figures={"gains": found.plot()},
        headlines=tuple(of_search(found.summary(), subject.task.metric, "gains")),
    )


def _amounts(subject: Subject) -> list[float]:
    """The amounts other than 0, which is no edit."""
    return [amount for amount in subject.settings.doses if amount]


def _configuration(subject: Subject, amounts: list[float]) -> dict[str, Any]:
    rule = subject.settings.rule
    keys = "found by alpha" if rule == "act" else "none" if rule in _WITHOUT_SOURCES else "first"
    return {"rule": rule, "amounts": amounts, "sources": keys}


EDIT_OF = {
    "transfer": moving.Move("first"),
    "mask": moving.Mask("first"),
    "drop": moving.Drop("first"),
    "logit_bias": moving.Bias("first", 0.0),
    "learned_sink": moving.LearnedSink(),
    "off_by_one": moving.LearnedSink(),
    "act": moving.Act(),
}
"""Rule of the configuration -> the edit of all heads, by any amount."""
_WITHOUT_SOURCES = ("learned_sink", "off_by_one", "act")
_ACTS = {
    "transfer": "The share (amount) of what the first token receives goes to the other keys that a row "
    "sees, in proportion to what they hold.",
    "mask": "The first token's weight is multiplied by 1 - amount, and rows are divided by their sum.",
    "drop": "The first token's weight is multiplied by 1 - amount; rows then sum to less than 1.",
    "logit_bias": "The amount is added to the first token's logit: above 0 gives it more attention, "
    "below 0 less.",
    "learned_sink": "Rows get a learned sink with a value of 0, whose exp(logit) is the amount.",
    "off_by_one": "The amount is how far the softmax goes towards exp(x) / (1 + sum exp(x)).",
    "act": "Keys after the first with alpha above 5 / N give the share (amount) of their attention to "
    "all others (attention calibration, arXiv 2406.15765).",
}
_COLUMNS = {
    **OF_TASKS,
    "heads": "Which heads were edited.",
    "prompts": "On which prompts.",
    "head": "The head of the layer that was edited alone.",
    "chosen": "Whether it was chosen.",
}
