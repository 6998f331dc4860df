"""What figures of tables share: error bars from interval columns, names of the heads in the rows."""

from typing import Any

import pandas as pd


def whiskers(value: pd.Series, low: pd.Series, high: pd.Series) -> dict[str, Any]:
    """Error bars from `low` to `high`; none where the interval is missing."""
    return {
        "type": "data",
        "symmetric": False,
        "array": (high - value).fillna(0),
        "arrayminus": (value - low).fillna(0),
        "thickness": 1,
        "width": 3,
    }


def head_names(layers: pd.Series, heads: pd.Series) -> list[str]:
    """`L3H5` for every row."""
    return [f"L{layer}H{head}" for layer, head in zip(layers, heads, strict=True)]
