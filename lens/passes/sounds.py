"""Sounds as people have them, for a model's own feature extractor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lens.common.choices import is_number
from lens.common.errors import LensError, first_line
from lens.common.files import on_disk, open_regular
from lens.models.ids import shape_of
from lens.models.loaded import LoadedModel

LARGEST_SOUND = 1 << 30
"""Bytes of a file."""
_INPUTS = ("input_features", "input_values")
_ARRAYS = frozenset({"array", "raw"})
_CHANNELS, _LOUDEST = 8, 100


def reads_sounds(model: LoadedModel) -> bool:
    """Whether the model reads sounds and no tokens."""
    return getattr(model.model, "main_input_name", "") in _INPUTS


def is_sound(given: Any) -> bool:
    """Whether this is a sound as `read_sound` takes it."""
    if isinstance(given, Mapping):
        return not _ARRAYS.isdisjoint(given) and "sampling_rate" in given
    if isinstance(given, tuple):
        return len(given) == 2 and sum(map(is_number, given)) == 1 and any(map(_is_samples, given))
    if isinstance(given, torch.Tensor) and given.ndim == 2:
        return False  # a batch of what the model reads
    return isinstance(given, str | Path) or _is_samples(given)


def read_sound(given: Any, rate: int) -> np.ndarray:
    """Samples [samples] float32 of one channel, -1 to 1, `rate` a second; channels are averaged.

    Args:
        given: the path of a .wav file; samples [samples] or [samples, channels] (an array or a tensor, floating numbers
            from -1 to 1, or whole numbers of 8, 16 or 32 bits), which have the rate already; a pair of samples and
            their rate, in either order; or a mapping with "array" (or "raw") and "sampling_rate", as datasets have it.
        rate: wanted, per second; a sound of another is resampled.

    Raises:
        LensError: no such file, one that is no .wav file, nothing in it, a rate that is none, or numbers that are no samples.
    """
    own, samples = _told(given, rate)
    if not samples.size or not np.isfinite(samples).all():
        raise LensError("a sound must hold at least one sample, and numbers that are finite")
    if (most := float(np.abs(samples).max())) > _LOUDEST:
        raise LensError(
            f"samples must go from -1 to 1, and these reach {most:g}; divide them by what stands for 1 (32768 of 16 bits)"
        )
    if own == rate:
        return samples
    from scipy.signal import resample_poly

    shared = gcd(own, rate)
    return resample_poly(samples, rate // shared, own // shared).astype(np.float32)


def _told(given: Any, rate: int) -> tuple[int, np.ndarray]:
    """The rate of a sound, and its samples [samples]."""
    if isinstance(given, str | Path):
        return _of_file(on_disk(given))
    own: Any = rate
    if isinstance(given, Mapping):
        own, given = given["sampling_rate"], next(given[name] for name in _ARRAYS if name in given)
    elif isinstance(given, tuple):
        own, given = sorted(given, key=_is_samples)
    if not (is_number(own) and own >= 1 and int(own) == own):
        raise LensError(f"a sound's rate is a whole number of samples a second, got {own!r}")
    samples = given.detach().float().cpu().numpy() if isinstance(given, torch.Tensor) else given
    if isinstance(samples, list | tuple):
        samples = np.array(samples)
    if not _is_samples(samples):
        raise LensError(
            "samples must be numbers [samples] or [samples, channels], floating or of 8, 16 or 32 bits, got "
            f"{shape_of(given)}"
        )
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:  # channels first
        samples = samples.T
    return int(own), _shares(samples)


def _is_samples(given: Any) -> bool:
    """[samples], or a few channels of them, in numbers."""
    if not isinstance(given, np.ndarray | torch.Tensor) or given.ndim not in (1, 2):
        return False
    if given.ndim == 2 and min(given.shape) > _CHANNELS:
        return False
    if isinstance(given, torch.Tensor):  # whole ones are token ids
        return given.is_floating_point()
    return given.dtype.kind == "f" or (given.dtype.kind in "iu" and given.dtype.itemsize <= 4)


def prepared_sound(model: LoadedModel, given: Any) -> dict[str, Any]:
    """What the model's feature extractor makes of a sound.

    Raises:
        LensError: no feature extractor, or as `read_sound`.
    """
    extractor = getattr(model.processor, "feature_extractor", model.processor)
    rate = getattr(extractor, "sampling_rate", None)
    if not isinstance(rate, int):
        raise LensError(
            f"{model.name} has no feature extractor, so it cannot read sounds; pass what one makes of them "
            f"({{{model.model.main_input_name!r}: ...}}), or give one: lens.load(model, processor=...)"
        )
    made = extractor(read_sound(given, rate), sampling_rate=rate, return_tensors="pt")
    return {model.model.main_input_name: made[model.model.main_input_name]}


def _of_file(path: Path) -> tuple[int, np.ndarray]:
    """Its rate, and [samples] of one channel."""
    from scipy.io import wavfile

    if not path.is_file():
        raise LensError(f"no sound {path}; give the path of a .wav file, or samples")
    with open_regular(path, most=LARGEST_SOUND) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks beside the sound
        try:
            rate, samples = wavfile.read(file)
        except (ValueError, EOFError, IndexError, TypeError, MemoryError) as error:
            raise LensError(
                f"{path} is no .wav file that can be read: {first_line(error)}; convert it, e.g. with sox or ffmpeg"
            ) from error
    return int(rate), _shares(samples)


def _shares(samples: np.ndarray) -> np.ndarray:
    """[samples] float32 from -1 to 1 of numbers of any type, [samples] or [samples, channels]."""
    if samples.dtype.kind == "u":  # of 8 bits
        found = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        found = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    else:
        found = samples.astype(np.float32)
    return found.mean(1) if found.ndim == 2 else found
