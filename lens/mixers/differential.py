"""Differential attention: Phi = P1 - lambda P2, two softmax maps of one head, the second taken off the first.

Rows sum to 1 - lambda, and entries may be negative: what both maps see is cancelled. Of DiffLlama head p of H / 2 is the
pair of the heads p and p + H / 2 that `lens.capture` shows.

Reference: Ye et al., Differential Transformer, 2024, arXiv 2410.05258.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lens.common.choices import is_number
from lens.common.errors import LensError
from lens.mixers.phi import BLOCK, Phi


@dataclass(frozen=True, eq=False, repr=False)
class Differential(Phi):
    """`Phi_ij = exp(s1_ij - L1_i) - lambda exp(s2_ij - L2_i)` for j <= i.

    Attributes:
        query, key: [2, heads, tokens, dim], queries scaled.
        lse: [2, heads, tokens], of the rows of both maps.
        factor: [heads], lambda.
    """

    query: Tensor
    key: Tensor
    lse: Tensor
    factor: Tensor

    def _strip(self, first: int, last: int, block: int) -> Iterator[tuple[int, int, Tensor]]:
        column = torch.arange(first, last)
        for start, end in self._blocks(first, block):
            rows = slice(start, end)
            logits = self.query[:, :, rows] @ self.key[:, :, first:last].transpose(-1, -2)
            hidden = column > torch.arange(start, end)[:, None]
            logits = (logits - self.lse[:, :, rows, None]).masked_fill(hidden, -math.inf)
            one, other = logits.exp()
            yield start, end, one - self.factor[:, None, None] * other


def differential(
    query: Tensor, key: Tensor, value: Tensor, factor: Tensor, scale: float
) -> Differential:
    """Phi of causal differential attention.

    Args:
        query, key: [2, heads, tokens, dim], of the first and of the second map.
        value: [heads, tokens, value_dim].
        factor: [heads], lambda.
        scale: of the logits.

    Raises:
        LensError: shapes that do not fit.

    Example:
        >>> query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
        >>> phi = lens.mixers.differential(query, key, torch.randn(4, 9, 16), torch.full((4,), 0.2), 8**-0.5)
        >>> bool(torch.allclose(phi.row_sums(), torch.tensor(0.8, dtype=torch.float64)))
        True
    """
    given = {"query": query, "key": key, "value": value, "factor": factor}
    for name, one in given.items():
        if not isinstance(one, Tensor):
            raise LensError(f"{name} must be a tensor, got {type(one).__name__}")
    if not is_number(scale):
        raise LensError(f"scale must be a number, got {scale!r}")
    if (
        query.dim() != 4
        or len(query) != 2
        or key.shape != query.shape
        or value.shape[:2] != query.shape[1:3]
    ):
        raise LensError(
            "differential takes query and key [2, heads, tokens, dim] and value [heads, tokens, value_dim], got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    query, key = query.double() * scale, key.double()
    length, lse = query.shape[2], []
    for start in range(0, length, BLOCK):
        rows = torch.arange(start, min(start + BLOCK, length))
        logits = query[:, :, rows] @ key.transpose(-1, -2)
        lse.append(
            logits.masked_fill(torch.arange(length) > rows[:, None], -math.inf).logsumexp(-1)
        )
    none = torch.full((query.shape[1],), math.nan, dtype=torch.float64)
    return Differential(
        value.double(), query, key, torch.cat(lse, -1), factor.double(), half_lives=none
    )


def record_differential(stack: ExitStack, module: Any, keep: Any) -> None:
    """Tell of each pass of a `DiffLlamaAttention`: the matrix, and what it gives before its norm."""
    home = sys.modules[type(module).__module__]
    made: list[Differential] = []

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is not None:
            raise LensError(
                "a pass that continues a cache has keys that are not seen here; run the whole prompt"
            )
        given = dict(zip(("hidden_states", "position_embeddings"), args, strict=False)) | kwargs
        hidden, position = given["hidden_states"], given["position_embeddings"]
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        query, key, value = (
            part.forward(hidden).view(shape).transpose(1, 2)
            for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        query, key = home.apply_rotary_pos_emb(query, key, *position)
        share = query.shape[1] // key.shape[1]
        query, key = query[0].cpu(), key[0].repeat_interleave(share, 0).cpu()
        value = torch.cat(value[0].cpu().chunk(2, 0), -1).repeat_interleave(share, 0)
        one, other = (
            (a.double() * b.double()).sum().exp()
            for a, b in ((module.lambda_q1, module.lambda_k1), (module.lambda_q2, module.lambda_k2))
        )
        factor = (one - other + module.lambda_init).cpu().expand(len(query) // 2)
        query, key = (part.unflatten(0, (2, -1)) for part in (query, key))
        made[:] = [differential(query, key, value, factor, module.scaling)]

    def after(_: nn.Module, args: tuple) -> None:
        keep("differential", made.pop(), args[0][0].transpose(0, 1))

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(module.groupnorm.register_forward_pre_hook(after).remove)
