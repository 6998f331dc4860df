"""Where the positions of a denoiser stand in its latents: rows and columns of a picture, frames of a video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor, nn

_SAMPLE = ("hidden_states", "sample")


@dataclass(frozen=True)
class LatentGrid:
    """The places of a picture, or of a video, in the order of positions: row by row, frame by frame.

    Attributes:
        shape: (height, width), or (frames, height, width).
    """

    shape: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """`row,column` or `frame,row,column` of each position."""
        found = [""]
        for size in self.shape:
            found = [
                f"{one},{place}" if one else str(place) for one in found for place in range(size)
            ]
        return found


def latent_grid(
    denoiser: nn.Module, inputs: Mapping[str, Any], positions: int
) -> LatentGrid | None:
    """The grid that has so many positions; None where the latents' shape does not give one.

    Every so many latents are one position, in each direction the same number; of Flux the places come with the input.
    """
    ids = inputs.get("img_ids")
    if isinstance(ids, Tensor) and ids.shape[-1] == 3:
        height, width = (int(ids[..., axis].max()) + 1 for axis in (1, 2))
        return LatentGrid((height, width)) if height * width == positions else None
    sample = next((inputs[name] for name in _SAMPLE if isinstance(inputs.get(name), Tensor)), None)
    if sample is None or sample.dim() not in (4, 5):
        return None
    height, width = sample.shape[-2:]
    frames = 1
    if sample.dim() == 5:
        frames = _frames(denoiser, sample)
    if positions % frames:
        return None
    of_frame = positions // frames
    step = isqrt(height * width // of_frame) if of_frame else 0
    if not step or (height // step) * (width // step) != of_frame:
        return None
    shape = (height // step, width // step)
    return LatentGrid(shape if sample.dim() == 4 else (frames, *shape))


def _frames(denoiser: nn.Module, sample: Tensor) -> int:
    """Of a video: [batch, channels, frames, ...] or [batch, frames, channels, ...], whichever has the model's channels."""
    config: Any = denoiser.config
    channels = config.get("in_channels", None)
    patch = config.get("patch_size", 1)
    across = patch[0] if isinstance(patch, list | tuple) else config.get("patch_size_t", None) or 1
    axis = 2 if sample.shape[1] == channels and sample.shape[2] != channels else 1
    if sample.shape[1] == sample.shape[2] == channels:
        axis = 2
    return sample.shape[axis] // across
