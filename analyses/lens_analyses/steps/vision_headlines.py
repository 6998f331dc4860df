"""The chief sentences of pictures: each a number beside its baseline."""

from collections.abc import Iterator, Sequence

import numpy as np

from lens.common.results import with_ends
from lens.runs.headlines import Headline
from lens.stats.intervals import known_mean, over_rows
from lens.stats.verdicts import APART, verdict
from lens.traces.overlays import heads_of
from lens.traces.tiles import sees
from lens.traces.trace import AttentionTrace
from lens.vision._patches import SMALLEST, grid_of, maps, of_uniform, offsets
from lens.vision.knocking import KnockOut
from lens.vision.routes import TextFlow
from lens_analyses.steps.headlines import NATS, beside, change


def strongest(
    title: str, name: str, trace: AttentionTrace, maps: Sequence[str], seed: int
) -> Iterator[Headline]:
    """The patch that rows look at most in one of these maps, as a multiple of what it has under uniform attention.

    Some patch always has most. Map and patch are chosen by every second row, and the number is of the rows between, with its
    interval over them: 1 where rows have no patch in common.
    """
    grid = grid_of(trace)
    start, end = grid.span
    rows, who = grid.span, "patches"
    if trace.cross:
        rows, who = (0, trace.queries), "positions"
    elif trace.attrs["segments"] is not None and end < trace.length:
        rows, who = (end, trace.length), "rows of text"
    if rows[1] - rows[0] < 2:
        return
    even = {layer: _of_rows(trace, layer, rows)[:, start:end] for layer in trace.layers}
    chosen = (0.0, "", 0, np.empty(0))
    for one in maps:
        members = heads_of(trace, one)
        fair = np.mean([even[head.layer] for head in members], 0)
        found = np.mean([trace.tile(*head, rows, grid.span) for head in members], 0)
        times = np.where(fair > 0, found / np.where(fair > 0, fair, 1), np.nan)
        first, rest = known_mean(times[::2], 0), known_mean(times[1::2], 0)
        first = np.where(np.isnan(rest), -np.inf, np.nan_to_num(first))
        best = int(first.argmax())
        if first[best] > chosen[0]:
            chosen = (float(first[best]), one, best, times[1::2, best])
    _, one, best, times = chosen
    if not one:
        return
    low, high = (float(stop) for stop in over_rows(times, seed))
    value, seen = float(known_mean(times)), int(np.isfinite(times).sum())
    if low <= 1:  # chosen as the most, it is no finding as less
        return
    row, column = divmod(int(grid.order[best]), grid.width)
    yield Headline(
        f"{title}, {one}: {who} look at the patch ({row}, {column}) {value:.2f} [{low:.2f}, {high:.2f}] times as much as "
        f"uniform attention does (on the {seen} that had no part in choosing it).",
        *(value, low, high),
        baseline=1.0,
        against="uniform attention",
        figure=name,
    )


def _of_rows(trace: AttentionTrace, layer: int, rows: tuple[int, int]) -> np.ndarray:
    """[rows, keys] uniform attention over what these rows see."""
    seen = sees(trace.dataset, layer, rows)
    return seen / np.maximum(seen.sum(-1, keepdims=True), 1)


def crossing(title: str, name: str, trace: AttentionTrace, seed: int) -> Iterator[Headline]:
    """The head that keeps most in its own row and column, chosen by every second patch and measured on those between."""
    grid = grid_of(trace)
    down, across = offsets(grid)
    cross = (down == 0) | (across == 0)
    even = dict(
        zip(trace.layers, of_uniform(trace, grid.span, lambda one: _share(one, cross)), strict=True)
    )
    chosen = (0.0, None, np.empty(0), 0.0)
    for head, one in maps(trace, grid):
        share, fair = _share(one, cross), even[head.layer]
        times = known_mean(share[::2]) / known_mean(fair[::2])
        if times > chosen[0]:
            chosen = (float(times), head, share[1::2], float(known_mean(fair[1::2])))
    _, head, share, fair = chosen
    if head is None or np.isfinite(share).sum() < 2:
        return
    low, high = (float(end) for end in over_rows(share, seed))
    if low <= fair:
        return
    value = float(known_mean(share))
    yield Headline(
        f"{title}: {head} keeps {value:.0%} [{low:.0%}, {high:.0%}] of its attention on patches in the row and column of the "
        f"patch that looks, uniform attention {fair:.0%}.",
        *(value, low, high),
        baseline=fair,
        against="uniform attention",
        figure=f"{name}_shapes",
    )


def _share(one: np.ndarray, members: np.ndarray) -> np.ndarray:
    """[patches] of the attention on patches; NaN of a row without."""
    total = one.sum(-1)
    return (one * members).sum(-1) / np.where(total > SMALLEST, total, np.nan)


def of_flow(found: TextFlow | None) -> Iterator[Headline]:
    """Image tokens beside as many others, where the text depends on the image most."""
    if found is None:
        return
    at = int(found.kl[0].mean(-1).argmax())
    rows = found.table().set_index("route")
    part, others = (rows.loc[[route]].iloc[at].to_dict() for route in ("image_part", "other_part"))
    if verdict(part["excess_low"], part["excess_high"]) in APART:
        yield beside(
            f"In layer {found.layers[at]} the text's predictions move by {with_ends(part, 'kl')} nats (KL) without "
            f"{part['keys']:.3g} random tokens of the image, without as many others by {with_ends(others, 'kl')}.",
            "kl",
            part,
            others,
            "as many other tokens",
            figure="flow",
            many=len(found.layers),
        )


def of_sinks(found: KnockOut | None) -> Iterator[Headline]:
    """The visual sinks hidden, beside as many random tokens of the image."""
    if found is None:
        return
    rows = {str(row["condition"]): row for row in found.table().to_dict("records")}
    own, other = rows["edit"], rows["size"]
    if verdict(other["excess_low"], other["excess_high"]) in APART:
        yield beside(
            f"Without its visual sinks ({own['mass']:.0%} of its attention) the text's loss changes by "
            f"{change(own, 'delta_loss')} nats a token, without as many random tokens of the image by "
            f"{change(other, 'delta_loss')}.",
            "delta_loss",
            own,
            other,
            "as many random image tokens",
            unit=NATS,
            figure="knock_out",
        )
