"""Where the nodes of a graph are in a transformers model.

A model is followed while it runs: each norm is where readers read (what enters it is the residual
stream), each attention function is where heads write (`z`, before the output projection), each MLP's
output is what it writes. Reading `x` per head means norm and projection of `x` by that head's weights
alone, so this works for blocks `x + attention(norm(x))`, `x + mlp(norm(x))`, and for no other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lens.circuits.graph.graph import Graph
from lens.common.errors import LensError
from lens.models.bare import bare
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.logits import logits_of
from lens.passes.sessions import OnLayer, listening


@dataclass(frozen=True)
class _Layout:
    """Where an architecture keeps its parts, as attribute paths; `joint` projections make q, k and v."""

    layers: str
    norm: str
    attention: str
    output: str
    last_norm: str
    mlp_norm: str
    mlp: str
    separate: tuple[str, ...] = ()
    joint: str | None = None
    by_head: bool = False


_LLAMA = _Layout(
    "model.layers", "input_layernorm", "self_attn", "o_proj", "model.norm",
    "post_attention_layernorm", "mlp", separate=("q_proj", "k_proj", "v_proj"),
)  # fmt: skip
_TOY = _Layout(
    "blocks", "ln1", "attn", "o", "ln_final", "ln2", "mlp", separate=("q", "k", "v")
)  # fmt: skip
_LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gpt2": _Layout(
        "transformer.h", "ln_1", "attn", "c_proj", "transformer.ln_f", "ln_2", "mlp", joint="c_attn"
    ),
    "gpt_neox": _Layout(
        "gpt_neox.layers", "input_layernorm", "attention", "dense", "gpt_neox.final_layer_norm",
        "post_attention_layernorm", "mlp", joint="query_key_value", by_head=True,
    ),
    "lens-attention-only": _TOY,
    "lens-program": _TOY,
}  # fmt: skip
_POST_NORMS = ("post_feedforward_layernorm", "post_self_attn_layernorm")


@dataclass(frozen=True, eq=False)
class Layer:
    """The parts of one layer.

    Attributes:
        block, norm, attention: modules; norm is what the attention reads through.
        mlp_norm, mlp: modules, None in a layer without MLP.
        weights: of q, k and v, [readers, d_model, head_dim] and [readers, 1, head_dim] or None; a
            key that is shared by query heads is repeated where each of them reads for itself.
        output: W_O, [heads, head_dim, d_model].
        projections: modules that make q, k and v: three, or one for all.
        by_head: whether a joint projection puts q, k, v of a head side by side.
    """

    block: nn.Module
    norm: nn.Module
    mlp_norm: nn.Module | None
    mlp: nn.Module | None
    weights: tuple[tuple[Tensor, Tensor | None], ...]
    output: Tensor
    projections: tuple[nn.Module, ...]
    by_head: bool


@dataclass(frozen=True, eq=False)
class Nodes:
    """A model with its graph and the places of its nodes."""

    model: LoadedModel
    graph: Graph
    layers: tuple[Layer, ...]
    last_norm: nn.Module


def find_nodes(model: LoadedModel, *, kv: str = "head") -> Nodes:
    """The graph of a model, and where its nodes are.

    Args:
        model: as `lens.load` returns it; of a `TransformerBridge` the model that it wraps is taken.
        kv: of `Graph`.

    Raises:
        LensError: blocks that are not known to be pre-norm, or a bridge whose weights were processed.
    """
    model = bare(model)
    root: Any = model.model
    kind = root.config.model_type
    if kind not in _LAYOUTS:
        names = {name.rpartition(".")[2] for name, _ in root.named_modules()}
        if found := [name for name in _POST_NORMS if name in names]:
            raise LensError(
                f"{kind} normalises what its attention and MLPs write ({found[0]}): a head's part "
                "then depends on all others of its layer, so edges from it cannot be replaced "
                "exactly; use lens.heads.importance"
            )
        raise LensError(
            f"the blocks of {kind!r} are not known here; known: {', '.join(_LAYOUTS)} (pre-norm)"
        )
    layout, info = _LAYOUTS[kind], model.info
    blocks = list(root.get_submodule(layout.layers))
    graph = Graph(
        info.layers,
        info.heads,
        info.kv_heads,
        mlps=all(hasattr(block, layout.mlp) for block in blocks),
        parallel=bool(getattr(root.config, "use_parallel_residual", False)),
        kv=kv,
    )
    return Nodes(
        model,
        graph,
        tuple(_layer(block, layout, graph) for block in blocks),
        root.get_submodule(layout.last_norm),
    )


def _layer(block: nn.Module, layout: _Layout, graph: Graph) -> Layer:
    attention = block.get_submodule(layout.attention)
    names = layout.separate or (str(layout.joint),)
    projections = tuple(attention.get_submodule(name) for name in names)
    parts = [_matrix(module) for module in projections]
    if layout.joint is not None:
        weight, bias = parts[0]
        parts = list(
            zip(
                _three(weight, graph.heads, layout.by_head),
                _three(bias, graph.heads, layout.by_head) if bias is not None else (None,) * 3,
                strict=True,
            )
        )
    shapes = (graph.heads, graph.kv_heads, graph.kv_heads)
    readers = (graph.heads, graph.kv_readers, graph.kv_readers)
    weights = tuple(
        (
            _by_reader(weight, stored, wanted),
            None if bias is None else _by_reader(bias[None], stored, wanted),
        )
        for (weight, bias), stored, wanted in zip(parts, shapes, readers, strict=True)
    )
    output, _ = _matrix(attention.get_submodule(layout.output))
    return Layer(
        block,
        block.get_submodule(layout.norm),
        block.get_submodule(layout.mlp_norm) if graph.mlps else None,
        block.get_submodule(layout.mlp) if graph.mlps else None,
        weights,
        output.unflatten(0, (graph.heads, -1)),
        projections,
        layout.by_head,
    )


def _matrix(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [in, out] and bias of a Linear, or of GPT-2's Conv1D, which keeps it this way round."""
    weight = module.get_parameter("weight").detach()
    bias = getattr(module, "bias", None)
    turned = weight.T if isinstance(module, nn.Linear) else weight
    return turned, None if bias is None else bias.detach()


def _three(joint: Tensor, heads: int, by_head: bool) -> list[Tensor]:
    """q, k and v of the last axis of a joint weight or bias."""
    if not by_head:
        return list(joint.chunk(3, -1))
    parts = joint.unflatten(-1, (heads, 3, -1))
    return [parts[..., number, :].flatten(-2) for number in range(3)]


def _by_reader(weight: Tensor, stored: int, wanted: int) -> Tensor:
    """[wanted, in, head_dim] of [in, stored * head_dim]; a view where no group is opened."""
    found = weight.unflatten(-1, (stored, -1)).movedim(-2, 0)
    return found if wanted == stored else found.repeat_interleave(wanted // stored, 0)


class Visitor:
    """What is done at each node while a model runs; by default nothing is changed.

    Rows are prompts, or several copies of them.
    """

    def enter(self, hidden: Tensor) -> Tensor:
        """What enters the first layer, [rows, tokens, d_model]."""
        return hidden

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, [rows, tokens, readers, head_dim], from what the attention of a layer reads."""
        raise NotImplementedError

    def attention(self, layer: int, call: LayerCall) -> None:
        """What the heads of a layer work with: queries and keys after rotary embedding, and the mask."""

    def heads(self, layer: int, z: Tensor) -> Tensor:
        """What the heads of a layer give, [rows, heads, tokens, head_dim]."""
        return z

    def mlp_input(self, layer: int, residual: Tensor) -> Tensor:
        """What the MLP of a layer reads, before its norm."""
        return residual

    def mlp(self, layer: int, output: Tensor) -> Tensor:
        """What the MLP of a layer writes."""
        return output

    def final(self, residual: Tensor) -> Tensor:
        """What the last norm reads."""
        return residual


def visit(nodes: Nodes, ids: Tensor, visitor: Visitor) -> Tensor:
    """Logits [rows, tokens, vocab] of a forward pass that asks the visitor at each node.

    Raises:
        LensError: prompts that the model does not take.
    """
    with ExitStack() as stack:
        for number, layer in enumerate(nodes.layers):
            for handle in _hooks(number, layer, visitor):
                stack.callback(handle.remove)

        def final(norm: Any, inputs: tuple, _: Any) -> Tensor:
            return norm.forward(visitor.final(inputs[0]))

        stack.callback(nodes.last_norm.register_forward_hook(final).remove)
        stack.enter_context(listening(nodes.model, _heads(visitor)))
        return logits_of(nodes.model, ids)


def project(layer: Layer, part: int, normed: Tensor) -> Tensor:
    """q (part 0), k (1) or v (2) [readers, ..., head_dim] of what each reader reads, [readers or 1, ..., d]."""
    weight, bias = layer.weights[part]
    shape = normed.shape[1:-1]
    result = normed.flatten(1, -2) @ weight  # [readers, rows * tokens, head_dim]
    return (result if bias is None else result + bias).unflatten(1, shape)


def _hooks(number: int, layer: Layer, visitor: Visitor) -> list[Any]:
    made: list[Tensor] = []

    def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": visitor.enter(kwargs["hidden_states"])}
        return (visitor.enter(args[0]), *args[1:]), kwargs

    def read(_: nn.Module, inputs: tuple, __: Any) -> None:
        made[:] = visitor.project(number, inputs[0])

    def give(part: int) -> Callable[..., Tensor]:
        return lambda *_: made[part].flatten(-2)

    def give_all(*_: Any) -> Tensor:
        if layer.by_head:
            return torch.cat(made, -1).flatten(-2)
        return torch.cat([part.flatten(-2) for part in made], -1)

    handles = [layer.norm.register_forward_hook(read)]
    if number == 0:
        handles.append(layer.block.register_forward_pre_hook(enter, with_kwargs=True))
    if len(layer.projections) == 1:
        handles.append(layer.projections[0].register_forward_hook(give_all))
    else:
        handles += [
            module.register_forward_hook(give(part))
            for part, module in enumerate(layer.projections)
        ]
    if layer.mlp is not None and layer.mlp_norm is not None:

        def read_mlp(norm: Any, inputs: tuple, _: Any) -> Tensor:
            return norm.forward(visitor.mlp_input(number, inputs[0]))

        def write_mlp(_: nn.Module, __: tuple, output: Any) -> Tensor:
            return visitor.mlp(number, output)

        handles.append(layer.mlp_norm.register_forward_hook(read_mlp))
        handles.append(layer.mlp.register_forward_hook(write_mlp))
    return handles


def _heads(visitor: Visitor) -> OnLayer:
    """Shows every head output to the visitor."""

    def on_layer(call: LayerCall) -> Tensor:
        visitor.attention(call.layer, call)
        z = attend(call, statistics=()).output.to(call.value.dtype)
        return visitor.heads(call.layer, z)

    return on_layer
