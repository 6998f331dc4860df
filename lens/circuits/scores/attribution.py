"""First-order scores of all edges at once: gradients where readers read times what writers differ by.

A gradient is met with the differences as soon as the backward pass gives it, and then forgotten. That of
what one head reads is made from the gradient by its own q, k or v, and differences are kept as `z` and
projected by W_O where they are met, a few prompts and one layer at a time: no tensor of all writers ×
tokens × d_model is ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from lens.circuits.graph.activations import Activations, PlainVisitor
from lens.circuits.graph.nodes import Layer, Nodes, visit
from lens.common.errors import LensError
from lens.models.parts import Norm
from lens.passes.calls import LayerCall

_NUMBERS = 2**22  # in one tensor while gradients meet differences
_KEPT = 2**23  # of what all writers write, that is made once; more is made anew where it is met
Stage = tuple[str, int]
"""("input", 0), ("heads", layer) or ("mlp", layer)."""
Objective = Callable[[Tensor], Tensor]


def edge_products(
    nodes: Nodes,
    ids: Tensor,
    objective: Objective,
    differences: Activations,
    replaced: dict[Stage, Tensor] | None = None,
    *,
    blocked: int | None = None,
    frozen_patterns: bool = False,
    norm_rules: Callable[[], AbstractContextManager[object]] = nullcontext,
    refuse_flat: bool = False,
    where: Tensor | None = None,
) -> np.ndarray:
    """[rows, edges]: gradient at the reader · difference of the writer, summed over the tokens.

    With `where` [rows, spans, edges], over the tokens of each span alone.

    Args:
        nodes: of the model.
        ids: [rows, tokens].
        objective: of the logits, [rows]; what the gradients are of.
        differences: of all writers, of the same rows.
        replaced: outputs of whole stages that are put in place of the run's own.
        blocked: a layer whose attention and MLP outputs no gradient passes (GradDrop).
        frozen_patterns: no gradient passes queries and keys.
        norm_rules: entered where norms are computed once more for the gradient of single heads, as
            modes that surround this call do not reach the backward pass (RelP).
        refuse_flat: refuse an objective whose gradient by the logits is 0.
        where: bool [spans, rows, tokens], or None: all tokens together.

    Raises:
        LensError: an objective without a gradient, or a flat one.
    """
    meeting = _Meeting(
        nodes, differences, replaced or {}, blocked, frozen_patterns, norm_rules, where
    )
    with meeting.hooks, torch.enable_grad():
        logits = visit(nodes, ids, meeting)
        slope = _slope(logits, objective, refuse_flat)
        torch.autograd.grad(logits, meeting.entered, slope, materialize_grads=True)
    found = for_numpy(meeting.finish())[..., nodes.graph.allowed]
    return found[0] if where is None else found.swapaxes(0, 1)


def for_numpy(values: Tensor) -> np.ndarray:
    """On the CPU and of 32 bits at least: numpy has no bfloat16."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).cpu().numpy()


@dataclass(frozen=True, eq=False)
class HeadSlopes:
    """Gradients of a number by what heads give, and what they were given.

    Attributes:
        residuals: per layer what its attention reads, [rows, tokens, d_model].
        calls: per layer what z was made from.
        heads: per layer the gradient by z, [rows, heads, tokens, head_dim].
    """

    residuals: list[Tensor]
    calls: list[LayerCall]
    heads: list[Tensor]


def head_slopes(
    nodes: Nodes,
    ids: Tensor,
    objective: Objective,
    replaced: dict[Stage, Tensor] | None = None,
    *,
    blocked: int | None = None,
) -> HeadSlopes:
    """Gradients by every head's output; the arguments are those of `edge_products`."""
    keeping = _Keeping(nodes, replaced or {}, blocked)
    with torch.enable_grad():
        logits = visit(nodes, ids, keeping)
        slope = _slope(logits, objective, refuse_flat=False)
        found = torch.autograd.grad(logits, keeping.outputs, slope, materialize_grads=True)
    return HeadSlopes(keeping.residuals, keeping.calls, list(found))


def written(nodes: Nodes, differences: Activations, layer: int) -> Tensor:
    """[rows, writers of the layer, tokens, d_model] of the differences."""
    heads = differences.heads[layer] @ nodes.layers[layer].block.output
    if not nodes.graph.mlps:
        return heads
    return torch.cat([heads, differences.mlps[layer][:, None]], 1)


def _slope(logits: Tensor, objective: Objective, refuse_flat: bool) -> Tensor:
    """Gradient of the sum of the objective by the logits."""
    values = objective(logits)
    if not values.requires_grad:
        raise LensError("the metric has no gradient; use 'logit_difference' or 'loss'")
    (slope,) = torch.autograd.grad(values.sum(), logits)
    if refuse_flat and not bool(slope.any()):
        raise LensError(
            "the metric is flat at the clean prompts (its gradient by the logits is 0), so that every "
            "score is 0 and says nothing; use method='eap-ig', whose gradients are taken on the way "
            "to the corrupt prompts"
        )
    return slope


class _Tracing(PlainVisitor):
    """A run with a gradient by what enters it, some stages replaced, one blocked for gradients."""

    def __init__(self, nodes: Nodes, replaced: dict[Stage, Tensor], blocked: int | None) -> None:
        super().__init__(nodes)
        self._replaced, self._blocked = replaced, blocked
        self.entered = torch.empty(0)

    def enter(self, hidden: Tensor) -> Tensor:
        self.entered = self._replaced.get(("input", 0), hidden).detach().requires_grad_()
        return self.entered

    def heads(self, layer: int, z: Tensor) -> Tensor:
        z = self._replaced.get(("heads", layer), z)
        return z.detach() if layer == self._blocked else z

    def mlp(self, layer: int, output: Tensor) -> Tensor:
        output = self._replaced.get(("mlp", layer), output)
        return output.detach() if layer == self._blocked else output


class _Keeping(_Tracing):
    """Keeps what each head reads, works with and gives."""

    def __init__(self, nodes: Nodes, replaced: dict[Stage, Tensor], blocked: int | None) -> None:
        super().__init__(nodes, replaced, blocked)
        self.calls: list[LayerCall] = []
        self.outputs: list[Tensor] = []
        self.residuals: list[Tensor] = []

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.residuals.append(residual.detach())
        return super().project(layer, residual)

    def attention(self, layer: int, call: LayerCall) -> None:
        names = ("query", "key", "value")
        self.calls.append(replace(call, **{name: getattr(call, name).detach() for name in names}))

    def heads(self, layer: int, z: Tensor) -> Tensor:
        z = self._replaced.get(("heads", layer), z)
        self.outputs.append(z if z.requires_grad else z.detach().requires_grad_())
        return self.outputs[-1].detach() if layer == self._blocked else self.outputs[-1]


_Read = Callable[[slice], Tensor]
"""Of some rows: the gradients by what some readers read, [rows, readers, tokens * d_model]."""


class _Meeting(_Tracing):
    """Meets each gradient with the differences when it comes.

    Readers that come after as many layers wait for each other, so that the differences of a layer are
    projected once for all of them.
    """

    def __init__(
        self,
        nodes: Nodes,
        differences: Activations,
        replaced: dict[Stage, Tensor],
        blocked: int | None,
        frozen_patterns: bool,
        norm_rules: Callable[[], AbstractContextManager[object]],
        where: Tensor | None,
    ) -> None:
        super().__init__(nodes, replaced, blocked)
        self._differences, self._frozen, self._rules = differences, frozen_patterns, norm_rules
        self._where, graph = where, nodes.graph
        spans = 1 if where is None else len(where)
        size = (spans, len(differences.input), len(graph.readers), len(graph.writers))
        self._found = differences.input.new_zeros(size)
        self._layers = 0  # layers that write to those who wait
        self._waiting: list[tuple[slice, _Read, bool]] = []  # the last: between heads and MLP
        self._read: dict[tuple[int, str], Tensor] = {}  # what the norms between have read
        self._keeps = differences.input.numel() * len(graph.writers) <= _KEPT
        self._outputs: dict[int, Tensor] = {}  # of the writers of each layer, where they are kept
        self.hooks = ExitStack()  # each holds the part of the graph that it hangs on

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(layer, residual)
        clean = self._read[layer, "attention"] = residual.detach()

        def meet(slopes: Sequence[Tensor | None]) -> None:
            self._attention(layer, clean, slopes)

        self.hooks.enter_context(register_multi_grad_hook((q, k, v), meet))
        return (q.detach(), k.detach(), v) if self._frozen else (q, k, v)

    def _attention(self, layer: int, residual: Tensor, slopes: Sequence[Tensor | None]) -> None:
        graph = self.nodes.graph
        start, counts = graph.attention_readers(layer).start, (graph.heads, *[graph.kv_readers] * 2)
        for part, (count, slope) in enumerate(zip(counts, slopes, strict=True)):
            if slope is not None:
                read = self._reading(self.nodes.layers[layer], part, residual, slope)
                self._wait(layer, slice(start, start + count), read)
            start += count

    def _reading(self, layer: Layer, part: int, residual: Tensor, made: Tensor) -> _Read:
        """From gradients by q, k or v, [rows, tokens, readers, head_dim], to those by what was read."""

        def read(rows: slice) -> Tensor:
            weight, _ = layer.weights[part]
            slope = made[rows].movedim(-2, 1) @ weight.mT  # [rows, readers, tokens, d_model]
            return self._before(layer.block.norm, residual[rows], slope).flatten(2)

        return read

    def _before(self, norm: Norm, read: Tensor, slope: Tensor) -> Tensor:
        """From gradients by what a norm gave, [rows, readers, tokens, d_model], to those by what it read."""
        if not norm.changes:
            return slope
        with torch.enable_grad(), self._rules():
            own = read[:, None].expand_as(slope).detach().requires_grad_()
            normed = norm.forward(own)
        (found,) = torch.autograd.grad(normed, own, slope)
        return found

    def mlp_input(self, layer: int, residual: Tensor) -> Tensor:
        reader, graph = self.nodes.graph.mlp_reader(layer), self.nodes.graph
        self._read[layer, "mlp"] = residual.detach()
        layers = layer if graph.parallel else layer + 1
        return self._watched(residual, layers, reader, between=not graph.parallel)

    def heads(self, layer: int, z: Tensor) -> Tensor:
        z = super().heads(layer, z)
        if self.nodes.layout.bends:
            self._read[layer, "after"] = self.nodes.layers[layer].block.attended(z).detach()
        return z

    def final(self, residual: Tensor) -> Tensor:
        graph = self.nodes.graph
        return self._watched(residual, graph.layers, len(graph.readers) - 1)

    def _watched(
        self, residual: Tensor, layers: int, reader: int, *, between: bool = False
    ) -> Tensor:
        """A name of its own for what one reader reads, so that its gradient comes alone."""
        read = residual.view_as(residual)

        def meet(slope: Tensor) -> None:
            places = slice(reader, reader + 1)
            self._wait(layers, places, lambda rows: slope[rows].flatten(1)[:, None], between)

        read.register_hook(meet)
        return read

    def _wait(self, layers: int, readers: slice, read: _Read, between: bool = False) -> None:
        if layers != self._layers:
            self._meet()
        self._layers = layers
        self._waiting.append((readers, read, between))

    def _meet(self) -> None:
        """Scores of all edges to those who wait."""
        graph, inputs = self.nodes.graph, self._differences.input
        readers = sum(places.stop - places.start for places, _, _ in self._waiting)
        at_once = max(1, _NUMBERS // max(1, readers * inputs[0].numel()))
        for start in range(0, len(inputs) if self._waiting else 0, at_once):
            rows = slice(start, start + at_once)
            slopes = [read(rows) for _, read, _ in self._waiting]
            for layer in reversed(range(self._layers)):
                first, output = graph.heads_of(layer).start, self._written(layer, rows)
                for number, (places, _, between) in enumerate(self._waiting):
                    found = self._found[:, rows, places, first : first + output.shape[1]]
                    is_last = between and layer == self._layers - 1
                    slopes[number] = self._pass(layer, rows, slopes[number], output, found, is_last)
            for (places, _, _), slope in zip(self._waiting, slopes, strict=True):
                self._found[:, rows, places, :1] = self._products(slope, inputs[rows, None], rows)
        self._waiting.clear()

    def _written(self, layer: int, rows: slice) -> Tensor:
        if not self._keeps:
            return written(self.nodes, self._differences.rows(rows), layer)
        if layer not in self._outputs:
            self._outputs[layer] = written(self.nodes, self._differences, layer)
        return self._outputs[layer][rows]

    def _products(self, slope: Tensor, output: Tensor, rows: slice) -> Tensor:
        """[spans, rows, readers, writers]: of [rows, readers, tokens * d_model] and [rows, writers, tokens, d_model]."""
        if self._where is None:
            return (slope @ output.flatten(2).mT)[None]
        spans = self._where[:, rows, None, :, None]
        return torch.stack([slope @ (output * span).flatten(2).mT for span in spans])

    def _pass(
        self, layer: int, rows: slice, slope: Tensor, output: Tensor, found: Tensor, between: bool
    ) -> Tensor:
        """Scores of a layer's writers into `found`; the gradient by what enters the layer.

        `slope` [rows, readers, tokens * d_model] is by what leaves it, or `between`: by the sum that its
        MLP reads. Without norms between it is the same all the way.
        """
        block, normed = self.nodes.layers[layer].block, self.nodes.layout.normed
        if not self.nodes.layout.bends:
            found[:] = self._products(slope, output, rows)
            return slope
        heads = self.nodes.graph.heads
        wide = (-1, output.shape[-1])
        if not between:
            found[..., heads:] = self._products(slope, output[:, heads:], rows)
            if normed:
                read = self._read[layer, "mlp"][rows]
                slope = self._before(block.mlp_norm, read, slope.unflatten(2, wide)).flatten(2)
        after = self._before(
            block.after, self._read[layer, "after"][rows], slope.unflatten(2, wide)
        )
        found[..., :heads] = self._products(after.flatten(2), output[:, :heads], rows)
        if normed:
            read = self._read[layer, "attention"][rows]
            slope = self._before(block.norm, read, slope.unflatten(2, wide)).flatten(2)
        return slope

    def finish(self) -> Tensor:
        """[spans, rows, readers, writers], after the backward pass."""
        self._meet()
        return self._found
