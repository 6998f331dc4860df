"""Instrumented attention: q, k and v in; output and exact statistics of `P` out, without N x N.

>>> import torch
>>> from lens_kernels import AttentionMask, attention
>>> query = key = value = torch.zeros(1, 2, 6, 16)
>>> result = attention(query, key, value, mask=AttentionMask(causal=True), block_size=3,
...                    statistics=("entropy", "block_mass"))
>>> result.statistics.block_mass.shape
torch.Size([1, 2, 2, 2])
"""

from lens_kernels.api import attention, explain
from lens_kernels.dispatch import Explanation
from lens_kernels.statistics import STATISTICS, Statistic
from lens_kernels.types import (
    AttentionGroups,
    AttentionMask,
    AttentionResult,
    AttentionStatistics,
)

__all__ = [
    "STATISTICS",
    "AttentionGroups",
    "AttentionMask",
    "AttentionResult",
    "AttentionStatistics",
    "Explanation",
    "Statistic",
    "attention",
    "explain",
]
