"""Page `/compare?a=&b=`: the same thing in two runs."""

from functools import lru_cache
from typing import Any

from dash import html

from lens.common.errors import LensError
from lens.runs import BrokenRun, Comparison, Run, compare_runs
from lens.runs.comparison.headlines import of_comparison
from lens.runs.comparison.pictures import comparison_scatter, difference_grid
from lens.traces.metrics import METRICS
from lens_dashboards.library import Library
from lens_dashboards.pages.headlines import headlines
from lens_dashboards.pages.parts import (
    card,
    choice,
    data_table,
    graph,
    limits,
    note_banner,
    number,
    select,
    trail,
)
from lens_dashboards.pages.words import coded
from lens_dashboards.selection import Selection, usual_metric

_MOST_ROWS = 60


def page(library: Library, view: Selection) -> list[Any]:
    """Two runs chosen, every head as a point, the differences, the losses, the settings."""
    runs = [run for run in library.runs() if not isinstance(run, BrokenRun)]
    top: list[Any] = [
        trail(view, html.Span("compare")),
        html.H1("Compare two runs"),
    ]
    if len(runs) < 2:
        return [
            *top,
            card(
                html.P(
                    f"The folder {library.folder} holds {len(runs)} run; two are needed: lens list"
                ),
                className="empty",
            ),
        ]
    names = {run.id: f"{run.id}: {run.title}" for run in runs}
    b = view.option("b") or next(run.id for run in runs if run.id != view.option("a"))
    a = view.option("a") or _beside(runs, b)
    choose = card(
        html.Div([select("a", "A", names, a), select("b", "B", names, b)], className="controls two")
    )
    try:
        found = _compare(library.run(a), library.run(b))
    except LensError as error:
        return [
            *top,
            choose,
            card(html.P(coded(str(error)), className="problem"), className="error"),
        ]
    return [
        *top,
        choose,
        headlines(view, of_comparison(found)),
        *_heads(found, view),
        card(
            html.Ul(
                [html.Li(text, className="found") for text in found.sentences], className="findings"
            ),
            "All that was found",
        ),
        *([_table("Circuits", found.circuits)] if len(found.circuits) else []),
        _table("Losses", found.losses),
        _table("Scores", found.metrics),
        _table("Tables of the analyses that both have", found.sections),
        _table("Settings that differ", found.settings),
        limits([found]),
    ]


def _beside(runs: list[Run], b: str) -> str:
    """The newest other run, of the same model if there is one."""
    models = {run.id: run.meta["model"]["name"] for run in runs}
    others = [run.id for run in runs if run.id != b]
    return next((one for one in others if models[one] == models.get(b)), others[0])


@lru_cache(maxsize=4)
def _compare(a: Run, b: Run) -> Comparison:
    return compare_runs(a, b)


def _heads(found: Comparison, view: Selection) -> list[Any]:
    """Heads of the same number against each other, or why not."""
    if not found.aligned:
        return [card(html.P(found.refusal), "Heads are not compared", className="empty")]
    plain = {name for name, one in METRICS.items() if not one.sink_excluded}
    shown = found.heads["metric"].isin(plain) | (found.heads["variant"] == view.variant)
    scored = found.heads[shown & found.heads["difference"].notna()]
    if scored.empty:
        why = "The runs share no score of a head of attention: see the tables of their analyses."
        return [card(html.P(why), "Heads are not compared", className="empty")]
    notes = []
    kinds = list(dict.fromkeys(scored["prompts"]))
    kind = choice(view, "group", kinds, kinds[0], notes)
    names = dict.fromkeys(scored.loc[scored["prompts"] == kind, "metric"])
    metrics = {name: METRICS[name].label for name in names}
    metric = choice(view, "metric", metrics, usual_metric(metrics), notes)
    variant = view.variant if METRICS[metric].sink_excluded else "raw"
    if variant != view.variant:
        notes.append(f"{metrics[metric]} has no sink-excluded form; raw is shown.")
    arguments = f"comparison, {metric!r}, {variant!r}, {kind!r}"
    code = (
        "from lens.runs import compare_runs\nfrom lens.runs.comparison import pictures as draw\n"
        "from lens.runs import open_run\n\n"
        f"comparison = compare_runs(open_run({str(found.a.path)!r}), open_run({str(found.b.path)!r}))\n"
    )
    scatter = comparison_scatter(found, metric, variant, kind, height=460)
    grid = difference_grid(found, metric, variant, kind, height=460)
    return [
        *[note_banner(text) for text in notes],
        card(
            [
                html.Div(
                    [
                        select("metric", "Score", metrics, metric),
                        select("group", "Prompts", {name: name for name in kinds}, kind),
                    ],
                    className="controls",
                ),
                html.Div(
                    [
                        graph(
                            "scatter",
                            scatter,
                            "A against B",
                            f"{code}draw.comparison_scatter({arguments})",
                        ),
                        graph(
                            "difference",
                            grid,
                            "B - A of each head",
                            f"{code}draw.difference_grid({arguments})",
                        ),
                    ],
                    className="halves",
                ),
            ],
            "Heads",
        ),
    ]


def _table(title: str, table: Any) -> html.Section:
    if not len(table):
        return card(html.P("None."), title)
    rows = [
        [number(value) if isinstance(value, float) else str(value) for value in row]
        for row in table.head(_MOST_ROWS).itertuples(index=False)
    ]
    left = len(table) - len(rows)
    return card(
        [
            data_table(title, [str(name).replace("_", " ") for name in table.columns], rows),
            html.P(
                f"{len(table)} rows"
                + (f", {left} not shown: lens compare has all." if left > 0 else "."),
                className="small",
            ),
        ],
        title,
    )
