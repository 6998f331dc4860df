"""A number per image token as the image that it stands for, with the base rates that any claim needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lens.common.choices import is_whole
from lens.common.errors import LensError
from lens.common.results import Result, Sentence

if TYPE_CHECKING:
    from lens.traces.segments import Segments


@dataclass(frozen=True, repr=False, eq=False)
class ImageGrid(Result):
    """One image, a number per token.

    Attributes:
        values: [height, width].
        marked: bool [height, width], tokens in question (such as sinks), or None.
        region: bool [height, width], a part of the image (such as the background), or None.
        name: of the values.
        image: number of the image in the batch.
    """

    values: np.ndarray = field(repr=False)
    marked: np.ndarray | None = field(repr=False)
    region: np.ndarray | None = field(repr=False)
    name: str
    image: int

    @property
    def base_rate(self) -> float:
        """Share of all tokens that lie in the region; NaN without one."""
        return float("nan") if self.region is None else float(self.region.mean())

    @property
    def rate(self) -> float:
        """Share of the marked tokens that lie in the region; NaN without either, or with none marked."""
        if self.region is None or self.marked is None or not self.marked.any():
            return float("nan")
        return float(self.region[self.marked].mean())

    @property
    def enrichment(self) -> float:
        """`rate / base_rate`: 1 is what a blind choice of tokens gives."""
        return self.rate / self.base_rate if self.base_rate > 0 else float("nan")

    def table(self) -> pd.DataFrame:
        """One row per token: `row`, `column`, `value`, and `marked` and `region` where they are given."""
        height, width = self.values.shape
        columns: dict[str, Any] = {
            "row": np.repeat(np.arange(height), width),
            "column": np.tile(np.arange(width), height),
            "value": self.values.ravel(),
        }
        for name in ("marked", "region"):
            if (cells := getattr(self, name)) is not None:
                columns[name] = cells.ravel()
        return pd.DataFrame(columns)

    def findings(self) -> tuple[Sentence, ...]:
        """The grid ("grid"), how much of it is marked ("marked"), and how much of that lies in the region
        ("region"), never without the base rate."""
        height, width = self.values.shape
        of = f"{height} × {width} tokens, mean {self.name} {self.values.mean():.4g}"
        found = [Sentence(f"Image {self.image}: {of}.", kind="grid")]
        if self.marked is not None:
            count, share = int(self.marked.sum()), self.marked.mean()
            marked = f"{count} of {height * width} tokens are marked ({share:.1%})."
            found.append(Sentence(marked, kind="marked"))
        if not np.isnan(self.rate):
            region = (
                f"{self.rate:.1%} of the marked tokens lie in the region, where {self.base_rate:.1%} of "
                f"all tokens lie: {self.enrichment:.2f} times what a blind choice gives."
            )
            found.append(Sentence(region, kind="region"))
        return tuple(found)


def grid(
    segments: Segments,
    values: Any,
    *,
    image: int = 0,
    marked: Any = None,
    region: Any = None,
    name: str = "value",
) -> ImageGrid:
    """The tokens of one image as a grid.

    Args:
        segments: with grids.
        values: [tokens] of the image's prompt (or [batch, tokens]), such as received attention.
        image: number of the image in the batch, from 0.
        marked: bool like `values`, tokens in question.
        region: bool [height, width] of the image in tokens.
        name: of the values.

    Raises:
        LensError: no grids, no such image, or shapes that do not fit.

    Example:
        >>> trace, segments = lens.capture(vlm, inputs), lens.vision.segments(vlm, inputs)
        >>> lens.vision.grid(segments, trace.received.mean(("layer", "head"))).plot()
    """
    if not segments.grids:
        raise LensError(f"the segments have no grids: {segments.why_no_grids or 'none were given'}")
    if not (is_whole(image) and 0 <= image < len(segments.grids)):
        raise LensError(f"image must be 0 to {len(segments.grids) - 1}, got {image}")
    row, start, height, width = segments.grids[image]
    batch, tokens = segments.kind.shape

    def cut(what: str, given: Any) -> np.ndarray:
        array = np.asarray(given)
        if array.shape not in ((tokens,), (batch, tokens)):
            raise LensError(
                f"{what} must be [tokens] = [{tokens}] or [{batch}, {tokens}], got {list(array.shape)}"
            )
        line = array if array.ndim == 1 else array[row]
        return line[start : start + height * width].reshape(height, width)

    if region is not None and np.shape(region) != (height, width):
        raise LensError(f"region must be [{height}, {width}], got {list(np.shape(region))}")
    return ImageGrid(
        cut("values", values).astype(float),
        None if marked is None else cut("marked", marked).astype(bool),
        None if region is None else np.asarray(region, dtype=bool),
        name,
        image,
    )
