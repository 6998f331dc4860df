"""Everything a run knows about each head, as one table: profile scores and columns of its analyses."""

from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from lens.common.errors import LensError
from lens.common.head_ids import HeadId, head_id
from lens.runs import Run
from lens.traces.metrics import METRICS
from lens_dashboards.library import sections

PATTERN = "patterns: pattern"
_NOT_SCORES = ("layer", "head", "n", "prompts", "trials", "key")
_ENDS = ("low", "high", "stderr", "baseline")


@dataclass(frozen=True, eq=False)
class HeadColumns:
    """One row per head.

    Attributes:
        table: `name` ("L3H5"), `layer`, `head`, then the columns, named as in `labels`.
        labels: column -> words for an axis.
        definitions: column -> what it is.
        sink_excluded: columns that leave the first key out.
    """

    table: pd.DataFrame
    labels: dict[str, str]
    definitions: dict[str, str]
    sink_excluded: frozenset[str]

    @cached_property
    def numbers(self) -> list[str]:
        """Columns of numbers that some head has."""
        return [
            name
            for name in self.labels
            if pd.api.types.is_numeric_dtype(self.table[name]) and self.table[name].notna().any()
        ]

    @cached_property
    def classes(self) -> list[str]:
        """Columns of words."""
        return [name for name in self.labels if not pd.api.types.is_numeric_dtype(self.table[name])]


def head_columns(run: Run, group: str, variant: str) -> HeadColumns:
    """Profile scores of one group of prompts, and the columns of every analysis that has rows of heads.

    Args:
        run: to read.
        group: `prompt_id` of the head table.
        variant: of the profile scores; metrics without a sink-excluded form stay raw.

    Raises:
        LensError: no head table.
    """
    long = run.heads[(run.heads["prompt_id"] == group).to_numpy()]
    heads = sorted(set(zip(long["layer"].tolist(), long["head"].tolist(), strict=True)))
    names = [str(HeadId(*pair)) for pair in heads]
    columns: dict[str, pd.Series] = {}
    labels, definitions, excluded = {}, {}, []
    for metric in METRICS.values():
        chosen = variant if metric.sink_excluded else "raw"
        rows = long[((long["metric"] == metric.name) & (long["variant"] == chosen)).to_numpy()]
        if rows["value"].notna().any():
            index = [str(HeadId(*pair)) for pair in zip(rows["layer"], rows["head"], strict=True)]
            columns[metric.name] = pd.Series(rows["value"].to_numpy(float), index)
            without = ", sink excluded" if chosen == "sink_excluded" else ""
            labels[metric.name] = f"{metric.label}{without} ({metric.unit})"
            definitions[metric.name] = f"{metric.definition} Unit: {metric.unit}."
            excluded += [metric.name] if chosen == "sink_excluded" else []
    for section_name, section in sections(run).items():
        if section_name == "heads":  # the others, joined
            continue
        for table_name, table in section.tables.items():
            index = _heads(table)
            if index is None:
                continue
            for column in map(str, table.columns):
                if column in ("name", *_NOT_SCORES) or column.endswith(_ENDS):
                    continue
                where = (
                    section_name
                    if table_name in ("heads", "scores")
                    else f"{section_name}, {table_name}"
                )
                key = f"{where}: {column}"
                columns[key] = pd.Series(table[column].to_numpy(), index)
                labels[key] = f"{column.replace('_', ' ')} ({where.replace('_', ' ')})"
                definitions[key] = section.columns[column]
    frame = pd.DataFrame(columns, index=names)
    frame.insert(0, "head", [head for _, head in heads])
    frame.insert(0, "layer", [layer for layer, _ in heads])
    frame.insert(0, "name", names)
    return HeadColumns(frame.reset_index(drop=True), labels, definitions, frozenset(excluded))


def _heads(table: pd.DataFrame) -> list[str] | None:
    """The head of each row, where every row is another head."""
    found: list[str] | None = None
    if {"layer", "head"} <= set(table) and pd.api.types.is_integer_dtype(table["head"]):
        found = [str(HeadId(*pair)) for pair in zip(table["layer"], table["head"], strict=True)]
    else:
        for column in ("name", "head"):
            if column in table and len(table):
                try:
                    found = [str(head_id(value)) for value in table[column]]
                    break
                except (LensError, TypeError):
                    continue
    return found if found and len(set(found)) == len(found) else None
