"""Page `/compare?a=&b=`: the same thing in two runs."""

from functools import lru_cache
from typing import Any

from dash import dcc, html

from lens.comparison import Comparison, compare_runs
from lens.errors import LensError
from lens.figures.comparison import comparison_scatter, difference_grid
from lens.metrics import METRICS
from lens.runs import BrokenRun, Run
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import card, graph, named, note_banner, number, select
from lens_dashboards.selection import Selection

_MOST_ROWS = 60
_METRIC = "induction"


def page(library: Library, view: Selection) -> list[Any]:
    """Two runs chosen, every head as a point, the differences, the losses, the settings."""
    runs = [run for run in library.runs() if not isinstance(run, BrokenRun)]
    top: list[Any] = [
        html.Nav(dcc.Link("runs", href="/"), className="crumbs", **named("Breadcrumb")),
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
    names = {run.id: f"{run.title} ({run.id})" for run in runs}
    b = view.option("b") or next(run.id for run in runs if run.id != view.option("a"))
    a = view.option("a") or next(run.id for run in runs if run.id != b)
    choose = card(
        html.Div([select("a", "A", names, a), select("b", "B", names, b)], className="controls two")
    )
    try:
        found = _compare(library.run(a), library.run(b))
    except LensError as error:
        return [*top, choose, card(html.P(str(error), className="problem"), className="error")]
    return [
        *top,
        choose,
        card(
            html.Ul(
                [html.Li(text, className="found") for text in found.sentences], className="findings"
            ),
            "Findings",
        ),
        *_heads(found, view),
        *([_table("Circuits", found.circuits)] if len(found.circuits) else []),
        _table("Losses", found.losses),
        _table("Scores", found.metrics),
        _table("Tables of the analyses that both have", found.sections),
        _table("Settings that differ", found.settings),
        card(html.Ul([html.Li(text) for text in found.limits]), "What this does not show"),
    ]


@lru_cache(maxsize=4)
def _compare(a: Run, b: Run) -> Comparison:
    return compare_runs(a, b)


def _heads(found: Comparison, view: Selection) -> list[Any]:
    """Heads of the same number against each other, or why not."""
    if not found.aligned:
        return [card(html.P(found.refusal), "Heads are not compared", className="empty")]
    notes = []
    kinds = list(dict.fromkeys(found.heads["prompts"]))
    metrics = {name: METRICS[name].label for name in dict.fromkeys(found.heads["metric"])}
    metric = view.option("metric") or (_METRIC if _METRIC in metrics else next(iter(metrics)))
    kind = view.option("group") or kinds[0]
    if metric not in metrics:
        notes.append(f"Not both runs have the score {metric!r}; {_METRIC} is shown.")
        metric = _METRIC
    if kind not in kinds:
        notes.append(f"Not both runs have prompts {kind!r}; {kinds[0]} is shown.")
        kind = kinds[0]
    variant = view.option("variant") if METRICS[metric].sink_excluded else "raw"
    arguments = f"comparison, {metric!r}, {variant!r}, {kind!r}"
    code = (
        "from lens.comparison import compare_runs\nfrom lens.figures import comparison as draw\n"
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
                        select(
                            "variant",
                            "First token",
                            {"raw": "counted (raw)", "sink_excluded": "left out (sink excluded)"},
                            variant,
                        ),
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
    head = html.Thead(
        html.Tr([html.Th(str(name).replace("_", " "), scope="col") for name in table.columns])
    )
    rows = [
        html.Tr(
            [html.Td(number(value) if isinstance(value, float) else str(value)) for value in row]
        )
        for row in table.head(_MOST_ROWS).itertuples(index=False)
    ]
    left = len(table) - len(rows)
    return card(
        [
            html.Div(
                html.Table([head, html.Tbody(rows)]),
                className="scroll tall",
                tabIndex=0,
                role="region",
                **named(title),
            ),
            html.P(
                f"{len(table)} rows"
                + (f", {left} not shown: lens compare has all." if left > 0 else "."),
                className="small",
            ),
        ],
        title,
    )
