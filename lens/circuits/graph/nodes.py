"""A model with its graph: which weights each reader reads with, and how what is written reaches readers.

Where norms come between heads and stream ("bends", `lens.models.parts`) a reader's input is no sum of what
is written. An edge is then defined by computing what its reader gets again: from the embedding up, each
sum of heads with the replaced outputs in it goes through the norm after it, and the stream through the
norms that it goes on from. So replacing all edges of a head is replacing the head, and gradients of these
edges pass the norms.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lens.circuits.graph.graph import Graph, Kv
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.models.parts import Block, Layout
from lens.passes.logits import logits_of
from lens.passes.replay import proved
from lens.passes.visit import Visitor, visiting


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: its parts, and the weights of its readers.

    Attributes:
        block: of `lens.models.parts`.
        weights: of q, k and v, [readers, d_model, head_dim] and [readers, 1, head_dim] or None; a
            key that is shared by query heads is repeated where each of them reads for itself.
    """

    block: Block
    weights: tuple[tuple[Tensor, Tensor | None], ...]


@dataclass(frozen=True, eq=False)
class Nodes:
    """A model with its graph and the places of its nodes; `model` is what a bridge wraps."""

    graph: Graph
    layers: tuple[Layer, ...]
    layout: Layout

    @property
    def model(self) -> LoadedModel:
        """The model that is run."""
        return self.layout.model


def find_nodes(model: LoadedModel, *, kv: Kv = "head", sums: str | None = None) -> Nodes:
    """The graph of a model, and where its nodes are.

    Args:
        model: as `lens.load` returns it; of a `TransformerBridge` the model that it wraps is taken.
        kv: of `Graph`.
        sums: what needs readers whose input is the sum of what is written, in words.

    Raises:
        LensError: parts that are not known or do not make this model (`lens.passes.replay`), norms
            between heads and stream where `sums` are needed, or keys that cannot be read head by head.
    """
    layout = proved(model)
    info = layout.model.info
    if sums is not None and layout.bends:
        raise LensError(
            f"{sums} takes what is read for the sum of what is written, and {layout.kind} norms it in "
            "between"
        )
    graph = Graph(
        info.layers,
        info.heads,
        info.kv_heads,
        mlps=all(block.mlp for block in layout.blocks),
        parallel=layout.parallel,
        kv=kv,
    )
    norm = layout.blocks[0].head_norms[1]
    together = norm.scale is not None and norm.scale.numel() != info.head_dim
    if graph.kv_readers != info.kv_heads and together:
        raise LensError(
            f"the keys of {layout.kind} are normed with weights for its {info.kv_heads} key heads, so "
            "query heads cannot have keys of their own; use kv='group'"
        )
    return Nodes(graph, tuple(_layer(block, graph) for block in layout.blocks), layout)


def _layer(block: Block, graph: Graph) -> Layer:
    readers = (graph.heads, graph.kv_readers, graph.kv_readers)
    return Layer(
        block,
        tuple(
            (_by_reader(weight, wanted), None if bias is None else _by_reader(bias, wanted))
            for (weight, bias), wanted in zip(block.weights, readers, strict=True)
        ),
    )


def _by_reader(weight: Tensor, wanted: int) -> Tensor:
    """[wanted, ...] of [stored, ...]; the same tensor where no group is opened."""
    stored = len(weight)
    return weight if wanted == stored else weight.repeat_interleave(wanted // stored, 0)


def visit(nodes: Nodes, ids: Tensor, visitor: Visitor) -> Tensor:
    """Logits [rows, tokens, vocab] of a forward pass that asks the visitor at each node.

    Raises:
        LensError: prompts that the model does not take.
    """
    with visiting(nodes.layout, len(ids), visitor):
        return logits_of(nodes.model, ids)


def project(layer: Layer, part: int, normed: Tensor) -> Tensor:
    """q (part 0), k (1) or v (2) [readers, ..., head_dim] of what each reader reads, [readers or 1, ..., d]."""
    weight, bias = layer.weights[part]
    shape = normed.shape[1:-1]
    result = normed.flatten(1, -2) @ weight  # [readers, rows * tokens, head_dim]
    return (result if bias is None else result + bias).unflatten(1, shape)
