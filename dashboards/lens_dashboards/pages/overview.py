"""Page `/run/<id>`: anything remarkable here?"""

from typing import Any

import pandas as pd
from dash import dcc, html

from lens import figures as draw
from lens.errors import LensError
from lens.figures.heads import select
from lens.findings import findings
from lens.metrics import METRICS
from lens.runs import Run
from lens_dashboards.library import Library
from lens_dashboards.library import section as read_section
from lens_dashboards.pages.parts import card, crumbs, graph, number, python_call, run_banner
from lens_dashboards.selection import Selection

_GROUP_WORDS = {"text": "all text prompts", "copied": "all copied prompts"}
_NAMED = 10


def page(library: Library, view: Selection) -> list[Any]:
    """Cards, findings, the grid of heads with its selectors, the trend over layers."""
    run = library.run(view.run)
    top = [crumbs(run, view), html.H1(run.title), *run_banner(run)]
    try:
        table = run.heads
    except LensError as error:
        return [*top, card(html.P(str(error)), "No head scores yet", className="empty")]
    groups = list(dict.fromkeys(table["prompt_id"]))
    notes: list[Any] = []
    group = view.group or best_group(groups)
    if group not in groups:
        notes = [
            html.Div(
                f"This run has no prompts {group!r}; {best_group(groups)} is shown.",
                className="banner note",
                role="status",
            )
        ]
        group = best_group(groups)
    view = Selection("overview", run.id, group, view.metric, view.variant)
    grid, trend, found, strongest, definition = figures(run, view)
    return [
        *top,
        *notes,
        dcc.Store(id="run-id", data=run.id),
        dcc.Store(id="overview-link"),
        dcc.Store(id="prompts-of-groups", data=_prompts_of_groups(run, groups)),
        _cards(run),
        card(html.Ul(found, id="findings", className="findings"), "Noteworthy heads"),
        html.Div(
            [
                card(
                    [
                        _controls(run, view, groups),
                        html.P(definition, id="metric-definition", className="definition"),
                        graph("grid", grid, "Grid of heads, layers down, heads across"),
                        html.P(
                            [
                                "Click a head to open it. ",
                                dcc.Link("Maps of all heads", href=f"/run/{run.id}/atlas"),
                            ],
                            className="small",
                        ),
                    ],
                    "Heads",
                    className="wide",
                ),
                html.Div(
                    [
                        card(html.Ol(strongest, id="strongest", className="strongest"), "Highest"),
                        card(graph("by-layer", trend, "The metric over the layers"), "By layer"),
                    ],
                    className="side",
                ),
            ],
            className="columns",
        ),
        *_analyses(run),
        card(
            [
                html.P(
                    [
                        html.A(
                            "heads.csv", href=f"/api/run/{run.id}/heads.csv", download="heads.csv"
                        ),
                        " · ",
                        html.A("report", href=f"/api/run/{run.id}/report.html", target="_blank"),
                        " · ",
                        dcc.Link("provenance", href=f"/run/{run.id}/provenance"),
                    ]
                ),
                python_call(
                    "from lens import figures\nfrom lens.runs import open_run\n\n"
                    f"run = open_run({str(run.path)!r})\n"
                    f'table = run.heads.query("prompt_id == {group!r}")\n'
                    f"figures.head_grid(table, {view.metric!r}, {view.variant!r})"
                ),
            ],
            "Take it with you",
        ),
    ]


def _analyses(run: Run) -> list[Any]:
    """What else was found in this run, first sentence of each analysis."""
    if not run.sections:
        return [
            card(
                html.P(
                    [
                        "No analysis beyond the profile yet: ",
                        html.Code(
                            f"lens heads --model {run.meta['model']['name']} --text-name moby-dick"
                        ),
                        " (or sinks, redistribute) makes a run with importance, patterns and edits.",
                    ]
                ),
                "Analyses",
                className="empty",
            )
        ]
    items = []
    for name in run.sections:
        section = read_section(run, name)
        target = Selection(page="analysis", run=run.id, section=name)
        first = section.summary[0] if section.summary else ""
        items.append(html.Li([dcc.Link(section.title, href=target.url()), f": {first}"]))
    return [card(html.Ul(items, id="analyses"), "Analyses")]


def figures(run: Run, view: Selection) -> tuple[Any, ...]:
    """What changes with the selectors: grid, trend, findings, highest heads, definition."""
    table = run.heads
    metric = METRICS[view.metric]
    variant = view.variant if metric.sink_excluded else "raw"
    cut = table[table["prompt_id"] == view.group]
    rows = select(cut, metric.name, variant)
    scored = rows[rows["value"].notna()].sort_values("value", ascending=False, kind="stable")
    grid = draw.head_grid(cut, metric.name, variant, height=_grid_height(rows))
    trend = draw.metric_by_layer(cut, metric.name, variant, height=280)
    definition = f"{metric.definition} Unit: {metric.unit}."
    if view.variant == "sink_excluded":
        definition += (
            " Shown with the first key left out of each row."
            if metric.sink_excluded
            else " This metric has no sink-excluded form; raw is shown."
        )
    return grid, trend, _finding_items(table), _strongest(run, view, scored), definition


def best_group(groups: list[str]) -> str:
    """The group shown first: copied prompts (they show most kinds of heads), else text."""
    return next((name for name in ("copied", "text") if name in groups), groups[0])


def _grid_height(rows: pd.DataFrame) -> int:
    return min(760, 150 + 26 * max(4, int(rows["layer"].nunique())))


def _controls(run: Run, view: Selection, groups: list[str]) -> html.Div:
    titles = dict(zip(run.prompts["prompt_id"], run.prompts["title"], strict=True))
    options = [
        {"value": name, "label": _GROUP_WORDS.get(name, f"{name}: {titles.get(name, '')}")}
        for name in groups
    ]
    metrics = [{"value": name, "label": metric.label} for name, metric in METRICS.items()]
    variants = [
        {"value": "raw", "label": "counted (raw)"},
        {"value": "sink_excluded", "label": "left out (sink excluded)"},
    ]
    return html.Div(
        [
            _select("Metric", "metric", metrics, view.metric),
            _select("Prompts", "group", options, view.group),
            _select("First token", "variant", variants, view.variant),
        ],
        className="controls",
    )


def _select(label: str, control: str, options: list[dict[str, str]], value: str) -> html.Div:
    return html.Div(
        [
            html.Label(label, htmlFor=control),
            dcc.Dropdown(id=control, options=options, value=value, clearable=False),
        ],
        className="control",
    )


def _finding_items(table: pd.DataFrame) -> list[html.Li]:
    items = [
        html.Li(finding.text, className="found" if finding.found else "none")
        for finding in findings(table)
    ]
    return items or [html.Li("No metric was scored on these prompts.", className="none")]


def _strongest(run: Run, view: Selection, scored: pd.DataFrame) -> list[html.Li]:
    if scored.empty:
        return [html.Li("not scored on these prompts")]
    items = []
    for row in scored.head(_NAMED).to_dict("records"):
        between = (
            "" if row["low"] != row["low"] else f" [{number(row['low'])}, {number(row['high'])}]"
        )
        target = Selection(
            page="head",
            run=run.id,
            layer=row["layer"],
            head=row["head"],
            prompt=_prompts_of_groups(run, [view.group])[view.group],
        )
        items.append(
            html.Li(
                [
                    dcc.Link(f"L{target.layer}H{target.head}", href=target.url()),
                    html.Span(f" {number(row['value'])}{between}"),
                ]
            )
        )
    return items


def _prompts_of_groups(run: Run, groups: list[str]) -> dict[str, str]:
    """The prompt whose trace stands for each group."""
    first = run.prompts.drop_duplicates("kind").set_index("kind")["prompt_id"].to_dict()
    return {group: str(first.get(group, group)) for group in groups}


def _cards(run: Run) -> html.Div:
    prompts, model = run.prompts, run.meta["model"]
    done = prompts[prompts["status"] == "done"]
    losses = done[done["kind"] == "text"]["loss"].dropna()
    repeat = done["loss_repeat"].dropna() if "loss_repeat" in done else pd.Series(dtype=float)
    cells = [
        ("Model", model["name"], f"{model.get('layers')} layers × {model.get('heads')} heads"),
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
        ("BOS", str(run.meta.get("bos")), "sinks depend on the first token"),
    ]
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
