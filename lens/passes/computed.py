"""Attention of models that compute it themselves and ask no registry: GPT-J, BLOOM, Falcon, MPT, XLNet.

While such a module runs, the product of queries and keys is not computed: it becomes a `Scores`, which
notes what is done to it (scaled, biased, masked, normalised) in the words of a `LayerCall`. Its product
with values is our attention. What is done otherwise (a threshold, a top-k) makes it a plain tensor of
the same entries, so that a module is never another than it was; its attention is then out of reach.
Calls of torch's own attention (`scaled_dot_product_attention`, `MultiheadAttention`) are taken too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from lens.common.errors import LensError
from lens.common.isolation import replaced
from lens.passes.masks import HIDDEN, split
from lens.passes.noted import (
    LOOKS,
    PRODUCTS,
    Noted,
    Scores,
    letters,
    masked,
    plain,
    product,
    reshaped,
    spelled_out_of,
    step_of,
    unfolded,
)
from lens.passes.sparse import form_of

Attend = Callable[..., Tensor]
"""(module, query, key, value, mask, scale, bias, causal) -> [batch, queries, heads, value_dim]."""


_OVER_DEPTH = {"Inkling2BlockAttentionResidual"}
"""Modules that attend from each token to its own states of earlier layers, and to no other token."""
_OF_TORCH = {"scaled_dot_product_attention", "multi_head_attention_forward"}


@contextmanager
def following(
    root: nn.Module,
    attend: Attend,
    modules: Iterable[nn.Module] | None = None,
    heads: int | None = None,
) -> Iterator[None]:
    """Modules that compute their own attention call `attend` inside the block.

    Args:
        root: where they are looked for.
        attend: the attention in their place.
        modules: they; None: those of `root` whose source says so.
        heads: of modules that fold them into the batch and do not say how many.
    """
    if modules is None:
        every = root.modules()
        modules = [one for one in every if form_of(one) or _computes_attention(type(one))]
    modules = list(modules)
    parts = (part for one in modules for part in one.modules())
    with ExitStack() as stack:
        if any(isinstance(part, nn.MultiheadAttention) for part in parts):
            # its fast path would go past the module
            slow = replaced(torch.backends.mha, "get_fastpath_enabled", lambda _: lambda: False)
            stack.enter_context(slow)
        for module in modules:
            _follow(stack, module, attend, heads)
        yield


@cache
def _computes_attention(kind: type[nn.Module]) -> bool:
    """Whether a class normalises scores itself, or asks torch for its attention: its source says so."""
    name = kind.__name__
    if (
        name in _OVER_DEPTH
        or "att" not in name.lower()
        or not kind.__module__.startswith("transformers.")
    ):
        return False
    try:
        source = "".join(
            inspect.getsource(part) for part in kind.__mro__ if part.__module__ == kind.__module__
        )
    except (OSError, TypeError):
        return False
    own = "softmax" in source.lower() or any(name in source for name in _OF_TORCH)
    return own and "ALL_ATTENTION_FUNCTIONS" not in source


def _follow(stack: ExitStack, module: nn.Module, attend: Attend, heads: int | None) -> None:
    own, form = module.forward, form_of(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if form is not None:
            return form(module, attend, *args, **kwargs)
        with _Following(module, attend, heads):
            found = own(*args, **kwargs)
        if isinstance(found, Scores):
            return found.noted.entries()
        return tree_map_only(Scores, _returned, found)

    put_over(stack, module, "forward", forward)


def put_over(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """`owner` has `value` under this name until the stack is closed, whatever it had there."""
    previous = vars(owner).get(name)
    object.__setattr__(owner, name, value)
    if previous is None:
        stack.callback(object.__delattr__, owner, name)
    else:
        stack.callback(object.__setattr__, owner, name, previous)


def _returned(scores: Scores) -> Tensor | None:
    """Probabilities that are returned beside the output were asked for by nobody: not computed."""
    return None if scores.noted.is_normalised else scores.noted.entries()


class _Following(TorchFunctionMode):
    """Sees each operation inside a module."""

    def __init__(self, module: nn.Module, attend: Attend, heads: int | None) -> None:
        super().__init__()
        self._module = module
        self._attend = attend
        self._heads = heads or _heads(module)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs, full = kwargs or {}, getattr(function, "__name__", "")
        name = full.strip("_")
        if name in _OF_TORCH:
            return self._of_torch(function, name, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            is_scores = any(isinstance(one, Scores) for one in (*args, *kwargs.values()))
            if not is_scores:
                found = product(name, args, kwargs) if name in PRODUCTS else None
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
            args, kwargs = tree_map(spelled_out_of, (args, kwargs))
        return function(*args, **kwargs)

    def _step(self, function: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result, as a `Scores` or a tensor; NotImplemented where the entries are needed."""
        first, others = args[0], [*args[1:], *kwargs.values()]
        if name in PRODUCTS and isinstance(first, Scores) and first.noted.is_normalised:
            if any(isinstance(one, Scores) for one in others):
                return NotImplemented
            return self._attention(first.noted, others[0])
        if name == "einsum" and len(args) == 3 and isinstance(args[1], Scores):
            return self._contracted(*args)
        if name in LOOKS and isinstance(first, Scores):
            found = function(*args, **kwargs)
            return NotImplemented if isinstance(found, Tensor) else found
        if name == "where" and len(args) == 3 and isinstance(args[1], Scores):
            return masked(args[1].noted, ~plain(args[0]), args[2])
        if not isinstance(first, Scores):
            if name not in ("add", "radd", "mul", "rmul") or len(args) != 2:
                return NotImplemented
            first, others = args[1], [args[0]]
        return step_of(function, name, first, others, args, kwargs)

    def _of_torch(self, function: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of torch's own attention."""
        if name == "scaled_dot_product_attention":
            found = self._product_attention(*args, **kwargs)
            return function(*args, **kwargs) if found is NotImplemented else found

        def inside(own: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **options: Any) -> Any:
                found = self._product_attention(*given, **options)
                return own(*given, **options) if found is NotImplemented else found

            return call

        # A mode is off inside of a function that it was asked about; the probabilities that are
        # returned beside the output were asked for by nobody.
        with replaced(nn.functional, "scaled_dot_product_attention", inside):
            return function(*args, **{**kwargs, "need_weights": False})

    def _product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """[..., queries, value_dim]; the arguments are those of `scaled_dot_product_attention`."""
        if dropout_p:
            raise LensError("attention is dropped out; call model.eval() first")
        lead = query.shape[:-2]
        if query.dim() not in (3, 4) or key.dim() != query.dim():
            return NotImplemented
        heads = lead[1] if len(lead) == 2 else self._heads
        if heads is None or (len(lead) == 1 and lead[0] % heads):
            return NotImplemented

        if len(lead) == 1:
            batch = lead[0] // heads
            query, key, value = (unfolded(one, batch) for one in (query, key, value))
            if attn_mask is not None and attn_mask.dim() == 3:
                attn_mask = unfolded(attn_mask, batch)
        queries, keys = query.shape[2], key.shape[2]
        if is_causal and queries != keys:  # top left: row i sees the keys 0 to i
            attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        allowed = bias = None
        if attn_mask is not None:
            axes = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
            allowed, bias = split(attn_mask.reshape(axes))
        if allowed is not None:
            allowed = allowed.expand(len(query), -1, queries, keys)
        causal = is_causal and queries == keys
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        found = self._attend(self._module, query, key, value, allowed, scale, bias, causal)
        return found.transpose(1, 2).reshape(*lead, queries, -1)

    def _contracted(self, equation: str, scores: Scores, values: Any) -> Any:
        """The product with values in Einstein's words: any order of axes."""
        (rows, other), result = letters(equation)
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

    def _attention(self, noted: Noted, values: Tensor) -> Any:
        """[..., queries, value_dim] with the leading axes of the scores."""
        lead = noted.shape[:-2]
        if not 1 <= len(lead) <= 2:
            return NotImplemented
        heads = lead[1] if len(lead) == 2 else self._heads
        if values.dim() != len(lead) + 2 or heads is None or lead[-1] % heads:
            return NotImplemented
        if len(lead) == 1:
            batch = lead[0] // heads
            noted = reshaped(noted, (batch, heads, *noted.shape[-2:]))
            values = unfolded(values, batch)
        # Some models compute scores in float32 whatever their own type is (GPT-J); values follow, as probabilities do.
        query, key, value = noted.query, noted.key, values.to(noted.query.dtype)
        if (
            len({query.shape[0], key.shape[0], value.shape[0]}) > 1
            or key.shape[1] != value.shape[1]
        ):
            return NotImplemented
        allowed: Tensor | None = noted.allowed
        mask: Tensor | None = noted.structured
        if allowed is not None:
            if mask is not None:
                allowed = allowed & (mask.spelled_out() >= HIDDEN)
            mask = allowed.expand(-1, -1, -1, key.shape[2])
        found = self._attend(self._module, query, key, value, mask, noted.scale, noted.bias, False)
        return found.to(values.dtype).transpose(1, 2).reshape(*lead, *found.shape[1:2], -1)


def _heads(module: nn.Module) -> int | None:
    """Number of heads, as the module names it."""
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead"):
        number = getattr(module, name, None)
        if isinstance(number, int):
            return number
    return None
