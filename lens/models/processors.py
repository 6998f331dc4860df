"""The processor of a checkpoint: what makes a model's inputs of pictures, and of pictures with texts."""

from __future__ import annotations

import importlib.util
from typing import Any

from lens.models.sizes import image_token


def read_processor(model: Any, name: str, **where: Any) -> Any:
    """Of a folder or hub model that reads pictures; None where it has none, or Pillow is not installed.

    Args:
        model: of transformers.
        name: folder or hub id.
        where: `revision` and `local_files_only` of transformers.
    """
    alone = getattr(model, "main_input_name", "") == "pixel_values"
    if not alone and image_token(model.config) is None:
        return None
    if importlib.util.find_spec("PIL") is None:
        return None
    from transformers import AutoImageProcessor, AutoProcessor

    reader = AutoImageProcessor if alone else AutoProcessor
    try:
        return reader.from_pretrained(name, trust_remote_code=False, **where)
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
    ):  # no file of one, or one of another library
        return None
