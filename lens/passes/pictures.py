"""Pictures as people have them, for a model's own processor: what it makes of them, and which part it looks at.

Where a position of the processor's output lies on the picture is measured and not taken from a configuration: the
processor is given ramps of the picture's size, and says by their values which column and row it put where. So
resizing, cropping, padding and tiles are all known alike.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lens.common.errors import LensError, first_line
from lens.common.files import on_disk
from lens.models.loaded import LoadedModel
from lens.models.sizes import image_token, reads_pictured_text

Box = tuple[float, float, float, float]
_SNAP = 0.2  # pixels of the output: an end this near to a whole pixel is meant to be there
_RIM = 16  # a resampled ramp is bent in the outer 1/16


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that a model was given.

    Attributes:
        pixels: [height, width, 1 or 3] uint8.
        boxes: for each picture that the model got of it (one; several where it is cut into tiles) the ends
            (left, top, right, bottom) in pixels of this picture; they lie outside of it where it was padded.
    """

    pixels: np.ndarray = field(repr=False)
    boxes: tuple[Box, ...]


def is_picture(given: Any) -> bool:
    """Whether this is one picture: of PIL, an array [height, width] or [height, width, 1, 3 or 4], or a path."""
    if isinstance(given, np.ndarray):
        return given.ndim == 2 or (given.ndim == 3 and given.shape[-1] in (1, 3, 4))
    return isinstance(given, Path) or (hasattr(given, "convert") and hasattr(given, "mode"))


def reads_pictures_alone(model: LoadedModel) -> bool:
    """Whether the model reads pictures and no tokens."""
    alone = getattr(model.model, "main_input_name", "") == "pixel_values"
    return alone and not reads_pictured_text(model.model)


def hides_at_random(model: LoadedModel) -> bool:
    """Whether the model leaves patches out by an input `noise`, which it draws itself where it is not given (ViT-MAE)."""
    return any(
        hasattr(one, "random_masking") and getattr(one, "is_mae", True)
        for one in model.model.modules()
    )


def check_noise(model: LoadedModel, given: Any) -> None:
    """Raises LensError: nobody says which patches are left out."""
    if "noise" not in given and hides_at_random(model):
        raise LensError(
            f"{model.info.class_name} leaves patches out by noise that it draws itself; say which: pass "
            "{'pixel_values': ..., 'noise': [1, patches]}, of which those with the least noise are kept "
            "(config.mask_ratio = 0.0 keeps all)"
        )


def read_picture(given: Any, channels: int = 3) -> np.ndarray:
    """[height, width, channels] uint8 of a picture of PIL, an array or a path.

    Args:
        given: arrays hold whole numbers from 0 to 255, or shares from 0 to 1.
        channels: 1 (grey) or 3.

    Raises:
        LensError: Pillow is not installed, no such file, one that is no picture, or other numbers.
    """
    Image = _pillow()
    if isinstance(given, str | Path):
        path = on_disk(given)
        if not path.is_file():
            raise LensError(
                f"no picture {path}; give the path of a picture file, a PIL image or an array"
            )
        try:
            with Image.open(path) as opened:
                opened.load()
                given = opened
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise LensError(
                f"{path} is no picture that Pillow reads: {first_line(error)}"
            ) from error
    elif isinstance(given, np.ndarray):
        given = Image.fromarray(_bytes(given))
    found = np.asarray(given.convert("L" if channels == 1 else "RGB"))
    return found.reshape(*found.shape[:2], channels)


def prepared(
    model: LoadedModel, given: Any, text: str | None = None
) -> tuple[dict[str, Any], Picture]:
    """What the model's processor makes of a picture (and a text), and the picture with its boxes.

    A text without the image token gets it as the processor's chat template says, or in a line before.

    Raises:
        LensError: no processor, no picture, or a text for a model that reads none.
    """
    if model.processor is None:
        raise LensError(
            f"{model.name} has no processor, so it cannot read pictures; pass what a processor makes of them "
            "({'pixel_values': ...}), or give one: lens.load(model, processor=...)"
        )
    pixels = read_picture(given, _channels(model))
    shown = _shown(pixels)
    images = getattr(model.processor, "image_processor", model.processor)
    if text is None and reads_pictures_alone(model):
        found = images(shown, return_tensors="pt")
    elif reads_pictures_alone(model):
        raise LensError(
            f"{model.info.class_name} reads pictures alone; pass the picture without a text"
        )
    else:
        worded = _worded(model, text or "")
        found = model.processor(images=[shown], text=[worded], return_tensors="pt")
    return dict(found), Picture(pixels, _boxes(images, pixels, found))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise LensError(
            "pictures need Pillow, which is not installed here; get it with "
            "`pip install 'attention-lens[vision]'`"
        ) from error
    return Image


def _bytes(array: np.ndarray) -> np.ndarray:
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    low, high = (float(array.min()), float(array.max())) if array.size else (np.nan, np.nan)
    whole = not np.issubdtype(array.dtype, np.floating) and array.dtype != bool
    if array.ndim not in (2, 3) or not (low >= 0 and high <= (255 if whole else 1)):
        raise LensError(
            "an array is a picture [height, width] or [height, width, 1, 3 or 4] of whole numbers from 0 to 255, or "
            f"shares from 0 to 1; got {array.dtype} {list(array.shape)} from {low:g} to {high:g}"
        )
    return array.astype(np.uint8) if whole else np.round(array * 255.0).astype(np.uint8)


def _channels(model: LoadedModel) -> int:
    config = model.model.config
    return 1 if getattr(getattr(config, "vision_config", config), "num_channels", 3) == 1 else 3


def _shown(pixels: np.ndarray) -> Any:
    return _pillow().fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _worded(model: LoadedModel, text: str) -> str:
    processor = model.processor
    token = getattr(processor, "image_token", None)
    if token is None and (index := image_token(model.model.config)) is not None:
        token = model.tokenizer.convert_ids_to_tokens(index)
    if token is None or token in text:
        return text
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        said = [{"role": "user", "content": content}]
        return processor.apply_chat_template(said, add_generation_prompt=True)
    return f"{token}\n{text}"


def _boxes(images: Any, pixels: np.ndarray, found: Any) -> tuple[Box, ...]:
    """Where each picture of the processor's output lies on the one that it was made of."""
    height, width = pixels.shape[:2]
    whole = (0.0, 0.0, float(width), float(height))
    values = found.get("pixel_values")
    if not isinstance(values, torch.Tensor) or values.dim() < 4:
        return (whole,)  # patches in a row (Qwen-VL), which resizes and neither cuts nor pads
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    seen = [
        _of_processor(images, np.round(255 * part), pixels.shape[-1])
        for part in (np.zeros((height, width)), np.ones((height, width)), across, down)
    ]
    if len({one.shape for one in seen}) > 1:
        return (whole,)
    black, white, right, below = seen
    return tuple(_box(*one, width, height) for one in zip(black, white, right, below, strict=True))


def _of_processor(images: Any, grey: np.ndarray, channels: int) -> np.ndarray:
    """[pictures, height, width] of the first channel."""
    array = np.repeat(grey.astype(np.uint8)[..., None], channels, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = images(_shown(array), return_tensors="pt")["pixel_values"].double().numpy()
    return values.reshape(-1, *values.shape[-3:])[:, 0]


def _box(
    black: np.ndarray,
    white: np.ndarray,
    right: np.ndarray,
    below: np.ndarray,
    width: int,
    height: int,
) -> Box:
    """Of one picture of the output: where black and white differ, the ramps say the place."""
    range_ = white - black
    inside = np.abs(range_) > 0.5 * np.abs(range_).max()
    if not inside.any():
        return (0.0, 0.0, float(width), float(height))
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = ((part - black) / range_ for part in (right, below))
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    left, end = _line(x[np.ix_(rows, columns)].mean(0), columns, black.shape[1], width)
    top, bottom = _line(y[np.ix_(rows, columns)].mean(1), rows, black.shape[0], height)
    return left, top, end, bottom


def _line(values: np.ndarray, places: np.ndarray, size: int, whole: int) -> tuple[float, float]:
    """Where the output begins and ends, in pixels of the picture, from a ramp's values at places of the output.

    Pictures are resized to whole pixels and cut or padded by whole pixels: with that the ramp, whose values are
    rounded, says the ends exactly. Where it does not fit, they are as measured.
    """
    rim = len(places) // _RIM
    kept = slice(rim, len(places) - rim)
    if len(places) < 2:
        return 0.0, float(whole)
    slope, start = np.polyfit(places[kept] + 0.5, values[kept], 1)
    resized, before = 1 / slope, start / slope  # in pixels of the output
    if (
        abs(resized - round(resized)) < _SNAP * (1 + resized / 256)
        and abs(before - round(before)) < _SNAP
    ):
        resized, before = round(resized), round(before)
    return float(before * whole / resized), float((before + size) * whole / resized)
