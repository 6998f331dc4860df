"""Page `/run/<id>/reading`: why a head attends where it does, pair by pair."""

from typing import Any

import pandas as pd
from dash import html

from lens.figures.reading import pair_map, pair_products
from lens.runs import Run
from lens.runs.sections import Section
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import (
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

_OF_HEADS = {"explain": "sides", "groups": "groups", "removal": "removal", "subspace": "subspace"}
"""Sections of heads, and the table in which each names them."""
_OF_ANSWERS = ("retrieval_kinds", "faithfulness", "mixing", "adversary", "perturbation")
_PARTS = 12  # of each side, in the table
_ROUNDING = 1e-6  # nats


def page(library: Library, view: Selection) -> list[Any]:
    """Pairs to pick from, what wrote the chosen one in words and as a matrix, and what the model does without."""
    return section_page(
        library,
        view,
        _cards,
        title="Reading",
        names=(*_OF_HEADS, *_OF_ANSWERS),
        missed=("explained heads", "explain"),
    )


def _cards(run: Run, view: Selection, known: dict[str, Section], notes: list[str]) -> list[Any]:
    """Of a head that was chosen, as far as the run has sections of heads, and of the whole model."""
    explained = known.get("explain")
    head, parts, halves = "", [], []
    if names := _heads(known):
        head = choice(view, "head", names, names[0], notes)
        parts = [_head_card(names, head)]
    if explained is not None:
        parts += _pair_cards(run, view, explained, head, notes)
        halves = [card(_sides(explained, head), f"What {head} looks there for, over all prompts")]
    halves += [
        card(section_figure(run, one, name), title) for one, name, title in _figures(known, head)
    ]
    return [*parts, html.Div(halves, className="halves")]


def _heads(known: dict[str, Section]) -> list[str]:
    """Heads that were taken apart, or of which parts or directions were taken out."""
    for name, table in _OF_HEADS.items():
        if name in known:
            return list(dict.fromkeys(known[name].tables[table]["name"]))
    return []


def _head_card(names: list[str], head: str) -> html.Section:
    return card(
        [
            html.Div(
                select("head", "Head", {name: name for name in names}, head), className="controls"
            ),
            html.P(
                "Why does this head attend to these keys? Its attention is a softmax of logits, and each logit is a sum over what earlier "
                "parts of the model wrote at the query times what they wrote at the key.",
                className="definition",
            ),
        ],
        "Head",
    )


def _pair_cards(
    run: Run, view: Selection, explained: Section, head: str, notes: list[str]
) -> list[Any]:
    """The pairs of a head on the map, and the chosen one taken apart."""
    if "pairs" not in explained.tables:
        return [card(html.P("The first prompt of this run has no such pair."), "Pairs")]
    pairs = explained.tables["pairs"]
    pairs = pairs[pairs["name"] == head].sort_values(["query", "key"])
    if pairs.empty:
        return [card(html.P(f"The first prompt has no such pair for {head}."), "Pairs")]
    words = {
        f"{row['query']}-{row['key']}": f"{row['query_token']!r} at {row['query']} → {row['key_token']!r} at "
        f"{row['key']} ({row['mass']:.0%})"
        for row in pairs.to_dict("records")
    }
    strongest = pairs.iloc[int(pairs["mass"].to_numpy().argmax())]
    default = f"{strongest['query']}-{strongest['key']}"
    given = choice(view, "pair", words, default, notes)
    query, key = map(int, given.split("-"))
    one = pairs[(pairs["query"] == query) & (pairs["key"] == key)].iloc[0]
    products = explained.tables["products"]
    cells = products[
        (products["name"] == head) & (products["query"] == query) & (products["key"] == key)
    ]
    figure = pair_map(pairs, (query, key))
    points: Any = figure.data[0]
    points.customdata = [
        view.where(head=head, pair=f"{row['query']}-{row['key']}").url()
        for row in pairs.to_dict("records")
    ]
    code = (
        "from lens.runs import open_run\n\n"
        f"tables = open_run({str(run.path)!r}).section('explain').tables\n"
        f"tables['pairs'].query('name == {head!r}'), tables['products'].query('name == {head!r}')"
    )
    said = [html.Li(text, className="found") for text in _sentences(str(one["said"]))]
    return [
        html.Div(
            [
                card(
                    [
                        html.Div(select("pair", "Pair", words, given), className="controls"),
                        html.P(
                            "Each point is a pair of the first prompt: a query, down, that looks at a key, across. A click takes it "
                            "apart.",
                            className="definition",
                        ),
                        graph({"points": "reading"}, figure, f"Pairs of {head} to pick", code),  # pyright: ignore[reportArgumentType]
                    ],
                    "Pick a pair",
                ),
                card(
                    [
                        html.Ul(said, className="findings", id="pair-said"),
                        html.P(
                            "Each cell is what one part of the model wrote at the query times what another wrote at the key, in "
                            "nats, less its mean over the keys that the query sees (contrast). All cells together are the logit above that "
                            "mean.",
                            className="definition",
                        ),
                        graph(
                            "pair-products", pair_products(cells), "Query parts by key parts", code
                        ),
                    ],
                    f"Why {head} attends from {one['query_token']!r} at {query} to {one['key_token']!r} at {key}",
                ),
            ],
            className="halves",
        )
    ]


def _sentences(said: str) -> list[str]:
    """One text as its sentences, each with its full stop."""
    return [f"{part.rstrip('.')}." for part in said.split(". ") if part]


def _sides(explained: Section, head: str) -> list[Any]:
    """Parts of both sides with the largest contrast, as a table."""
    table = explained.tables["sides"]
    rows: list[pd.DataFrame] = [
        table[(table["name"] == head) & (table["side"] == side)].head(_PARTS)
        for side in ("key", "query")
    ]
    cells = [
        (
            str(row["side"]),
            str(row["part"]),
            number(row["contrast"] if abs(row["contrast"]) > _ROUNDING else 0.0),
            _percent(row["share"]),
            f"{_percent(row['share_low'])} to {_percent(row['share_high'])}"
            if row["share_low"] == row["share_low"]
            else "–",
        )
        for row in pd.concat(rows).to_dict("records")
    ]
    head_row = ("side", "part", "contrast, nats", "share", "95 %")
    return [data_table(f"What wrote the queries and keys of {head}", head_row, cells)]


def _percent(share: float) -> str:
    """Without a sign where it rounds to 0."""
    return f"{round(share * 100) or 0:.0f}%"


def _figures(known: dict[str, Section], head: str) -> list[tuple[Section, str, str]]:
    """Of one head: parts over all prompts and by group, without a part or a subspace, components; then of the answers."""
    wanted = (
        ("explain", f"parts_{head.lower()}", "Parts over all prompts"),
        ("removal", f"removal_{head.lower()}", "Without a part: predicted and measured"),
        ("groups", f"offset_{head.lower()}", "Parts by distance"),
        ("groups", f"class_{head.lower()}", "Parts by class of token"),
        ("subspace", f"subspace_{head.lower()}", "Without a subspace, beside controls"),
        ("explain", f"components_{head.lower()}", "Singular components"),
        ("retrieval_kinds", "recall", "Needles without retrieval heads"),
        (
            "faithfulness",
            "sufficiency",
            "Does attention explain the answer: the highest tokens alone",
        ),
        (
            "faithfulness",
            "comprehensiveness",
            "Does attention explain the answer: without the highest tokens",
        ),
        ("mixing", "mixing", "How much tokens mix"),
        ("adversary", "adversary", "Other attention with the same answer"),
        ("perturbation", "logits", "The answer when attention logits change"),
        ("perturbation", "pairs", "The answer when attention moves from token to token"),
    )
    return [
        (known[name], figure, title)
        for name, figure, title in wanted
        if name in known and figure in known[name].figures
    ]
