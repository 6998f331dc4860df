"""The one primitive of this package: a forward pass in which each edge carries what its mask says.

    in_reader = sum over writers of [out_writer + alpha_edge (ref_writer - out_writer)]

`out` is what the writer gives in this very run, `ref` a stored output. alpha 0 on all edges is the clean
run, 1 on all edges the reference run; the gradient by alpha at 0 is edge attribution patching. Where norms
come between writers and readers, "sum" is the way through them (`lens.circuits.graph.nodes`). With places, alpha is of an edge at a place,
and heads can be cut off from keys at a place (`lens.circuits.graph.ways`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lens.circuits.graph.activations import Activations
from lens.circuits.graph.nodes import Nodes, project, visit
from lens.circuits.graph.ways import Ways
from lens.common.errors import LensError
from lens.passes.calls import LayerCall
from lens.passes.visit import Visitor


def masked_logits(
    nodes: Nodes,
    ids: Tensor,
    reference: Activations,
    masks: Tensor,
    where: Tensor | None = None,
    ways: Ways | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Logits [masks, rows, tokens, vocab] of one forward pass with edges replaced.

    Differentiable by `masks` (where grad is enabled).

    Args:
        nodes: of the model.
        ids: [rows, tokens], or pictures [rows, channels, height, width].
        reference: of the same rows, or one row for all.
        masks: [masks, readers, writers], alpha of each edge; what stands where there is no edge is
            not read. With `where` [spans, masks, readers, writers].
        where: [spans, rows, tokens], in which tokens each of the masks holds; None: one for all.
        ways: across spans, that are cut in each of the masks; None: none.
        noise: [rows, tokens, d_model], added to what enters the first layer.

    Raises:
        LensError: masks or references of other shapes, or alphas that are NaN.
    """
    wanted = (len(nodes.graph.readers), len(nodes.graph.writers))
    masks = masks[None] if where is None else masks
    if masks.dim() != 4 or masks.shape[2:] != wanted:
        raise LensError(
            f"masks must be [masks, readers {wanted[0]}, writers {wanted[1]}], got the shape "
            f"{list(masks.shape[where is None :])}; graph.dense(values) makes them from values of the edges"
        )
    of_tokens = ids.dim() == 2  # of pictures the model says itself how many positions they have
    if reference.input.shape[0] not in (1, len(ids)) or (
        of_tokens and reference.input.shape[1] != ids.shape[1]
    ):
        raise LensError(
            f"the reference is of {reference.input.shape[0]} prompts of "
            f"{reference.input.shape[1]} tokens, and there are {len(ids)} of {ids.shape[1]}"
        )
    allowed = torch.as_tensor(nodes.graph.allowed, device=masks.device)
    masks = masks.where(allowed, 0)
    if masks.isnan().any():
        raise LensError("masks has NaN on an edge; give each edge a number of 0 to 1")
    masks = masks.to(nodes.model.device, nodes.model.dtype)
    visitor = _Masking(nodes, reference, masks, where, ways, noise)
    copies = masks.shape[1]
    return visit(nodes, ids.repeat(copies, *[1] * (ids.dim() - 1)), visitor).unflatten(
        0, (copies, -1)
    )


class _Masking(Visitor):
    """Adds `sum alpha (ref - out)` to what each reader reads; differences are kept writer by writer."""

    def __init__(
        self,
        nodes: Nodes,
        reference: Activations,
        masks: Tensor,
        where: Tensor | None,
        ways: Ways | None,
        noise: Tensor | None,
    ) -> None:
        self._nodes, self._graph = nodes, nodes.graph
        self._reference = reference
        self._masks = masks  # [spans, masks, readers, writers]
        self._where = where  # [spans, rows, tokens]
        self._ways = ways
        self._noise = noise
        self._written = 0
        self._differences = torch.empty(0)  # [masks, writers, rows, tokens, d_model]
        self._walks = nodes.layout.bends
        # input, sum of heads, MLP, ...: [masks, rows, tokens, d_model]
        self._outputs: list[Tensor] = []

    def _copies(self, tensor: Tensor) -> Tensor:
        """[masks, rows, ...] of [masks * rows, ...]."""
        return tensor.unflatten(0, (self._masks.shape[1], -1))

    def _read(self, residual: Tensor, readers: slice) -> Tensor:
        """[masks, readers, rows, tokens, d_model], what these readers get instead of the residual."""
        alphas = self._masks[:, :, readers, : self._written]
        if self._walks:
            return self._walk(alphas)
        return (
            self._added(alphas, self._differences[:, : self._written])
            + self._copies(residual)[:, None]
        )

    def _added(self, alphas: Tensor, differences: Tensor) -> Tensor:
        """[masks, readers, rows, tokens, d_model]: of alphas [spans, masks, readers, writers] and their differences."""
        if self._where is None:
            return (alphas[0] @ differences.flatten(2)).unflatten(2, differences.shape[2:])
        # Of each span its own tokens alone: spans share none, so that all together cost as much as one mask.
        added = differences.new_zeros(*alphas.shape[1:3], *differences.shape[2:])
        for own, span in zip(alphas, self._where.to(differences.device), strict=True):
            part = differences[:, :, span]  # [masks, writers, its tokens in all rows, d_model]
            added[:, :, span] += (own @ part.flatten(2)).unflatten(2, part.shape[2:])
        return added

    def _walk(self, alphas: Tensor) -> Tensor:
        """`_read`, through the norms between: of alphas [spans, masks, readers, writers so far]."""
        normed, graph = self._nodes.layout.normed, self._graph
        outputs, writers = iter(self._outputs), 0

        def replaced(count: int) -> Tensor:
            nonlocal writers
            part = slice(writers, writers + count)
            writers += count
            return next(outputs)[:, None] + self._added(
                alphas[..., part], self._differences[:, part]
            )

        stream = replaced(1)
        for layer in self._nodes.layers:
            block = layer.block
            if writers < alphas.shape[-1]:
                stream = block.norm.forward(stream) if normed else stream
                stream = stream + block.after.forward(replaced(graph.heads))
            if writers < alphas.shape[-1] and graph.mlps:
                stream = block.mlp_norm.forward(stream) if normed else stream
                stream = stream + replaced(1)
        return stream

    def _keep(self, differences: Tensor) -> None:
        """Differences of the next writers, [masks, writers, rows, tokens, d_model]."""
        start, self._written = self._written, self._written + differences.shape[1]
        if torch.is_grad_enabled():
            parts = [self._differences, differences] if start else [differences]
            self._differences = torch.cat(parts, 1)
            return
        if not start:
            shape = (self._masks.shape[1], len(self._graph.writers), *differences.shape[2:])
            self._differences = differences.new_empty(shape)
        self._differences[:, start : self._written] = differences

    def enter(self, hidden: Tensor) -> Tensor:
        if self._noise is not None:
            hidden = hidden + self._noise.repeat(self._masks.shape[1], 1, 1)
        self._outputs.append(self._copies(hidden))
        self._keep((self._reference.input - self._copies(hidden))[:, None])
        return hidden

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self._nodes.layers[layer]
        readers = self._graph.attention_readers(layer)
        heads, others = self._graph.heads, self._graph.kv_readers
        normed = parts.block.norm.forward(self._read(residual, readers)).transpose(0, 1)
        q, k, v = (
            project(parts, part, some).flatten(1, 2).movedim(0, -2)
            for part, some in enumerate(normed.split([heads, others, others]))
        )
        return q, k, v  # [masks * rows, tokens, readers, head_dim]

    def attention(self, layer: int, call: LayerCall) -> None:
        self._call = call

    def heads(self, layer: int, z: Tensor) -> Tensor:
        if self._ways is not None:
            z = self._ways.output(self._call, z)
        difference = self._reference.heads[layer] - self._copies(z)
        block = self._nodes.layers[layer].block
        if self._walks:
            self._outputs.append(self._copies(block.attended(z)))
        written = difference @ block.output
        self._keep(written.transpose(1, 2))
        return z

    def mlp_input(self, layer: int, residual: Tensor) -> Tensor:
        reader = self._graph.mlp_reader(layer)
        return self._read(residual, slice(reader, reader + 1)).flatten(0, 2)

    def mlp(self, layer: int, output: Tensor) -> Tensor:
        self._outputs.append(self._copies(output))
        self._keep((self._reference.mlps[layer] - self._copies(output))[:, None])
        return output

    def final(self, residual: Tensor) -> Tensor:
        last = len(self._graph.readers) - 1
        return self._read(residual, slice(last, last + 1)).flatten(0, 2)
