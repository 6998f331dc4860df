"""Sounds as people have them, for a model's own feature extractor."""

from __future__ import annotations

import warnings
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from lens.common.errors import LensError, first_line
from lens.common.files import on_disk, open_regular
from lens.models.loaded import LoadedModel

LARGEST_SOUND = 1 << 30
"""Bytes of a file."""
_INPUTS = ("input_features", "input_values")


def reads_sounds(model: LoadedModel) -> bool:
    """Whether the model reads sounds and no tokens."""
    return getattr(model.model, "main_input_name", "") in _INPUTS


def is_sound(given: Any) -> bool:
    """Whether this is a sound as `read_sound` takes it: a path, or samples [samples] of floating numbers."""
    is_samples = isinstance(given, np.ndarray) and given.ndim == 1 and given.dtype.kind == "f"
    return is_samples or isinstance(given, str | Path)


def read_sound(given: Any, rate: int) -> np.ndarray:
    """Samples [samples] float32 of one channel, -1 to 1, `rate` a second; channels are averaged.

    Args:
        given: the path of a .wav file, or samples that have the rate already.
        rate: wanted, per second; a file of another is resampled.

    Raises:
        LensError: no such file, one that is no .wav file, or nothing in it.
    """
    if isinstance(given, np.ndarray):
        samples, own = given.astype(np.float32), rate
    else:
        own, samples = _of_file(on_disk(given))
    if not samples.size or not np.isfinite(samples).all():
        raise LensError("a sound must hold at least one sample, and numbers that are finite")
    if own == rate:
        return samples
    from scipy.signal import resample_poly

    shared = gcd(own, rate)
    return resample_poly(samples, rate // shared, own // shared).astype(np.float32)


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
