"""Head metrics as CSV or parquet files, for spreadsheets and other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from lens.common.errors import LensError
from lens.common.files import as_path, write_atomically, write_text


class HasTable(Protocol):
    """Any result with a table, such as `HeadScores` or `HeadSimilarity`."""

    def table(self) -> pd.DataFrame:
        """The rows to write."""
        ...


def to_csv(result: pd.DataFrame | HasTable, path: str | Path) -> Path:
    """Write a table, or the table of a result, as UTF-8 CSV; numbers keep all their digits, NaN is empty.

    Text that a spreadsheet would compute, as it begins with `=`, `+`, `-` or `@`, gets an apostrophe.

    Raises:
        LensError: neither a table nor a result with one, or no rows.

    Example:
        >>> lens.runs.to_csv(lens.profile(traces), "heads.csv").name
        'heads.csv'
    """
    path = as_path("path", path)
    write_text(path, csv_text(_table(result)))
    return path


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV, as `to_csv` writes it."""
    texts = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    table = table.assign(**{str(name): table[name].map(_as_text) for name in texts})
    return table.rename(columns=_as_text).to_csv(index=False, lineterminator="\n")


def _as_text(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def to_parquet(result: pd.DataFrame | HasTable, path: str | Path) -> Path:
    """Write a table, or the table of a result, as parquet with its column types.

    Raises:
        LensError: neither a table nor a result with one, or no rows.

    Example:
        >>> import pandas
        >>> path = lens.runs.to_parquet(lens.profile(traces), "heads.parquet")
        >>> pandas.read_parquet(path).equals(lens.profile(traces))
        True
    """
    path = as_path("path", path)
    table = _table(result)
    table.attrs = {}  # notes for people, which are not all JSON
    write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False))
    return path


def _table(result: pd.DataFrame | HasTable) -> pd.DataFrame:
    if isinstance(result, pd.DataFrame):
        table = result.copy()
    elif callable(getattr(result, "table", None)):
        table = result.table()
    else:
        raise LensError(
            f"expected a DataFrame or a result with table(), got {type(result).__name__}; pass "
            "lens.profile(traces) for the head metrics of traces"
        )
    if table.empty:
        raise LensError("the table has no rows; there is nothing to write")
    return table
