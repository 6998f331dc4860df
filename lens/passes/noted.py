"""Scores of an attention that is written out, noted instead of computed.

A `Scores` stands for the product of queries and keys in no memory: it notes what is done to it (scaled, biased,
masked, normalised) in the words of a `LayerCall`. What cannot be noted needs its entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.passes.masks import HIDDEN, StructuredMask, split


@dataclass(frozen=True, eq=False)
class Noted:
    """What a `Scores` stands for: `P` or the logits `scale * query key^T + bias`, where visible.

    `query` [..., queries, d], `key` [..., keys, d] with one leading axis, of batch and heads, or two; `bias` and `allowed`
    broadcast to these. `shape` is how the module has the entries: of two leading axes the first may be split (Swin v2),
    behind one leading axis queries and keys may be rows and columns of a picture (ViTDet).
    """

    query: Tensor
    key: Tensor
    shape: tuple[int, ...]
    scale: float = 1.0
    bias: Tensor | None = None
    allowed: Tensor | None = None
    structured: StructuredMask | None = None
    is_normalised: bool = False
    zeroed: Tensor | None = None  # bool: logits that were set to 0, to be hidden by what is added

    def entries(self) -> Tensor:
        """All of it, as the model itself would have it."""
        logits = self.query @ self.key.transpose(-1, -2) * self.scale
        if self.zeroed is not None:
            logits = logits.masked_fill(self.zeroed, 0)
        if self.bias is not None:
            logits = logits + self.bias
        if self.structured is not None:
            logits = logits + self.structured.spelled_out()
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, torch.finfo(logits.dtype).min)
        return (logits.softmax(-1) if self.is_normalised else logits).reshape(self.shape)

    def shown(self, allowed: Tensor) -> Noted:
        """Visible only where `allowed`, too."""
        return replace(self, allowed=allowed if self.allowed is None else allowed & self.allowed)


class Scores(Tensor):
    """Stands for logits or probabilities of one attention module, in no memory."""

    noted: Noted


def scores_of(noted: Noted) -> Scores:
    stub = torch.zeros((), dtype=noted.query.dtype, device=noted.query.device)
    found = stub.expand(noted.shape).as_subclass(Scores)
    found.noted = noted
    return found


PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
LOOKS = {"get", "len", "hash", "dim", "size", "numel", "is_floating_point", "get_device"}
_SAME = {
    "to",
    "float",
    "type",
    "type_as",
    "contiguous",
    "clone",
    "detach",
    "dropout",
    "feature_dropout",
}


def product(name: str, args: tuple, kwargs: dict[str, Any]) -> Scores | None:
    """Of two activations with an axis of heads; None for any other product."""
    bias, scale = None, 1.0
    if name == "baddbmm":
        names = ("input", "batch1", "batch2")
        bias, query, key = (*args, *(kwargs[one] for one in names[len(args) :]))
        beta, scale = kwargs.get("beta", 1), float(kwargs.get("alpha", 1))
        bias = bias * beta if beta else None  # with beta 0 it may hold anything, and is not read
    elif len(args) != 2 + (name == "einsum") or not isinstance(args[-1], Tensor):
        return None
    else:
        query, key = args[-2:]
    if (
        any(isinstance(one, nn.Parameter) or not one.is_floating_point() for one in (query, key))
        or query.dim() != key.dim()
        or query.dim() not in (3, 4)
    ):
        return None
    if name == "einsum":
        (rows, columns), result = letters(args[0])
        *axes, row, column = result if len(result) == query.dim() else "..."
        inner = "".join(set(rows) & set(columns) - set(result))
        orders = ("".join((*axes, row, inner)), "".join((*axes, inner, column)))
        if any(set(order) != set(own) for order, own in zip(orders, (rows, columns), strict=True)):
            return None
        query = query.permute([rows.index(letter) for letter in orders[0]])
        key = key.permute([columns.index(letter) for letter in orders[1]])
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    if lead != query.shape[:-2]:
        return None
    shape = (*lead, query.shape[-2], key.shape[-1])
    noted = Noted(query, key.transpose(-1, -2), shape, scale)
    return scores_of(noted if bias is None else _added(noted, bias, 1))


def letters(equation: str) -> tuple[tuple[str, str], str]:
    operands, _, result = equation.replace(" ", "").partition("->")
    left, _, right = operands.partition(",")
    return (left, right), result


def step_of(
    function: Any, name: str, first: Scores, others: list[Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    noted = first.noted
    if name in _SAME:
        if name == "dropout" and noted.is_normalised and _drops(args, kwargs):
            raise LensError("attention is dropped out; call model.eval() first")
        return first
    if name in ("view", "reshape"):
        return _viewed(first, tuple(function(*args, **kwargs).shape))
    if name == "softmax":
        return _normalised(noted, kwargs.get("dim", args[1] if len(args) > 1 else None))
    if not others or (noted.is_normalised and name != "masked_fill"):
        return NotImplemented
    other = others[0]
    if name in ("mul", "rmul", "imul", "div", "truediv", "itruediv"):
        return _multiplied(noted, name, others)
    if name in ("add", "radd", "iadd", "sub", "isub") and len(others) == 1:
        return scores_of(_added(noted, other, -1 if "sub" in name else 1))
    if name == "masked_fill":
        return masked(noted, plain(other), others[1])
    if name in ("max", "maximum"):
        number = _number(other)
        return first if number is not None and number <= HIDDEN else NotImplemented
    return NotImplemented


def _viewed(first: Scores, shape: tuple[int, ...]) -> Any:
    noted = first.noted
    if 5 in (len(shape), len(noted.shape)):
        return scores_of(replace(noted, shape=shape)) if _splits(noted, shape) else NotImplemented
    if shape == noted.shape:
        return first
    folds = {len(shape), len(noted.shape)} == {3, 4} and shape[-2:] == noted.shape[-2:]
    return scores_of(reshaped(noted, shape)) if folds and noted.zeroed is None else NotImplemented


def _normalised(noted: Noted, dim: Any) -> Any:
    if noted.is_normalised or dim not in (-1, len(noted.shape) - 1):
        return NotImplemented
    if noted.zeroed is not None:
        if noted.allowed is None or bool((noted.zeroed & noted.allowed).any()):
            return NotImplemented
        noted = replace(noted, zeroed=None)
    return scores_of(replace(noted, is_normalised=True))


def _multiplied(noted: Noted, name: str, others: list[Any]) -> Any:
    other, number = others[0], _number(others[0])
    if number is None and name.endswith("mul"):
        if (off := _switched_off(other, noted)) is not None:
            return scores_of(replace(noted, zeroed=off))
        if (own := _of_heads(other, noted)) is not None:
            bias = None if noted.bias is None else noted.bias * own
            return scores_of(replace(noted, query=noted.query * own, bias=bias))
    by_zero = name.endswith("div") and number == 0
    if number is None or by_zero or noted.zeroed is not None or len(others) > 1:
        return NotImplemented
    factor = 1 / number if "div" in name else number
    bias = None if noted.bias is None else noted.bias * factor
    return scores_of(replace(noted, scale=noted.scale * factor, bias=bias))


def _added(noted: Noted, other: Any, sign: int) -> Noted:
    if isinstance(other, StructuredMask) and noted.structured is None and sign > 0:
        return replace(noted, structured=other)
    other = spelled_out_of(other)
    if not isinstance(other, Tensor):
        other = torch.as_tensor(other, dtype=noted.query.dtype, device=noted.query.device)
    allowed, added = split(_aligned(sign * other, noted))
    if allowed is not None:
        noted = noted.shown(allowed)
    if added is not None:
        noted = replace(noted, bias=added if noted.bias is None else added + noted.bias)
    return noted


def masked(noted: Noted, hidden: Tensor, value: Any) -> Any:
    number = _number(value)
    if number is None or hidden.dtype != torch.bool:
        return NotImplemented
    if noted.is_normalised:  # what is hidden has no probability, and is set to 0 once more (SEW-D)
        again = noted.allowed is not None and not bool(
            (_aligned(hidden, noted) & noted.allowed).any()
        )
        return scores_of(noted) if number == 0 and again else NotImplemented
    if number > HIDDEN:
        return NotImplemented
    return scores_of(noted.shown(~_aligned(hidden, noted)))


def _aligned(tensor: Tensor, noted: Noted) -> Tensor:
    """With as many axes as query and key, as it broadcasts."""
    found = tensor.reshape((1,) * (len(noted.shape) - tensor.dim()) + tuple(tensor.shape))
    if len(noted.shape) < 5:
        return found
    if noted.query.dim() == 3:
        return found.expand(noted.shape).flatten(3).flatten(1, 2)
    return found.expand(*noted.shape[:2], -1, -1, -1).flatten(0, 1)


def _splits(noted: Noted, shape: tuple[int, ...]) -> bool:
    """Whether these entries are those of query and key with an axis, or axes, of theirs in two."""
    own = (*noted.query.shape[:-1], noted.key.shape[-2])
    if len(shape) < 5:
        return shape == own
    if len(own) == 3:
        return (shape[0], shape[1] * shape[2], shape[3] * shape[4]) == own
    return (shape[0] * shape[1], *shape[2:]) == own


def unfolded(tensor: Tensor, batch: int) -> Tensor:
    """[batch, heads, ...] of [batch * heads, ...]; what is one for all of them stays one."""
    return tensor[None] if tensor.shape[0] == 1 else tensor.unflatten(0, (batch, -1))


def reshaped(noted: Noted, shape: tuple[int, ...]) -> Noted:
    """With the leading axes of `shape`; what broadcasts over them goes on doing so."""

    def moved(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if len(shape) == 4:
            return unfolded(tensor, shape[0])
        if tensor.shape[:2] == (1, 1):
            return tensor[0]
        return tensor.expand(*noted.shape[:2], -1, -1).flatten(0, 1)

    if noted.structured is not None and len(shape) == 3:
        noted = noted.shown(noted.structured.spelled_out() >= HIDDEN)
        noted = replace(noted, structured=None)
    return replace(
        noted,
        query=moved(noted.query),
        key=moved(noted.key),
        bias=moved(noted.bias),
        allowed=moved(noted.allowed),
        shape=shape,
    )


def _switched_off(factor: Any, noted: Noted) -> Tensor | None:
    """bool, where a factor of zeros and ones is 0; None of any other, and where a bias would be switched off too."""
    if not _is_plain(factor) or noted.bias is not None or noted.zeroed is not None:
        return None
    if not bool(((factor == 0) | (factor == 1)).all()):
        return None
    return _aligned(factor == 0, noted)


def _of_heads(factor: Any, noted: Noted) -> Tensor | None:
    """A factor that is one number for all entries of a head (a learned temperature), as it broadcasts; else None."""
    if not _is_plain(factor) or noted.zeroed is not None:
        return None
    if factor.dim() < 2 or factor.shape[-2:] != (1, 1) or factor.dim() > noted.query.dim():
        return None
    return _aligned(factor, noted)


def _is_plain(factor: Any) -> bool:
    return isinstance(factor, Tensor) and not isinstance(factor, StructuredMask)


def _number(value: Any) -> float | None:
    value = spelled_out_of(value)
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


def plain(mask: Any) -> Any:
    return mask.spelled_out() if isinstance(mask, StructuredMask) else mask


def spelled_out_of(value: Any) -> Any:
    return value.noted.entries() if isinstance(value, Scores) else plain(value)


def _drops(args: tuple, kwargs: dict[str, Any]) -> bool:
    share = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return bool(share) and bool(
        kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    )
