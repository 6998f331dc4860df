"""Attention on the picture: any row, column, head, layer or mean, exactly where the patches lie.

Values are those of the patches; attention on what is no patch ([CLS], registers, text) is said apart. Sinks are the
patches that receive more than `SINK_TIMES` times the median patch, on average over all rows that see the picture
(Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588: a few background patches hold much of the
attention of large models); without them the rest is divided by what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy import ndimage

from lens.common.choices import check_choice, is_number, is_whole, shown
from lens.common.colors import VIRIDIS, rgb
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId, all_heads
from lens.common.results import Result, Sentence, few
from lens.traces.metrics import VARIANTS
from lens.traces.pictures import PatchGrid, grid_numbered

SINK_TIMES = 10.0
_STANDS_OUT = 1.05  # times uniform attention: less is none at the digits that are said
Token = int | str | tuple[int, int]


class Traced(Protocol):
    """What an overlay needs of a trace."""

    @property
    def attrs(self) -> dict[str, Any]: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def heads(self) -> int: ...
    @property
    def tokens(self) -> list[str]: ...
    @property
    def query_tokens(self) -> list[str]: ...
    @property
    def queries(self) -> int: ...
    @property
    def cross(self) -> bool: ...
    @property
    def dataset(self) -> Any: ...
    def head_id(self, head: AnyHead) -> HeadId: ...
    def tile(
        self, layer: int, head: int, queries: tuple[int, int], keys: tuple[int, int]
    ) -> np.ndarray: ...


@dataclass(frozen=True, repr=False, eq=False)
class Overlay(Result):
    """Attention of one or several heads (or means of heads) on a picture.

    Attributes:
        values: [maps, height, width] in patches: attention mass; NaN where a sink is left out.
        elsewhere: [maps] mass that is on no patch of this picture, sinks that are left out included.
        names: of the maps: "L3H5", "L3", "mean".
        what: in words: whose attention.
        query: (row, column) of the patch that looks or is looked at, or None.
        grid: where the patches lie on the picture.
        back: whether `values` are what the patches give to one key, and `elsewhere` what sinks among them give.
    """

    values: np.ndarray = field(repr=False)
    elsewhere: np.ndarray = field(repr=False)
    names: tuple[str, ...]
    what: str
    query: tuple[int, int] | None
    grid: PatchGrid = field(repr=False)
    back: bool = False

    def table(self) -> pd.DataFrame:
        """One row per map and patch: `map`, `row`, `column`, `value`, and the patch's `left`, `top`, `right`, `bottom`
        in pixels of the picture."""
        maps, height, width = self.values.shape
        rows, columns = np.indices((height, width)).reshape(2, -1)
        ends = np.array([self.grid.cell(*cell) for cell in zip(rows, columns, strict=True)])
        found = {
            "map": np.repeat(self.names, height * width),
            "row": np.tile(rows, maps),
            "column": np.tile(columns, maps),
            "value": self.values.ravel(),
        }
        for number, name in enumerate(("left", "top", "right", "bottom")):
            found[name] = np.tile(ends[:, number], maps)
        return pd.DataFrame(found)

    def findings(self) -> tuple[Sentence, ...]:
        """Of each map the patch that gets most ("strongest"), how few hold half ("half"), and what lies elsewhere
        ("elsewhere"); of attention to a key the patch that gives it most, how few give half, and what sinks give."""
        found = []
        for name, values, elsewhere in zip(self.names, self.values, self.elsewhere, strict=True):
            flat = np.nan_to_num(values).ravel()
            row, column = np.unravel_index(int(flat.argmax()), values.shape)
            times = flat.max() / (flat.sum() or 1.0) * (flat > 0).sum()  # of those that it sees
            half = int((np.sort(flat)[::-1].cumsum() < flat.sum() / 2).sum()) + 1
            of = f"{name}, {self.what}"
            most = f"most on the patch ({row}, {column}), {times:.1f} times what a patch of uniform attention has"
            none = "no patch stands out from uniform attention"
            hold, rest = "hold half of it", f"{elsewhere:.1%} lies on no patch shown"
            if self.back:
                most = f"most the patch ({row}, {column}), {times:.1f} times the mean of the patches that see it"
                none = "no patch looks more than the others that see it"
                hold = "give half of what it gets from patches"
                rest = f"sinks, which are left out, give it {elsewhere:.2g} rows of attention more"
            most += " (one picture, no interval)"
            said = most if times >= _STANDS_OUT else none
            found += [
                Sentence(f"{of}: {said}.", kind="strongest"),
                Sentence(f"{of}: {half} of {flat.size} patches {hold}.", kind="half"),
            ]
            if not self.back or np.isnan(values).any():
                found.append(Sentence(f"{of}: {rest}.", kind="elsewhere"))
        return tuple(found)

    def regions(self, map_: int = 0, *, share: float = 0.5) -> pd.DataFrame:
        """What is looked at, strongest first: patches that hold a share of the mass, joined where they touch.

        Args:
            map_: number of the map.
            share: of the mass: the strongest patches that hold it are kept.

        Returns:
            One row a region: `region`, `mass` (share of what lies on patches), `patches`, and its centre of mass
            `row`, `column` in patches and `x`, `y` in pixels of the picture. In this order they are a scan path.

        Raises:
            LensError: a share that is none, or no map of this number.

        Example:
            >>> lens.capture(vit, {"pixel_values": images}, keep_qk=True).overlay("L1H0").regions()
        """
        if not (is_number(share) and 0 < share <= 1):
            raise LensError(f"share must lie between 0 and 1, got {share}")
        values = np.nan_to_num(self._map(map_))
        order = np.sort(values.ravel())[::-1]
        enough = int((order.cumsum() < share * order.sum() * (1 - 1e-12)).sum())
        labels, count = ndimage.label(values >= order[enough], np.ones((3, 3)))
        each = np.arange(1, count + 1)
        row, column = np.array(ndimage.center_of_mass(values, labels, each)).T
        left, top, right, bottom = self.grid.cell(0, 0)
        found = pd.DataFrame(
            {
                "mass": ndimage.sum_labels(values, labels, each) / order.sum(),
                "patches": np.bincount(labels.ravel())[1:],
                "row": row,
                "column": column,
                "x": left + (column + 0.5) * (right - left),
                "y": top + (row + 0.5) * (bottom - top),
            }
        ).sort_values("mass", ascending=False, kind="stable", ignore_index=True)
        found.insert(0, "region", np.arange(count))
        return found

    def render(self, map_: int = 0, *, alpha: float = 0.6) -> np.ndarray:
        """[height, width, 3] uint8: the picture with the map over it, each pixel with the colour of its patch.

        Args:
            map_: number of the map.
            alpha: of the map: 0 is the picture alone, 1 the map alone. Pixels that the model did not see, and sinks
                that are left out, show the picture.

        Example:
            >>> lens.capture(vit, {"pixel_values": images}).overlay().render().shape
            (16, 16, 3)
        """
        (height, width), pixels = self.grid.size, self.grid.pixels
        under = pixels[
            ((np.arange(height) + 0.5) * pixels.shape[0] / height).astype(int)[:, None],
            ((np.arange(width) + 0.5) * pixels.shape[1] / width).astype(int),
        ].astype(float)
        values = self.pixel_values(self._map(map_))
        palette = np.array(rgb(VIRIDIS), float)
        places = np.nan_to_num(values / (float(np.nanmax(values)) or 1.0)) * (len(palette) - 1)
        colors = np.stack(
            [np.interp(places, np.arange(len(palette)), palette[:, part]) for part in range(3)], -1
        )
        weight = np.where(np.isfinite(values), alpha, 0.0)[..., None]
        return np.round(under * (1 - weight) + colors * weight).astype(np.uint8)

    def _map(self, number: int) -> np.ndarray:
        if is_whole(number) and 0 <= number < len(self.names):
            return self.values[number]
        raise LensError(f"map_ must be 0 to {len(self.names) - 1}, got {shown(number)}")

    def pixel_values(self, values: np.ndarray) -> np.ndarray:
        """[height, width] in pixels of the picture, of [height, width] in patches; NaN where the model does not see it."""
        height, width = self.grid.size
        left, top, right, bottom = self.grid.box
        rows = (np.arange(height) + 0.5 - top) / (bottom - top) * self.grid.height
        columns = (np.arange(width) + 0.5 - left) / (right - left) * self.grid.width
        rows, columns = np.floor(rows).astype(int), np.floor(columns).astype(int)
        inside = ((rows >= 0) & (rows < self.grid.height))[:, None] & (
            (columns >= 0) & (columns < self.grid.width)
        )
        at = np.ix_(rows.clip(0, self.grid.height - 1), columns.clip(0, self.grid.width - 1))
        return np.where(inside, values[at], np.nan)


def overlay(
    trace: Traced,
    heads: AnyHead | Sequence[AnyHead] = "mean",
    *,
    query: Token | None = None,
    key: Token | None = None,
    variant: str = "raw",
    image: int = 0,
) -> Overlay:
    """Attention on the picture of a trace.

    Args:
        trace: of a picture, or of a prompt with one.
        heads: "mean" of all heads, "L3" (mean of a layer), "L3H5", or several of these, side by side.
        query: who looks: (row, column) of a patch, a position, or the name of a token such as "[CLS]".
        key: who is looked at, instead: then the map shows how much every patch looks at it. With neither, the map is
            the mean over all rows: of the patches, or of the text behind the picture.
        variant: "raw", or "sink_excluded": without the patches that receive more than `SINK_TIMES` times the
            median patch.
        image: number of the picture or tile.

    Raises:
        LensError: no picture, no such head, token or picture, query and key together, or a trace without q and k
            where a row is asked for.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> trace.overlay(["L0H1", "L1", "mean"], query="[CLS]").plot()
    """
    check_choice("variant", variant, VARIANTS)
    grid = grid_numbered(trace, image)
    if query is not None and key is not None:
        raise LensError("give query (where it looks) or key (who looks at it), not both")
    asked = list(heads) if isinstance(heads, list) else [heads]
    if not asked:
        raise LensError("heads names none; give 'mean', 'L3', 'L3H5' or several of these")
    chosen = {_name(trace, one): heads_of(trace, one) for one in asked}
    read, what, cell = _reader(trace, grid, query, key)
    maps, elsewhere = [], []
    for members in chosen.values():
        values, total = np.zeros(grid.height * grid.width), 0.0
        for head in members:
            part, mass = read(head)
            values += part / len(members)
            total += mass / len(members)
        if variant == "sink_excluded":
            values[_sinks(trace, grid, members)] = np.nan
        left = float(np.nansum(values))
        elsewhere.append(total - left)
        if variant == "sink_excluded" and left > 0:
            values = values / left
        maps.append(grid.laid(values))
    lost = np.array(elsewhere)
    return Overlay(np.array(maps), lost, tuple(chosen), what, cell, grid, key is not None)


def _name(trace: Traced, asked: Any) -> str:
    return asked if isinstance(asked, str) else str(trace.head_id(asked))


def heads_of(trace: Traced, asked: Any) -> list[HeadId]:
    """The heads that "mean", "L3" or "L3H5" stand for.

    Raises:
        LensError: no such layer or head.
    """
    layers: Sequence[int] = trace.layers
    if isinstance(asked, str) and asked == "mean":
        return all_heads(layers, trace.heads)
    if isinstance(asked, str) and asked[:1] == "L" and asked[1:].isdigit():
        if int(asked[1:]) not in layers:
            raise LensError(f"there is no layer {asked[1:]} in this trace; it has {list(layers)}")
        return [HeadId(int(asked[1:]), head) for head in range(trace.heads)]
    return [trace.head_id(asked)]


_Read = Callable[[HeadId], tuple[np.ndarray, float]]


def _reader(
    trace: Traced, grid: PatchGrid, query: Token | None, key: Token | None
) -> tuple[_Read, str, tuple[int, int] | None]:
    """What gives the values of a head and the mass that they are a part of; words; the patch in question."""
    start, end = grid.span
    looks = (trace.attrs.get("patches") or {}).get("of") == "queries"
    if looks and key is None:
        raise LensError(
            "here the picture looks and text is looked at: name a word, overlay(key=...); its tokens are "
            f"{few(trace.tokens)}"
        )
    looked_at = trace.cross and not looks
    if looked_at and key is not None:
        raise LensError(
            "here text looks and the picture is looked at: name a token of the target, overlay(query=...); its tokens are "
            f"{few(trace.query_tokens)}"
        )
    if query is not None or key is not None:
        given = query if query is not None else key
        assert given is not None
        rows = trace.query_tokens if looked_at else trace.tokens
        place = token_position(rows, given) if looked_at else position(trace, grid, given)
        said = rows[place]
        if trace.attrs["segments"] is not None:
            said = f"“{said.strip()}”"
        cell = None
        if start <= place < end and not (looks or looked_at):
            cell = divmod(int(grid.order[place - start]), grid.width)
            said = f"the patch {cell}"

        def row(head: HeadId) -> tuple[np.ndarray, float]:
            if query is not None:
                return trace.tile(*head, (place, place + 1), (start, end))[0], 1.0
            column = trace.tile(*head, (start, end), (place, place + 1))[:, 0]
            return column, float(column.sum())

        return row, f"who looks at {said}" if query is None else f"where {said} looks", cell
    length = len(trace.tokens)
    if trace.attrs["segments"] is not None and end < length:

        def text(head: HeadId) -> tuple[np.ndarray, float]:
            return trace.tile(*head, (end, length), (start, end)).mean(0), 1.0

        return text, "where the text behind it looks", None

    def mean(head: HeadId) -> tuple[np.ndarray, float]:
        return received(trace, head)[start:end] / (trace.queries if looked_at else length), 1.0

    return mean, "where all positions look", None


def position(trace: Traced, grid: PatchGrid, given: Token) -> int:
    """Of a patch (row, column), a token's name, or a number, which may count from the end.

    Raises:
        LensError: there is none, or it is none of these.
    """
    if isinstance(given, tuple):
        if len(given) != 2 or not all(map(is_whole, given)):
            raise LensError(f"a patch is (row, column), both whole numbers, got {given}")
        return grid.position(*given)
    return token_position(trace.tokens, given)


def token_position(tokens: Sequence[str], given: Token) -> int:
    """Of a token's name, or a number, which may count from the end.

    Raises:
        LensError: there is none, or it is neither.
    """
    if isinstance(given, str):
        if given not in tokens:
            raise LensError(f"no token is called {given!r}; the first are {', '.join(tokens[:6])}")
        return tokens.index(given)
    if isinstance(given, tuple) or not is_whole(given):
        raise LensError(
            f"a token is (row, column) of a patch, a position or a name such as {tokens[0]!r}, got {given!r}"
        )
    if not -len(tokens) <= given < len(tokens):
        raise LensError(f"positions go from 0 to {len(tokens) - 1}, got {given}")
    return given % len(tokens)


def received(trace: Traced, head: HeadId) -> np.ndarray:
    """[keys] mass that each key of a head receives.

    Raises:
        LensError: the trace did not keep it.
    """
    if "received" not in trace.dataset:
        raise LensError(
            "this needs what each key receives; capture with statistics including 'received'"
        )
    return trace.dataset["received"].sel(layer=head.layer, head=head.head).values.astype(float)


def _sinks(trace: Traced, grid: PatchGrid, members: Sequence[HeadId]) -> np.ndarray:
    """bool [patches], by position: those that receive far more than the median patch."""
    start, end = grid.span
    mass = np.mean([received(trace, head)[start:end] for head in members], 0)
    return mass > SINK_TIMES * np.median(mass)
