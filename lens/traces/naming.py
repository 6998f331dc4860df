"""What the positions of a trace are called: tokens, patches of a picture, moments of a sound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lens.models.loaded import LoadedModel
from lens.models.stacks import stacks
from lens.passes.inputs import Prompt
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


def keys_of(model: LoadedModel, prompt: Prompt, length: int) -> Axis:
    """The keys of a trace of `model`; of an encoder-decoder of its chosen part."""
    if model.chosen == "decoder":
        return _tokens(model, prompt.target, length)
    if prompt.ids and (not model.parts or len(prompt.ids) == length):
        return Axis(prompt.ids, model.token_strings(prompt.ids))
    seconds = _seconds(model, prompt, length)
    if seconds is not None:
        names = [f"{position * seconds:.2f} s" for position in range(length)]
        return Axis([-1] * length, names, seconds=seconds)
    read = model
    if model.parts and (halves := stacks(model.model)) and halves.encoder is not None:
        read = replace(model, model=halves.encoder)
    names, patches = describe_patches(read, prompt.inputs, length)
    return Axis([-1] * length, names, patches)


def queries_of(model: LoadedModel, prompt: Prompt, length: int) -> Axis:
    """The queries of a trace of cross-attention."""
    return _tokens(model, prompt.target, length)


def _tokens(model: LoadedModel, ids: list[int] | None, length: int) -> Axis:
    if ids is None or len(ids) != length:  # learned queries
        return Axis([-1] * length, [str(position) for position in range(length)])
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
