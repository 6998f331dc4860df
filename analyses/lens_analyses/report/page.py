"""`report.html`: the numbers as one page that needs nothing else, no network either.

The page forbids itself every request by a content security policy; plotly.js is inlined once.
"""

import json
from functools import cache
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from lens.figures.small import strip
from lens.runs.headlines import Headline
from lens.runs.schema import KIND_WORDS
from lens_analyses.report.charts import template
from lens_analyses.report.maps import HeadMap

COLUMNS = (
    ("induction", "raw", "copied"),
    ("previous_token", "raw", "copied"),
    ("duplicate_token", "raw", "copied"),
    ("sink_mass", "raw", "text"),
    ("entropy", "raw", "text"),
    ("entropy", "sink_excluded", "text"),
    ("distance", "sink_excluded", "text"),
    ("effective_keys", "raw", "text"),
    ("top_key", "raw", "text"),
)
"""Metric, variant and the prompts that show it best: the columns of the table of heads."""

TITLES = {
    "sinks": "The attention sinks of",
    "redistribute": "Attention moved elsewhere in",
    "policies": "Sparse attention in",
    "patch": "Where the answer is carried in",
    "mixers": "Mixers beside softmax heads in",
    "explain": "Why heads attend in",
    "vision": "What was looked at by",
    "circuit": "A circuit of",
    "examples": "Top activating examples of the heads of",
    "generate": "What heads look at while this model writes:",
}
"""What a page is called, with the model's name behind it; other runs are about all heads."""

MOST_ROWS = 300  # of a section's table on the page

ROLES = {
    "induction": "induction",
    "sink": "sink",
    "previous_token": "previous",
    "duplicate_token": "duplicate",
}


def page(
    data: dict[str, Any],
    maps: list[HeadMap],
    figures: dict[str, dict[str, Any]],
    picture: str = "",
) -> str:
    """The whole page.

    Args:
        data: the report's numbers.
        maps: pictures of some heads.
        figures: of `charts`, by name.
        picture: what the figure `summary` shows, in words; "" where there is none.
    """
    kinds = list(dict.fromkeys(record["prompts"] for record in data["heads"]))
    made = environment()
    return made.get_template("report.html.j2").render(
        report=data,
        title=f"{_called(data)} {data['setup']['model']['name']}",
        kinds=kinds,
        kind_names=KIND_WORDS,
        grids=_choices(figures, data),
        columns=_columns(kinds, data),
        rows=_rows(kinds, data),
        sink_heads=_sink_heads(kinds, data) if kinds else {},
        maps=maps,
        most_rows=MOST_ROWS,
        picture=picture,
        style=Markup(source_of(made, "report.css")),
        script=Markup(source_of(made, "shared.js") + source_of(made, "report.js")),
        plotly=Markup(get_plotlyjs()),
        payload=Markup(
            embedded_json(
                {
                    "template": template(),
                    "figures": figures,
                    "maps": [shown.zoomable for shown in maps],
                }
            )
        ),
    )


def _called(data: dict[str, Any]) -> str:
    """What the page is called, without the name of the model."""
    if data["what"] == "mixers" and data["setup"]["model"].get("attending") == []:
        return "The mixers of"
    return TITLES.get(data["what"], "The attention heads of")


@cache
def environment() -> Environment:
    """The templates of every page, with the filters that write numbers."""
    made = Environment(
        loader=PackageLoader("lens_analyses.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        number=number, percent=percent, interval=interval, value=value, strip=strip_of
    )
    return made


def source_of(made: Environment, name: str) -> str:
    """A style sheet or script that stands beside the templates."""
    assert made.loader is not None
    return made.loader.get_source(made, name)[0]


def number(value: float | None, unit: str = "") -> str:
    """A number for people: three significant digits, whole tokens and positions whole."""
    if value is None:
        return "–"
    if unit == "position":
        return f"{value:.0f}"
    if unit == "probability":
        return f"{value:.2f}"
    return (
        f"{value:.2f}"
        if abs(value) < 10
        else f"{value:.1f}"
        if abs(value) < 100
        else f"{value:,.0f}"
    )


def value(given: Any) -> str:
    """Any value of a section's table, for people."""
    if given is None:
        return "–"
    if isinstance(given, float):
        return f"{given:.3g}" if abs(given) < 1000 else f"{given:,.0f}"
    return str(given)


def strip_of(headline: dict[str, Any]) -> str:
    """The strip of a headline as a data URI."""
    one = Headline.from_json(headline)
    drawn = strip(one.value, *one.ends, one.baseline, one.against)
    return f"data:image/svg+xml,{quote(drawn)}"


def signed(value: float | None) -> str:
    """A difference with its sign, three significant digits."""
    return "–" if value is None else f"{value:+z.3g}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{value:.0%}" if value >= 0.1 or not value else f"{value:.1%}"


def interval(row: dict[str, Any], unit: str = "") -> str:
    """The interval of a row, or "" where there is none."""
    if row["low"] is None or row["high"] is None:
        return ""
    return f"{number(row['low'], unit)}–{number(row['high'], unit)}"


def embedded_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, cls=PlotlyJSONEncoder, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _choices(figures: dict[str, Any], data: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """For each kind of prompts the grids that can be shown."""
    found: dict[str, list[dict[str, str]]] = {}
    for name in figures:
        if not name.startswith("grid/"):
            continue
        _, kind, metric, variant = name.split("/")
        known = data["metrics"][metric]
        without = ", sink excluded" if variant == "sink_excluded" else ""
        choice = {
            "key": f"{metric}/{variant}",
            "label": known["label"] + without,
            "definition": f"{known['definition']} Unit: {known['unit']}.",
        }
        found.setdefault(kind, []).append(choice)
    return found


def _columns(kinds: list[str], data: dict[str, Any]) -> list[dict[str, Any]]:
    made = []
    for metric, variant, prefers in COLUMNS:
        if metric not in data["metrics"]:
            continue
        known = data["metrics"][metric]
        made.append(
            {
                "metric": metric,
                "variant": variant,
                "kind": prefers if prefers in kinds else kinds[0],
                "label": known["label"] + (", no sink" if variant == "sink_excluded" else ""),
                "unit": known["unit"],
                "definition": known["definition"],
            }
        )
    return made


def _rows(kinds: list[str], data: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a head with a cell per column."""
    keys = ("prompts", "metric", "variant", "layer", "head")
    cells = {tuple(record[key] for key in keys): record for record in data["heads"]}
    tags: dict[tuple[int, int], list[str]] = {}
    for finding in data["summary"]:
        for head in finding["heads"] if finding["found"] else ():
            tags.setdefault((head["layer"], head["head"]), []).append(ROLES[finding["kind"]])
    columns = _columns(kinds, data)
    return [
        {
            "name": f"L{layer}H{head}",
            "order": index,
            "tags": tags.get((layer, head), []),
            "cells": [
                cells[column["kind"], column["metric"], column["variant"], layer, head]
                for column in columns
            ],
        }
        for index, (layer, head) in enumerate(sorted({key[3:] for key in cells}))
    ]


def _sink_heads(kinds: list[str], data: dict[str, Any]) -> dict[str, Any]:
    """The heads whose first token receives most, with what else describes a sink."""
    kind = "text" if "text" in kinds else kinds[0]
    names = ("sink_mass", "sink_rate", "top_key", "top_key_mass")
    by_head: dict[tuple[int, int], dict[str, Any]] = {}
    for record in data["heads"]:
        if record["prompts"] == kind and record["variant"] == "raw" and record["metric"] in names:
            by_head.setdefault((record["layer"], record["head"]), {})[record["metric"]] = record
    found = [
        {"name": f"L{layer}H{head}", **parts}
        for (layer, head), parts in by_head.items()
        if (parts["sink_mass"]["value"] or 0) > data["sinks"]["epsilon"]
    ]
    found.sort(key=lambda one: -one["sink_mass"]["value"])
    return {"kind": kind, "total": len(by_head), "heads": found}
