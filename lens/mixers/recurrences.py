"""The mixers that are recurrences first: RWKV-4 and 7, RG-LRU, SSRU, mLSTM and Titans' memory, as `Phi`.

As in `lens.mixers.kinds`, of tensors [heads, tokens, ...] of one prompt.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.mixers.kinds import checked_decay, doubles, half_lives_of, linear
from lens.mixers.phi import Phi, ScalarDecay, Stepwise


def rwkv7(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, away: Tensor, toward: Tensor
) -> Phi:
    """RWKV-7 (Peng et al., arXiv 2503.14456): `S_i = e^{w_i} S_{i-1} + b_i (a_i . S_{i-1}) + k_i v_i`, `y_i = q_i S_i`.

    Args:
        query, key: [heads, tokens, dim].
        value: [heads, tokens, value_dim].
        decay: w, [heads, tokens, dim].
        away, toward: a and b, [heads, tokens, dim].

    Raises:
        LensError: shapes that do not fit, or a decay above 0.

    Example:
        >>> q, k, v = torch.randn(3, 2, 9, 4) / 2
        >>> lens.mixers.rwkv7(q, k, v, -torch.rand(2, 9, 4), -k, k * 0.5).output().shape
        torch.Size([2, 9, 4])
    """
    query, key, value, decay, away, toward = doubles(
        query=query, key=key, value=value, decay=decay, away=away, toward=toward
    )
    checked_decay(decay, query.shape)
    kept = decay.exp()

    def begin(columns: int) -> Tensor:
        return key.new_zeros(key.shape[0], key.shape[2], columns)

    def step(state: Tensor, token: int, unit: Tensor) -> tuple[Tensor, Tensor]:
        read = (away[:, token, :, None] * state).sum(1, keepdim=True)
        state = kept[:, token, :, None] * state + toward[:, token, :, None] * read
        state = state + key[:, token, :, None] * unit[:, None]
        return state, (query[:, token, :, None] * state).sum(1)

    return Stepwise(value, begin, step, half_lives=half_lives_of(decay))


def rwkv4(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Phi:
    """RWKV-4: for each channel a softmax over `k_j + w (i - 1 - j)` of earlier tokens and `k_i + u` of its own.

    Args:
        decay: [channels], w, below 0.
        bonus: [channels], u.
        key, value: [channels, tokens].

    Raises:
        LensError: shapes that do not fit, or a decay above 0.

    Example:
        >>> k, v = torch.randn(2, 3, 9)
        >>> rwkv4(-torch.rand(3), torch.rand(3), k, v).tile((8, 9), (0, 9)).sum(-1).round().tolist()
        [[1.0], [1.0], [1.0]]
    """
    key, value = doubles(key=key, value=value)
    rate = checked_decay(decay.double()[:, None].expand(key.shape), key.shape)
    place = torch.arange(key.shape[1])
    below = rate * place - key  # column j: exp(-below_j) = exp(k_j - w j)
    own = key + bonus.double()[:, None]
    before = torch.logcumsumexp(-below, 1)
    before = torch.cat([torch.full_like(before[:, :1], -math.inf), before[:, :-1]], 1)
    above = rate * (place - 1)
    total = torch.logaddexp(above + before, own)
    one = torch.ones(*key.shape, 1, dtype=torch.float64)
    return ScalarDecay(
        value[..., None], one, one, above - total, below,
        diagonal=(own - total).exp(), half_lives=half_lives_of(rate),
    )  # fmt: skip


def rglru(decay: Tensor, value: Tensor) -> Phi:
    """RG-LRU of Griffin and RecurrentGemma, for each channel `exp(G_i - G_j)`: its input is gated already.

    Args:
        decay: [channels, tokens], the logarithm of the recurrent gate; -inf where a document begins.
        value: [channels, tokens], what is added to the state.

    Raises:
        LensError: shapes that do not fit, or a decay above 0.

    Example:
        >>> rglru(-torch.rand(3, 9), torch.randn(3, 9)).output().shape
        torch.Size([3, 9, 1])
    """
    (value,) = doubles(value=value)
    one = torch.ones(*value.shape, 1, dtype=torch.float64)
    return linear(one, one, value[..., None], decay=decay)


def ssru(forget: Tensor, value: Tensor) -> Phi:
    """SSRU (Marian): `c_i = f_i c_{i-1} + (1 - f_i) x_i`, before its ReLU; rows sum to 1 at most.

    Args:
        forget: [channels, tokens], f, between 0 and 1.
        value: [channels, tokens], x.

    Raises:
        LensError: shapes that do not fit, or a gate outside 0..1.

    Example:
        >>> lens.mixers.ssru(torch.rand(3, 9), torch.randn(3, 9)).output().shape
        torch.Size([3, 9, 1])
    """
    forget, value = doubles(forget=forget, value=value)
    if bool(((forget < 0) | (forget > 1)).any()):
        raise LensError("forget must be between 0 and 1")
    one = torch.ones(*value.shape, 1, dtype=torch.float64)
    return linear(one, (1 - forget)[..., None], value[..., None], decay=forget.log())


def mlstm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    epsilon: float = 1e-6,
) -> Phi:
    """mLSTM of xLSTM (Beck et al., arXiv 2405.04517): decayed, gated and divided by `max(|row sum|, e^{-m}) + epsilon`.

    Args:
        query, key: [heads, tokens, dim], neither scaled.
        value: [heads, tokens, value_dim].
        input_gate, forget_gate: [heads, tokens], before exponential and sigmoid.
        epsilon: of the division.

    Raises:
        LensError: shapes that do not fit.

    Example:
        >>> q, k, v = torch.randn(3, 2, 9, 4)
        >>> lens.mixers.mlstm(q, k, v, torch.randn(2, 9), torch.randn(2, 9)).output().shape
        torch.Size([2, 9, 4])
    """
    query, key, value, gate, forget = doubles(
        query=query, key=key, value=value, input_gate=input_gate, forget_gate=forget_gate
    )
    rate = torch.nn.functional.logsigmoid(forget)
    total = rate.cumsum(1)
    below = total - gate
    top = (-below).cummax(1).values.clamp(min=0) + total  # m, 0 before the first
    query = query * query.shape[-1] ** -0.5
    phi = ScalarDecay(value, query, key, total - top, below, half_lives=half_lives_of(rate))
    return replace(phi, scale=1 / (torch.maximum(phi.row_sums().abs(), (-top).exp()) + epsilon))


def titans(
    query: Tensor, key: Tensor, value: Tensor, rate: Tensor, momentum: Tensor, forget: Tensor
) -> Phi:
    """The linear memory of Titans (Behrouz et al., arXiv 2501.00663), learned by gradient while it reads.

    `S_i = eta_i S_{i-1} - theta_i (M_{i-1} k_i - v_i) k_i'`, `M_i = (1 - alpha_i) M_{i-1} + S_i`, `y_i = M_i q_i`. (A memory
    that is an MLP is not linear in v and has no such matrix.)

    Args:
        query, key: [heads, tokens, dim].
        value: [heads, tokens, value_dim].
        rate, momentum, forget: theta, eta and alpha, [heads, tokens].

    Raises:
        LensError: shapes that do not fit.

    Example:
        >>> q, k, v = torch.randn(3, 2, 9, 4) / 2
        >>> lens.mixers.titans(q, k, v, *torch.rand(3, 2, 9) / 2).output().shape
        torch.Size([2, 9, 4])
    """
    query, key, value, rate, momentum, forget = doubles(
        query=query, key=key, value=value, rate=rate, momentum=momentum, forget=forget
    )

    def begin(columns: int) -> Tensor:  # momentum and memory, [2, heads, dim, columns]
        return key.new_zeros(2, key.shape[0], key.shape[2], columns)

    def step(state: Tensor, token: int, unit: Tensor) -> tuple[Tensor, Tensor]:
        surprise, memory = state
        k = key[:, token, :, None]
        wrong = (memory * k).sum(1) - unit
        surprise = momentum[:, token, None, None] * surprise
        surprise = surprise - rate[:, token, None, None] * k * wrong[:, None]
        memory = (1 - forget[:, token, None, None]) * memory + surprise
        return torch.stack([surprise, memory]), (query[:, token, :, None] * memory).sum(1)

    lives = half_lives_of(torch.log1p(-forget.clamp(max=1 - 1e-12)))
    return Stepwise(value, begin, step, half_lives=lives)
