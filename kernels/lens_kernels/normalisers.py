"""What turns logits into weights, for `weighted_attention`: other normalisers than the softmax.

Each says what the weight of a visible key is, from the logits `s` of its row; hidden keys weigh 0. Weights
need not sum to 1, and may be negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

_INF = float("inf")
Over: TypeAlias = Literal["seen", "keys"]
_OVER = ("seen", "keys")


@dataclass(frozen=True, eq=False)
class OffByOne:
    """`exp(s_j) / (1 + sum exp(s))`: a row that finds nothing attends to nothing.

    The same as a learned sink whose logit is 0.
    """


@dataclass(frozen=True, eq=False)
class Sigmoid:
    """`sigmoid(s_j + bias)`, each key by itself (arXiv 2409.04431).

    Attributes:
        bias: a number, one per head [heads], or None: `-log(keys)`, as in the paper, so that rows sum to
            about 1 when training starts.
    """

    bias: float | Float[Tensor, "heads"] | None = None


@dataclass(frozen=True, eq=False)
class Relu:
    """`max(s_j + bias, 0)^power / n`: exact zeros, and one normaliser for all rows (arXiv 2309.08586).

    Attributes:
        power: 1, or 2 for the squared form.
        over: `n`: "keys", the length of the sequence, the same for each row; or "seen", the keys that the
            row sees.
        bias: a number or one per head [heads].
    """

    power: int = 1
    over: Over = "keys"
    bias: float | Float[Tensor, "heads"] = 0.0


@dataclass(frozen=True, eq=False)
class Differential:
    """`softmax(s1)_j - subtracted * softmax(s2)_j`: what two maps share falls away (arXiv 2410.05258).

    Queries and keys of both maps lie side by side in the last axis, `torch.cat([q1, q2], -1)`; the scale is
    that of half the axis.

    Attributes:
        subtracted: lambda, a number or one per head [heads].
    """

    subtracted: float | Float[Tensor, "heads"]


Normaliser: TypeAlias = OffByOne | Sigmoid | Relu | Differential


def check_normaliser(normaliser: Normaliser, query: Tensor) -> None:
    """Raises TypeError or ValueError: what is no normaliser, or has numbers that cannot be."""
    match normaliser:
        case OffByOne():
            pass
        case Sigmoid(bias=bias):
            if bias is not None:
                _check_number("bias of Sigmoid", bias, query)
        case Relu(power=power, over=over, bias=bias):
            if power not in (1, 2) or isinstance(power, bool):
                raise ValueError(f"power of Relu must be 1 or 2, got {power!r}")
            if over not in _OVER:
                raise ValueError(f"over of Relu must be one of {', '.join(_OVER)}, got {over!r}")
            _check_number("bias of Relu", bias, query)
        case Differential(subtracted=subtracted):
            _check_number("subtracted of Differential", subtracted, query)
            if query.dim() == 4 and query.shape[-1] % 2:
                raise ValueError(
                    "Differential takes the queries of both maps side by side, so head_dim must be even, "
                    f"got {query.shape[-1]}; give torch.cat([q1, q2], -1)"
                )
        case _:
            kind = (
                normaliser.__name__ if isinstance(normaliser, type) else type(normaliser).__name__
            )
            raise TypeError(
                f"normaliser must be OffByOne(), Sigmoid(), Relu() or Differential(...), got {kind}"
            )


def _check_number(name: str, number: float | Tensor, query: Tensor) -> None:
    if isinstance(number, Tensor):
        heads = query.shape[1] if query.dim() == 4 else None
        if tuple(number.shape) != (heads,) or not number.is_floating_point():
            raise ValueError(
                f"{name} must be a number or floating point, one per head ([{heads}]), got "
                f"{number.dtype} {list(number.shape)}"
            )
        if number.device != query.device:
            raise ValueError(
                f"{name} is on {number.device}, the query on {query.device}; move it there"
            )
        finite = bool(number.isfinite().all())
    elif isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} must be a number or one per head, got {number!r}")
    else:
        finite = math.isfinite(number)
    if not finite:
        raise ValueError(f"{name} must be finite, got {number}")


def number_of(normaliser: Normaliser, keys: int) -> float | Tensor:
    """The one number that a normaliser has, or one per head; 0 where it has none."""
    match normaliser:
        case Sigmoid(bias=bias):
            return -math.log(keys) if bias is None else bias
        case Relu(bias=bias):
            return bias
        case Differential(subtracted=subtracted):
            return subtracted
    return 0.0


def weights_of(normaliser: Normaliser, scores: list[Tensor], number: Tensor, keys: int) -> Tensor:
    """Weights [batch, heads, rows, columns] from whole rows of logits, -inf where hidden.

    Args:
        normaliser: which.
        scores: one map, or the two of `Differential`.
        number: `number_of` it, broadcastable to the logits.
        keys: of the whole sequence.
    """
    first = scores[0]
    match normaliser:
        case OffByOne():
            return _softmax(first, sink=True)
        case Sigmoid():
            return torch.sigmoid(first + number)
        case Relu(power=power, over=over):
            weights = torch.relu(first + number)
            weights = weights * weights if power == 2 else weights
            seen = (first > -_INF).sum(-1, keepdim=True).clamp(min=1)
            return weights / (keys if over == "keys" else seen)
    return _softmax(first) - number * _softmax(scores[1])


def _softmax(scores: Tensor, sink: bool = False) -> Tensor:
    """Rows that see nothing are 0; with a sink, 1 is added to the denominator."""
    top = scores.detach().amax(-1, keepdim=True)
    pivot = torch.where(top > -_INF, top, 0)
    if sink:
        pivot = pivot.clamp(min=0)
    weights = torch.exp(scores - pivot)
    total = weights.sum(-1, keepdim=True)
    if sink:
        return weights / (total + torch.exp(-pivot))
    return weights / torch.where(total > 0, total, 1)
