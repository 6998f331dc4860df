"""The mixers that are known, each from what its layer computes: tensors in, `Phi` out.

All take [heads, tokens, ...] of one prompt; G is the running sum of a decay's logarithm, so that the decay from token
j to token i is `exp(G_i - G_j)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.mixers.phi import Band, Delta, Phi, ScalarDecay, VectorDecay

if TYPE_CHECKING:
    from jaxtyping import Float

_NEVER = -1e4  # log of a decay that forgets everything


def linear(
    query: Float[Tensor, "heads tokens dim"],
    key: Float[Tensor, "heads tokens dim"],
    value: Float[Tensor, "heads tokens dim"],
    *,
    decay: Tensor | None = None,
    normalized: bool = False,
) -> Phi:
    """Linear attention, RetNet, Lightning Attention and simple GLA: `q_i . k_j exp(G_i - G_j)`.

    Args:
        query, key: as the layer multiplies them: after feature map, rotation and scale.
        value: what is mixed.
        decay: its logarithm, at most 0: one number a head (RetNet, Lightning) or a token; None: no decay.
        normalized: rows are divided by their sum.

    Raises:
        LensError: shapes that do not fit, or a decay above 0.

    Example:
        >>> q, k, v = torch.randn(3, 2, 9, 4)
        >>> lens.mixers.linear(q, k, v, decay=torch.tensor([-0.1, -0.5])).tile((5, 6), (0, 6)).shape
        torch.Size([2, 1, 6])
    """
    query, key, value = doubles(query=query, key=key, value=value)
    shape = query.shape[:2]
    rate = torch.zeros(shape) if decay is None else _fitting("decay", decay, shape[:1], shape)
    rate = rate[:, None].expand(shape) if rate.dim() == 1 else rate
    rate = checked_decay(rate.double(), shape)
    total = rate.cumsum(1)
    phi = ScalarDecay(value, query, key, total, total, half_lives=half_lives_of(rate))
    return replace(phi, scale=1 / phi.row_sums()) if normalized else phi


def gla(query: Tensor, key: Tensor, value: Tensor, decay: Tensor) -> Phi:
    """Gated linear attention (Yang et al., arXiv 2312.06635): `sum_c q_ic k_jc exp(G_ic - G_jc)`.

    Args:
        query, key: [heads, tokens, dim], the query scaled as the layer does.
        value: [heads, tokens, value_dim].
        decay: [heads, tokens, dim], its logarithm.

    Raises:
        LensError: shapes that do not fit, or a decay above 0.

    Example:
        >>> q, k, v = torch.randn(3, 2, 9, 4)
        >>> lens.mixers.gla(q, k, v, -torch.rand(2, 9, 4)).output().shape
        torch.Size([2, 9, 4])
    """
    query, key, value, decay = doubles(query=query, key=key, value=value, decay=decay)
    total = checked_decay(decay, query.shape).cumsum(1)
    return VectorDecay(value, query, key, total, total, half_lives=half_lives_of(decay))


def mamba2(
    inputs: Tensor,
    step: Tensor,
    decay: Tensor,
    into: Tensor,
    out: Tensor,
    skip: Tensor | None = None,
) -> Phi:
    """Mamba-2 (Dao and Gu, arXiv 2405.21060): `C_i . B_j exp(G_i - G_j) step_j`, G the sum of `step A`.

    Args:
        inputs: [heads, tokens, head_dim], x after convolution and activation.
        step: [heads, tokens], after softplus and limits.
        decay: [heads], A, below 0.
        into, out: [heads, tokens, state], B and C of each head.
        skip: [heads], D.

    Raises:
        LensError: shapes that do not fit, or a decay above 0.

    Example:
        >>> x, b, c = torch.randn(3, 2, 9, 4)
        >>> lens.mixers.mamba2(x, torch.rand(2, 9), -torch.ones(2), b, c).output().shape
        torch.Size([2, 9, 4])
    """
    inputs, step, into, out = doubles(inputs=inputs, step=step, into=into, out=out)
    decay = _fitting("decay", decay, step.shape[:1])
    rate = checked_decay(step * decay[:, None], step.shape)
    total = rate.cumsum(1)
    weighted = into * step[..., None]
    skip = None if skip is None else _fitting("skip", skip, step.shape[:1])
    return ScalarDecay(
        inputs, out, weighted, total, total, half_lives=half_lives_of(rate), skip=skip
    )


def mamba(
    inputs: Tensor,
    step: Tensor,
    decay: Tensor,
    into: Tensor,
    out: Tensor,
    skip: Tensor | None = None,
) -> Phi:
    """Mamba (Gu and Dao, arXiv 2312.00752): a matrix for each channel, `sum_n C_in exp(A_n (T_i - T_j)) B_jn step_j`.

    Args:
        inputs: [channels, tokens], x after convolution and activation.
        step: [channels, tokens], after softplus.
        decay: [channels, state], A, below 0.
        into, out: [tokens, state], or [channels, tokens, state]: B and C.
        skip: [channels], D.

    Raises:
        LensError: shapes that do not fit, or a decay above 0.

    Example:
        >>> x, b = torch.randn(3, 9), torch.randn(9, 4)
        >>> lens.mixers.mamba(x, torch.rand(3, 9), -torch.rand(3, 4), b, b).output().shape
        torch.Size([3, 9, 1])
    """
    inputs, step, decay, into, out = doubles(
        inputs=inputs, step=step, decay=decay, into=into, out=out
    )
    rate = checked_decay(step[..., None] * decay[:, None], (*step.shape, decay.shape[1]))
    total = rate.cumsum(1)
    key = into.expand(total.shape) * step[..., None]
    skip = None if skip is None else _fitting("skip", skip, step.shape[:1])
    return VectorDecay(
        inputs[..., None], out.expand(total.shape), key, total, total,
        half_lives=half_lives_of(rate), skip=skip,
    )  # fmt: skip


def delta(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor | None = None
) -> Phi:
    """DeltaNet, gated DeltaNet (a decay a head) and KDA (a decay a channel).

    `S_i = e^{g_i} S_{i-1} + beta_i k_i (v_i - k_i . e^{g_i} S_{i-1})`, `y_i = q_i S_i`.

    Args:
        query, key: [heads, tokens, dim], normalised and scaled as the layer does.
        value: [heads, tokens, value_dim].
        beta: [heads, tokens].
        decay: g, [heads, tokens] or [heads, tokens, dim]; None: no decay.

    Raises:
        LensError: shapes that do not fit, or a decay above 0.

    Reference: Yang et al., arXiv 2406.06484 and 2412.06464; Kimi Linear, arXiv 2510.26692.

    Example:
        >>> q, k, v = torch.randn(3, 2, 9, 4) / 2
        >>> lens.mixers.delta(q, k, v, torch.rand(2, 9)).output().shape
        torch.Size([2, 9, 4])
    """
    query, key, value, beta = doubles(query=query, key=key, value=value, beta=beta)
    shapes = (beta.shape, (*beta.shape, 1), key.shape)
    rate = torch.zeros(beta.shape) if decay is None else _fitting("decay", decay, *shapes)
    rate = rate[..., None] if rate.dim() == 2 else rate
    rate = checked_decay(rate.double(), (*beta.shape, rate.shape[-1]))
    return Delta(value, query, key, beta, rate, half_lives=half_lives_of(rate))


def rwkv6(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor) -> Phi:
    """RWKV-6 (Peng et al., arXiv 2404.05892): a token is added after it was read, its own weight is the bonus's.

    Args:
        query, key: [heads, tokens, dim], the query scaled as the layer does.
        value: [heads, tokens, value_dim].
        decay: [heads, tokens, dim], its logarithm.
        bonus: [heads, dim], u.

    Raises:
        LensError: shapes that do not fit, or a decay above 0.

    Example:
        >>> q, k, v = torch.randn(3, 2, 9, 4)
        >>> lens.mixers.rwkv6(q, k, v, -torch.rand(2, 9, 4), torch.rand(2, 4)).output().shape
        torch.Size([2, 9, 4])
    """
    query, key, value, decay = doubles(query=query, key=key, value=value, decay=decay)
    total = checked_decay(decay, query.shape).cumsum(1)
    bonus = _fitting("bonus", bonus, (len(key), key.shape[-1]))
    own = (query * bonus[:, None] * key).sum(-1)
    return VectorDecay(
        value, query, key, total - decay, total, half_lives=half_lives_of(decay), diagonal=own
    )


def short_conv(into: Tensor, out: Tensor, weight: Tensor, value: Tensor) -> Phi:
    """A gated short convolution (LFM2): `out_i w_(i - j) in_j` for each channel, within its width.

    Args:
        into, out: [channels, tokens], gates.
        weight: [channels, width], the last of them of the token itself, as torch keeps it.
        value: [channels, tokens].

    Raises:
        LensError: shapes that do not fit.

    Example:
        >>> x, b, c = torch.randn(3, 3, 9)
        >>> lens.mixers.short_conv(b, c, torch.randn(3, 4), x).output().shape
        torch.Size([3, 9, 1])
    """
    into, out, value, weight = doubles(into=into, out=out, value=value, weight=weight)
    unknown = torch.full((len(value),), torch.nan, dtype=torch.float64)
    return Band(value[..., None], out, into, weight.flip(-1), half_lives=unknown)


def doubles(**tensors: Tensor) -> list[Tensor]:
    """In float64 on the CPU; refused where they are no tensors of one number of heads."""
    for name, one in tensors.items():
        if not isinstance(one, Tensor) or one.dim() < 2:
            raise LensError(f"{name} must be a tensor [heads, tokens, ...], got {_said(one)}")
        if not bool(one.isfinite().all()):
            raise LensError(f"{name} has values that are not numbers")
    found = [one.detach().double().cpu() for one in tensors.values()]
    named = dict(zip(tensors, found, strict=True))
    with_tokens = [n for n in named if n not in ("weight", "decay", "into", "out")]
    shapes = {tuple(named[name].shape[:2]) for name in with_tokens}
    if len(shapes) > 1:
        both = ", ".join(f"{name} {list(named[name].shape)}" for name in with_tokens)
        raise LensError(f"heads and tokens must be the same in all, got {both}")
    for one, other in (("query", "key"), ("key", "away"), ("key", "toward")):
        if one in named and other in named and named[one].shape != named[other].shape:
            raise LensError(
                f"{one} and {other} must have one shape, got {list(named[one].shape)} and "
                f"{list(named[other].shape)}"
            )
    return found


def _fitting(name: str, one: Tensor, *shapes: Sequence[int]) -> Tensor:
    """In float64 on the CPU; refused where it is no tensor of one of these shapes, or has NaN."""
    if not isinstance(one, Tensor) or tuple(one.shape) not in map(tuple, shapes):
        known = " or ".join(str(list(shape)) for shape in shapes)
        raise LensError(f"{name} must be a tensor {known}, got {_said(one)}")
    if bool(one.isnan().any()):
        raise LensError(f"{name} has values that are not numbers")
    return one.detach().double().cpu()


def checked_decay(rate: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Logarithms of decays, those of -inf as a number that leaves nothing."""
    if rate.shape != torch.Size(shape):
        raise LensError(f"decay must be {list(shape)}, got {list(rate.shape)}")
    if bool((rate > 0).any()):
        raise LensError("decay is a logarithm of at most 0; give log of the factor")
    return rate.clamp(min=_NEVER)


def half_lives_of(rate: Tensor) -> Tensor:
    """[heads] median of ln 2 / -rate, inf without decay."""
    return (math.log(2) / -rate.double().clamp(max=0).flatten(1)).abs().median(1).values


def _said(given: object) -> str:
    return f"{list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
