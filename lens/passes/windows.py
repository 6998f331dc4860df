"""Attention in windows of a picture, on reduced keys or along one axis of a video, as attention among its positions.

Such a layer computes one row for each window (Swin: arXiv 2103.14030; ViTDet, SAM: 2203.16527; TimeSformer: 2102.05095).
Here the windows go back to where they lie: a call with one row for each picture, whose queries see the keys of their own
window, and whose output goes back into the windows. Layers with fewer keys than queries (SegFormer: 2105.15203; PVT:
2102.12122) or fewer queries than keys (Hiera, which pools queries inside its mask units: 2306.00989) get a grid for either axis.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.passes.calls import LayerCall, Places
from lens.passes.masks import LARGEST_SPELLED_OUT, refuse_large
from lens.passes.structures import MaskStructure

_APART = -50.0
"""Swin adds -100 (twice in version 2) to the logits of places that a shift brought side by side, which leaves e^-100."""
_RATIOS = ("sequence_reduction_ratio", "sequences_reduction_ratio", "spatial_reduction_ratio")


@dataclass(frozen=True, eq=False)
class Windows:
    """How the rows of a call lie among the positions of a picture.

    Attributes:
        places: int [windows, positions of one], each position once; some positions may be in none.
        axis: what the positions are.
        keys, key_axis: the same of the keys, where they are others.
    """

    places: Tensor
    axis: Places
    keys: Tensor | None = None
    key_axis: Places | None = None

    def joined(self, call: LayerCall) -> LayerCall:
        """The call with one row for each picture.

        Raises:
            LensError: rows that are no windows, a mask of another kind, or too many positions.
        """
        own, key_axis = self.places, self.key_axis or self.axis
        others = own if self.keys is None else self.keys
        rows, inside = own.shape
        length, keys = len(self.axis.names), len(key_axis.names)
        sizes = (call.query.shape[2], call.key.shape[2])
        if len(call.query) % rows or sizes != (inside, others.shape[1]):
            raise LensError(
                f"layer {call.layer} attends in {len(call.query)} rows of {call.query.shape[2]} positions where "
                f"{rows} windows of {inside} were expected; lens.traces.capturing cannot put them together"
            )
        if call.mask.causal or call.mask.window is not None or call.mask.padding is not None:
            raise LensError(f"layer {call.layer} masks its windows in a way that is not known here")
        own, others = own.to(call.query.device), others.to(call.query.device)
        call = replace(call, query_places=self.axis, key_places=key_axis, tokens=None)
        if rows == 1 and length == inside and self.keys is None:
            return call
        refuse_large(length, keys, "windows")
        batch = len(call.query) // rows

        def whole(part: Tensor, places: Tensor, length: int) -> Tensor:
            found = part.new_zeros(batch, part.shape[1], length, part.shape[3])
            parts = part.unflatten(0, (batch, rows)).transpose(1, 2).flatten(2, 3)
            found[:, :, places.flatten()] = parts
            return found

        def spread(part: Tensor) -> Tensor:
            many = part.expand(-1, -1, inside, others.shape[1])
            many = many.expand(rows, -1, -1, -1) if len(many) == 1 else many
            many = many.unflatten(0, (-1, rows)).transpose(1, 2)  # [batch, heads, rows, q, k]
            found = part.new_zeros(*many.shape[:2], length, keys)
            found[:, :, own[:, :, None], others[:, None, :]] = many
            return found

        def windows(places: Tensor, length: int) -> Tensor:
            of = torch.full((length,), -1, device=places.device)
            number = torch.arange(rows, device=places.device)
            of[places.flatten()] = number.repeat_interleave(places.shape[1])
            return of

        of = windows(own, length)
        allowed = ((of[:, None] == windows(others, keys)) & (of >= 0)[:, None])[None, None]
        bias = None if call.position_bias is None else spread(call.position_bias)
        if call.mask.allowed is not None:
            allowed = allowed & spread(call.mask.allowed)
        if bias is not None and bool((apart := (bias < _APART).all(1, keepdim=True)).any()):
            allowed, bias = allowed & ~apart, bias.masked_fill(apart, 0)
        allowed = allowed.expand(batch, -1, -1, -1)
        return replace(
            call,
            query=whole(call.query, own, length),
            key=whole(call.key, others, keys),
            value=whole(call.value, others, keys),
            mask=MaskStructure(causal=False, allowed=allowed, cross=self.key_axis is not None),
            position_bias=bias,
        )

    def parted(self, output: Tensor) -> Tensor:
        """[batch, heads, positions, value_dim] as [batch × windows, heads, positions of one, value_dim]."""
        if self.keys is None and self.places.shape == (1, output.shape[2]):
            return output
        return output[:, :, self.places.to(output.device)].transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Block:
    """A layer that runs, with what it was called with.

    Attributes:
        module, args, kwargs: of the call.
        place: of which part of the model, as in `LayerCall`.
        alike: all layers of its stage.
        config: of the model.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: str
    alike: Sequence[nn.Module]
    config: Any

    def __getitem__(self, name: str) -> Any:
        """An argument by its name; None where there is none."""
        if name in self.kwargs:
            return self.kwargs[name]
        place = _arguments(type(self.module)).get(name, len(self.args))
        return self.args[place] if place < len(self.args) else None


@cache
def _arguments(kind: type[nn.Module]) -> dict[str, int]:
    """The place of each argument."""
    return {
        name: place - 1 for place, name in enumerate(inspect.signature(kind.forward).parameters)
    }


def laid_out(block: Block, call: LayerCall, batch: int | None) -> tuple[LayerCall, Windows | None]:
    """The call with one row for each of `batch` pictures, and how to put its output back; None: as it is.

    Raises:
        LensError: as `Windows.joined`.
    """
    windows: Windows | None
    if block.place in ("time", "space"):
        windows = _divided(block, call, batch or 1)
    elif block.place == "molecules":
        return _molecules(block, call), None
    elif hasattr(block.config, "masked_unit_size"):
        windows = _units(block, call, batch or 1)
    elif hasattr(block.module, "window_size") and (grid := _grid(block)) is not None:
        windows = _windows(block, grid)
    elif isinstance(height := block["height"], int) and isinstance(width := block["width"], int):
        return _reduced(block, call, (height, width)), None
    else:
        windows = _rows(call, batch) if block.config is None else None
    return (call, None) if windows is None else (windows.joined(call), windows)


def _rows(call: LayerCall, batch: int | None) -> Windows | None:
    """Of a wrapped module that attends in several rows for each of its inputs (frames, a pair of pictures): side by side."""
    rows, rest = divmod(len(call.query), batch or len(call.query))
    queries, keys = call.query.shape[2], call.key.shape[2]
    masked = call.mask.causal or call.mask.window is not None or call.mask.padding is not None
    if rest or rows == 1 or masked or rows**2 * queries * keys > LARGEST_SPELLED_OUT:
        return None

    def axis(length: int, of: str = "") -> tuple[Tensor, Places]:
        names = tuple(f"{of}{row},{place}" for row in range(rows) for place in range(length))
        why = f"each input has {rows} rows: positions are called row,position"
        places = torch.arange(rows * length).view(rows, length)
        return places, Places(names, {"first": None, "why": why})

    if not call.cross and keys == queries:
        return Windows(*axis(queries))
    return Windows(*axis(queries), *axis(keys, "keys of "))


def _grid(block: Block) -> tuple[int, int] | None:
    """(height, width) in patches of what a layer in windows reads."""
    if (sizes := block["input_dimensions"]) is not None:
        return int(sizes[0]), int(sizes[1])
    states = block["hidden_states"]
    if not isinstance(states, Tensor) or states.dim() != 4:
        return None
    is_last = not type(block.module).__name__.startswith("VitDet")  # where its channels stand
    sizes = states.shape[1:3] if is_last else states.shape[2:]
    return int(sizes[0]), int(sizes[1])


def _windows(block: Block, grid: tuple[int, int]) -> Windows:
    """Windows side by side, shifted or not, of a grid that is padded to a multiple of them: patches come first."""
    sizes = {_size(one, grid) for one in block.alike}
    height, width = (
        max(-(-side // (size or side)) * (size or side) for size in sizes) for side in grid
    )
    order = torch.full((height, width), -1)
    order[: grid[0], : grid[1]] = torch.arange(grid[0] * grid[1]).view(grid)
    beyond = order < 0
    order[beyond] = torch.arange(int(beyond.sum())) + grid[0] * grid[1]
    size, shift = _size(block.module, grid), int(getattr(block.module, "shift_size", 0))
    if size:
        rows, columns = (-(-side // size) * size for side in grid)
        own = order[:rows, :columns].roll((-shift, -shift), (0, 1))
        own = own.view(rows // size, size, columns // size, size).transpose(1, 2)
        places = own.reshape(-1, size * size)
    else:
        places = order[: grid[0], : grid[1]].reshape(1, -1)
    outside = [(row, column) for row, column in beyond.nonzero().tolist()]
    axis = _patches(grid, behind=[f"[PAD {row},{column}]" for row, column in outside])
    cells = [divmod(patch, grid[1]) for patch in range(grid[0] * grid[1])]
    return Windows(places, replace(axis, cells=(*cells, *outside)))


def _units(block: Block, call: LayerCall, batch: int) -> Windows:
    """Hiera's mask units, whose tokens stand in the order in which they are pooled."""
    config, made = block.config, sys.modules[type(block.module).__module__]
    level = min(int(block.place.removeprefix("stage").removeprefix("pool")), config.num_query_pool)

    def axis(level: int, inside: int) -> tuple[Tensor, Places]:
        sides = zip(config.image_size, config.patch_stride, config.query_stride, strict=True)
        height, width = (size // patch // pooled**level for size, patch, pooled in sides)
        units = len(call.query) // batch
        if units * inside != height * width:
            raise LensError(
                f"layer {call.layer} attends in {units} units of {inside} positions, and a picture of "
                f"{tuple(config.image_size)} has {height} × {width}: other pictures, and hidden patches, are not known here"
            )
        left = [config.query_stride] * (len(config.depths) - 1 - level)
        order = torch.arange(height * width).view(1, -1, 1)
        order = made.unroll(order, (height, width), (1, 1), left).view(inside, units)
        return order.T, _patches((height, width))

    places, grid = axis(level, call.query.shape[2])
    if block.place.startswith("stage"):
        return Windows(places, grid, places)
    return Windows(places, grid, *axis(level - 1, call.key.shape[2]))


def _molecules(block: Block, call: LayerCall) -> LayerCall:
    """Canine's: the first character, then as many characters as one convolution reads."""
    rate, count = block.config.downsampling_rate, call.key.shape[2]
    names = [f"{rate * number}-{rate * (number + 1) - 1}" for number in range(count - 1)]
    why = f"a position is {rate} characters"
    axis = Places(("[CLS]", *names), {"first": None, "why": why})
    return replace(call, query_places=axis, key_places=axis)


def _size(module: nn.Module, grid: tuple[int, int]) -> int:
    """Of a layer's windows, 0 where it sees all; Swin's is not larger than its grid."""
    size = int(getattr(module, "window_size", 0))
    return min(size, *grid) if hasattr(module, "set_shift_and_window_size") else size


def _reduced(block: Block, call: LayerCall, grid: tuple[int, int]) -> LayerCall:
    """Of a layer whose keys are those of a coarser grid."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    rows = _patches(grid, before=["[CLS]"] * (queries - grid[0] * grid[1]))
    if keys == queries:
        return replace(call, query_places=rows, key_places=rows)
    ratios = [getattr(one, name, 0) for one in block.module.modules() for name in _RATIOS]
    ratio = max([1, *ratios])
    coarse = (grid[0] // ratio, grid[1] // ratio)
    if coarse[0] * coarse[1] != keys:  # PVT v2 may pool to a square
        coarse = (round(keys**0.5), round(keys**0.5))
    axis = _patches(coarse)
    if keys != len(axis.names) or queries != len(rows.names):
        raise LensError(
            f"layer {call.layer} attends from {queries} to {keys} positions, and {grid[0]} × {grid[1]} patches make "
            "other grids"
        )
    mask = replace(call.mask, cross=True)
    return replace(call, mask=mask, query_places=rows, key_places=axis, tokens=None)


def _divided(block: Block, call: LayerCall, batch: int) -> Windows:
    """Of a video: each place through time, or each frame with a [CLS] of its own."""
    rows, inside = len(call.query) // batch, call.query.shape[2]
    in_time = block.place == "time"
    patches, frames = (rows, inside) if in_time else (inside - 1, rows)
    width = block.config.image_size // block.config.patch_size
    names = [divmod(patch, width) for patch in range(patches)]
    own = [[f"{frame},{row},{column}" for row, column in names] for frame in range(frames)]
    if in_time:
        places = torch.arange(frames * patches).view(frames, patches).T
    else:
        places = torch.arange(frames * (1 + patches)).view(frames, -1)
        own = [[f"[CLS {frame}]", *of] for frame, of in enumerate(own)]
    why = "it is a video of several pictures: positions are called frame,row,column"
    flat = tuple(name for of in own for name in of)
    return Windows(places, Places(flat, {"first": None, "why": why}))


def _patches(
    grid: tuple[int, int], before: Sequence[str] = (), behind: Sequence[str] = ()
) -> Places:
    names = [f"{row},{column}" for row in range(grid[0]) for column in range(grid[1])]
    where = {"first": len(before), "height": grid[0], "width": grid[1]}
    return Places((*before, *names, *behind), where)
