"""Attention of models that compute it themselves and ask no registry: GPT-J, BLOOM, Falcon, MPT, XLNet.

While such a module runs, the product of queries and keys is not computed: it becomes a `Scores`, which
notes what is done to it (scaled, biased, masked, normalised) in the words of a `LayerCall`. Its product
with values is our attention. What is done otherwise (a threshold, a top-k) makes it a plain tensor of
the same entries, so that a module is never another than it was; its attention is then out of reach.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from lens.common.errors import LensError
from lens.passes.masks import HIDDEN, StructuredMask, split

Attend = Callable[..., Tensor]
"""(module, query, key, value, mask, scale, bias) -> [batch, queries, heads, value_dim]."""


@contextmanager
def following(root: nn.Module, attend: Attend) -> Iterator[None]:
    """Modules inside `root` that compute their own attention call `attend` inside the block."""
    with ExitStack() as stack:
        for module in root.modules():
            if _computes_attention(type(module)):
                _follow(stack, module, attend)
        yield


@cache
def _computes_attention(kind: type[nn.Module]) -> bool:
    """Whether a class normalises scores itself: its source says so."""
    if "att" not in kind.__name__.lower() or not kind.__module__.startswith("transformers."):
        return False
    try:
        source = "".join(
            inspect.getsource(part) for part in kind.__mro__ if part.__module__ == kind.__module__
        )
    except (OSError, TypeError):
        return False
    return "softmax" in source.lower() and "ALL_ATTENTION_FUNCTIONS" not in source


def _follow(stack: ExitStack, module: nn.Module, attend: Attend) -> None:
    own, previous = module.forward, vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Following(module, attend):
            found = own(*args, **kwargs)
        if isinstance(found, Scores):
            return found.noted.entries()
        return tree_map_only(Scores, _returned, found)

    object.__setattr__(module, "forward", forward)
    if previous is None:
        stack.callback(object.__delattr__, module, "forward")
    else:
        stack.callback(object.__setattr__, module, "forward", previous)


def _returned(scores: Scores) -> Tensor | None:
    """Probabilities that are returned beside the output were asked for by nobody: not computed."""
    return None if scores.noted.is_normalised else scores.noted.entries()


@dataclass(frozen=True, eq=False)
class _Noted:
    """What a `Scores` stands for: `P` or the logits `scale * query key^T + bias`, where visible.

    `query` [..., queries, d], `key` [..., keys, d] with one leading axis, of batch and heads, or two;
    `bias` and `allowed` broadcast to `shape`; `order` says how the entries lie: axes of [..., q, k].
    """

    query: Tensor
    key: Tensor
    shape: tuple[int, ...]
    scale: float = 1.0
    bias: Tensor | None = None
    allowed: Tensor | None = None
    structured: StructuredMask | None = None
    is_normalised: bool = False

    def entries(self) -> Tensor:
        """All of it, as the model itself would have it."""
        logits = (self.query @ self.key.transpose(-1, -2) * self.scale).reshape(self.shape)
        if self.bias is not None:
            logits = logits + self.bias
        if self.structured is not None:
            logits = logits + self.structured.spelled_out()
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, torch.finfo(logits.dtype).min)
        return logits.softmax(-1) if self.is_normalised else logits


class Scores(Tensor):
    """Stands for logits or probabilities of one attention module, in no memory."""

    noted: _Noted


def _scores(noted: _Noted) -> Scores:
    stub = torch.zeros((), dtype=noted.query.dtype, device=noted.query.device)
    found = stub.expand(noted.shape).as_subclass(Scores)
    found.noted = noted
    return found


class _Following(TorchFunctionMode):
    """Sees each operation inside a module."""

    def __init__(self, module: nn.Module, attend: Attend) -> None:
        super().__init__()
        self._module = module
        self._attend = attend

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs, full = kwargs or {}, getattr(function, "__name__", "")
        name = full.strip("_")
        with torch._C.DisableTorchFunctionSubclass():
            is_scores = any(isinstance(one, Scores) for one in (*args, *kwargs.values()))
            if not is_scores:
                found = _product(name, args, kwargs) if name in _PRODUCTS else None
                return function(*args, **kwargs) if found is None else found
            found = self._step(function, name, args, kwargs)
            is_method = full.endswith("_") and not full.endswith("__")
            if is_method or full == "__setitem__" or full.startswith("__i"):  # in place
                if isinstance(found, Scores):
                    args[0].noted = found.noted
                    return args[0]
                if not full.startswith("__i"):
                    raise LensError(
                        f"{type(self._module).__name__} changes its attention scores by {full}, which "
                        "capture does not understand"
                    )
            if found is not NotImplemented:
                return found
            args, kwargs = tree_map(_spelled_out, (args, kwargs))
        return function(*args, **kwargs)

    def _step(self, function: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result, as a `Scores` or a tensor; NotImplemented where the entries are needed."""
        first, others = args[0], [*args[1:], *kwargs.values()]
        if name in _PRODUCTS and isinstance(first, Scores) and first.noted.is_normalised:
            if any(isinstance(one, Scores) for one in others):
                return NotImplemented
            return self._attention(first.noted, others[0])
        if name == "einsum" and len(args) == 3 and isinstance(args[1], Scores):
            return self._contracted(*args)
        if name in _LOOKS and isinstance(first, Scores):
            found = function(*args, **kwargs)
            return NotImplemented if isinstance(found, Tensor) else found
        if name == "where" and len(args) == 3 and isinstance(args[1], Scores):
            return _masked(args[1].noted, ~_plain(args[0]), args[2])
        if not isinstance(first, Scores):
            if name not in ("add", "radd", "mul", "rmul") or len(args) != 2:
                return NotImplemented
            first, others = args[1], [args[0]]
        return _noted_step(function, name, first, others, args, kwargs)

    def _contracted(self, equation: str, scores: Scores, values: Any) -> Any:
        """The product with values in Einstein's words: any order of axes."""
        (rows, other), result = _letters(equation)
        *lead, _, key = rows if rows else "..."
        width = set(other) - set(rows)
        is_product = len(width) == 1 and set(other) == {*lead, key, *width}
        if not scores.noted.is_normalised or isinstance(values, Scores) or not is_product:
            return NotImplemented
        places = [other.index(letter) for letter in (*lead, key, *width)]
        found = self._attention(scores.noted, values.permute(places))
        if found is NotImplemented:
            return found
        axes = rows[:-1] + "".join(width)
        return found.permute([axes.index(letter) for letter in result])

    def _attention(self, noted: _Noted, values: Tensor) -> Any:
        """[..., queries, value_dim] with the leading axes of the scores."""
        lead = noted.shape[:-2]
        heads = lead[1] if len(lead) == 2 else _heads(self._module)
        if values.dim() != len(lead) + 2 or heads is None or lead[-1] % heads:
            return NotImplemented
        batch = lead[0] if len(lead) == 2 else lead[0] // heads

        def four(tensor: Tensor | None) -> Any:
            if tensor is None or len(lead) == 2:
                return tensor
            return tensor[None] if tensor.shape[0] == 1 else tensor.unflatten(0, (batch, -1))

        query, key, value = four(noted.query), four(noted.key), four(values)
        if (
            len({query.shape[0], key.shape[0], value.shape[0]}) > 1
            or key.shape[1] != value.shape[1]
        ):
            return NotImplemented
        allowed: Tensor | None = four(noted.allowed)
        mask: Tensor | None = noted.structured
        if allowed is not None:
            if mask is not None:
                allowed = allowed & (mask.spelled_out() >= HIDDEN)
            mask = allowed.expand(-1, -1, -1, key.shape[2])
        found = self._attend(self._module, query, key, value, mask, noted.scale, four(noted.bias))
        return found.transpose(1, 2).reshape(*lead, *found.shape[1:2], -1)


_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_LOOKS = {"get", "len", "hash", "dim", "size", "numel", "is_floating_point", "get_device"}
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


def _product(name: str, args: tuple, kwargs: dict[str, Any]) -> Scores | None:
    """Of two activations with an axis of heads; None for any other product."""
    bias, scale = None, 1.0
    if name == "baddbmm":
        names = ("input", "batch1", "batch2")
        bias, query, key = (*args, *(kwargs[one] for one in names[len(args) :]))
        bias, scale = bias * kwargs.get("beta", 1), float(kwargs.get("alpha", 1))
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
        (rows, columns), result = _letters(args[0])
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
    return _scores(_Noted(query, key.transpose(-1, -2), shape, scale, bias))


def _letters(equation: str) -> tuple[tuple[str, str], str]:
    operands, _, result = equation.replace(" ", "").partition("->")
    left, _, right = operands.partition(",")
    return (left, right), result


def _noted_step(
    function: Any, name: str, first: Scores, others: list[Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    noted = first.noted
    if name in _SAME:
        if name == "dropout" and noted.is_normalised and _drops(args, kwargs):
            raise LensError("attention is dropped out; call model.eval() first")
        return first
    if name in ("view", "reshape"):
        shape = tuple(function(*args, **kwargs).shape)
        if shape[-2:] != noted.shape[-2:] or len(shape) not in (3, 4):
            return NotImplemented
        if len(shape) == len(noted.shape):
            return first if shape == noted.shape else NotImplemented
        return _scores(_reshaped(noted, shape))
    if name == "softmax":
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if noted.is_normalised or dim not in (-1, len(noted.shape) - 1):
            return NotImplemented
        return _scores(replace(noted, is_normalised=True))
    if noted.is_normalised or not others:
        return NotImplemented
    other = others[0]
    if name in ("mul", "rmul", "imul", "div", "truediv", "itruediv"):
        number = _number(other)
        if number is None or (name.endswith("div") and number == 0) or len(others) > 1:
            return NotImplemented
        factor = 1 / number if "div" in name else number
        bias = None if noted.bias is None else noted.bias * factor
        return _scores(replace(noted, scale=noted.scale * factor, bias=bias))
    if name in ("add", "radd", "iadd", "sub", "isub") and len(others) == 1:
        return _scores(_added(noted, other, -1 if "sub" in name else 1))
    if name in ("masked_fill", "max", "maximum") and others:
        if name == "masked_fill":
            return _masked(noted, _plain(other), others[1])
        number = _number(other)
        return first if number is not None and number <= HIDDEN else NotImplemented
    return NotImplemented


def _added(noted: _Noted, other: Any, sign: int) -> _Noted:
    if isinstance(other, StructuredMask) and noted.structured is None and sign > 0:
        return replace(noted, structured=other)
    other = _spelled_out(other)
    if not isinstance(other, Tensor):
        other = torch.as_tensor(other, dtype=noted.query.dtype, device=noted.query.device)
    allowed, added = split(_aligned(sign * other, noted))
    if allowed is not None and noted.allowed is not None:
        allowed = allowed & noted.allowed
    if added is not None and noted.bias is not None:
        added = added + noted.bias
    return replace(
        noted,
        allowed=noted.allowed if allowed is None else allowed,
        bias=noted.bias if added is None else added,
    )


def _masked(noted: _Noted, hidden: Tensor, value: Any) -> Any:
    number = _number(value)
    if number is None or number > HIDDEN or noted.is_normalised or hidden.dtype != torch.bool:
        return NotImplemented
    hidden = _aligned(hidden, noted)
    allowed = ~hidden if noted.allowed is None else noted.allowed & ~hidden
    return _scores(replace(noted, allowed=allowed))


def _aligned(tensor: Tensor, noted: _Noted) -> Tensor:
    """With as many axes as the scores, as it broadcasts."""
    return tensor.reshape((1,) * (len(noted.shape) - tensor.dim()) + tuple(tensor.shape))


def _reshaped(noted: _Noted, shape: tuple[int, ...]) -> _Noted:
    """With the leading axes of `shape`; what broadcasts over them goes on doing so."""

    def moved(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if len(shape) == 4:
            return tensor[None] if tensor.shape[0] == 1 else tensor.unflatten(0, (shape[0], -1))
        if tensor.shape[:2] == (1, 1):
            return tensor[0]
        return tensor.expand(*noted.shape[:2], -1, -1).flatten(0, 1)

    bias, structured = noted.bias, noted.structured
    if structured is not None and len(shape) == 3:
        allowed = structured.spelled_out() >= HIDDEN
        noted = replace(noted, structured=None)
        noted = replace(
            noted, allowed=allowed if noted.allowed is None else allowed & noted.allowed
        )
    return replace(
        noted,
        query=moved(noted.query),
        key=moved(noted.key),
        bias=moved(bias),
        allowed=moved(noted.allowed),
        shape=shape,
    )


def _number(value: Any) -> float | None:
    value = _spelled_out(value)
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


def _plain(mask: Any) -> Any:
    return mask.spelled_out() if isinstance(mask, StructuredMask) else mask


def _spelled_out(value: Any) -> Any:
    return value.noted.entries() if isinstance(value, Scores) else _plain(value)


def _drops(args: tuple, kwargs: dict[str, Any]) -> bool:
    share = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return bool(share) and bool(
        kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    )


def _heads(module: nn.Module) -> int | None:
    """Number of heads, as the module names it."""
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        number = getattr(module, name, None)
        if isinstance(number, int):
            return number
    return None
