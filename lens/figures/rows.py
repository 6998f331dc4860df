"""What figures of tables share: error bars from interval columns, a colour for each class of rows, names of heads."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import ACCENT, BASELINE, LINE

COLORS = (ACCENT, LINE, "#22a884", "#8250df", BASELINE)


def classes(table: pd.DataFrame, column: str) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Colour, name and rows of each class of a column, in the order of the table."""
    for number, (name, rows) in enumerate(table.groupby(column, sort=False)):
        yield COLORS[number % len(COLORS)], str(name), rows


def bars(rows: pd.DataFrame, name: str, *, plain: bool = False) -> dict[str, Any]:
    """Error bars of a column from those of its interval: `<name>_low`, or `low` alone where it is plain."""
    start = "" if plain else f"{name}_"
    return whiskers(rows[name], rows[f"{start}low"], rows[f"{start}high"])


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


def samples(row: pd.Series) -> str:
    """What a row was measured on, "BOS added, n = 8"; of what is no tokens "n = 8"."""
    return f"BOS {row['bos']}, n = {row['n']}" if row["bos"] else f"n = {row['n']}"


def draw_rankings(
    figure: go.Figure, table: pd.DataFrame, over: str, told: list[str], words: str
) -> None:
    """Faithfulness of circuits by signed and by absolute scores, each with its interval.

    Args:
        over: column across, on a log scale; told: columns of the hover behind the KL divergence, as `words` say.
    """
    colors = {"signed": ACCENT, "absolute": LINE}
    for ranking, rows in table.groupby("ranking", sort=False):
        figure.add_scatter(
            x=rows[over],
            line={"color": colors[str(ranking)]},
            y=rows.faithfulness,
            error_y=bars(rows, "faithfulness", plain=True),
            mode="lines+markers",
            name=f"{ranking} scores",
            customdata=rows[["kl", *told]],
            hovertemplate=f"{words}: %{{y:.3f}}, KL %{{customdata[0]:.3g}}",
        )
    figure.update_xaxes(type="log")
    figure.update_yaxes(title="faithfulness")
