"""Whether a sink matters: edits beside controls, scopes, doses, the first token, a short cache."""

from dataclasses import replace
from typing import Any

import pandas as pd

import lens
from lens import edits, heads, sinks
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.results import of_kind
from lens.edits.clean_runs import CleanRuns
from lens.edits.effect_results import Effect
from lens.figures.sink_effects import migration_maps, streaming_curves
from lens.figures.sink_heads import reach_points
from lens.models.vocabulary import around, windows
from lens.runs.sections import Section
from lens.sinks.detection.conditions import bos_pair, control_prompts
from lens.tasks import prompts
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_conditions, of_edits, of_reaches, of_streaming
from lens_analyses.steps.sinks import COLUMNS
from lens_analyses.steps.subject import Subject

_FIRST = (0, 1, 4)  # first keys that a cache keeps
_HEADS, _FEW = 3, 3  # heads switched off one at a time, on so many prompts of each text
EDITS = {
    "mask": edits.Mask("first"),
    "drop": edits.Drop("first"),
    "mean_value": edits.Value("first", "mean"),
    "zero_value": edits.Value("first", "zero"),
    "move": edits.Move(None, to="first"),
    "transfer": edits.Move("first"),
}
"""What the words of the configuration do with the first token."""
OF_TASKS = {
    "metric": "Of the task, with the edit.",
    "gain": "How much better the task goes than without the edit, in units of its metric.",
    "excess_gain": "gain of the edit less that of the control, prompt by prompt.",
}
"""Columns of the effect of an edit on a task."""
_WORDS = {edit.words: word for word, edit in EDITS.items()}
_OTHERS = ("pride-and-prejudice", "shakespeare")


def effects(subject: Subject) -> Section:
    """The sink edited away, beside controls of the same size, mass and position; where mass moves."""
    texts = subject.text_windows
    strongest, clean = strongest_heads(subject, 1)[0], CleanRuns(subject.model)
    model, seed = subject.model, subject.seed
    done = [EDITS[word] for word in subject.settings.edited]
    found = [
        lens.effect(model, texts, edit, seed=seed, clean=clean, progress=subject.progress)
        for edit in done
    ]
    layer = strongest.layer
    reaches = {
        "head": replace(done[0], heads=[strongest]),
        "layer": replace(done[0], layers=[layer]),
        "from_layer": replace(done[0], layers=[at for at in model.info.attending if at >= layer]),
        "all": done[0],
    }
    mass = {"controls": ("mass",), "seed": seed, "clean": clean, "progress": subject.progress}
    scopes = {name: lens.effect(model, texts, edit, **mass) for name, edit in reaches.items()}
    alike = {"seed": seed, "clean": clean, "progress": subject.progress}
    off = lens.effect(model, texts, edits.Ablate(strongest), controls=("size", "mass"), **alike)
    found.append(replace(off, edit="heads off"))
    massive = sinks.massive(model, texts, progress=subject.progress)
    if len(massive.rows):
        references: dict[str, Any] = {"zero": massive.edits()}
        if len(texts) > 1:
            references["others"] = massive.others(model, texts)
        for to, edit in references.items():
            one = lens.effect(model, texts, edit, **alike)
            found.append(replace(one, edit=f"massive activations := {to}"))
    scoped = by_reach(scopes)
    tables = {
        "edits": edits_of(found),
        "scopes": by_word(scoped),
        "migration": migration_of(found),
    }
    return Section(
        name="effects",
        title="Sinks: do they matter?",
        summary=(
            *(in_short(one) for one in found),
            *(text for reach in ("head", "layer") for text in reach_words(scopes, reach)),
        ),
        limits=(
            "A small change of loss does not prove that a sink is of no use: attention moves to the next key, "
            "as the migration table says.",
            "The control of equal mass edits ordinary keys that hold as much attention together; where a prompt has "
            "no such keys its own column mass says how much it reached.",
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={"sources": "first", "edits": subject.settings.edits, "head": str(strongest)},
        tables=tables,
        figures={
            **{f"edit_{number}": one.plot("excess") for number, one in enumerate(found)},
            "scopes": reach_points(scoped),
            "migration": migration_maps(found[0]),
        },
        headlines=(
            *of_edits(tables["edits"], effect_figures(found)),
            *of_reaches(tables["scopes"], "scopes"),
        ),
    )


def effects_of(subject: Subject, prompts: Any, *put: Any) -> Section:
    """The first key edited away, beside as much of other keys, and the head that looks most at it switched off.

    Args:
        prompts: a task, or pairs of source and target.
        put: in the place of the head that is switched off, if not what `Ablate` has.

    Raises:
        LensError: none of the edits can be made in this model.
    """
    (strongest,) = strongest_heads(subject, 1)
    alike = {"seed": subject.seed, "progress": subject.progress}
    found, left = [], {}
    for word in subject.settings.edited:
        try:
            found.append(lens.effect(subject.model, prompts, EDITS[word], **alike))
        except LensError as reason:
            left[word] = str(reason)
    if not found:
        raise LensError("; ".join(f"{word}: {reason}" for word, reason in left.items()))
    off = edits.Ablate(strongest, *put)
    one = lens.effect(subject.model, prompts, off, controls=("size", "mass"), **alike)
    found.append(replace(one, edit="heads off"))
    tables = {"edits": edits_of(found), "migration": migration_of(found)}
    return Section(
        name="effects",
        title="Sinks: do they matter?",
        summary=tuple(in_short(one) for one in found),
        limits=(
            *(f"The edit {word} is not made: {reason}." for word, reason in left.items()),
            "A small change of loss does not prove that a sink is of no use: attention moves to other keys, as the "
            "migration table says.",
        ),
        columns=defined(tables.values(), COLUMNS | OF_TASKS),
        configuration={"sources": "first", "edits": subject.settings.edits, "head": str(strongest)},
        tables=tables,
        figures={
            **{f"edit_{number}": one.plot("excess") for number, one in enumerate(found)},
            "migration": migration_maps(found[0]),
        },
        headlines=tuple(of_edits(tables["edits"], effect_figures(found), one.per)),
    )


def dose(subject: Subject) -> Section:
    """How the effect grows with the amount that is taken from the sink."""
    return dose_of(subject, subject.text_windows)


def dose_of(subject: Subject, prompts: Any) -> Section:
    """The same on prompts as `lens.effect` takes them."""
    amounts = subject.settings.doses
    found = lens.effect(
        subject.model,
        prompts,
        edits.Mask("first"),
        amounts=amounts,
        controls=("mass",),
        seed=subject.seed,
        progress=subject.progress,
    )
    table = by_word(found.table())
    return Section(
        name="dose",
        title="Sinks: dose and response",
        summary=of_kind(found.findings(), "dose", "trend", "mass"),
        limits=("The same control keys are edited at every amount.",),
        columns=defined([table], COLUMNS | OF_TASKS),
        configuration={"amounts": list(amounts), "edit": "mask", "sources": "first"},
        tables={"curve": table},
        figures={"curve": found.plot()},
    )


def streaming(subject: Subject) -> Section:
    """What a cache of the first few and the last keys keeps, and what the windowed run costs."""
    texts = subject.text_windows
    length = len(texts[0])
    windows = sorted({max(1, length // 8), max(1, length // 4)})
    found = [
        heads.streaming(subject.model, texts, first=first, last=last, progress=subject.progress)
        for last in windows
        for first in _FIRST
    ]
    table = pd.concat([one.summary(seed=subject.seed) for one in found], ignore_index=True)
    return Section(
        name="streaming",
        title="Sinks: a cache of the first and the last keys",
        summary=tuple(
            sentence for one in found for sentence in of_kind(one.findings(), "kept", "loss")
        ),
        limits=of_kind(found[0].findings(), "limit"),
        columns=defined([table], COLUMNS),
        configuration={"first": list(_FIRST), "last": windows},
        tables={"policies": table},
        figures={"policies": streaming_curves(table)},
        headlines=tuple(of_streaming(table, "policies")),
    )


def first_token(subject: Subject) -> Section:
    """What hangs on the first token: with BOS and without, and how active its heads are on other text."""
    texts, model, seed = subject.text_windows, subject.model, subject.seed
    chosen = strongest_heads(subject, _HEADS)
    domains = _domains(subject)
    active = heads.activity(model, domains, heads=chosen, progress=subject.progress)
    tables, figures = {"activity": active.table()}, {"activity": active.plot()}
    summary = of_kind(active.findings(), "dormant", "switching")
    limits: list[str] = [*of_kind(active.findings(), "limit")]
    if model.bos_id is None:
        limits.append(
            "The model has no BOS token, so the text was not compared with and without it."
        )
    else:
        both = bos_pair(model, texts)
        pair = {
            name: lens.effect(
                model, ids, edits.Mask(), controls=("mass",), seed=seed, progress=subject.progress
            )
            for name, ids in both.items()
        }
        rates = sinks.emergence(model, texts, over="bos", seed=seed, progress=subject.progress)
        summary = [
            *of_kind(rates.findings(), "rate"),
            *(text for reach in pair for text in reach_words(pair, reach)),
            *summary,
        ]
        tables |= {"bos": by_word(by_reach(pair)), "bos_layers": rates.table()}
        figures |= {"bos": reach_points(by_reach(pair)), "bos_layers": rates.plot()}
    return Section(
        name="first_token",
        title="Sinks: the first token, BOS and other texts",
        summary=tuple(summary),
        limits=(*limits, f"Only the {len(chosen)} heads that park most were switched off."),
        columns=defined(tables.values(), COLUMNS),
        configuration={"heads": [str(head) for head in chosen], "domains": list(domains)},
        tables=tables,
        figures=figures,
        headlines=tuple(
            of_conditions(
                tables["bos_layers"],
                "with BOS",
                "without BOS",
                "The first token is a sink in {value} of heads with BOS in front, in {baseline} without it.",
                "the same text without BOS",
                "bos_layers",
            )
            if "bos_layers" in tables
            else ()
        ),
    )


def _domains(subject: Subject) -> dict[str, list[list[int]]]:
    """A few windows of the run's text, of another embedded text, and of random tokens."""
    texts = subject.text_windows[:_FEW]
    name = next(one for one in _OTHERS if one != subject.config.prompts.text_name)
    ids = subject.model.encode(prompts.text(name))
    others = windows(ids, len(texts[0]), around(subject.model))[: len(texts)]
    random = control_prompts(subject.model, texts, subject.seed)["random"]
    return {"the run's text": texts, name: others, "random tokens": random}


def strongest_heads(subject: Subject, count: int) -> list[HeadId]:
    """The heads whose first token receives most, as the detection found."""
    table = subject.run.section("detection").tables["heads"]
    rows = table.sort_values("alpha", ascending=False, kind="stable").head(count)
    return [HeadId(int(row["layer"]), int(row["head"])) for row in rows.to_dict("records")]


def by_reach(effects: dict[str, Effect]) -> pd.DataFrame:
    """The tables of several effects, one below the other; `reach` names them."""
    tables = [found.table().assign(reach=name) for name, found in effects.items()]
    return pd.concat(tables, ignore_index=True)


def reach_words(effects: dict[str, Effect], reach: str) -> list[str]:
    """What one of them does."""
    return [f"{reach}: {text}" for text in of_kind(effects[reach].findings(), "effect")]


def edits_of(found: list[Effect]) -> pd.DataFrame:
    """What each edit does, one below the other."""
    return by_word(pd.concat([one.table() for one in found], ignore_index=True))


def migration_of(found: list[Effect]) -> pd.DataFrame:
    """Where the attention goes at each edit, one below the other."""
    moved = [one.migration.assign(edit=one.edit, scope=one.scope) for one in found]
    return by_word(pd.concat(moved, ignore_index=True))


def by_word(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the configuration's words for edits."""
    return table.assign(edit=table["edit"].replace(_WORDS))


def effect_figures(found: list[Effect]) -> dict[str, str]:
    """Word of the configuration -> name of the figure of its effect."""
    return {_WORDS.get(one.edit, one.edit): f"edit_{number}" for number, one in enumerate(found)}


def in_short(effect: Effect) -> str:
    """What the edit does, and whether that is more than editing as much attention elsewhere does."""
    said = effect.findings()
    there = (kind for kind in ("mass", "norm", "size") if kind not in effect.missing)
    control = next((found for kind in there if (found := of_kind(said, kind))), ())
    return " ".join((*of_kind(said, "effect"), *control, *of_kind(said, "moved")))
