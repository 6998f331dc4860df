"""The prompt itself, each token coloured by the attention that it gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.choices import is_whole
from lens.common.colors import VIRIDIS, scale
from lens.common.errors import LensError
from lens.figures.cross import over_time
from lens.figures.head import head_data, provenance
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

MOST_TOKENS = 512
PER_LINE = 16
_MOST_LETTERS = 7
_VISIBLE = str.maketrans({"\n": "↵", "\t": "→", " ": "␣"})


def token_strip(
    trace: AttentionTrace, layer: int, head: int, query: int | None = None, **look: Unpack[Look]
) -> go.Figure:
    """Tokens in reading order, coloured by what one query gives them, or by what all queries give.

    With `query` the colour is its exact probability on each key (q and k must have been kept); without,
    it is alpha, the mean attention from the queries that see the key. At most 512 tokens are shown,
    the last ones up to the query or the first ones of the prompt, and the title says which. Moments of a sound
    that a decoder looks at stand along the seconds instead, all of them.

    Raises:
        LensError: no such query, or exact probabilities cannot be had.

    Example:
        >>> lens.figures.token_strip(trace, 1, 0).layout.title.text
        'L1H0: attention that each token receives'
    """
    name = f"L{layer}H{head}"
    if query is None:
        data = head_data(trace, layer, head, "received")
        seen = data["visible"].values
        values = data["received"].values / np.where(seen > 0, seen, np.nan)
        unit, found = "mean probability", f"{name}: attention that each token receives"
        first = 0
    else:
        if not (is_whole(query) and 0 <= query < trace.queries):
            raise LensError(f"query must be 0 to {trace.queries - 1}, got {query}")
        values = trace.tile(layer, head, (query, query + 1), (0, trace.length))[0]
        unit = "probability"
        best = int(values.argmax())
        found = (
            f"{name}: query {query} {escaped(_shown(trace.query_tokens[query]))} looks most at key {best} "
            f"{escaped(_shown(trace.tokens[best]))}, {values[best]:.1%}"
        )
        middle = best if trace.cross else query
        last = query + 1 if trace.attrs["causal"] else min(middle + MOST_TOKENS // 2, trace.length)
        first = max(0, last - MOST_TOKENS)
    meta = provenance(trace, layer, head, "token_strip") | {"query": query}
    if trace.cross and trace.attrs.get("seconds_per_position"):
        return over_time(trace, values, found, meta, look)
    position = np.arange(first, min(first + MOST_TOKENS, trace.length))
    if len(position) < trace.length:
        found += f" (tokens {position[0]} to {position[-1]} of {trace.length:,})"
    tokens = [_shown(token) for token in trace.tokens[position[0] : position[-1] + 1]]
    labels = [f"{at} {escaped(token)}" for at, token in zip(position, tokens, strict=True)]
    lines = -(-len(position) // PER_LINE)
    figure = go.Figure(
        go.Heatmap(
            z=_lines(values[position], np.nan, lines),
            text=_lines(
                np.array([escaped(_short(token)) for token in tokens], dtype=object), "", lines
            ),
            customdata=_lines(np.array(labels, dtype=object), "", lines),
            texttemplate="%{text}",
            textfont={"size": 11},
            hovertemplate="key %{customdata}: %{z:.4g}<extra></extra>",
            hoverongaps=False,
            zmin=0,
            colorscale=scale(VIRIDIS),
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 12},
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, autorange="reversed")
    return style(
        figure,
        found,
        look,
        height=90 + 28 * lines,
        meta=meta,
    )


def _shown(token: str) -> str:
    """The token with its white space visible."""
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in token.translate(_VISIBLE)
    )


def _short(token: str) -> str:
    return token if len(token) <= _MOST_LETTERS else token[: _MOST_LETTERS - 1] + "…"


def _lines(values: np.ndarray, empty: object, lines: int) -> np.ndarray:
    """[lines, PER_LINE], the last line filled up with `empty`."""
    missing = lines * PER_LINE - len(values)
    return np.concatenate([values, np.full(missing, empty, dtype=values.dtype)]).reshape(lines, -1)
