"""Definitions of columns: those of the ends of an interval follow from the column's own."""

from collections.abc import Iterable, Mapping

import pandas as pd


def defined(tables: Iterable[pd.DataFrame], known: Mapping[str, str]) -> dict[str, str]:
    """The definitions that the tables need, in the order of their columns.

    `x_low` and `x_high` are the ends of the 95 % interval of x, `x_baseline` what x would be by
    chance; a column that is not known is left out, and `Section` refuses it.
    """
    found: dict[str, str] = {}
    for column in (str(name) for table in tables for name in table.columns):
        base, _, end = column.rpartition("_")
        if column in known:
            found[column] = known[column]
        elif base in known and end in ("low", "high"):
            found[column] = f"{end.capitalize()} end of the 95 % interval of {base}."
        elif base in known and end == "baseline":
            found[column] = f"{base} of a head that looks at all keys it sees alike."
    return found
