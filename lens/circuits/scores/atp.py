"""AtP* for edges: the softmax recomputed for every edge into a query or key, the rest linear.

Plain attribution multiplies the change of a query or key by a slope, which is 0 where the softmax is
saturated. Here each edge's own query or key goes through norm, projection, rotary embedding and softmax;
only what comes after the head is linear (Kramár et al., AtP*, 2024, arXiv 2403.00745). With dO the
gradient by z, p the weights and p' those with the patched query or key:

    edge into <q>                   sum_it (p'_it - p_it) dO_i . v_t
    edge into <k>, "atp*"           sum_it (p'_it - p_it) / (1 - p_it) (dO_i . v_t - dO_i . o_i), each
                                    key position alone, as published
    edge into <k>, "atp*-together"  sum_i dO_i . (o'_i - o_i), all key positions patched at once, as
                                    ablating the edge does

Edges into <v>, MLPs and logits are scored as by "eap". GradDrop takes the mean of |scores| over passes
with the gradient through one layer's outputs blocked, times layers / (layers - 1).

The queries and keys of all edges from one writer come from one forward pass in which each layer reads
the clean residual stream with that writer replaced; no N×N matrix is built.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from lens_kernels import patch_effects
from torch import Tensor

from lens.circuits.graph.activations import Activations, PlainVisitor
from lens.circuits.graph.nodes import Nodes, visit
from lens.circuits.scores.attribution import edge_products, for_numpy, head_slopes, written
from lens.circuits.scores.batch import Batch
from lens.common.errors import LensError
from lens.passes.calls import LayerCall, attend, kernel_options

_COPIES = 64  # rows of one forward pass


def atp_star(batch: Batch) -> np.ndarray:
    """Key positions one at a time: [rows, edges]."""
    return _scores(batch, together=False)


def atp_star_together(batch: Batch) -> np.ndarray:
    """Key positions all at once: [rows, edges]."""
    return _scores(batch, together=True)


def atp_star_grad_drop(batch: Batch) -> np.ndarray:
    """Mean size over passes with one layer blocked: [rows, edges], not negative.

    Raises:
        LensError: a model with one layer.
    """
    layers = batch.nodes.graph.layers
    if layers < 2:
        raise LensError("GradDrop blocks one layer at a time and needs another; this model has one")
    found = 0
    for layer in range(layers):
        found = found + np.abs(_scores(batch, together=False, blocked=layer)) / (layers - 1)
    return np.asarray(found)


class _Patching(PlainVisitor):
    """One copy of the rows per writer; every layer reads the clean stream with that writer replaced."""

    def __init__(
        self, nodes: Nodes, residuals: list[Tensor], differences: Activations, writers: list[int]
    ) -> None:
        super().__init__(nodes)
        self._residuals, self._differences, self._writers = residuals, differences, writers
        self._added = torch.empty(0)  # [writers, rows, tokens, d_model], 0 for writers to come
        self.calls: list[LayerCall] = []

    def _add(self, first: int, parts: Tensor) -> None:
        """Differences [rows, writers, tokens, d_model] of the writers from number `first` on."""
        for number, writer in enumerate(self._writers):
            if first <= writer < first + parts.shape[1]:
                self._added[number] = parts[:, writer - first]

    def enter(self, hidden: Tensor) -> Tensor:
        self._added = hidden.new_zeros(len(self._writers), *self._differences.input.shape)
        self._add(0, self._differences.input[:, None])
        return hidden

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = super().project(layer, (self._residuals[layer] + self._added).flatten(0, 1))
        self._add(
            self.nodes.graph.heads_of(layer).start, written(self.nodes, self._differences, layer)
        )
        return made

    def attention(self, layer: int, call: LayerCall) -> None:
        self.calls.append(call)


def _scores(batch: Batch, *, together: bool, blocked: int | None = None) -> np.ndarray:
    """[rows, edges]: benefit lost by each edge."""
    nodes, graph = batch.nodes, batch.nodes.graph
    if nodes.layout.bends:
        raise LensError(
            f"atp* takes what is read for the sum of what is written, and {nodes.layout.kind} norms it "
            "in between; use method='eap-ig' or 'exact'"
        )
    found = np.zeros((len(batch.ids), *graph.allowed.shape))
    found[:, graph.allowed] = edge_products(
        nodes, batch.ids, batch.measure, batch.differences, blocked=blocked, refuse_flat=True
    )
    at = head_slopes(nodes, batch.ids, batch.measure, blocked=blocked)
    change = batch.differences.times(-1)  # reference - clean
    last = graph.heads_of(graph.layers - 1).start  # writers before the last attention
    at_once = max(1, _COPIES // len(batch.ids))
    for start in range(0, last, at_once):
        writers = list(range(start, min(start + at_once, last)))
        patching = _Patching(nodes, at.residuals, change, writers)
        with torch.no_grad():
            visit(nodes, batch.ids.repeat(len(writers), 1), patching)
            for layer, call in enumerate(patching.calls):
                readers = graph.attention_readers(layer)
                effects = _effects(at.calls[layer], call, at.heads[layer], together)
                # Queries, then keys: [writers, rows, readers].
                for number, effect in enumerate(effects):
                    first = readers.start + number * graph.heads
                    columns = slice(first, first + effect.shape[-1])
                    found[:, columns, start : writers[-1] + 1] = -for_numpy(effect.permute(1, 2, 0))
    return found[:, graph.allowed]


def _effects(
    clean: LayerCall, patched: LayerCall, slope: Tensor, together: bool
) -> tuple[Tensor, Tensor]:
    """Change of the metric by patched queries and by patched keys, [copies, rows, readers] each."""
    copies = len(patched.query) // len(clean.query)
    query, key, value, slope = (
        part.repeat(copies, 1, 1, 1) for part in (clean.query, clean.key, clean.value, slope)
    )
    if together:
        own = replace(patched, query=query, key=key, value=value)
        plain = attend(own, statistics=()).output
        by_query, by_key = (
            (slope * (attend(replace(own, **part), statistics=()).output - plain)).sum((2, 3))
            for part in ({"query": patched.query}, {"key": patched.key})
        )
    else:
        effects = patch_effects(
            query, key, value, slope,
            patched_query=patched.query, patched_key=patched.key, **kernel_options(patched),
        )  # fmt: skip
        assert effects.query is not None
        assert effects.key is not None
        by_query, by_key = effects.query.sum(-1), effects.key.sum(-1)
    by_key = by_key.unflatten(1, (key.shape[1], -1)).sum(2)  # over the heads that share a key
    return by_query.unflatten(0, (copies, -1)), by_key.unflatten(0, (copies, -1))
