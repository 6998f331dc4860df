"""What the positions of a trace are called: tokens, patches of a picture, moments of a sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lens.models.loaded import LoadedModel
from lens.models.stacks import stacks
from lens.passes.inputs import Prompt
from lens.traces.latents import LatentGrid
from lens.traces.patches import describe_patches

_FRAME = 0.01
"""Seconds from one frame of a spectrogram to the next, as every speech model's processor makes them."""
_RATE = 16_000
"""Samples a second of speech models that read the sound itself."""


@dataclass(frozen=True)
class Axis:
    """One row of positions.

    Attributes:
        ids: token ids; -1 where there are none.
        names: of every position.
        patches: of a picture, as in docs/schema/trace.md, or None.
        seconds: from one position to the next, of a sound.
    """

    ids: list[int]
    names: list[str]
    patches: dict[str, Any] | None = None
    seconds: float | None = None


def keys_of(model: LoadedModel, prompt: Prompt, length: int, extra: Sequence[str] = ()) -> Axis:
    """The keys of a trace of `model`, the last called `extra`; of an encoder-decoder of its chosen part."""
    if extra:
        own = keys_of(model, prompt, length - len(extra))
        return replace(own, ids=[*own.ids, *[-1] * len(extra)], names=[*own.names, *extra])
    if model.chosen == "decoder":
        return _tokens(model, prompt.target, length)
    if prompt.ids and (not model.parts or len(prompt.ids) == length):
        return Axis(prompt.ids, model.token_strings(prompt.ids))
    if (names := _of_video(model, prompt, length)) is not None:
        why = "it is a video of several pictures: positions are called frame,row,column"
        return Axis([-1] * length, names, {"first": None, "why": why})
    if (names := _of_spectrogram(model, prompt, length)) is not None:
        why = "it is a spectrogram in patches: positions are called by time and band"
        return Axis([-1] * length, names, {"first": None, "why": why})
    seconds = _seconds(model, prompt, length)
    if seconds is not None:
        names = [f"{position * seconds:.2f} s" for position in range(length)]
        return Axis([-1] * length, names, seconds=seconds)
    read = model
    if model.is_encoder_decoder and (halves := stacks(model.model)) and halves.encoder is not None:
        read = replace(model, model=halves.encoder)
    names, patches = describe_patches(read, prompt.inputs, length)
    return Axis([-1] * length, names, patches)


def queries_of(model: LoadedModel, prompt: Prompt, length: int) -> Axis:
    """The queries of a trace of cross-attention."""
    return _tokens(model, prompt.target, length)


def patches_of(
    model: LoadedModel, prompts: Sequence[Prompt], lengths: Sequence[int]
) -> tuple[int, ...]:
    """How many patches each picture has, by its positions; none where one's are not known, as of sounds."""
    grids = [
        keys_of(model, one, length).patches or {}
        for one, length in zip(prompts, lengths, strict=True)
    ]
    if not all("height" in one for one in grids):
        return ()
    return tuple(one["height"] * one["width"] for one in grids)


def _tokens(model: LoadedModel, ids: list[int] | None, length: int) -> Axis:
    if ids is None or len(ids) != length:  # learned queries
        why = "they are learned queries, which stand in no row"
        names = [str(position) for position in range(length)]
        return Axis([-1] * length, names, {"first": None, "why": why})
    return Axis(ids, model.token_strings(ids))


def _seconds(model: LoadedModel, prompt: Prompt, length: int) -> float | None:
    """Of a sound: what one position stands for."""
    frames = prompt.inputs.get("input_features")
    if isinstance(frames, torch.Tensor) and frames.dim() == 3:
        bins = getattr(model.model.config, "num_mel_bins", None)
        time = frames.shape[2] if frames.shape[1] == bins else frames.shape[1]
        return time * _FRAME / length
    strides = getattr(model.model.config, "conv_stride", None)
    if "input_values" in prompt.inputs and isinstance(strides, list | tuple):
        return float(torch.tensor(strides).prod()) / _RATE
    return None


def _of_video(model: LoadedModel, prompt: Prompt, length: int) -> list[str] | None:
    """`frame,row,column` of patches that are as long as several frames (VideoMAE, ViViT); None of another input."""
    pixels, config = prompt.inputs.get("pixel_values"), model.model.config
    tube, patch = (getattr(config, name, None) for name in ("tubelet_size", "patch_size"))
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 5 or tube is None:
        return None
    sides = [tube, *(patch if isinstance(patch, list | tuple) else (patch, patch))]
    sides = list(tube) if isinstance(tube, list | tuple) else sides
    sizes = (pixels.shape[1], *pixels.shape[-2:])
    names = LatentGrid(tuple(a // b for a, b in zip(sizes, sides, strict=True))).names
    if len(names) + 1 == length:
        return ["[CLS]", *names]
    return names if len(names) == length else None


def _of_spectrogram(model: LoadedModel, prompt: Prompt, length: int) -> list[str] | None:
    """Time and band of the patches of a spectrogram, which overlap (AST); None of another input."""
    sound, config = prompt.inputs.get("input_values"), model.model.config
    strides: list[Any] = [
        getattr(config, name, None) for name in ("frequency_stride", "time_stride")
    ]
    if not isinstance(sound, torch.Tensor) or sound.dim() != 3 or None in strides:
        return None
    frames, bins = sound.shape[1:]
    bands, times = (
        (size - config.patch_size) // stride + 1
        for size, stride in zip((bins, frames), strides, strict=True)
    )
    names = [
        f"{time * strides[1] * _FRAME:.2f} s, band {band}"
        for band in range(bands)
        for time in range(times)
    ]
    return ["[CLS]", "[DIST]", *names] if len(names) + 2 == length else None
