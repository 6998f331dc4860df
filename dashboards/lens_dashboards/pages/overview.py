"""Page `/run/<id>`: anything remarkable here?"""

from typing import Any

import pandas as pd
from dash import dcc, html

from lens import figures as draw
from lens.common.errors import LensError
from lens.common.head_ids import HeadId, layers_in_words
from lens.figures.heads import select as rows_of
from lens.runs import Run
from lens.runs.first_screen import first_screen
from lens.traces.findings import findings
from lens.traces.metrics import METRICS, Metric
from lens_dashboards.library import Library, sections
from lens_dashboards.pages.headlines import headlines
from lens_dashboards.pages.next_steps import next_steps
from lens_dashboards.pages.parts import (
    card,
    choice,
    crumbs,
    graph,
    link_points,
    note_banner,
    number,
    run_banner,
    select,
)
from lens_dashboards.selection import Selection, usual_metric

_GROUP_WORDS = {
    "text": "all text prompts",
    "copied": "all copied prompts",
    "picture": "all pictures",
    "sound": "all sounds",
}
_NAMED = 10
NOT_ATTENDING = (
    "No layer of this model has softmax attention, so that this run has no scores of heads and no traces; the page Mixers has "
    "its heads."
)


def page(library: Library, view: Selection) -> list[Any]:
    """Cards, findings, the grid of heads with its selectors, the trend over layers."""
    run = library.run(view.run)
    top = [crumbs(run, view), html.H1(run.title), *run_banner(run)]
    try:
        table = run.heads
    except LensError as error:
        return [*top, card(html.P(str(error)), "No head scores yet", className="empty")]
    if table.empty:
        return [
            *top,
            headlines(view, first_screen(table, sections(run))),
            card(html.P(NOT_ATTENDING), "No head scores", className="empty"),
        ]
    notes: list[str] = []
    groups = list(dict.fromkeys(table["prompt_id"]))
    group = choice(view, "group", groups, best_group(groups), notes)
    cut = table[(table["prompt_id"] == group).to_numpy()]
    scored = set(cut.loc[cut["value"].notna(), "metric"])
    metric = METRICS[view.option("metric") or usual_metric(scored)]
    variant = view.variant if metric.sink_excluded else "raw"
    prompt = _prompt_of(run, group)
    rows = rows_of(cut, metric.name, variant)
    grid = draw.head_grid(cut, metric.name, variant)
    grid = link_points(grid, lambda layer, head: view.to_head(layer, head, prompt).url())
    code = (
        "from lens import figures\nfrom lens.runs import open_run\n\n"
        f"run = open_run({str(run.path)!r})\n"
        f'table = run.heads.query("prompt_id == {group!r}")\n'
    )
    arguments = f"(table, {metric.name!r}, {variant!r})"
    return [
        *top,
        *map(note_banner, notes),
        headlines(view, first_screen(table, sections(run))),
        html.Details(
            [
                html.Summary("What the scores of the heads say, and what was run"),
                card(
                    html.Ul(_finding_items(table), id="findings", className="findings"),
                    "Noteworthy heads",
                ),
                _cards(run),
            ],
            className="more",
        ),
        html.Div(
            [
                card(
                    [
                        _controls(run, metric.name, groups, group),
                        html.P(
                            _definition(view, metric),
                            id="metric-definition",
                            className="definition",
                        ),
                        graph(
                            {"points": "grid"},
                            grid,
                            "Grid of heads, layers down, heads across",
                            f"{code}figures.head_grid{arguments}",
                        ),
                        html.P(
                            [
                                "Click a head to open it. ",
                                dcc.Link("Maps of all heads", href=view.to("atlas").url()),
                            ],
                            className="small",
                        ),
                    ],
                    "Heads",
                    className="wide",
                ),
                html.Div(
                    [
                        card(
                            html.Ol(
                                _strongest(view, prompt, rows),
                                id="strongest",
                                className="strongest",
                            ),
                            "Highest",
                        ),
                        card(
                            graph(
                                "by-layer",
                                draw.metric_by_layer(cut, metric.name, variant, height=280),
                                "The metric over the layers",
                                f"{code}figures.metric_by_layer{arguments}",
                            ),
                            "By layer",
                        ),
                    ],
                    className="side",
                ),
            ],
            className="columns",
        ),
        *_analyses(library, run, view),
        card(
            html.P(
                [
                    html.A("heads.csv", href=f"/api/run/{run.id}/heads.csv", download=""),
                    " · ",
                    html.A("report", href=f"/api/run/{run.id}/report.html", target="_blank"),
                    " · ",
                    dcc.Link("provenance", href=view.to("provenance").url()),
                ]
            ),
            "Take it with you",
        ),
    ]


def _definition(view: Selection, metric: Metric) -> str:
    text = f"{metric.definition} Unit: {metric.unit}."
    if view.variant == "raw":
        return text
    if metric.sink_excluded:
        return f"{text} Shown with the first key left out of each row."
    return f"{text} This metric has no sink-excluded form; raw is shown."


def _analyses(library: Library, run: Run, view: Selection) -> list[Any]:
    """What else was found in this run, first sentence of each analysis."""
    held = sections(run)
    if not held:
        return [next_steps(library, run)]
    items = []
    for name, section in held.items():
        target = view.to("analysis", name)
        first = section.summary[0] if section.summary else ""
        items.append(html.Li([dcc.Link(section.title, href=target.url()), f": {first}"]))
    return [card(html.Ul(items, id="analyses"), "Analyses")]


def best_group(groups: list[str]) -> str:
    """The group shown first: copied prompts (they show most kinds of heads), else text.

    Raises:
        LensError: there is none, of a model of mixers alone.
    """
    if not groups:
        raise LensError(NOT_ATTENDING)
    return next((name for name in ("copied", "text") if name in groups), groups[0])


def _controls(run: Run, metric: str, groups: list[str], group: str) -> html.Div:
    titles = dict(zip(run.prompts["prompt_id"], run.prompts["title"], strict=True))
    prompts = {name: _GROUP_WORDS.get(name, f"{name}: {titles.get(name, '')}") for name in groups}
    metrics = {name: known.label for name, known in METRICS.items()}
    return html.Div(
        [
            select("metric", "Metric", metrics, metric),
            select("group", "Prompts", prompts, group),
        ],
        className="controls",
    )


def _finding_items(table: pd.DataFrame) -> list[html.Li]:
    items = [
        html.Li(finding.text, className="found" if finding.found else "none")
        for finding in findings(table)
    ]
    return items or [html.Li("No metric was scored on these prompts.", className="none")]


def _strongest(view: Selection, prompt: str, rows: pd.DataFrame) -> list[html.Li]:
    scored = rows[rows["value"].notna()].sort_values("value", ascending=False, kind="stable")
    if scored.empty:
        return [html.Li("not scored on these prompts")]
    items = []
    for row in scored.head(_NAMED).to_dict("records"):
        between = (
            "" if row["low"] != row["low"] else f" [{number(row['low'])}, {number(row['high'])}]"
        )
        link = view.to_head(row["layer"], row["head"], prompt).url()
        name = str(HeadId(row["layer"], row["head"]))
        items.append(
            html.Li([dcc.Link(name, href=link), html.Span(f" {number(row['value'])}{between}")])
        )
    return items


def _prompt_of(run: Run, group: str) -> str:
    """The prompt whose trace stands for a group."""
    first = run.prompts.drop_duplicates("kind").set_index("kind")["prompt_id"].to_dict()
    return str(first.get(group, group))


def _layers(model: dict[str, Any]) -> str:
    """ "4 layers", or which of them have heads."""
    attending = model.get("attending") or []
    if 0 < len(attending) < model.get("layers", 0):
        return f"{layers_in_words(attending)} of {model['layers']}"
    return f"{model.get('layers')} layers"


def _cards(run: Run) -> html.Div:
    prompts, model = run.prompts, run.meta["model"]
    done = prompts[prompts["status"] == "done"]
    losses = done[done["kind"] == "text"]["loss"].dropna()
    repeat = done["loss_repeat"].dropna() if "loss_repeat" in done else pd.Series(dtype=float)
    cells = [
        ("Model", model["name"], f"{_layers(model)} × {model.get('heads')} heads"),
        ("Prompts", f"{len(done)}", f"{number(float(done['tokens'].sum()))} tokens"),
        (
            "Loss on text",
            number(float(losses.mean())) if len(losses) else "–",
            "nats a token" if len(losses) else "no text prompt",
        ),
        (
            "Loss on the second copy",
            number(float(repeat.mean())) if len(repeat) else "–",
            "nats a token, copied prompts" if len(repeat) else "no copied prompt",
        ),
        ("Blocks", str(run.meta.get("block_size")), f"tokens, backend {run.meta.get('backend')}"),
    ]
    if run.bos:
        cells.append(("BOS", run.bos, "sinks depend on the first token"))
    return html.Div(
        [
            html.Div(
                [
                    html.Div(name, className="small"),
                    html.Div(value, className="big"),
                    html.Div(more, className="small"),
                ],
                className="fact",
            )
            for name, value, more in cells
        ],
        className="facts",
    )
