"""Whether the tables and traces of a run fit its model and each other: what a reader may rely on.

Each function gives one sentence a problem, naming the column; numbers are looked at by `lens.runs.validation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.head_ids import head_id
from lens.runs.schema import PROMPT_KINDS, SECTIONS
from lens.traces.metrics import METRICS, VARIANTS

if TYPE_CHECKING:
    from lens.runs.sections import Section
    from lens.traces.trace import AttentionTrace

_STATES = ("done", "pending")
_PROMPT = r"p\d{3,}"
_FIGURES = {"detection": "epsilon", "circuit": "faithfulness"}
_ROWS = {
    "detection": (("epsilon", "epsilon", ()),),
    "circuit": (
        ("faithfulness", "ranking", ("absolute", "signed")),
        ("same_size", "circuit", ("circuit", "uniform")),
    ),
}
"""Section -> table, column, and values that it must have; it has no empty places."""


def prompt_problems(table: pd.DataFrame) -> Iterator[str]:
    """Of `prompts.parquet`."""
    yield from _unknown(table, "kind", PROMPT_KINDS)
    yield from _unknown(table, "status", _STATES)
    names = table["prompt_id"]
    if names.duplicated().any():
        yield "column prompt_id has a prompt twice"
    if not names.str.fullmatch(_PROMPT).all():
        yield "column prompt_id has names other than p000, p001 and so on"
    for row in table[["prompt_id", "tokens", "token_ids", "token_strings"]].to_dict("records"):
        counts = {row["tokens"], len(row["token_ids"]), len(row["token_strings"])}
        if len(counts) > 1 or 0 in counts:
            yield f"column tokens: {row['prompt_id']} has differing token counts {sorted(counts)}"
    pending = (table["status"] == "pending").to_numpy()
    for name in ("loss", "loss_repeat", "seconds"):
        values = table[name].to_numpy(float)
        if (np.isinf(values) | (values < 0)).any():
            yield f"column {name} has numbers that are negative or infinite"
        if (~np.isnan(values) & pending).any():
            yield f"column {name} has numbers of prompts that are pending"
    copied = (table["kind"] == "copied").to_numpy()
    if (~np.isnan(table["loss_repeat"].to_numpy(float)) & ~copied).any():
        yield "column loss_repeat has numbers of prompts that are not copied"


def head_problems(
    table: pd.DataFrame, model: Mapping[str, Any], prompts: pd.DataFrame
) -> Iterator[str]:
    """Of `heads.parquet`: names and numbers that are not known, heads that are missing or there twice."""
    yield from _unknown(table, "metric", METRICS)
    yield from _unknown(table, "variant", VARIANTS)
    yield from _unknown(table, "prompt_id", (*PROMPT_KINDS, *prompts["prompt_id"]))
    if table.empty and model.get("attending") == []:
        return  # of mixers alone
    if table.empty:
        yield "it has no rows"
    yield from outside_of(table, model)
    if table.duplicated(["prompt_id", "layer", "head", "metric", "variant"]).any():
        yield "it has a score twice"
    heads = table[["layer", "head"]].drop_duplicates()
    of_layer = heads.groupby("layer").size()
    if short := of_layer[of_layer != model["heads"]].to_dict():
        layer, count = next(iter(short.items()))
        yield f"column head: layer {layer} has {count} of {model['heads']} heads"
    counts = table.groupby(["prompt_id", "metric", "variant"]).size()
    if (counts != len(heads)).any():
        yield f"it lacks scores: not every metric has all {len(heads)} heads"


def section_problems(section: Section, model: Mapping[str, Any]) -> Iterator[str]:
    """Of the tables and figures of a section: what the pages that show them could not do without."""
    for part, table in section.tables.items():
        for problem in (*outside_of(table, model), *_intervals(table)):
            yield f"{part}.parquet: {problem}"
    for part, kinds in SECTIONS.get(section.name, {}).items():
        if section.tables[part].empty:
            yield f"{part}.parquet: it has no rows"
        if "head" in kinds and section.tables[part].duplicated(["layer", "head"]).any():
            yield f"{part}.parquet: it has a head twice"
    if (figure := _FIGURES.get(section.name)) and figure not in section.figures:
        yield f"it lacks the figure {figure}"
    for part, column, rows in _ROWS.get(section.name, ()):
        found = section.tables[part][column]
        if found.isna().any() or not set(rows) <= set(found):
            yield f"{part}.parquet: column {column} lacks values"


def outside_of(table: pd.DataFrame, model: Mapping[str, Any]) -> Iterator[str]:
    """Layers and heads of a table that the model does not have; heads of a mixer are as many as it has."""
    if "mixer" in table:
        if not table["layer"].between(0, model["layers"] - 1).all():
            yield f"column layer has numbers outside of 0 to {model['layers'] - 1}"
        table = table[table["mixer"] == "softmax"]
    numbers = all(
        name in table and pd.api.types.is_integer_dtype(table[name]) for name in ("layer", "head")
    )
    for name in ("layer", "head") if numbers else ():
        if not table[name].between(0, model[f"{name}s"] - 1).all():
            yield f"column {name} has numbers outside of 0 to {model[f'{name}s'] - 1}"
    for name in ("name", "head"):
        if name not in table or not pd.api.types.is_string_dtype(table[name]):
            continue
        named = table[name].dropna()
        named = named[named.str.fullmatch(r"L\d+H\d+")]
        for head in named.drop_duplicates():
            try:
                head_id(head, layers=model["layers"], heads=model["heads"])
            except LensError as error:
                yield f"column {name}: {error}"
        if numbers and name == "name":
            of_row = table.loc[named.index]
            places = "L" + of_row["layer"].astype(str) + "H" + of_row["head"].astype(str)
            if (named != places).any():
                yield "column name has other heads than the columns layer and head"


def _intervals(table: pd.DataFrame) -> Iterator[str]:
    """Measured columns have ends beside them: what is measured is finite, and the ends are in order."""
    triples = [("value", "low", "high"), *((name, f"{name}_low", f"{name}_high") for name in table)]
    for value, low, high in triples:
        numbers = [name for name in (value, low, high) if name in table]
        if not {low, high} <= set(numbers):
            continue
        if not all(pd.api.types.is_numeric_dtype(table[name]) for name in numbers):
            continue
        for name in numbers:
            if np.isinf(table[name].to_numpy(float)).any():
                yield f"column {name} has infinite numbers"
        if (table[low] > table[high]).any():
            yield f"column {low} is above {high}"


def trace_problems(
    trace: AttentionTrace, model: Mapping[str, Any], tokens: list[str] | None
) -> Iterator[str]:
    """Of a trace beside the model and the tokens of the run that it is in; None where nobody knows them."""
    last = max(trace.layers)
    if trace.heads != model["heads"] or last >= model["layers"]:
        yield (
            f"it has {trace.heads} heads in layers up to {last}, the model of the run has "
            f"{model['heads']} in {model['layers']} layers"
        )
    if tokens not in (None, trace.tokens):
        yield "its tokens are not those of prompts.parquet"


def _unknown(table: pd.DataFrame, column: str, known: Any) -> Iterator[str]:
    if unknown := sorted(set(table[column]) - set(known)):
        yield f"column {column} has {', '.join(map(repr, unknown[:3]))}, which is not known"
