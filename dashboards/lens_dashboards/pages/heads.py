"""Page `/run/<id>/heads`: which heads matter, by whose measure?"""

from typing import Any

import pandas as pd
from dash import dcc, html

from lens.figures.columns import column_grid, column_scatter
from lens.figures.style import grid_height
from lens.runs import Run
from lens_dashboards.head_columns import PATTERN, HeadColumns, head_columns
from lens_dashboards.library import Library, sections
from lens_dashboards.pages.maps import MOST_MAPS
from lens_dashboards.pages.next_steps import missing
from lens_dashboards.pages.overview import best_group
from lens_dashboards.pages.parts import (
    Cell,
    card,
    choice,
    crumbs,
    data_table,
    graph,
    link_points,
    note_banner,
    number,
    remember,
    run_banner,
    section_figure,
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
    group = choice(view, "group", groups, best_group(groups), notes)
    columns = head_columns(run, group, view.variant)
    numbers = columns.numbers
    measures = [name for name in numbers if name.startswith("importance: ")]
    effect = next((name for name in measures if "ablation" in name), next(iter(measures), None))
    x = choice(view, "x", numbers, next(n for n in (*_USUAL, *numbers) if n in numbers), notes)
    other = next((n for n in (*_USUAL, *numbers) if n in numbers and n != x), x)
    y = choice(view, "y", numbers, effect or other, notes)
    color = choice(view, "color", ["", *numbers, *columns.classes], "", notes)
    shown = choice(view, "show", ["scatter", "grid"], "scatter", notes)
    rows, query = _filtered(view, columns.table, notes)
    marked = [name for name in view.option("heads").split(",") if name]
    figure, code = _figure(run, view, columns, rows, (x, y, color), shown, marked, group, query)
    sort = choice(view, "sort", numbers, y, notes)
    return [
        *top,
        *[note_banner(text) for text in notes],
        card(
            [
                _controls(view, columns, groups, (x, y, color, group, shown)),
                html.P(f"{columns.labels[y]}: {columns.definitions[y]}", className="definition"),
                *_without_form(view, columns, [x, y] if shown == "scatter" else [y]),
                graph({"points": "heads"}, figure, "All heads", code),  # pyright: ignore[reportArgumentType]
                html.P("Click a head to open it.", className="small"),
            ],
            className="wide",
        ),
        _table(run, view, columns, rows, sort, marked, group),
        _agreement(library, run, view),
    ]


def _without_form(view: Selection, columns: HeadColumns, axes: list[str]) -> list[html.P]:
    """Which of the scores on the axes still count the first token."""
    counted = [columns.labels[name] for name in axes if name not in columns.sink_excluded]
    if view.variant == "raw" or not counted:
        return []
    text = f"No sink-excluded form, so the first token is counted: {', '.join(counted)}."
    return [html.P(text, className="small", id="no-form")]


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
    view: Selection,
    columns: HeadColumns,
    rows: pd.DataFrame,
    chosen: tuple[str, str, str],
    shown: str,
    marked: list[str],
    group: str,
    query: str,
) -> tuple[Any, str]:
    """The figure, its points linked to their heads, and the Python that makes it."""
    x, y, color = chosen
    kept = f".query({query!r}, engine='python')" if query else ""
    begin = (
        "from lens.figures.columns import column_grid, column_scatter\n"
        "from lens.runs import open_run\nfrom lens_dashboards.head_columns import head_columns\n\n"
        f"columns = head_columns(open_run({str(run.path)!r}), {group!r}, {view.variant!r})\n"
        f"rows = columns.table{kept}\n"
    )
    if shown == "grid":
        figure = column_grid(
            rows, y, labels=columns.labels, height=grid_height(rows["layer"].nunique(), 26)
        )
        figure = link_points(figure, lambda *head: view.to_head(*head).url())
        return figure, f"{begin}column_grid(rows, {y!r}, labels=columns.labels)"
    figure = column_scatter(
        rows, x, y, color or None, labels=columns.labels, marked=marked, height=520
    )
    figure = link_points(figure, lambda *head: view.to_head(*head).url())
    arguments = f"rows, {x!r}, {y!r}, {color or None!r}, labels=columns.labels, marked={marked!r}"
    return figure, f"{begin}column_scatter({arguments})"


def _controls(
    view: Selection, columns: HeadColumns, groups: list[str], chosen: tuple[str, ...]
) -> html.Div:
    x, y, color, group, shown = chosen
    axes = {name: columns.labels[name] for name in columns.numbers}
    colors = {"": "layer", **axes, **{name: columns.labels[name] for name in columns.classes}}
    layers = columns.table["layer"]
    ends = [int(layers.min()), int(layers.max())]
    given = view.option("layers").partition("-")[::2]
    between = [int(one) if one.isdigit() else end for one, end in zip(given, ends, strict=True)]
    parts: list[Any] = [
        select("show", "Show", {"scatter": "two scores", "grid": "one score, as a grid"}, shown),
        *([select("x", "Across", axes, x)] if shown == "scatter" else []),
        select("y", "Up" if shown == "scatter" else "Score", axes, y),
        *([select("color", "Colour", colors, color)] if shown == "scatter" else []),
        select("group", "Profile of", {name: name for name in groups}, group),
        html.Fieldset(
            [
                html.Legend("Layers"),
                dcc.RangeSlider(
                    ends[0],
                    ends[1],
                    1,
                    value=between,
                    marks={end: f"{end}" for end in ends},
                    allow_direct_input=False,
                    id={"option": "layers"},
                ),
                remember("layers", between),
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
    head = [
        {"text": columns.labels[name], "title": columns.definitions[name]}
        | (
            {"sort": "descending"}
            if name == sort
            else {"link": view.where(sort=name).url()}
            if name in columns.numbers
            else {}
        )
        for name in shown
    ]
    body: list[list[Cell]] = []
    for row in ordered.head(MOST_ROWS).to_dict("records"):
        name = str(row["name"])
        after = [one for one in marked if one != name] if name in marked else [*marked, name]
        act, link = "remove" if name in marked else "select", view.where(heads=",".join(after))
        body.append(
            [
                (name, view.to_head(row["layer"], row["head"]).url()),
                *[_cell(row[column]) for column in shown],
                (act, link.url(), f"{act} {name}"),
            ]
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
            dcc.Link(
                "open their maps side by side",
                href=view.to("maps").where(heads=",".join(marked[:MOST_MAPS])).url(),
                id="to-maps",
            ),
            " · ",
            dcc.Link("select none", href=view.where(heads="", only="").url()),
        ]
    return card(
        [
            data_table(
                "Heads and their scores",
                ["Head", *head, "Selected"],
                body,
                marked=[number for number, cells in enumerate(body) if cells[0][0] in marked],
            ),
            html.P(tail, className="small"),
        ],
        "Table",
    )


def _cell(value: Any) -> str:
    return str(value).replace("_", " ") if isinstance(value, str) else number(value)


def _agreement(library: Library, run: Run, view: Selection) -> html.Section:
    """Where measures of importance disagree."""
    section = sections(run).get("importance")
    if section is None:
        return missing(library, run, "measures of importance", "heads")
    if "agreement" not in section.figures:
        return card(html.P("This run has no picture of how measures agree: give lens heads two."))
    target = view.to("analysis", "importance")
    return card(
        [
            section_figure(run, section, "agreement"),
            html.P(dcc.Link("All of importance", href=target.url())),
        ],
        "Do the measures agree?",
    )
