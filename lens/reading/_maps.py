"""Scores of tokens from maps of attention: what people take for an explanation, each by its definition.

Maps are [heads, queries, keys] of each layer, float64; a score is [tokens], of one answering query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from lens.common.errors import LensError

if TYPE_CHECKING:
    from jaxtyping import Float

LONGEST_FLOW = 128
_UNITS = 1_000_000  # of a capacity of 1: flows are whole numbers


def rollout(maps: Sequence[Tensor]) -> Float[Tensor, "queries keys"]:
    """`R_l = ½ (mean over heads of A_l + I) R_{l-1}`; rows sum to what attention rows sum to, 1 without learned sinks.

    Reference: Abnar and Zuidema, Quantifying Attention Flow in Transformers, 2020, arXiv 2005.00928.
    """
    found = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    for attention in maps:
        found = _mixed(attention) @ found
    return found


def flow(maps: Sequence[Tensor], row: int) -> Float[Tensor, " keys"]:
    """Largest flow from the query of the last layer to each token of the first, capacities as in `rollout`; sums to 1.

    Raises:
        LensError: too many tokens.
    """
    tokens = maps[0].shape[-1]
    if tokens > LONGEST_FLOW:
        raise LensError(f"attention flow takes at most {LONGEST_FLOW} tokens, got {tokens}")
    starts, ends, sizes = [], [], []
    for layer, attention in enumerate(maps):
        mixed = (_mixed(attention) * _UNITS).round().int().cpu().numpy()
        query, key = np.nonzero(mixed)
        starts.append((layer + 1) * tokens + query)
        ends.append(layer * tokens + key)
        sizes.append(mixed[query, key])
    count = (len(maps) + 1) * tokens
    shape = (np.concatenate(sizes), (np.concatenate(starts), np.concatenate(ends)))
    graph = coo_matrix(shape, shape=(count, count)).tocsr().astype(np.int32)
    source = len(maps) * tokens + row
    found = [maximum_flow(graph, source, token).flow_value for token in range(tokens)]
    values = torch.tensor(found, dtype=torch.float64)
    return values / values.sum().clamp(min=1)


def norms(attention: Tensor, values: Tensor, output: Tensor, row: int) -> Float[Tensor, " keys"]:
    """`‖sum over heads of A_ij v_j W_O‖` of one query.

    Reference: Kobayashi et al., Attention is Not Only a Weight, 2020, arXiv 2004.10102.
    """
    written = torch.einsum("hj,hjk,hkd->jd", attention[:, row], values, output.to(values))
    return written.norm(dim=-1)


def effective(
    attention: Float[Tensor, " keys"], values: Float[Tensor, "keys value_dim"], seen: Tensor
) -> Float[Tensor, " keys"]:
    """The part of a row that reaches the output: the row less its part in the null space of the values and of ones.

    Any row that differs by that part alone sums to the same and writes the same.

    Reference: Brunner et al., On Identifiability in Transformers, 2020, arXiv 1908.04211; there the null space of the
        values alone, over all keys, which breaks sums of rows and looks ahead.
    """
    places = seen.nonzero()[:, 0]
    basis = torch.cat([values[places], torch.ones_like(values[places][:, :1])], 1)
    left, sizes, _ = torch.linalg.svd(basis, full_matrices=False)
    left = left[:, sizes > sizes[0] * 1e-9]
    found = torch.zeros_like(attention)
    found[places] = left @ (left.T @ attention[places])
    return found


def gradient_rollout(maps: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "queries keys"]:
    """`R = R + (mean over heads of (A ∘ gradient)^+) R`, from R = I; I taken off in the end.

    Reference: Chefer et al., Generic Attention-model Explainability, 2021, arXiv 2103.15679.
    """
    eye = torch.eye(maps[0][0].shape[-1], dtype=maps[0][0].dtype, device=maps[0][0].device)
    found = eye
    for attention, slope in maps:
        found = found + (attention * slope).clamp(min=0).mean(0) @ found
    return found - eye


def _mixed(attention: Tensor) -> Tensor:
    eye = torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
    return (attention.mean(0) + eye) / 2
