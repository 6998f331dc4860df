"""Quantised checkpoints: GGUF files, which transformers reads as float weights, and those that keep their bits."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from lens.common.errors import LensError, told


def names_tokens(file: Path) -> bool:
    """Whether a GGUF file, which is read once for all questions, holds a tokenizer.

    Raises:
        LensError: no GGUF file, one that is damaged or of several parts, or nothing here that reads it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise LensError(
            f"{file} is a GGUF file, which gguf reads: pip install 'attention-lens[gguf]'"
        )
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise LensError(f"{file} is no GGUF file: it does not begin with GGUF; get it again")
    import gguf

    with told(lambda why: f"{file} is damaged or not all there: {why}"):
        fields: dict[str, Any] = dict(gguf.GGUFReader(str(file)).fields)
    parts = fields.get("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise LensError(
            f"{file} is one of {int(parts.contents())} parts; join them (llama-gguf-split --merge) and load the whole"
        )
    return "tokenizer.ggml.tokens" in fields


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
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        yield
        return
    read = settings.get if isinstance(settings, dict) else partial(getattr, settings)
    method = read("quant_method", None)
    method = getattr(method, "value", method)
    with told(
        lambda why: (
            f"the weights of {name} are quantised ({method}), and cannot be loaded here: {why}; load a "
            "checkpoint in float32, bfloat16, GGUF or 4 bit of bitsandbytes"
        )
    ):
        yield


_TORCH_QUANTISED = re.compile(r"torch\.ao\.nn\.(.*\.)?quantized\b")
"""Of fused layers intrinsic.quantized, too."""


class _Once(logging.Filter):
    """Lets a message through the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        before = len(self.told)
        self.told.add(record.getMessage())
        return len(self.told) > before


_ONCE = _Once()


def tell_rounding_once(model: nn.Module) -> None:
    """Of 8 bit, bitsandbytes writes at every product of every layer that what is read is rounded: a line is enough."""
    if any(type(one).__name__ == "Linear8bitLt" for one in model.modules()):
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)


def refuse_torch_quantised(model: nn.Module) -> None:
    """Refuse layers of `torch.ao.quantization`: no gradient passes them, and one scale rounds all tokens that they read.

    Raises:
        LensError: there is one.
    """
    kinds = (type(one) for one in model.modules())
    kind = next((one for one in kinds if _TORCH_QUANTISED.match(one.__module__)), None)
    if kind is not None:
        raise LensError(
            f"{type(model).__name__} has layers that torch quantised ({kind.__module__}.{kind.__name__}): no gradient passes "
            "them, and what they compute of a token hangs on all the others; load the model in float32, bfloat16, GGUF or "
            "4 or 8 bit of bitsandbytes"
        )
