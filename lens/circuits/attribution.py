"""First-order scores of all edges at once: gradients where readers read times what writers differ by.

The gradient by what one head reads is made from the gradient by its own q, k or v, layer by layer, and
differences are kept as `z`, so that no tensor of all writers × tokens × d_model is ever built; the
differences of one layer at a time are projected by W_O when they are met with a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lens.captures.layer import LayerCall
from lens.circuits.activations import Activations, PlainVisitor
from lens.circuits.nodes import Layer, Nodes, visit
from lens.errors import LensError

_FLAT = 1e-8
Stage = tuple[str, int]
"""("input", 0), ("heads", layer) or ("mlp", layer)."""


@dataclass(frozen=True, eq=False)
class Slopes:
    """Gradients of a number at every reader, as they come out of one backward pass.

    Attributes:
        attention: per layer what its attention reads [rows, tokens, d_model], and the gradient by q, k
            and v, [rows, tokens, readers, head_dim] each.
        mlps: per layer the gradient by what its MLP reads, [rows, tokens, d_model].
        final: by what the last norm reads.
        heads: per layer by z, [rows, heads, tokens, head_dim].
        calls: per layer what z was made from.
        values: [rows], the number itself.
    """

    attention: list[tuple[Tensor, tuple[Tensor, ...]]]
    mlps: list[Tensor]
    final: Tensor
    heads: list[Tensor]
    calls: list[LayerCall]
    values: Tensor


def slopes(
    nodes: Nodes,
    ids: Tensor,
    objective: Callable[[Tensor], Tensor],
    replaced: dict[Stage, Tensor] | None = None,
    *,
    blocked: int | None = None,
    frozen_patterns: bool = False,
    refuse_flat: bool = False,
) -> Slopes:
    """Gradients at every reader of the sum over rows of `objective(logits)`, [rows].

    Args:
        nodes: of the model.
        ids: [rows, tokens].
        objective: of the logits.
        replaced: outputs of whole stages that are put in place of the run's own.
        blocked: a layer whose attention and MLP outputs no gradient passes (GradDrop).
        frozen_patterns: no gradient passes queries and keys.
        refuse_flat: refuse an objective whose gradient by the logits is 0.

    Raises:
        LensError: an objective without a gradient, or a flat one.
    """
    tracing = _Tracing(nodes, replaced or {}, blocked, frozen_patterns)
    with torch.enable_grad():
        logits = visit(nodes, ids, tracing)
        values = objective(logits)
        if not values.requires_grad:
            raise LensError("the metric has no gradient; use 'logit_difference' or 'loss'")
        (slope,) = torch.autograd.grad(values.sum(), logits, retain_graph=True)
        if refuse_flat and slope.norm() < _FLAT:
            raise LensError(
                "the metric is flat at the clean prompts (its gradient by the logits has the norm "
                f"{slope.norm():.1e}), so that plain 'eap' is 0 everywhere and says nothing; use "
                "method='eap-ig', whose gradients are taken on the way to the corrupt prompts"
            )
        targets = [part for parts in tracing.made for part in parts]
        targets += [*tracing.mlp_inputs, tracing.final_input, *tracing.outputs]
        found = torch.autograd.grad(logits, targets, slope, materialize_grads=True)
    layers = nodes.graph.layers
    last = 3 * layers + len(tracing.mlp_inputs)
    return Slopes(
        [
            (residual, found[3 * layer : 3 * layer + 3])
            for layer, residual in enumerate(tracing.residuals)
        ],
        list(found[3 * layers : last]),
        found[last],
        list(found[last + 1 :]),
        tracing.calls,
        values.detach(),
    )


class _Tracing(PlainVisitor):
    """Keeps q, k, v and what MLPs and the last norm read, with their autograd graph."""

    def __init__(
        self,
        nodes: Nodes,
        replaced: dict[Stage, Tensor],
        blocked: int | None,
        frozen_patterns: bool,
    ) -> None:
        super().__init__(nodes)
        self._replaced, self._blocked, self._frozen = replaced, blocked, frozen_patterns
        self.calls: list[LayerCall] = []
        self.outputs: list[Tensor] = []
        self.residuals: list[Tensor] = []
        self.made: list[tuple[Tensor, Tensor, Tensor]] = []
        self.mlp_inputs: list[Tensor] = []
        self.final_input = torch.empty(0)

    def enter(self, hidden: Tensor) -> Tensor:
        """See `Visitor`."""
        return self._replaced.get(("input", 0), hidden).detach().requires_grad_()

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Visitor`."""
        self.residuals.append(residual.detach())
        q, k, v = super().project(layer, residual)
        self.made.append((q, k, v))
        return (q.detach(), k.detach(), v) if self._frozen else (q, k, v)

    def attention(self, layer: int, call: LayerCall) -> None:
        """See `Visitor`."""
        self.calls.append(
            replace(
                call, query=call.query.detach(), key=call.key.detach(), value=call.value.detach()
            )
        )

    def heads(self, layer: int, z: Tensor) -> Tensor:
        """See `Visitor`."""
        z = self._replaced.get(("heads", layer), z)
        self.outputs.append(z if z.requires_grad else z.detach().requires_grad_())
        return self.outputs[-1].detach() if layer == self._blocked else self.outputs[-1]

    def mlp_input(self, layer: int, residual: Tensor) -> Tensor:
        """See `Visitor`."""
        self.mlp_inputs.append(residual.clone())
        return self.mlp_inputs[-1]

    def mlp(self, layer: int, output: Tensor) -> Tensor:
        """See `Visitor`."""
        output = self._replaced.get(("mlp", layer), output)
        return output.detach() if layer == self._blocked else output

    def final(self, residual: Tensor) -> Tensor:
        """See `Visitor`."""
        self.final_input = residual.clone()
        return self.final_input


def edge_products(nodes: Nodes, slopes: Slopes, differences: Activations) -> np.ndarray:
    """[rows, edges]: gradient at the reader · difference of the writer, summed over the tokens."""
    graph = nodes.graph
    rows = len(differences.input)
    found = slopes.final.new_zeros(rows, len(graph.readers), len(graph.writers))
    for layers, parts in _by_depth(nodes, slopes):
        for readers, slope in parts:
            found[:, readers, 0] = (slope @ differences.input.flatten(1)[..., None])[..., 0]
        for layer in range(layers):
            names = [graph.heads_of(layer)]
            outputs = [differences.heads[layer] @ nodes.layers[layer].output]
            if graph.mlps:
                writer = graph.mlp_writer(layer)
                names.append(slice(writer, writer + 1))
                outputs.append(differences.mlps[layer][:, None])
            for readers, slope in parts:
                for writers, output in zip(names, outputs, strict=True):
                    found[:, readers, writers] = slope @ output.flatten(2).mT
    return found.cpu().numpy()[:, graph.allowed]


def written(nodes: Nodes, differences: Activations, layer: int) -> Tensor:
    """[rows, writers of the layer, tokens, d_model] of the differences."""
    heads = differences.heads[layer] @ nodes.layers[layer].output
    if not nodes.graph.mlps:
        return heads
    return torch.cat([heads, differences.mlps[layer][:, None]], 1)


def _by_depth(nodes: Nodes, slopes: Slopes) -> Iterator[tuple[int, list[tuple[slice, Tensor]]]]:
    """Readers by the number of layers that write to them: that number, and readers with the gradients
    [rows, readers, tokens * d_model] by what they read; queries, keys and values apart, so that no
    tensor is large."""
    graph = nodes.graph
    for depth in range(graph.layers + 1):
        parts: list[tuple[slice, Tensor]] = []
        if depth < graph.layers:
            start = graph.attention_readers(depth).start
            residual, made = slopes.attention[depth]
            for part, slope in enumerate(made):
                readers = slice(start, start + slope.shape[-2])
                parts.append((readers, _read_slope(nodes.layers[depth], part, residual, slope)))
                start = readers.stop
        layer = depth if graph.parallel else depth - 1
        if graph.mlps and 0 <= layer < graph.layers:
            reader = graph.mlp_reader(layer)
            parts.append((slice(reader, reader + 1), slopes.mlps[layer].flatten(1)[:, None]))
        if depth == graph.layers:
            last = len(graph.readers) - 1
            parts.append((slice(last, last + 1), slopes.final.flatten(1)[:, None]))
        yield depth, parts


def _read_slope(layer: Layer, part: int, residual: Tensor, made: Tensor) -> Tensor:
    """[rows, readers, tokens * d_model]: from gradients by q, k or v to those by what was read."""
    weight, _ = layer.weights[part]
    slope = (made.movedim(-2, 0).flatten(1, 2) @ weight.mT).unflatten(1, residual.shape[:-1])
    with torch.enable_grad():
        read = residual.expand_as(slope).detach().requires_grad_()
        normed = layer.norm.forward(read)
        (found,) = torch.autograd.grad(normed, read, slope)
    return found.flatten(2).transpose(0, 1)
