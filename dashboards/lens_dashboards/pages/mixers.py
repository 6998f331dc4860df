"""Page `/run/<id>/mixers`: what linear and recurrent mixers do, beside the softmax heads of the same model."""

from typing import Any

import numpy as np
import pandas as pd
from dash import html

from lens.figures.mixers import block_masses, mixer_profile
from lens.runs import Run
from lens.runs.sections import Section
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import (
    Cell,
    card,
    choice,
    data_table,
    graph,
    number,
    section_figure,
    select,
)
from lens_dashboards.pages.section_page import section_page
from lens_dashboards.selection import Selection

_SHOWN = {"signed": "with its sign", "absolute": "absolute"}
_NUMBERS = {
    "mass": "mass of a row",
    "negative_share": "negative share",
    "distance": "tokens back",
    "first_share": "first key",
    "entropy": "entropy",
    "half_life": "half-life",
    "rank": "rank of tiles",
}


def page(library: Library, view: Selection) -> list[Any]:
    """All heads by reach and sign; of one head the block map, the weights by distance and its numbers."""
    return section_page(
        library,
        view,
        _cards,
        title="Mixers",
        names=("mixers",),
        missed=("linear or recurrent mixers", "mixers"),
    )


def _cards(run: Run, view: Selection, known: dict[str, Section], notes: list[str]) -> list[Any]:
    found = known["mixers"]
    heads = found.tables["heads"]
    names = {f"{row['name']} {row['mixer']}": row for row in heads.to_dict("records")}
    first = next(iter(names))
    head = choice(view, "head", names, first, notes)
    shown = choice(view, "shown", _SHOWN, "signed", notes)
    row = names[head]
    return [
        card(section_figure(run, found, "heads"), "Every head"),
        card(
            html.Div(
                [
                    select("head", "Head", {name: name for name in names}, head),
                    select("shown", "Mass", _SHOWN, shown),
                ],
                className="controls",
            ),
            "One head",
        ),
        html.Div(
            [_map_card(run, found, row, shown), _profile_card(run, found, row)], className="halves"
        ),
        card(_numbers(row), f"{row['name']}: {row['mixer']}"),
    ]


def _rows(found: Section, table: str, row: dict[Any, Any]) -> pd.DataFrame | None:
    """The rows of a head in a table of the section; None where it is not there."""
    if table not in found.tables:
        return None
    whole = found.tables[table]
    rows = whole[(whole["name"] == row["name"]) & (whole["mixer"] == row["mixer"])]
    return None if rows.empty else rows


def _code(run: Run, table: str, row: dict[Any, Any]) -> str:
    return (
        "from lens.runs import open_run\n\n"
        f"table = open_run({str(run.path)!r}).section('mixers').tables[{table!r}]\n"
        f"table[(table['name'] == {row['name']!r}) & (table['mixer'] == {row['mixer']!r})]"
    )


def _map_card(run: Run, found: Section, row: dict[Any, Any], shown: str) -> html.Section:
    title = "Blocks of the first window"
    rows = _rows(found, "maps", row)
    if rows is None:
        return card(html.P("This run holds no maps: its windows have too many blocks."), title)
    at = (rows["query_block"].to_numpy(int), rows["key_block"].to_numpy(int))
    values = np.full((int(at[0].max()) + 1, int(at[1].max()) + 1), np.nan)
    values[at] = rows[shown].to_numpy(float)
    name = f"{row['name']}: {row['mixer']}"
    figure = block_masses(values, name, signed=shown == "signed", height=400)
    size = int(found.configuration["block_size"])
    return card(
        [
            graph("mixer-map", figure, f"Block map of {name}", _code(run, "maps", row)),
            html.P(
                f"Blocks of {size} tokens, mean over the queries of a block.", className="small"
            ),
        ],
        title,
    )


def _profile_card(run: Run, found: Section, row: dict[Any, Any]) -> html.Section:
    title = "Weights by distance"
    rows = _rows(found, "profiles", row)
    if rows is None:
        words = "Softmax heads have theirs on their own pages." if row["mixer"] == "softmax" else ""
        return card(html.P(words or "This run holds no profiles of this head."), title)
    figure = mixer_profile(rows, str(row["name"]), height=400)
    return card(
        graph("mixer-profile", figure, f"Weights of {row['name']}", _code(run, "profiles", row)),
        title,
    )


def _numbers(row: dict[Any, Any]) -> html.Div | html.Table:
    """The numbers of the head, with their intervals."""
    body: list[list[Cell]] = []
    for name, words in _NUMBERS.items():
        value = float(row[name])
        ends = [float(row.get(f"{name}_{end}", np.nan)) for end in ("low", "high")]
        between = "" if np.isnan(ends).any() else f"{number(ends[0])} to {number(ends[1])}"
        shown = "no end" if np.isinf(value) else number(value)
        body.append([words, shown, between])
    return data_table(
        f"Numbers of {row['name']}", ["number", "mean over windows", "95 %"], body, row_heads=True
    )
