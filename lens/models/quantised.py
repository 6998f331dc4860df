"""Quantised checkpoints: GGUF files, which transformers reads as float weights, and those that keep their bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from lens.common.errors import LensError, first_line


def check_gguf(file: Path) -> None:
    """Raises LensError: no GGUF file, a file in several parts, or nothing here that reads it."""
    if importlib.util.find_spec("gguf") is None:
        raise LensError(
            f"{file} is a GGUF file, which gguf reads: pip install 'attention-lens[gguf]'"
        )
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise LensError(f"{file} is no GGUF file: it does not begin with GGUF; get it again")
    fields = _fields(file)
    parts = fields.get("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise LensError(
            f"{file} is one of {int(parts.contents())} parts; join them (llama-gguf-split --merge) and load the whole"
        )


def names_tokens(file: Path) -> bool:
    """Whether a GGUF file holds a tokenizer."""
    return "tokenizer.ggml.tokens" in _fields(file)


def _fields(file: Path) -> dict[str, Any]:
    import gguf

    try:
        return dict(gguf.GGUFReader(str(file)).fields)
    except Exception as error:  # of somebody else's code: any kind
        raise LensError(f"{file} is damaged or not all there: {first_line(error)}") from error


def class_of(config: Any) -> str:
    """The class with a head that a configuration is for, where no checkpoint names it."""
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM):
        found: Any = auto._model_mapping.get(type(config), None)
        if found is not None:
            return (found if isinstance(found, type) else found[0]).__name__
    return "AutoModel"


@contextmanager
def readable_weights(config: Any, name: str) -> Iterator[None]:
    """Errors inside the block, of a checkpoint with quantised weights, say so in one line.

    Raises:
        LensError: a package that reads such weights is missing, or they need another device.
    """
    try:
        yield
    except LensError:
        raise
    except Exception as error:  # of somebody else's code: any kind
        settings = getattr(config, "quantization_config", None)
        if settings is None:
            raise
        read = (
            settings.get if isinstance(settings, dict) else lambda key: getattr(settings, key, None)
        )
        method = getattr(read("quant_method"), "value", read("quant_method"))
        raise LensError(
            f"the weights of {name} are quantised ({method}), and cannot be loaded here: {first_line(error)}; load a "
            "checkpoint in float32, bfloat16, GGUF or 4 bit of bitsandbytes"
        ) from error
