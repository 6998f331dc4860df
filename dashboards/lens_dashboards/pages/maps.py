"""Page `/run/<id>/maps`: up to nine heads of one run or of two, on one prompt, with one zoom and one cursor."""

import re
from itertools import takewhile
from typing import Any

from dash import dcc, html

from lens.common.errors import LensError
from lens.runs import Run
from lens.runs.comparison.pairing import paired_prompts
from lens.runs.folders import BrokenRun
from lens.traces.trace import AttentionTrace
from lens_dashboards.library import Library
from lens_dashboards.pages.head import finished_traces, known_prompt, map_config, prompt_control
from lens_dashboards.pages.parts import (
    card,
    crumbs,
    names_control,
    note_banner,
    python_call,
    run_banner,
    select,
)
from lens_dashboards.selection import Selection

MOST_MAPS = 9
_SIDE = 300  # pixels of a map
_RUNS = 200  # that are offered to compare with


def page(library: Library, view: Selection) -> list[Any]:
    """The maps, what is shown and what could be, and the tokens of the row that was clicked."""
    run = library.run(view.run)
    traces = finished_traces(run)
    notes: list[str] = []
    prompt = known_prompt(view, traces, notes)
    trace = library.trace(run.id, prompt)
    heads = _heads(trace, view.option("heads") or f"L{trace.layers[0]}H0", MOST_MAPS, notes)
    maps = [map_config(view, run, prompt, trace, name) for name in heads]
    chosen = [_chip(view, "heads", heads, name, "") for name in heads]
    title = trace.model
    other = _other(library, view, run, prompt, notes)
    if other is not None and other[2].query_tokens != trace.query_tokens:
        notes.append(f"The rows of {other[0].id} are other tokens, so its maps are not shown.")
        other = None
    if other is not None:
        run_b, prompt_b, trace_b = other
        given = view.option("others") or ",".join(heads)
        theirs = _heads(trace_b, given, MOST_MAPS - len(heads), notes)
        title = " and ".join(dict.fromkeys((trace.model, trace_b.model)))
        a, b = _apart((trace.model, trace_b.model), (run.id, run_b.id))
        maps = [one | {"title": f"{name} of {a}"} for one, name in zip(maps, heads, strict=True)]
        maps += [
            map_config(view, run_b, prompt_b, trace_b, name) | {"title": f"{name} of {b}"}
            for name in theirs
        ]
        chosen = [_chip(view, "heads", heads, name, f" of {a}") for name in heads]
        chosen += [_chip(view, "others", theirs, name, f" of {b}") for name in theirs]
    return [
        crumbs(run, view),
        html.H1(f"Heads of {title} side by side"),
        *run_banner(run),
        *map(note_banner, notes),
        dcc.Store(id="maps-config", data={"side": _SIDE, "maps": maps}),
        dcc.Store(id="maps-mounted"),
        prompt_control(run, traces, prompt),
        _controls(library, view, run, heads, other),
        html.P(["Shown: ", *chosen], id="maps-chosen", className="small"),
        card(
            [
                html.Div(id="maps", className="map-wall"),
                html.P(
                    "Wheel zooms with Ctrl or after a click, drag pans, double click shows everything: in all maps. "
                    "Click a row to shade its keys below.",
                    className="small",
                ),
                python_call(
                    f"from lens.runs import open_run\n\nopen_run({str(run.path)!r}).trace({prompt!r}).view({heads!r})"
                ),
            ],
            "Attention",
        ),
        card(html.Div(id="strip", className="strip"), "Tokens"),
    ]


def _heads(trace: AttentionTrace, words: str, most: int, notes: list[str]) -> list[str]:
    """Those that the trace has, each once."""
    found: dict[str, None] = {}
    for word in filter(None, (one.strip() for one in words.replace(" ", ",").split(","))):
        try:
            found[str(trace.head_id(word))] = None
        except LensError as problem:
            notes.append(f"{problem}.")
    if len(found) > most:
        notes.append(
            f"At most {MOST_MAPS} maps are shown; {', '.join(list(found)[most:])} left out."
        )
    return list(found)[:most]


def _apart(models: tuple[str, str], ids: tuple[str, str]) -> tuple[str, str]:
    """Short names of two runs: their models, or of one model what their ids do not share."""
    if models[0] != models[1]:
        return models
    dates, names = zip(*(_dated(one) for one in ids), strict=True)
    if dates[0] != dates[1] and names[0] == names[1]:
        return dates
    words = [one.split("-") for one in names]
    first, last = (_alike(words[0][::step], words[1][::step]) for step in (1, -1))
    last = min(last, *(len(one) - first - 1 for one in words))  # each keeps a word
    a, b = ("-".join(one[first : len(one) - max(last, 0)]) for one in words)
    return a or names[0], b or names[1]


def _dated(run: str) -> tuple[str, str]:
    """The date that an id begins with, and the rest."""
    match = re.match(r"(\d{4}-\d\d-\d\d)-(.+)", run)
    return (match[1], match[2]) if match else ("", run)


def _alike(a: list[str], b: list[str]) -> int:
    """How many words two lists begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _chip(view: Selection, option: str, heads: list[str], name: str, words: str) -> html.Span:
    """A head, and the link that takes it away."""
    left = [one for one in heads if one != name]
    parts: list[Any] = [f"{name}{words} "]
    if left:
        parts.append(
            dcc.Link(
                "remove",
                href=view.where(**{option: ",".join(left)}).url(),
                title=f"Remove {name}{words}",
            )
        )
    return html.Span(parts, className="chip")


def _other(
    library: Library, view: Selection, run: Run, prompt: str, notes: list[str]
) -> tuple[Run, str, AttentionTrace] | None:
    """The other run, and its prompt of the same tokens."""
    if not view.option("vs"):
        return None
    try:
        other = library.run(view.option("vs"))
        pairs = dict(pair for kind in paired_prompts(run, other).values() for pair in kind)
        if prompt not in pairs:
            raise LensError(
                f"{other.id} has no prompt of the same tokens as {prompt}; choose another prompt or run"
            )
        return other, pairs[prompt], library.trace(other.id, pairs[prompt])
    except LensError as problem:
        notes.append(f"{problem}.")
        return None


def _controls(
    library: Library, view: Selection, run: Run, heads: list[str], other: Any
) -> html.Div:
    """Heads by their names, and another run."""
    runs = [one for one in library.runs() if not isinstance(one, BrokenRun) and one.id != run.id]
    runs.sort(key=lambda one: one.meta["model"]["name"] != run.meta["model"]["name"])  # same tokens
    options = {"": "none", **{one.id: f"{one.id}: {one.title}" for one in runs[:_RUNS]}}
    parts = [names_control("heads", "Heads, with commas", ",".join(heads))]
    parts.append(
        select(
            "vs",
            "Beside another run",
            options,
            view.option("vs") if view.option("vs") in options else "",
        )
    )
    if other is not None:
        parts.append(names_control("others", "Its heads", view.option("others") or ",".join(heads)))
    return html.Div(parts, className="controls")
