"""Page `/run/<id>/redistribution`: what changes when attention is moved off the sink?"""

from typing import Any

from dash import html

from lens.runs import Run
from lens_dashboards.library import Library
from lens_dashboards.library import section as read_section
from lens_dashboards.pages.analysis import figure_code, tables_of
from lens_dashboards.pages.parts import (
    card,
    crumbs,
    findings,
    graph,
    missing,
    note_banner,
    number,
    run_banner,
    select,
)
from lens_dashboards.selection import Selection

_SECTIONS = ("dose", "search", "redistribution")
_COMMAND = "lens redistribute --model {model} --text-name moby-dick --tokens 128 --windows 6"
_FACTS = {
    "gain": "What the task gains (positive: better)",
    "delta_loss": "Loss on held-out text, change in nats a token",
    "kl": "KL divergence on it, nats",
    "flip_rate": "Predictions that change",
}


def page(library: Library, view: Selection) -> list[Any]:
    """One amount at a time: what the task gains and the text loses; then every dose and head."""
    run = library.run(view.run)
    top = [crumbs(run, view), html.H1("Redistribution"), *run_banner(run)]
    sections = [name for name in _SECTIONS if name in run.sections]
    if not sections:
        return [*top, missing(run, "redistribution", _COMMAND)]
    notes: list[str] = []
    return [
        *top,
        findings(read_section(run, name) for name in sections),
        *_amount(run, view, notes),
        *[note_banner(text) for text in notes],
        html.Div(
            [
                card(
                    graph(
                        f"{name}-{figure}",
                        read_section(run, name).figures[figure],
                        f"{read_section(run, name).title}: {figure.replace('_', ' ')}",
                        figure_code(run, name, figure),
                    )
                )
                for name in sections
                for figure in read_section(run, name).figures
            ],
            className="halves",
        ),
        tables_of(run, sections),
        card(
            html.Ul(
                [html.Li(text) for name in sections for text in read_section(run, name).limits]
            ),
            "What this does not show",
        ),
    ]


def _amount(run: Run, view: Selection, notes: list[str]) -> list[Any]:
    """The measured numbers of one amount."""
    tables = [
        table
        for name in _SECTIONS
        if name in run.sections
        for table in read_section(run, name).tables.values()
        if "amount" in table and set(_FACTS) & set(table)
    ]
    if not tables:
        return []
    amounts = sorted({float(value) for table in tables for value in table["amount"]})
    words = {f"{value:g}": f"{value:g}" for value in amounts}
    chosen = view.option("amount") or list(words)[-1]
    if chosen not in words:
        notes.append(f"Amount {chosen!r} was not run; {list(words)[-1]} is shown.")
        chosen = list(words)[-1]
    facts = []
    for table in tables:
        rows = table[(table["amount"] == float(chosen)).to_numpy()]
        if "condition" in rows:
            rows = rows[(rows["condition"] == "sources").to_numpy()]
        for row in rows.head(1).to_dict("records"):
            facts += [
                html.Tr(
                    [
                        html.Th(label, scope="row"),
                        html.Td(number(row[name]), className="number"),
                        html.Td(_interval(row, name), className="number"),
                        html.Td(f"n = {number(row['n'])}" if "n" in row else ""),
                    ]
                )
                for name, label in _FACTS.items()
                if name in row
            ]
    return [
        card(
            [
                html.Div(
                    select("amount", "Share of the mass that is moved", words, chosen),
                    className="controls",
                ),
                html.Table(html.Tbody(facts), className="facts-table", id="amount-facts"),
            ],
            "One amount",
        )
    ]


def _interval(row: dict[Any, Any], name: str) -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return "" if low is None or low != low else f"{number(low)} to {number(high)}"
