"""One head on one prompt: what it worked with, its rows, and what the norms before it divided by."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.models.parts import Layout, Norm
from lens.passes.calls import LayerCall
from lens.passes.sessions import run
from lens.passes.visit import Visitor, visiting
from lens.reading._rotation import Rotation, find_rotation
from lens.reading._rows import capped, softmaxed

if TYPE_CHECKING:
    from jaxtyping import Float

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""How far sums of parts may be from what the model computed, by the type of its weights."""

Sizes = dict[tuple[int, str], Tensor]
"""(layer, "read" or "mlp") -> [tokens, 1], what that norm divides by."""


class Plain(Visitor):
    """Runs the model as it is."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self.layout.blocks[layer]
        return block.projected(block.norm.forward(residual))


@dataclass(frozen=True, eq=False)
class Head:
    """A head of a model on one prompt.

    Attributes:
        id: layer and head; group: the head that its keys and values come from.
        layout, inputs: the model and what it read.
        query, key: [tokens, head_dim], as its attention got them; float64.
        call: of its layer.
        sizes: of the norms on the way to it.
        head_sizes: [tokens, 1] that the norms of its queries and of its keys divide by.
        rotation: between these and the attention.
    """

    id: HeadId
    group: int
    layout: Layout
    inputs: Mapping[str, Tensor]
    query: Float[Tensor, "tokens width"]
    key: Float[Tensor, "tokens width"]
    call: LayerCall
    sizes: Sizes
    head_sizes: tuple[Tensor, Tensor]
    rotation: Rotation

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.key)

    @property
    def tolerance(self) -> float:
        """See `TOLERANCE`."""
        return TOLERANCE[self.layout.model.precision]

    @property
    def sink(self) -> float | None:
        """Logit of its learned sink."""
        return (
            None
            if self.call.sink_logits is None
            else float(self.call.sink_logits.detach()[self.id.head])
        )

    def bias(self, queries: Tensor) -> Float[Tensor, "queries tokens"]:
        """What is added to the logits of these rows, apart from queries and keys."""
        given = self.call.position_bias
        if given is None:
            return self.query.new_zeros(len(queries), self.tokens)
        whole = given.expand(-1, self.call.query.shape[1], self.tokens, self.tokens)
        return whole[0, self.id.head, queries].double()

    def logits(self, queries: Tensor) -> Float[Tensor, "queries tokens"]:
        """Before a softcap and the mask."""
        return self.call.scale * self.query[queries] @ self.key.T + self.bias(queries)

    def rows(
        self, queries: Tensor, logits: Tensor | None = None
    ) -> Float[Tensor, "queries tokens"]:
        """What these rows attend to; a learned sink takes what is left of 1.

        Args:
            queries: places.
            logits: others than its own, before softcap and mask.
        """
        found = self.logits(queries) if logits is None else logits
        sinks = self.call.sink_logits
        sinks = None if sinks is None else sinks.detach()[self.id.head : self.id.head + 1]
        return softmaxed(self.call, capped(self.call, found[None]), queries, sinks)[0]


@dataclass(eq=False)
class _Watching(Plain):
    """The pass that reads one head."""

    layout: Layout
    layer: int
    sizes: Sizes = field(default_factory=dict)
    made: tuple[Tensor, ...] = ()
    call: LayerCall | None = None
    output: Tensor | None = None

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self.layout.blocks[layer]
        if layer == self.layer or (self.layout.normed and layer < self.layer):
            self.sizes[layer, "read"] = block.norm.size(residual[0]).double()
        made = super().project(layer, residual)
        if layer == self.layer:
            self.made = made
        return made

    def mlp_input(self, layer: int, residual: Tensor) -> Tensor:
        if self.layout.normed and layer < self.layer:
            norm = self.layout.blocks[layer].mlp_norm
            self.sizes[layer, "mlp"] = norm.size(residual[0]).double()
        return residual

    def attention(self, layer: int, call: LayerCall) -> None:
        if layer == self.layer:
            self.call = call

    def heads(self, layer: int, z: Tensor) -> Tensor:
        if layer == self.layer:
            self.output = z
        return z


def read_head(layout: Layout, inputs: Mapping[str, Tensor], head: HeadId) -> Head:
    """A forward pass that reads one head.

    Raises:
        LensError: prompts that the model does not take, a prompt that is read several times at once, or
            queries and keys that are not what its parts say.
    """
    watching = _Watching(layout, head.layer)
    block = layout.blocks[head.layer]
    given: list[Any] = []
    with ExitStack() as stack, torch.no_grad():
        watched = block.attention.register_forward_pre_hook(
            lambda _, __, kwargs: given.append(kwargs.get("position_embeddings")), with_kwargs=True
        )
        stack.callback(watched.remove)
        stack.enter_context(visiting(layout, 1, watching))
        run(layout.model, inputs)
    call = watching.call
    if call is None or watching.output is None:
        raise LensError(f"layer {head.layer} of {layout.model.info.class_name} did not attend")
    if len(call.query) != 1:
        raise LensError(
            f"{layout.model.info.class_name} reads this prompt as {len(call.query)} rows; one prompt of one "
            "row is taken apart at a time"
        )
    with torch.no_grad():
        group = head.head * call.key.shape[1] // call.query.shape[1]
        sizes, before = [], []
        for norm, made, which in zip(
            block.head_norms, watching.made, (head.head, group), strict=False
        ):
            before.append(norm.of_heads(made)[0])
            sizes.append(_head_size(norm, made[0], which).double())
        after = [part[0].detach().transpose(0, 1).double() for part in (call.query, call.key)]
        rotation = find_rotation(
            next((one for one in given if one is not None), None),
            list(zip(before, after, strict=True)),
            TOLERANCE[layout.model.precision],
            head.layer,
        )
    found = Head(
        id=head,
        group=group,
        layout=layout,
        inputs=inputs,
        query=after[0][:, head.head],
        key=after[1][:, group],
        call=call,
        sizes=watching.sizes,
        head_sizes=(sizes[0], sizes[1]),
        rotation=rotation,
    )
    _check_rows(found, watching.output.detach())
    return found


def _head_size(norm: Norm, made: Tensor, head: int) -> Tensor:
    """[tokens, 1] that the norm of the queries or keys [tokens, heads, width] divides a head's by."""
    return norm.size(made.flatten(-2) if norm.together(made.shape[-1]) else made[:, head])


def _check_rows(head: Head, output: Tensor) -> None:
    """Rows made here, times the values, must be what the head gave.

    Raises:
        LensError: they are not.
    """
    # rows with many keys and with some
    last = torch.tensor([head.tokens - 1, head.tokens // 2], device=head.key.device)
    value = head.call.value[0, head.group].double()
    own = output[0, head.id.head, last].double()
    error = float((head.rows(last) @ value - own).abs().max())
    scale = max(float(own.abs().max()), torch.finfo(torch.float64).tiny)
    if not error <= head.tolerance * max(scale, 1e-30):
        raise LensError(
            f"rows of {head.id} computed from its queries and keys do not give its output (off by "
            f"{error / scale:.1e}); its attention does more than is known here"
        )
