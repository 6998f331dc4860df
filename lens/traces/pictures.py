"""The picture of a prompt as a trace notes it, and where the patches of a trace lie on it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lens.common.choices import is_whole
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.png import pixels_of, png

if TYPE_CHECKING:
    import torch

    from lens.models.loaded import LoadedModel
    from lens.passes.inputs import Prompt

LONGEST = 512  # pixels of a side of the picture that a trace keeps
_PIXELS = ("pixel_values", "pixel_values_images")


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The patches of one picture (or tile) of a trace, and the picture under them.

    Attributes:
        first: position of the first patch.
        height, width: in patches.
        order: [height * width]: patch (counted row by row) of each position from the first on.
        pixels: [h, w, 3] uint8 of the whole picture, smaller than it was where it was large.
        size: (height, width) of the picture in its own pixels.
        box: (left, top, right, bottom) of the patches in these pixels.
    """

    first: int
    height: int
    width: int
    order: np.ndarray = field(repr=False)
    pixels: np.ndarray = field(repr=False)
    size: tuple[int, int]
    box: tuple[float, float, float, float]

    @property
    def span(self) -> tuple[int, int]:
        """Positions of the patches: first, past the last."""
        return self.first, self.first + self.height * self.width

    def laid(self, values: np.ndarray) -> np.ndarray:
        """[..., height, width] of [..., patches] in the order of positions."""
        found = np.empty_like(values)
        found[..., self.order] = values
        return found.reshape(*values.shape[:-1], self.height, self.width)

    def position(self, row: int, column: int) -> int:
        """Of a patch.

        Raises:
            LensError: no such patch.
        """
        if not (0 <= row < self.height and 0 <= column < self.width):
            raise LensError(
                f"patches go from (0, 0) to ({self.height - 1}, {self.width - 1}), got ({row}, {column})"
            )
        return self.first + int((self.order == row * self.width + column).argmax())

    def cell(self, row: int, column: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of a patch in pixels of the picture."""
        left, top, right, bottom = self.box
        across, down = (right - left) / self.width, (bottom - top) / self.height
        return (
            left + column * across,
            top + row * down,
            left + (column + 1) * across,
            top + (row + 1) * down,
        )


def picture_note(model: LoadedModel, prompt: Prompt) -> dict[str, Any] | None:
    """`{"png", "size", "boxes", "stretched"}` of the picture of a prompt; None of a prompt without one.

    Where only the model's input is known, the picture is that, stretched from its lowest to its highest value.
    """
    if prompt.picture is not None:
        pixels, boxes, stretched = prompt.picture.pixels, prompt.picture.boxes, False
    else:
        given = next((prompt.inputs[name] for name in _PIXELS if name in prompt.inputs), None)
        if given is None or given.dim() != 4 or len(given) != 1 or given.shape[1] not in (1, 3):
            return None
        pixels, stretched = _stretched(given[0]), True
        boxes = ((0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[0])),)
    if len(boxes) == 1:
        from lens.traces.patches import in_whole_patches  # reads torch

        down, across = in_whole_patches(model.model.config, prompt.inputs)
        left, top, right, bottom = boxes[0]
        boxes = ((left, top, left + across * (right - left), top + down * (bottom - top)),)
    height, width = pixels.shape[:2]
    small = _smaller(np.broadcast_to(pixels, (height, width, 3)))
    return {
        "png": base64.b64encode(png(np.ascontiguousarray(small))).decode(),
        "size": [height, width],
        "boxes": [list(box) for box in boxes],
        "stretched": stretched,
    }


def grids_of(attributes: Mapping[str, Any]) -> tuple[PatchGrid, ...]:
    """The patches of every picture or tile of a trace, with the picture under them.

    Raises:
        LensError: the trace is of no picture, or its patches are not known, with the reason.
    """
    spans = _spans(attributes)
    order = (attributes.get("patches") or {}).get("order")
    note = attributes.get("picture")
    height, width = spans[0][1:]
    if note is None:  # a picture that nobody kept: grey, a pixel a patch
        note = {"size": [height, width], "boxes": [], "stretched": True}
        pixels = np.full((height, width, 3), 200, np.uint8)
    else:
        try:
            pixels = pixels_of(base64.b64decode(note["png"], validate=True))
        except ValueError as error:
            raise LensError(
                f"the picture of this trace is damaged: {error}; capture it again"
            ) from error
    size = tuple(note["size"])
    boxes = note["boxes"] if len(note["boxes"]) == len(spans) else None
    if boxes is None:
        boxes = [(0.0, 0.0, float(size[1]), float(size[0]))] * len(spans)
    return tuple(
        PatchGrid(
            *(first, rows, columns),
            order=np.arange(rows * columns) if order is None else np.asarray(order),
            pixels=pixels,
            size=size,
            box=(box[0], box[1], box[2], box[3]),
        )
        for (first, rows, columns), box in zip(spans, boxes, strict=True)
    )


def _spans(attributes: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    patches, segments = attributes.get("patches"), attributes.get("segments")
    if patches is not None and patches["first"] is not None:
        return [(patches["first"], patches["height"], patches["width"])]
    if segments is not None and segments["grids"]:
        return [(start, height, width) for _, start, height, width in segments["grids"]]
    why = "it is of no picture"
    if patches is not None:
        why = patches["why"]
    elif segments is not None:
        why = segments["why_no_grids"] or "none were given"
    raise LensError(f"the patches of this trace are not known: {why}")


def _stretched(values: torch.Tensor) -> np.ndarray:
    array = values.detach().float().cpu().numpy().transpose(1, 2, 0)
    low, high = float(array.min()), float(array.max())
    return np.round(255 * (array - low) / ((high - low) or 1.0)).astype(np.uint8)


def _smaller(pixels: np.ndarray) -> np.ndarray:
    """At most `LONGEST` pixels a side, each the mean of those that it stands for."""
    shrink = LONGEST / max(pixels.shape[:2])
    if shrink >= 1:
        return pixels
    found = pixels.astype(np.float64)
    for axis in (0, 1):
        edges = np.linspace(0, pixels.shape[axis], max(1, round(pixels.shape[axis] * shrink)) + 1)
        starts = edges.astype(int)
        sums = np.add.reduceat(found, starts[:-1], axis)
        found = sums / np.expand_dims(np.diff(starts), (1 - axis, 2))
    return np.round(found).astype(np.uint8)


def grid_numbered(trace: Any, image: int) -> PatchGrid:
    """The patches of a picture or tile.

    Raises:
        LensError: no picture, or no such one.
    """
    if not hasattr(trace, "attrs"):
        given_as("AttentionTrace", trace=trace)
    grids = grids_of(trace.attrs)
    if not is_whole(image) or not 0 <= image < len(grids):
        raise LensError(f"image must be 0 to {len(grids) - 1}, got {image!r}")
    return grids[image]
