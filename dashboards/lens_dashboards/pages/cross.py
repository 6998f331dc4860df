"""A head of cross-attention: the map with the tokens of both sides, and a strip for each."""

from dataclasses import replace
from typing import Any

import numpy as np
from dash import dcc, html

from lens import figures as draw
from lens.common.errors import LensError
from lens.traces.trace import AttentionTrace
from lens_dashboards.pages.parts import card, graph, python_call, shade
from lens_dashboards.selection import Selection

_MOST_LINKS = 512  # tokens of a strip


def map_card(view: Selection, trace: AttentionTrace, code: str) -> html.Section:
    """Target down, source across."""
    layer, head = view.layer, view.head
    figure = draw.block_map(trace, layer, head, height=520)
    return card(
        [
            graph(
                "cross-map",
                figure,
                f"Cross-attention of L{layer}H{head}: tokens of the target down, of the source across",
                f"{code}figures.block_map(trace, {layer}, {head})",
            ),
            html.P("The line goes through the strongest key of each row.", className="small"),
        ],
        "Attention",
        className="wide",
    )


def strips(
    view: Selection, trace: AttentionTrace, prompt: str, code: str, notes: list[str]
) -> list[html.Section]:
    """Tokens of the target, each a link that shows its row, and tokens of the source with what they get."""
    query = view.query
    exact = not trace.tile_refusal(view.layer, view.head)
    if query is not None and not (exact and 0 <= query < trace.queries):
        why = "is no token of the target" if exact else "has no exact row: q and k were not kept"
        notes.append(f"Query {query} {why}; the mean over all rows is shown.")
        query = None
    if query is None:
        values = trace.select((view.layer, view.head))["received"].values / trace.queries
    else:
        row = (query, query + 1)
        values = trace.tile(view.layer, view.head, row, (0, trace.length))[0]
    drawn = bool(trace.attrs.get("latents"))  # a picture that is denoised looks at text
    row = f"place {trace.query_tokens[query or 0]}" if drawn else f"token {query} of the target"
    of = "all rows see" if query is None else f"{row} sees"
    call = f"figures.token_strip(trace, {view.layer}, {view.head}, {query})"
    return [
        card(
            [
                html.P(_links(view, trace, prompt, query), className="token-links"),
                html.P(
                    [
                        "Choose a token to see what it looks at. ",
                        dcc.Link("All rows", href=replace(view, query=None, prompt=prompt).url()),
                    ],
                    className="small",
                ),
            ],
            "Places of the picture (row,column)" if drawn else "Target: queries of the decoder",
        ),
        card(
            [
                *_source(view, trace, values, query, f"{code}{call}"),
                html.P(
                    f"The darkest holds {values.max():.1%}, uniform attention {1 / trace.length:.1%}."
                    if not trace.attrs.get("seconds_per_position")
                    else f"The highest moment holds {values.max():.1%}, uniform attention {1 / trace.length:.2%}.",
                    className="small",
                ),
            ],
            f"{'Text' if drawn else 'Source: keys of the encoder'}, as {of} them",
        ),
    ]


def _source(
    view: Selection, trace: AttentionTrace, values: np.ndarray, query: int | None, code: str
) -> list[Any]:
    """Words shaded; moments of a sound along the seconds; patches on the picture."""
    layer, head = view.layer, view.head
    if trace.attrs.get("seconds_per_position"):
        figure = draw.token_strip(trace, layer, head, query)
        label = f"Attention of L{layer}H{head} along the sound, in seconds"
        return [graph("source-time", figure, label, code)]
    if (trace.attrs.get("patches") or {}).get("first") is not None and trace.attrs.get("picture"):
        try:
            name = str(trace.head_id((layer, head)))
            figure = trace.overlay(name, query=query).plot()
        except LensError:
            pass  # a grid that is not the picture's: the patches by their names
        else:
            call = f"trace.overlay({name!r}, query={query}).plot()"
            label = f"Attention of {name} on the picture"
            return [graph("source-picture", figure, label, code.rpartition("figures.")[0] + call)]
    return [
        html.P(_shaded(trace, values), className="token-links", id="source-strip"),
        python_call(code),
    ]


def _shaded(trace: AttentionTrace, values: np.ndarray) -> list[html.Span]:
    """The tokens of the source on a ground that is darker the more they hold."""
    most = float(values.max()) or 1.0
    found = []
    for place, token in enumerate(trace.tokens[:_MOST_LINKS]):
        share = float(values[place]) / most
        found.append(
            html.Span(
                token.strip() or repr(token),
                title=f"{place} {token!r}: {values[place]:.4g}",
                className="token",
                style=shade(share),
            )
        )
    if trace.length > _MOST_LINKS:
        found.append(html.Span(f"… {trace.length - _MOST_LINKS:,} more"))
    return found


def _links(
    view: Selection, trace: AttentionTrace, prompt: str, query: int | None
) -> list[dcc.Link | html.Span]:
    """The tokens of the target, each with its row's strongest key in its title."""
    best = None
    if "strongest" in trace.dataset:
        best = trace.select((view.layer, view.head))["strongest"].values
    found: list[dcc.Link | html.Span] = []
    for place, token in enumerate(trace.query_tokens[:_MOST_LINKS]):
        title = f"{place} {token!r}"
        if best is not None and not np.isnan(float(best[place])):
            title += f" looks most at {trace.tokens[int(best[place])]!r}"
        found.append(
            dcc.Link(
                token.strip() or repr(token),
                href=replace(view, query=place, prompt=prompt).url(),
                title=title,
                className="token current" if place == query else "token",
            )
        )
    if trace.queries > _MOST_LINKS:
        found.append(html.Span(f"… {trace.queries - _MOST_LINKS:,} more"))
    return found
