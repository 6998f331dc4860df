"""Page `/run/<id>/sinks`: where is attention parked, and does it matter?"""

from typing import Any

import pandas as pd
from dash import dcc, html

from lens.common.head_ids import HeadId
from lens.figures.columns import column_grid
from lens.runs import Run
from lens.runs.sections import Section
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import (
    card,
    choice,
    graph,
    link_points,
    marked,
    remember,
    section_figure,
    select,
)
from lens_dashboards.pages.section_page import section_page
from lens_dashboards.selection import Selection

SECTIONS = (
    "detection", "mechanism", "kinds", "effects", "first_token", "dose", "streaming", "spectrum",
)  # fmt: skip
_MOST_HEADS = 40


def page(library: Library, view: Selection) -> list[Any]:
    """The rate at a threshold of your choice, the heads above it, what edits of the sink do."""
    return section_page(
        library,
        view,
        _cards,
        title="Sinks",
        names=SECTIONS,
        missed=("analysis of sinks", "sinks"),
    )


def _cards(run: Run, view: Selection, known: dict[str, Section], notes: list[str]) -> list[Any]:
    section = known["detection"]
    curve = section.tables["epsilon"]
    epsilon = _threshold(view, curve, float(section.configuration["epsilon"]), notes)
    heads = section.tables["heads"]
    heads = heads.assign(above=heads["alpha"] > epsilon)
    row = curve.loc[(curve["epsilon"] - epsilon).abs().idxmin()]
    grid = column_grid(
        heads,
        "alpha",
        labels={"alpha": "mean α of key 0"},
        title=f"{int(heads['above'].sum())} of {len(heads)} heads are above ε = {epsilon:g} on average",
        height=min(620, 150 + 22 * max(5, int(heads["layer"].nunique()))),
    )
    grid = link_points(grid, lambda *head: view.to_head(*head).url())
    curve_figure = marked(section.figures["epsilon"], row["epsilon"], row["rate"], "chosen")
    grid_code = (
        "from lens.figures.columns import column_grid\nfrom lens.runs import open_run\n\n"
        f"section = open_run({str(run.path)!r}).section('detection')\n"
        "heads = section.tables['heads']\n"
        "column_grid(heads, 'alpha')"
    )
    usual, every = (section.configuration.get(f"rate{name}") for name in ("", "_over_all_queries"))
    published = (
        f" Where α is the mean over all queries, seen or not (layers have windows), as Gu et al. define it, the "
        f"rate at ε = {section.configuration['epsilon']:g} is {every:.1%} instead of {usual:.1%}."
        if None not in (usual, every) and usual != every
        else ""
    )
    return [
        card(
            [
                _slider(epsilon),
                html.P(
                    f"At ε = {row['epsilon']:g} a head's key 0 is a sink in {row['rate']:.0%} of heads and "
                    f"prompts [{row['low']:.0%}, {row['high']:.0%}] ({row['tokens']} tokens, BOS {row['bos']}, "
                    f"n = {row['n']}); there is no natural threshold, so look at the whole curve.{published}",
                    className="definition",
                ),
                html.Div(
                    [
                        section_figure(
                            run, section, "epsilon", graph_id="epsilon", figure=curve_figure
                        ),
                        graph({"points": "sinks"}, grid, "Mass on the sink by head", grid_code),  # pyright: ignore[reportArgumentType]
                    ],
                    className="halves",
                ),
                _heads(view, heads),
            ],
            "Which heads have a sink",
        ),
        html.Div(
            [
                *[
                    _figure(run, known, "detection", name)
                    for name in ("positions", "layers", "lengths")
                ],
                *[_figure(run, known, "mechanism", name) for name in ("mass_and_value", "massive")],
                *[_figure(run, known, "kinds", name) for name in ("kinds", "tests", "origin")],
            ],
            className="halves",
        ),
        *_effects(run, view, known, notes),
    ]


def _threshold(view: Selection, curve: pd.DataFrame, usual: float, notes: list[str]) -> float:
    given = view.option("epsilon")
    try:
        value = float(given) if given else usual
    except ValueError:
        value = float("nan")
    if not curve["epsilon"].min() <= value <= curve["epsilon"].max():
        notes.append(f"There is no threshold {given!r}; {usual:g} is shown.")
        return usual
    return value


def _slider(epsilon: float) -> html.Div:
    return html.Div(
        html.Div(
            [
                html.Label("Threshold ε", htmlFor='{"option":"epsilon"}'),
                dcc.Slider(
                    0.05,
                    0.95,
                    0.05,
                    value=epsilon,
                    marks={value / 10: f"{value / 10:g}" for value in (1, 3, 5, 7, 9)},
                    allow_direct_input=False,
                    id={"option": "epsilon"},
                ),
                remember("epsilon", epsilon),
            ],
            className="control slider",
        ),
        className="controls",
    )


def _heads(view: Selection, heads: pd.DataFrame) -> html.P:
    above = heads[heads["above"]].sort_values("alpha", ascending=False)
    parts: list[Any] = []
    for row in above.head(_MOST_HEADS).to_dict("records"):
        name = str(HeadId(row["layer"], row["head"]))
        parts += [
            dcc.Link(name, href=view.to_head(row["layer"], row["head"]).url()),
            f" {row['alpha']:.2f}, ",
        ]
    if not parts:
        return html.P("No head is above this threshold on average.", id="sink-heads")
    left = len(above) - _MOST_HEADS
    parts[-1] = parts[-1].rstrip(", ") + (f" and {left} more." if left > 0 else ".")
    return html.P(["Above it: ", *parts], id="sink-heads")


def _effects(run: Run, view: Selection, known: dict[str, Section], notes: list[str]) -> list[Any]:
    """What each edit of the sink does, beside controls, one edit at a time."""
    section = known.get("effects")
    if section is None:
        return []
    names = [name for name in section.figures if name.startswith("edit_")]
    titles = {
        name: str(section.figures[name].layout.title.text or name)  # pyright: ignore[reportAttributeAccessIssue]
        for name in names
    }
    if not names:
        return []
    chosen = choice(view, "edit", names, names[0], notes)
    shown = [chosen, *(name for name in section.figures if name not in names)]
    return [
        card(
            [
                html.Div(select("edit", "Edit", titles, chosen), className="controls"),
                html.Div(
                    [section_figure(run, section, name) for name in shown],
                    className="halves",
                ),
            ],
            "Does it matter: edits of the sink beside controls",
        )
    ]


def _figure(run: Run, known: dict[str, Section], section: str, name: str) -> Any:
    found = known.get(section)
    if found is None or name not in found.figures:
        return html.Div()
    return card(section_figure(run, found, name))
