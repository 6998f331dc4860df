"""Page `/run/<id>/heads`: which heads matter, by whose measure?"""

from typing import Any

import pandas as pd
from dash import dcc, html

from lens.figures.columns import column_grid, column_scatter
from lens.runs import Run
from lens_dashboards.head_columns import PATTERN, HeadColumns, head_columns
from lens_dashboards.library import Library
from lens_dashboards.library import section as read_section
from lens_dashboards.pages.overview import best_group
from lens_dashboards.pages.parts import (
    card,
    crumbs,
    graph,
    missing,
    named,
    note_banner,
    number,
    run_banner,
    select,
)
from lens_dashboards.selection import Selection

MOST_ROWS = 200
_SHOWN = 8  # columns of scores in the table
_USUAL = ("induction", "previous_token", "first_token", "entropy")


def page(library: Library, view: Selection) -> list[Any]:
    """Two scores of every head as axes, or one as a grid; the table; where the measures disagree."""
    run = library.run(view.run)
    top = [crumbs(run, view), html.H1("Heads"), *run_banner(run)]
    groups = list(dict.fromkeys(run.heads["prompt_id"]))
    notes: list[str] = []
    group = _known(view, "group", groups, best_group(groups), notes)
    variant = _known(view, "variant", ["raw", "sink_excluded"], "raw", notes)
    columns = head_columns(run, group, variant)
    numbers = columns.numbers
    effect = next((name for name in numbers if name.startswith("importance: ablation")), None)
    x = _known(view, "x", numbers, next(n for n in (*_USUAL, *numbers) if n in numbers), notes)
    y = _known(view, "y", numbers, effect or next(n for n in numbers[::-1] if n != x), notes)
    color = _known(view, "color", ["", *numbers, *columns.classes], "", notes)
    shown = _known(view, "show", ["scatter", "grid"], "scatter", notes)
    rows, query = _filtered(view, columns.table, notes)
    marked = [name for name in view.option("heads").split(",") if name]
    figure, code = _figure(
        run, columns, rows, (x, y, color), shown, marked, (group, variant), query
    )
    sort = _known(view, "sort", numbers, y, notes)
    return [
        *top,
        *[note_banner(text) for text in notes],
        card(
            [
                _controls(view, columns, groups, (x, y, color, group, variant, shown)),
                html.P(f"{columns.labels[y]}: {columns.definitions[y]}", className="definition"),
                graph({"points": "heads"}, figure, "All heads", code),  # pyright: ignore[reportArgumentType]
                html.P("Click a head to open it.", className="small"),
            ],
            className="wide",
        ),
        _table(run, view, columns, rows, sort, marked, group),
        _agreement(run),
    ]


def _known(view: Selection, option: str, known: list[str], default: str, notes: list[str]) -> str:
    """The option, or the default and a note where it is not one of those known here."""
    value = view.option(option)
    if not value:
        return default
    if value not in known:
        notes.append(f"This run has no {option} {value!r}; {default or 'none'} is shown.")
        return default
    return value


def _filtered(view: Selection, table: pd.DataFrame, notes: list[str]) -> tuple[pd.DataFrame, str]:
    """The heads that pass the filters, and the pandas query that keeps them."""
    kept: list[str] = []
    if layers := view.option("layers"):
        first, _, last = layers.partition("-")
        if first.isdigit() and last.isdigit() and int(first) <= int(last):
            if int(first) > table["layer"].min() or int(last) < table["layer"].max():
                kept.append(f"{int(first)} <= layer <= {int(last)}")
        else:
            notes.append(f"Layers are two numbers, e.g. 0-5, not {layers!r}; all are shown.")
    if (pattern := view.option("pattern")) and PATTERN in table:
        kept.append(f"`{PATTERN}` == {pattern!r}")
    if view.option("only"):
        kept.append(f"head in {view.option('heads').split(',')!r}")
    query = " and ".join(kept)
    rows = table.query(query, engine="python") if query else table
    if rows.empty:
        notes.append("No head passes these filters; all heads are shown.")
        return table, ""
    return rows, query


def _figure(
    run: Run,
    columns: HeadColumns,
    rows: pd.DataFrame,
    chosen: tuple[str, str, str],
    shown: str,
    marked: list[str],
    source: tuple[str, str],
    query: str,
) -> tuple[Any, str]:
    """The figure, its points linked to their heads, and the Python that makes it."""
    x, y, color = chosen
    kept = f".query({query!r}, engine='python')" if query else ""
    begin = (
        "from lens.figures.columns import column_grid, column_scatter\n"
        "from lens.runs import open_run\nfrom lens_dashboards.head_columns import head_columns\n\n"
        f"columns = head_columns(open_run({str(run.path)!r}), {source[0]!r}, {source[1]!r})\n"
        f"rows = columns.table{kept}\n"
    )
    if shown == "grid":
        figure = column_grid(rows, y, labels=columns.labels, height=_height(rows))
        heat: Any = figure.data[0]
        heat.customdata = [
            [_link(run, int(layer), int(head)) for head in heat.x] for layer in heat.y
        ]
        return figure, f"{begin}column_grid(rows, {y!r}, labels=columns.labels)"
    figure = column_scatter(
        rows, x, y, color or None, labels=columns.labels, marked=marked, height=520
    )
    for trace in figure.data:
        points: Any = trace
        points.customdata = [_link(run, *map(int, name[1:].split("H"))) for name in points.text]
    arguments = f"rows, {x!r}, {y!r}, {color or None!r}, labels=columns.labels, marked={marked!r}"
    return figure, f"{begin}column_scatter({arguments})"


def _height(rows: pd.DataFrame) -> int:
    return min(760, 150 + 26 * max(4, int(rows["layer"].nunique())))


def _link(run: Run, layer: int, head: int) -> str:
    return Selection(page="head", run=run.id, layer=layer, head=head).url()


def _controls(
    view: Selection, columns: HeadColumns, groups: list[str], chosen: tuple[str, ...]
) -> html.Div:
    x, y, color, group, variant, shown = chosen
    axes = {name: columns.labels[name] for name in columns.numbers}
    colors = {"": "layer", **axes, **{name: columns.labels[name] for name in columns.classes}}
    layers = columns.table["layer"]
    low, _, high = view.option("layers").partition("-")
    parts: list[Any] = [
        select("show", "Show", {"scatter": "two scores", "grid": "one score, as a grid"}, shown),
        *([select("x", "Across", axes, x)] if shown == "scatter" else []),
        select("y", "Up" if shown == "scatter" else "Score", axes, y),
        *([select("color", "Colour", colors, color)] if shown == "scatter" else []),
        select("group", "Profile of", {name: name for name in groups}, group),
        select(
            "variant",
            "First token",
            {"raw": "counted (raw)", "sink_excluded": "left out (sink excluded)"},
            variant,
        ),
        html.Fieldset(
            [
                html.Legend("Layers"),
                dcc.RangeSlider(
                    int(layers.min()),
                    int(layers.max()),
                    1,
                    value=[
                        int(low) if low.isdigit() else int(layers.min()),
                        int(high) if high.isdigit() else int(layers.max()),
                    ],
                    marks={int(end): f"{end}" for end in (layers.min(), layers.max())},
                    allow_direct_input=False,
                    id={"option": "layers"},
                ),
            ],
            className="control slider",
        ),
    ]
    if PATTERN in columns.table:
        kinds = sorted(set(columns.table[PATTERN].dropna()))
        options = {"": "all", **{kind: kind.replace("_", " ") for kind in kinds}}
        parts.append(select("pattern", "Pattern", options, view.option("pattern")))
    return html.Div(parts, className="controls")


def _table(
    run: Run,
    view: Selection,
    columns: HeadColumns,
    rows: pd.DataFrame,
    sort: str,
    marked: list[str],
    group: str,
) -> html.Section:
    """The heads, the highest of the chosen column first; each can be selected."""
    effects = [name for name in columns.numbers if name.startswith("importance: ")]
    usual = [name for name in _USUAL if name in columns.numbers]
    shown = list(dict.fromkeys([sort, *effects, *usual, *columns.numbers]))[:_SHOWN]
    shown += [PATTERN] * (PATTERN in rows)
    ordered = rows.sort_values(sort, ascending=False, kind="stable", na_position="last")
    head = html.Thead(
        html.Tr(
            [
                html.Th("Head", scope="col"),
                *[
                    html.Th(
                        columns.labels[name]
                        if name == sort or name not in columns.numbers
                        else dcc.Link(columns.labels[name], href=view.where(sort=name).url()),
                        scope="col",
                        title=columns.definitions[name],
                        **{"aria-sort": "descending"} if name == sort else {},  # pyright: ignore[reportArgumentType]
                    )
                    for name in shown
                ],
                html.Th("Selected", scope="col"),
            ]
        )
    )
    body = []
    for row in ordered.head(MOST_ROWS).to_dict("records"):
        name = str(row["head"])
        after = [one for one in marked if one != name] if name in marked else [*marked, name]
        body.append(
            html.Tr(
                [
                    html.Td(dcc.Link(name, href=_link(run, row["layer"], row["number"]))),
                    *[html.Td(_cell(row[column]), className="number") for column in shown],
                    html.Td(
                        dcc.Link(
                            "remove" if name in marked else "select",
                            href=view.where(heads=",".join(after)).url(),
                            title=f"{'remove' if name in marked else 'select'} {name}",
                        )
                    ),
                ],
                className="marked" if name in marked else "",
            )
        )
    left = len(ordered) - len(body)
    tail: list[Any] = [
        f"{len(ordered)} heads" + (f", the last {left} not shown. " if left > 0 else ". "),
        html.A("all columns (CSV)", href=f"/api/run/{run.id}/columns.csv?group={group}"),
    ]
    if marked:
        only = bool(view.option("only"))
        tail += [
            f" · {len(marked)} selected: ",
            dcc.Link(
                "show all" if only else "show only these",
                href=view.where(only="" if only else "1").url(),
            ),
            " · ",
            dcc.Link("select none", href=view.where(heads="", only="").url()),
        ]
    return card(
        [
            html.Div(
                html.Table([head, html.Tbody(body)], className="runs"),
                className="scroll tall",
                tabIndex=0,
                role="region",
                **named("Heads and their scores"),
            ),
            html.P(tail, className="small"),
        ],
        "Table",
    )


def _cell(value: Any) -> str:
    return str(value).replace("_", " ") if isinstance(value, str) else number(value)


def _agreement(run: Run) -> html.Section:
    """Where measures of importance disagree."""
    if "importance" not in run.sections:
        return missing(run, "measures of importance", "lens heads --model {model}")
    section = read_section(run, "importance")
    if "agreement" not in section.figures:
        return card(html.P("This run has no picture of how measures agree: give lens heads two."))
    target = Selection(page="analysis", run=run.id, section="importance")
    code = (
        "from lens.runs import open_run\n\n"
        f"section = open_run({str(run.path)!r}).section('importance')\nsection.figures['agreement']"
    )
    return card(
        [
            graph("agreement", section.figures["agreement"], "Agreement of the measures", code),
            html.P(dcc.Link("All of importance", href=target.url())),
        ],
        "Do the measures agree?",
    )
