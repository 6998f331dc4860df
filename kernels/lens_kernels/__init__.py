"""Instrumented attention: q, k and v in; output and exact statistics of `P` out, without N x N.

Names are loaded on first use, so that `lens_kernels.tile` works without torch.

>>> import torch
>>> from lens_kernels import AttentionMask, attention
>>> query = key = value = torch.zeros(1, 2, 6, 16)
>>> result = attention(query, key, value, mask=AttentionMask(causal=True), block_size=3,
...                    statistics=("entropy", "block_mass"))
>>> result.statistics.block_mass.shape
torch.Size([1, 2, 2, 2])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lens_kernels.api import attention, explain
    from lens_kernels.decoding import decode
    from lens_kernels.dispatch import Explanation as Explanation
    from lens_kernels.known_lse import masses_from_lse
    from lens_kernels.patching import patch_effects
    from lens_kernels.rectangles import tile
    from lens_kernels.redistribution import redistribute
    from lens_kernels.states import AttentionState, merge
    from lens_kernels.statistics import STATISTICS
    from lens_kernels.statistics import Statistic as Statistic
    from lens_kernels.types import (
        AttentionGroups,
        AttentionMask,
        AttentionResult,
        AttentionStatistics,
    )
    from lens_kernels.weighted import weighted_attention

__all__ = [
    "STATISTICS",
    "AttentionGroups",
    "AttentionMask",
    "AttentionResult",
    "AttentionState",
    "AttentionStatistics",
    "attention",
    "decode",
    "explain",
    "masses_from_lse",
    "merge",
    "patch_effects",
    "redistribute",
    "tile",
    "weighted_attention",
]

_MODULES = {
    "STATISTICS": "statistics",
    "AttentionGroups": "types",
    "AttentionMask": "types",
    "AttentionResult": "types",
    "AttentionState": "states",
    "AttentionStatistics": "types",
    "Explanation": "dispatch",
    "Statistic": "statistics",
    "attention": "api",
    "decode": "decoding",
    "explain": "api",
    "masses_from_lse": "known_lse",
    "merge": "states",
    "patch_effects": "patching",
    "redistribute": "redistribution",
    "tile": "rectangles",
    "weighted_attention": "weighted",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lens_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lens_kernels.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
