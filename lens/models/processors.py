"""The processor of a checkpoint: what makes a model's inputs of pictures, pictures with texts, and sounds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens.common.files import shorten
from lens.models.sizes import image_token


def read_processor(model: Any, name: str, **where: Any) -> Any:
    """Of a folder or hub model that reads pictures or sounds; None where it has none, or Pillow is not installed.

    Args:
        model: of transformers.
        name: folder or hub id.
        where: `revision` and `local_files_only` of transformers.
    """
    reads = getattr(model, "main_input_name", "")
    alone, hears = reads == "pixel_values", reads in ("input_features", "input_values")
    if not (alone or hears) and image_token(model.config) is None:
        return None
    if not hears and importlib.util.find_spec("PIL") is None:
        return None
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    reader = AutoFeatureExtractor if hears else AutoImageProcessor if alone else AutoProcessor
    try:
        return reader.from_pretrained(name, trust_remote_code=False, **where)
    except (OSError, ValueError, KeyError, ImportError):
        return None  # no file of one, or one of another library


def check_given(**given: Any) -> None:
    """Raises LensError where a tokenizer or processor, by that name, is a name, path or settings of one."""
    for what, one in given.items():
        if isinstance(one, str | int | float | Path | dict | list):
            made = f"transformers.Auto{what.capitalize()}.from_pretrained(...)"
            raise LensError(f"{what} must be one, such as {made}, got {shorten(repr(one))}")
