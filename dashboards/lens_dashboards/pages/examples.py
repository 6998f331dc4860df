"""On the page of a head: the texts of a corpus on which it attends most, each with its pair of tokens."""

from typing import Any

import pandas as pd
from dash import dcc, html

from lens.reading.top_examples import WORDS
from lens.runs import Run
from lens_dashboards.library import sections
from lens_dashboards.pages.parts import card, choice, number, select, shade
from lens_dashboards.selection import Selection


def examples_card(run: Run, view: Selection, name: str, notes: list[str]) -> list[Any]:
    """The examples of one head by one measure, the strongest first; nothing where the run has none."""
    section = sections(run).get("examples")
    if section is None:
        return []
    heads, found, strips = (section.tables[part] for part in ("heads", "examples", "strips"))
    known = {by: WORDS.get(by, by) for by in dict.fromkeys(map(str, heads["by"]))}
    usual = "sink_excluded" if view.variant == "sink_excluded" else "attention"
    by = choice(view, "by", known, usual, notes)
    mine, around, row = (
        table[(table["name"] == name).to_numpy() & (table["by"] == by).to_numpy()]
        for table in (found, strips, heads)
    )
    shown = [
        _example(one, around[(around["rank"] == one["rank"]).to_numpy()])
        for one in mine.to_dict("records")
    ]
    return [
        card(
            [
                html.Div(select("by", "By", known, by), className="controls"),
                *[html.P(_typical(one), className="small") for one in row.to_dict("records")],
                html.Ol(shown, className="examples", tabIndex=0)
                if shown
                else html.P("No text has two tokens for it."),
                html.P(
                    dcc.Link("All heads", href=view.to("analysis", "examples").url()),
                    className="small",
                ),
            ],
            f"Texts on which {name} attends most",
        )
    ]


def _typical(row: dict[Any, Any]) -> str:
    chance = number(float(row["random_weights"]))
    return (
        f"The strongest pair of one of {row['n']} texts: {number(float(row['typical']))} on average, "
        f"{number(float(row['typical_low']))} to {number(float(row['typical_high']))}; of any head with random weights "
        f"at most {chance}. The query is framed, its key dashed; tokens are shaded by the weight of its row."
    )


def _example(one: dict[Any, Any], strip: pd.DataFrame) -> html.Li:
    """The value of a pair, and the tokens around it."""
    most = float(strip["weight"].max()) or 1.0
    words: list[Any] = []
    before = None
    for token in strip.to_dict("records"):
        if before is not None and token["place"] != before + 1:
            words.append(html.Span(" … ", className="gap"))
        before = token["place"]
        words.append(_token(token, one, most))
    return html.Li(
        [
            html.P(
                [
                    html.B(number(float(one["value"]))),
                    f" text {one['prompt']}, {one['query_token']!r} ({one['query']}) to {one['key_token']!r} "
                    f"({one['key']}), {one['query'] - one['key']} back; a row that looks at all keys alike: "
                    f"{number(float(one['uniform']))}",
                ],
                className="small",
            ),
            html.Div(words, className="tokens"),
        ]
    )


def _token(token: dict[Any, Any], one: dict[Any, Any], most: float) -> html.Span:
    weight = float(token["weight"])
    share = 0.0 if weight != weight else (max(weight, 0.0) / most) ** 0.5
    place = token["place"]
    kind = (
        "token query" if place == one["query"] else "token key" if place == one["key"] else "token"
    )
    said = "not visible" if weight != weight else number(weight)
    text = str(token["token"]).replace("\n", "⏎").replace("\t", "⇥") or "∅"
    return html.Span(text, className=kind, style=shade(share), title=f"{place} {text!r}: {said}")
