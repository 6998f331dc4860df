"""Page `/run/<id>/redistribution`: what changes when attention is moved off the sink?"""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from dash import html

from lens.runs import Run
from lens.runs.sections import Section
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import (
    between,
    card,
    choice,
    named,
    number,
    section_figure,
    select,
)
from lens_dashboards.pages.section_page import section_page
from lens_dashboards.selection import Selection

_SECTIONS = ("dose", "search", "redistribution")
_MEASURED = (*_SECTIONS, "effects")  # that have rows of one rule at one amount
_MEASURES = {
    "gain": "Gain of the task (positive: better)",
    "delta_loss": "Loss on held-out text, change in nats a token",
    "kl": "KL divergence on it, nats",
    "flip_rate": "Predictions that change",
}
_CONDITIONS = {
    "edit": "the sink",
    "size": "as many other keys",
    "mass": "other keys of the same mass",
    "position": "keys at the next positions",
    "self": "the sink, back onto itself",
}


def page(library: Library, view: Selection) -> list[Any]:
    """One rule and amount at a time, with its controls; then every dose and head."""
    return section_page(
        library,
        view,
        _cards,
        title="Redistribution",
        names=_SECTIONS,
        missed=("redistribution", "redistribute"),
    )


def _cards(run: Run, view: Selection, known: dict[str, Section], notes: list[str]) -> list[Any]:
    one = _one_dose([known[name] for name in _MEASURED if name in known], view, notes)
    return [
        *one,
        html.Div(
            [
                card(section_figure(run, known[name], figure))
                for name in _SECTIONS
                if name in known
                for figure in known[name].figures
            ],
            className="halves",
        ),
    ]


def measured(sections: Iterable[Section]) -> pd.DataFrame:
    """Everything that was measured of whole-model edits: a row per rule, amount, condition and measure.

    Columns: `rule`, `amount`, `condition`, `measure` (of gain, delta_loss, kl, flip_rate), `value`, `low`,
    `high`, `n`.
    """
    rows = []
    for section in sections:
        for table in section.tables.values():
            numbers = table.select_dtypes("number")
            if "amount" not in numbers or not set(_MEASURES) & set(numbers):
                continue
            for row, given in zip(
                table.to_dict("records"), numbers.to_dict("records"), strict=True
            ):
                if row.get("scope", "all heads") != "all heads":
                    continue
                rows += [
                    {
                        "rule": str(row.get("edit", section.configuration.get("rule", ""))),
                        "amount": float(given["amount"]),
                        "condition": str(row.get("condition", "edit")),
                        "measure": name,
                        "value": float(given[name]),
                        "low": float(given.get(f"{name}_low", float("nan"))),
                        "high": float(given.get(f"{name}_high", float("nan"))),
                        "n": given.get("n"),
                    }
                    for name in _MEASURES
                    if name in given
                ]
    columns = ["rule", "amount", "condition", "measure", "value", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(columns[:4])


def _one_dose(held: list[Section], view: Selection, notes: list[str]) -> list[Any]:
    """The measured numbers of one rule at one amount, beside its controls."""
    table = measured(held)
    if table.empty:
        return []
    rules = list(dict.fromkeys(table["rule"]))
    rule = choice(view, "rule", rules, rules[0], notes)
    of_rule = table[(table["rule"] == rule).to_numpy()]
    amounts = [f"{amount:g}" for amount in sorted(set(of_rule["amount"]))]
    amount = choice(view, "amount", amounts, amounts[-1], notes)
    rows = of_rule[(of_rule["amount"] == float(amount)).to_numpy()]
    body = [
        html.Tr(
            [
                html.Th(_MEASURES[row["measure"]], scope="row"),
                html.Td(_CONDITIONS.get(row["condition"], row["condition"])),
                html.Td(number(row["value"]), className="number"),
                html.Td(between(row["low"], row["high"]), className="number"),
                html.Td(number(row["n"]), className="number"),
            ]
        )
        for measure in _MEASURES
        for row in rows[(rows["measure"] == measure).to_numpy()].to_dict("records")
    ]
    heading = ("What", "Taken from", "Value", "95 % interval", "n")
    return [
        card(
            [
                html.Div(
                    [
                        select("rule", "Rule", {r: r.replace("_", " ") for r in rules}, rule),
                        select(
                            "amount",
                            "Share of the mass that is moved",
                            {name: name for name in amounts},
                            amount,
                        ),
                    ],
                    className="controls",
                ),
                html.Div(
                    html.Table(
                        [
                            html.Thead(html.Tr([html.Th(word, scope="col") for word in heading])),
                            html.Tbody(body, id="dose-rows"),
                        ]
                    ),
                    className="scroll",
                    tabIndex=0,
                    role="region",
                    **named("One rule at one amount"),
                ),
                html.P(
                    "Measured in this run, all heads at once: "
                    + "; ".join(f"{name} at {_amounts_of(table, name)}" for name in rules),
                    className="small",
                ),
            ],
            "One rule, one amount",
        )
    ]


def _amounts_of(table: pd.DataFrame, rule: str) -> str:
    amounts = sorted(set(table.loc[(table["rule"] == rule).to_numpy(), "amount"]))
    return ", ".join(f"{amount:g}" for amount in amounts)
