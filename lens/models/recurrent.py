"""Which modules of transformers' models are linear or recurrent mixers, by their names; `lens.mixers` follows them."""

from __future__ import annotations

import inspect
import sys
from functools import cache

from torch import nn

SCANS = (
    "mamba2_chunk_scan",
    "mamba_selective_scan",
    "torch_chunk_gated_delta_rule",
    "chunk_kimi_delta_attention",
    "rwkv_linear_attention",
)
"""Functions that a mixer looks up in its file and scans with."""
CLASSES = ("Rglru", "ShortConv", "LightningAttention", "xLSTMBackend", "DiffLlamaAttention")
"""Endings of the names of the classes of mixers that scan otherwise."""


def has_mixers(root: nn.Module) -> bool:
    """Whether some module is a mixer that is known."""
    return any(scan_function(one) or scan_class(one) for one in root.modules())


def scan_class(module: nn.Module) -> str | None:
    """The ending of its class that is one of `CLASSES`; None of one that is no such mixer."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    return next((ending for ending in CLASSES if kind.__name__.endswith(ending)), None)


def scan_function(module: nn.Module) -> str | None:
    """Name of the function that the module looks up in its file and scans with; None of one that has none."""
    home = sys.modules[type(module).__module__]
    return next((one for one in SCANS if hasattr(home, one) and _calls(type(module), one)), None)


@cache  # inspect parses the whole file for each class
def _calls(kind: type[nn.Module], function: str) -> bool:
    """Whether the source of a class's methods names a function."""
    try:
        return function in inspect.getsource(kind)
    except (OSError, TypeError):
        return False
