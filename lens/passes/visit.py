"""A forward pass that asks a visitor at each node: where heads and MLPs read, and what they write.

Norms are where readers read: what enters them is the residual stream. Attention functions are where heads
write, `z`, before the output projection. In a block without a norm before its attention the stream is
what the attention gets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.models.parts import Block, Layout
from lens.passes.calls import LayerCall, attend, first_of, with_first
from lens.passes.sessions import OnLayer, listening

if TYPE_CHECKING:
    from jaxtyping import Float


class Visitor:
    """What is done at each node while a model runs; by default nothing is changed.

    Rows are prompts, or several copies of them.
    """

    def enter(
        self, hidden: Float[Tensor, "rows tokens d_model"]
    ) -> Float[Tensor, "rows tokens d_model"]:
        """What enters the first layer."""
        return hidden

    def residual_in(
        self, layer: int, hidden: Float[Tensor, "rows tokens d_model"]
    ) -> Float[Tensor, "rows tokens d_model"]:
        """What enters a layer; of the first, after `enter`."""
        return hidden

    def project(
        self, layer: int, residual: Float[Tensor, "rows tokens d_model"]
    ) -> tuple[
        Float[Tensor, "rows tokens heads head_dim"],
        Float[Tensor, "rows tokens kv_heads head_dim"],
        Float[Tensor, "rows tokens kv_heads value_dim"],
    ]:
        """q, k and v from what the attention of a layer reads.

        Keys and values may have as many heads as the model's, or one for each query head.
        """
        raise NotImplementedError

    def attention(self, layer: int, call: LayerCall) -> None:
        """What the heads of a layer work with: queries and keys after rotary embedding, and the mask."""

    def heads(
        self, layer: int, z: Float[Tensor, "rows heads tokens value_dim"]
    ) -> Float[Tensor, "rows heads tokens value_dim"]:
        """What the heads of a layer give."""
        return z

    def mlp_input(
        self, layer: int, residual: Float[Tensor, "rows tokens d_model"]
    ) -> Float[Tensor, "rows tokens d_model"]:
        """What the MLP of a layer reads, before its norm."""
        return residual

    def mlp(
        self, layer: int, output: Float[Tensor, "rows tokens d_model"]
    ) -> Float[Tensor, "rows tokens d_model"]:
        """What the MLP of a layer adds to the stream."""
        return output

    def final(
        self, residual: Float[Tensor, "rows tokens d_model"]
    ) -> Float[Tensor, "rows tokens d_model"]:
        """What the last norm reads."""
        return residual


@contextmanager
def visiting(layout: Layout, rows: int, visitor: Visitor) -> Iterator[None]:
    """One forward pass of `layout.model` over that many rows asks the visitor at each node."""
    with ExitStack() as stack:
        hooks = Hooks(stack, rows)
        for number, block in enumerate(layout.blocks):
            _hook(hooks, number, block, visitor)
        last = layout.final_norm

        def final(_: nn.Module, arguments: tuple, __: Any) -> Tensor:
            return last.forward(visitor.final(arguments[0]))

        if last.module is not None:
            hooks.after(last.module, "read", final)
        stack.enter_context(listening(layout.model, _heads(visitor)))
        yield


class Hooks:
    """Hooks of whole passes; a module that several layers share gets each layer's in turn."""

    def __init__(self, stack: ExitStack, rows: int = 1) -> None:
        self.stack, self.rows = stack, rows
        self._turns: dict[tuple[int, str], deque[Callable[..., Any]]] = {}
        stack.callback(self._turns.clear)  # they hold this, and the visitor with all that it keeps

    def after(self, module: nn.Module, purpose: str, function: Callable[..., Any]) -> None:
        """`function(module, arguments, output)` after the module; what it returns is its output."""
        if (turn := self._turn(module, purpose, function)) is not None:
            self.stack.callback(module.register_forward_hook(turn).remove)

    def before(self, module: nn.Module, purpose: str, function: Callable[[Tensor], Any]) -> None:
        """`function(hidden)` before it; what it returns is put in its place, unless that is None."""

        def call(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            found = function(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            if found is None:
                return None
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": found}
            return (found, *args[1:]), kwargs

        if (turn := self._turn(module, purpose, call)) is not None:
            self.stack.callback(module.register_forward_pre_hook(turn, with_kwargs=True).remove)

    def shaped(self, hidden: Float[Tensor, "*rest width"]) -> Float[Tensor, "rows tokens width"]:
        """Of a block that puts all tokens in one row for its MLP (OPT) too."""
        return hidden.unflatten(0, (self.rows, -1)) if hidden.dim() == 2 else hidden

    def _turn(
        self, module: nn.Module, purpose: str, function: Callable[..., Any]
    ) -> Callable[..., Any] | None:
        """What calls the functions in turn; None where the module has it already."""
        key = (id(module), purpose)
        if key in self._turns:
            self._turns[key].append(function)
            return None
        turns = self._turns[key] = deque([function])

        def call(*args: Any) -> Any:
            turns.rotate(-1)
            return turns[-1](*args)

        return call


def _hook(hooks: Hooks, number: int, block: Block, visitor: Visitor) -> None:
    made: list[Tensor] = []

    def read(residual: Tensor) -> None:
        made[:] = visitor.project(number, residual)

    def enter(hidden: Tensor) -> Tensor:
        return visitor.residual_in(number, visitor.enter(hidden) if number == 0 else hidden)

    # A module that several layers share has a turn for each, in which nothing may be done.
    hooks.before(block.module, "enter", enter)
    hooks.before(block.attention, "read", read if block.norm.module is None else _nothing)
    if block.norm.module is not None:
        hooks.after(block.norm.module, "read", lambda _, arguments, __: read(arguments[0]))

    def give(part: int) -> Tensor:
        if not made:
            raise LensError(
                f"layer {number} makes queries, keys and values before the norm that they are said to "
                "read through has run, so its parts are not those of lens.models.architectures"
            )
        return _joined(hooks, block, made) if block.joint else made[part].flatten(-2)

    for part, module in enumerate(block.projections):
        hooks.after(module, "write", lambda *_, part=part: give(part))
    if block.mlp:
        _hook_mlp(hooks, number, block, visitor)


def _nothing(_: Tensor) -> None:
    pass


def _joined(hooks: Hooks, block: Block, made: list[Tensor]) -> Tensor:
    """q, k and v as the joint projection gives them."""
    if block.joint == "heads":
        return torch.cat(made, -1).flatten(-2)
    attention: Any = block.attention
    if hasattr(attention, "num_key_value_heads"):  # Phi-3 takes them apart by this number
        hooks.stack.callback(
            setattr, attention, "num_key_value_heads", attention.num_key_value_heads
        )
        attention.num_key_value_heads = made[1].shape[-2]
    return torch.cat([part.flatten(-2) for part in made], -1)


def _hook_mlp(hooks: Hooks, number: int, block: Block, visitor: Visitor) -> None:
    found: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple, __: Any) -> None:
        found[:] = arguments[:1]

    def read(hidden: Tensor) -> Tensor:
        residual = found[0] if found else hidden
        normed = block.mlp_norm.forward(visitor.mlp_input(number, hooks.shaped(residual)))
        return normed.view(hidden.shape[:-1] + normed.shape[-1:])

    def write(_: nn.Module, __: tuple, output: Any) -> Any:
        own = first_of(output)
        given = visitor.mlp(number, hooks.shaped(own) * block.multiplier) / block.multiplier
        return with_first(output, given.view(own.shape))

    if block.mlp_norm.module is not None:
        hooks.after(block.mlp_norm.module, "read mlp", keep)
    hooks.before(block.mlp[0], "read", read)
    hooks.after(block.mlp_after.module or block.mlp[-1], "write", write)


def _heads(visitor: Visitor) -> OnLayer:
    """Shows every head output to the visitor."""

    def on_layer(call: LayerCall) -> Tensor:
        visitor.attention(call.layer, call)
        z = attend(call, statistics=()).output.to(call.value.dtype)
        return visitor.heads(call.layer, z)

    return on_layer
