"""Tables that two runs both have in their sections, row beside row.

The rows of a table are known by the shortest run of its first columns that names each row once; tables
whose rows do not match in the other run are refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens import stats
from lens.common.errors import LensError
from lens.runs.folders import Run
from lens.runs.sections import Section

SECTION_COLUMNS = (
    "section",
    "table",
    "column",
    "rows",
    "a",
    "b",
    "difference",
    "rank_correlation",
    "largest",
    "largest_difference",
)
_MOST_KEYS = 4
_NUMBERED = ("cluster",)  # a number that the method gave, which means nothing in the other run
_HEAD = re.compile(r"L\d+H\d+")
_ENDS = re.compile(r".*[ _](low|high)|low|high|stderr|n|prompts")


@dataclass(frozen=True, eq=False)
class SectionTables:
    """The tables of both runs' sections.

    Attributes:
        table: one row per column of numbers, `SECTION_COLUMNS`: means over the rows that both have,
            their difference, Spearman's correlation, the row that differs most.
        refused: sentences: which tables were not compared and why.
        summaries: section -> its title, and what it found in A and in B.
    """

    table: pd.DataFrame
    refused: tuple[str, ...]
    summaries: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]]


def compare_sections(a: Run, b: Run, *, aligned: bool) -> SectionTables:
    """All tables that both runs have."""
    rows: list[tuple[object, ...]] = []
    sides = [run.readable() for run in (a, b)]
    refused = [problem for _, problems in sides for problem in problems]
    for name in [name for name in sides[0][0] if name in sides[1][0]]:
        first, second = sides[0][0][name], sides[1][0][name]
        for part in [part for part in first.tables if part in second.tables]:
            try:
                keys, merged = side_by_side(first, second, part, aligned=aligned)
            except LensError as error:
                refused.append(str(error))
                continue
            rows += [(name, part, *one) for one in _columns(keys, merged)]
    table = pd.DataFrame(rows, columns=list(SECTION_COLUMNS))
    summaries = {
        name: (first.title, first.summary, sides[1][0][name].summary)
        for name, first in sides[0][0].items()
        if name in sides[1][0]
    }
    return SectionTables(table, tuple(refused), summaries)


def side_by_side(
    a: Section, b: Section, name: str, *, aligned: bool
) -> tuple[list[str], pd.DataFrame]:
    """One table of two sections, merged on its keys.

    Returns:
        The key columns, and a table with them and each column of numbers as `<column> a` and
        `<column> b`.

    Raises:
        LensError: nothing names its rows, the rows are heads of models that cannot be aligned, or
            fewer than half of the rows are in both.
    """
    x, y = a.tables[name], b.tables[name]
    title = f"{a.name}/{name}"
    keys = _keys(x, y)
    if not keys:
        raise LensError(f"{title} is not compared: no columns that both runs have name its rows")
    if not aligned and (
        {"layer", "head"} & set(keys) or x[keys[0]].astype(str).str.fullmatch(_HEAD).all()
    ):
        raise LensError(f"{title} is not compared: its rows are heads of differing models")
    numbers = [
        column
        for column in x.columns
        if column in y.columns and column not in keys and not _ENDS.fullmatch(str(column))
        if all(
            pd.api.types.is_numeric_dtype(table[column])
            and not pd.api.types.is_bool_dtype(table[column])
            for table in (x, y)
        )
    ]
    try:
        merged = x[[*keys, *numbers]].merge(y[[*keys, *numbers]], on=keys, suffixes=(" a", " b"))
    except ValueError as error:
        raise LensError(
            f"{title} is not compared: {', '.join(keys)} are other kinds of values in A than in B"
        ) from error
    if 2 * len(merged) < min(len(x), len(y)) or merged.empty:
        raise LensError(
            f"{title} is not compared: {len(merged)} of its {len(x)} rows in A are among the "
            f"{len(y)} in B"
        )
    return keys, merged


def _keys(x: pd.DataFrame, y: pd.DataFrame) -> list[str]:
    columns = [str(column) for column in x.columns]
    if not columns or columns[0] in _NUMBERED:
        return []
    for count in range(1, min(_MOST_KEYS, len(columns)) + 1):
        keys = columns[:count]
        if not set(keys) <= set(y.columns) or any(_nested(side[keys[-1]]) for side in (x, y)):
            return []
        if not x.duplicated(keys).any() and not y.duplicated(keys).any():
            return keys
    return []


def _nested(values: pd.Series) -> bool:
    """Whether a column holds lists or objects, which name nothing."""
    return bool(values.map(pd.api.types.is_list_like).any())


def _columns(keys: list[str], merged: pd.DataFrame) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for column in [str(one)[:-2] for one in merged.columns if str(one).endswith(" a")]:
        x, y = (merged[f"{column} {side}"].to_numpy(float, na_value=np.nan) for side in "ab")
        both = np.isfinite(x) & np.isfinite(y)
        if not both.any():
            continue
        difference = np.where(both, y - x, np.nan)
        top = int(np.nanargmax(np.abs(difference)))
        found.append(
            (
                column,
                int(both.sum()),
                float(x[both].mean()),
                float(y[both].mean()),
                float(difference[both].mean()),
                stats.spearman(x, y),
                ", ".join(
                    f"{value:g}" if isinstance(value, float) else str(value)
                    for value in merged[keys].iloc[top]
                ),
                float(difference[top]),
            )
        )
    return found
