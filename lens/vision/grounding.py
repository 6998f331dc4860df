"""Whether a head looks where a box says that the thing is: the pointing game, and IoU at the best threshold.

Pointing game (Zhang et al., "Top-down Neural Attention by Excitation Backprop", arXiv 1608.00507): does the middle of
the patch with the highest value lie in a box? IoU: the patches at or above a threshold against the boxes, in pixels, at
the threshold that fits best, which is an upper bound. Beside both stand what needs no model: a blind point, the
middle of the picture, the whole picture as the answer, and the patches round its middle, with the best threshold too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lens.common.choices import Seed, check_lists, is_number
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.results import Result, Sentence, few
from lens.stats.intervals import columns, of_share
from lens.stats.verdicts import of_many_told, rivals
from lens.traces.overlays import Overlay

_DIGITS = 5  # of shares of the highest value: what differs by less is one threshold
Box = tuple[float, float, float, float]
_COLUMNS = ("pointing", "pointing_blind", "pointing_middle", "iou", "iou_whole", "iou_middle")


@dataclass(frozen=True, repr=False, eq=False)
class Grounding(Result):
    """How well maps find boxes.

    Attributes:
        rows: one row per picture and map: `picture`, `map`, `pointing`, `pointing_blind` (share of the picture in
            boxes), `pointing_middle`, `iou`, `threshold` (share of the highest value), `iou_whole`,
            `iou_middle` (patches nearest to the middle, as many as fit best).
        seed: of the intervals over pictures.
    """

    rows: pd.DataFrame = field(repr=False)
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per map: the means over pictures with 95 % intervals (of shares that are yes or no Wilson's), and the number of
        pictures `n`."""
        groups = list(self.rows.groupby("map", sort=False))
        found: dict[str, Any] = {
            "map": [name for name, _ in groups],
            "n": [len(part) for _, part in groups],
        }
        values = np.array([part[list(_COLUMNS)].to_numpy(dtype=float).T for _, part in groups])
        for place, column in enumerate(_COLUMNS):
            found |= columns(column, values[:, place], self.seed)
        for column in ("pointing", "pointing_middle"):  # yes or no
            ends_of = [of_share(*one) for one in zip(found[column], found["n"], strict=True)]
            found[f"{column}_low"], found[f"{column}_high"] = zip(*ends_of, strict=True)
        return pd.DataFrame(found)

    def findings(self) -> tuple[Sentence, ...]:
        """Of the best map: how often it points into a box ("pointing"), and how well it covers it ("iou")."""
        table = self.table()
        best, covers = (table.iloc[int(table[name].argmax())] for name in ("pointing", "iou"))
        many = len(table)
        return (
            Sentence(
                f"{best['map']}{self._beside('pointing', best, many)} points into a box in "
                f"{of_many_told(best, 'pointing', '.0%', many, 0, least=0, most=1)} of {_counted(best['n'])}; a blind point "
                f"does in {best['pointing_blind']:.0%}, the middle in {best['pointing_middle']:.0%}.",
                kind="pointing",
            ),
            Sentence(
                f"{covers['map']}{self._beside('iou', covers, many)} covers the boxes best: IoU "
                f"{of_many_told(covers, 'iou', '.2f', many, covers['n'], least=0, most=1)} at the best threshold of each picture; the whole picture has {covers['iou_whole']:.2f}, patches round its middle {covers['iou_middle']:.2f}.",
                kind="iou",
            ),
        )

    def _beside(self, column: str, best: pd.Series, many: int) -> str:
        """Of how many maps it is the best, and which are not told apart from it."""
        if many == 1:
            return ""
        wide = self.rows.pivot(index="map", columns="picture", values=column)
        values = wide.to_numpy(dtype=float)
        alike = rivals(values, list(wide.index).index(best["map"]), self.seed)
        told = (
            f", not told apart from {few([wide.index[one] for one in alike], 3)}" if alike else ""
        )
        return f", the best of {many}{told},"


def _counted(pictures: int) -> str:
    return "1 picture" if pictures == 1 else f"{pictures} pictures"


def grounding(
    overlays: Overlay | Sequence[Overlay],
    boxes: Sequence[Box] | Sequence[Sequence[Box]],
    *,
    seed: Seed = 0,
) -> Grounding:
    """How well the maps of overlays find the boxes of their pictures.

    Args:
        overlays: of one picture, or of several with the same maps.
        boxes: of one picture, or a list for each: (left, top, right, bottom) in its pixels.
        seed: of the intervals over pictures.

    Raises:
        LensError: no picture, boxes for another number of pictures, none for one, or one that has no area in it.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> lens.vision.grounding(trace.overlay(["L0H0", "L1H1"], query="[CLS]"), [(4, 4, 12, 12)]).table()
    """
    if not isinstance(overlays, list | tuple):
        given_as("Overlay", overlays=overlays)
    several = [overlays] if isinstance(overlays, Overlay) else list(overlays)
    for one in several:
        given_as("Overlay", overlays=one)
    check_lists(boxes=boxes)
    given = [boxes] if isinstance(overlays, Overlay) else list(boxes)
    if not several or len(several) != len(given):
        raise LensError(
            f"grounding takes boxes for each picture, got {len(given)} for {len(several)}"
        )
    if len({one.names for one in several}) > 1:
        raise LensError(
            "grounding takes overlays with the same maps, got "
            + "; ".join(", ".join(one.names) for one in several)
        )
    rows = []
    for number, (one, theirs) in enumerate(zip(several, given, strict=True)):
        check_lists(boxes=theirs)
        inside = _inside(one.grid.size, theirs)  # pyright: ignore[reportArgumentType]
        covered = _Covered.by(one, inside)
        rows += [
            {"picture": number, "map": name, **_scores(one, values, inside, covered)}
            for name, values in zip(one.names, one.values, strict=True)
        ]
    return Grounding(pd.DataFrame(rows), seed)


def _inside(size: tuple[int, int], boxes: Sequence[Box]) -> np.ndarray:
    """bool [height, width] of the pixels whose middles lie in a box."""
    height, width = size
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    found = np.zeros(size, bool)
    for box in boxes:
        check_lists(box=box)
        if len(box) != 4 or not all(map(is_number, box)):
            raise LensError(f"a box is (left, top, right, bottom), got {box}")
        left, top, right, bottom = box
        found |= (x >= left) & (x < right) & (y >= top) & (y < bottom)
    if not found.any():
        raise LensError(
            f"the boxes {list(boxes)} hold nothing of a picture of {width} × {height} pixels"
        )
    return found


class _Covered(NamedTuple):
    """Pixels of a picture by patch.

    Attributes:
        pixels, hits: [height, width] in patches: how many a patch has, and how many of them lie in a box.
        boxed: in boxes, of the whole picture.
        middle: IoU of the patches nearest to the middle of the picture.
    """

    pixels: np.ndarray
    hits: np.ndarray
    boxed: int
    middle: float

    @classmethod
    def by(cls, one: Overlay, inside: np.ndarray) -> _Covered:
        grid = one.grid
        shape = (grid.height, grid.width)
        patch = one.pixel_values(np.arange(grid.height * grid.width).reshape(shape))
        seen = np.isfinite(patch)
        patch = patch[seen].astype(int)
        pixels, hits = (
            np.bincount(patch, weights, grid.height * grid.width).reshape(shape)
            for weights in (None, inside[seen])
        )
        left, top, right, bottom = grid.box
        y = top + (np.arange(grid.height) + 0.5) * (bottom - top) / grid.height
        x = left + (np.arange(grid.width) + 0.5) * (right - left) / grid.width
        near = -np.hypot(y[:, None] - grid.size[0] / 2, x - grid.size[1] / 2)
        found = cls(pixels, hits, int(inside.sum()), 0.0)
        return found._replace(middle=found.best(np.round(near, _DIGITS))[0])

    def best(self, values: np.ndarray) -> tuple[float, float]:
        """IoU of the patches at or above the threshold that fits best, and the threshold."""
        order = np.argsort(-values, axis=None, kind="stable")
        ranked = values.ravel()[order]
        last = np.append(ranked[1:] < ranked[:-1], True)  # of the patches of one value
        chosen, hit = (of.ravel()[order].cumsum()[last] for of in (self.pixels, self.hits))
        shares = hit / (chosen + self.boxed - hit)
        best = int(shares.argmax())
        return float(shares[best]), float(ranked[last][best])


def _scores(
    one: Overlay, values: np.ndarray, inside: np.ndarray, covered: _Covered
) -> dict[str, float]:
    height, width = inside.shape
    known = np.nan_to_num(values)
    known = np.round(known / (known.max() or 1.0), _DIGITS)
    row, column = np.unravel_index(int(known.argmax()), known.shape)
    left, top, right, bottom = one.grid.cell(int(row), int(column))
    y, x = int((top + bottom) / 2), int((left + right) / 2)
    iou, threshold = covered.best(known)
    return {
        "pointing": float(inside[min(max(y, 0), height - 1), min(max(x, 0), width - 1)]),
        "pointing_blind": float(inside.mean()),
        "pointing_middle": float(inside[height // 2, width // 2]),
        "iou": iou,
        "threshold": threshold,
        "iou_whole": float(inside.mean()),
        "iou_middle": covered.middle,
    }
