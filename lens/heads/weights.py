"""What a head's weights say without any input: copying, and composition with later heads.

Weights are taken as the residual stream meets them: the scale of the norm before the attention and of
the last norm is folded in, and for LayerNorm the mean is taken off, as TransformerLens' `fold_ln` and
`center_writing_weights` do. Biases, and the division by the norm, which depend on the input, are left
out; so are rotary positions.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.sessions import transformer


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """Weights of every head, float32, on the CPU; a vector x is a row: `v = x W_V`.

    Attributes:
        query, key, value: [layer, head, d_model, head_dim], the norm's scale folded in; heads of one
            group have the same key and value.
        output: [layer, head, head_dim, d_model].
        embedding: [vocab, d_model].
        unembedding: [d_model, vocab], the last norm's scale folded in.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    embedding: Tensor
    unembedding: Tensor


@dataclass(frozen=True)
class _Layout:
    """Where an architecture keeps its weights, as attribute paths."""

    layers: str
    norm: str
    attention: str
    output: str
    last_norm: str
    joint: str | None = None
    separate: tuple[str, ...] = ()


_LLAMA = _Layout(
    "model.layers", "input_layernorm", "self_attn", "o_proj", "model.norm",
    separate=("q_proj", "k_proj", "v_proj"),
)  # fmt: skip
_TOY = _Layout("blocks", "ln1", "attn", "o", "ln_final", separate=("q", "k", "v"))
_LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": _Layout("transformer.h", "ln_1", "attn", "c_proj", "transformer.ln_f", joint="c_attn"),
    "lens-attention-only": _TOY,
    "lens-program": _TOY,
}


def head_weights(model: LoadedModel) -> HeadWeights:
    """Weights of every head of a model.

    Raises:
        LensError: an architecture whose weights are not known here.
    """
    root: Any = transformer(model)
    layout = _layout(model)
    with torch.no_grad():
        layers = [_of_layer(layer, layout, model) for layer in root.get_submodule(layout.layers)]
        query, key, value, output = (torch.stack(parts) for parts in zip(*layers, strict=True))
        unembedding = root.get_output_embeddings().weight.float().T
        return HeadWeights(
            query=query.cpu(),
            key=key.cpu(),
            value=value.cpu(),
            output=output.cpu(),
            embedding=root.get_input_embeddings().weight.float().cpu().clone(),
            unembedding=_fold(root.get_submodule(layout.last_norm), unembedding).cpu(),
        )


def output_weights(model: LoadedModel) -> Tensor:
    """W_O of every head as it is stored: [layer, head, head_dim, d_model]; errors as in `head_weights`."""
    root: Any = transformer(model)
    layout, heads = _layout(model), model.info.heads
    with torch.no_grad():
        parts = [
            _matrix(layer.get_submodule(layout.attention).get_submodule(layout.output))
            for layer in root.get_submodule(layout.layers)
        ]
        return torch.stack(parts).unflatten(1, (heads, -1))


def input_norms(model: LoadedModel) -> list[nn.Module]:
    """Of each layer the norm that reads the residual stream; errors as in `head_weights`."""
    root: Any = transformer(model)
    layout = _layout(model)
    return [layer.get_submodule(layout.norm) for layer in root.get_submodule(layout.layers)]


def last_norm(model: LoadedModel) -> nn.Module:
    """The norm before the unembedding; errors as in `head_weights`."""
    return transformer(model).get_submodule(_layout(model).last_norm)


def copying(
    model: LoadedModel, *, top: int = 5, tokens: int | None = 1024, seed: int = 0
) -> pd.DataFrame:
    """How far each head writes the token that it reads: one row per head.

    Of the circuit `M = W_E W_V W_O W_U` [vocab, vocab], from the token read to the logits written:
    `eigenvalue`, `sum of eigenvalues / sum of their absolute values`, in [-1, 1] (Elhage et al. 2021,
    A Mathematical Framework for Transformer Circuits); `top_share`, the share of tokens whose own
    logit is among the `top` largest of their row, over at most `tokens` tokens drawn by `seed` (None:
    all; their number is in `tokens`); `top_by_chance`, top / vocab. `eigenvalue_random` and
    `top_share_random` are those of one random head of the layer, the entries of its first head's W_V
    and W_O shuffled by `seed`, between the model's own embeddings. M is never built:
    its eigenvalues other than 0 are those of `W_V W_O W_U W_E` [head_dim, head_dim].

    Raises:
        LensError: an architecture whose weights are not known here, a `top` that is none, or no tokens.

    Example:
        >>> table = lens.heads.copying(small)
        >>> table[table.top_share == 1]["head"].tolist()
        ['L1H0', 'L1H2', 'L1H3']
    """
    weights = head_weights(model)
    vocab = len(weights.embedding)
    if not 1 <= top <= vocab:
        raise LensError(f"top must be 1 to {vocab}, the size of the vocabulary, got {top}")
    if tokens is not None and tokens < 1:
        raise LensError(f"tokens must be at least 1, or None for all, got {tokens}")
    across = weights.unembedding @ weights.embedding  # [d_model, d_model]
    generator = torch.Generator().manual_seed(seed)
    read = torch.arange(vocab)
    if tokens is not None and tokens < vocab:
        drawing = torch.Generator().manual_seed(seed)
        read = torch.randperm(vocab, generator=drawing)[:tokens].sort().values
    rows: list[dict[str, Any]] = []
    for layer, (values, outputs) in enumerate(zip(weights.value, weights.output, strict=True)):
        drawn, written = (_shuffled(matrix[0], generator) for matrix in (values, outputs))
        random_eigenvalue, random_share = _copied(drawn, written, across, weights, read, top)
        for head, (value, output) in enumerate(zip(values, outputs, strict=True)):
            eigenvalue, share = _copied(value, output, across, weights, read, top)
            rows.append(
                {
                    "head": f"L{layer}H{head}",
                    "layer": layer,
                    "number": head,
                    "eigenvalue": eigenvalue,
                    "eigenvalue_random": random_eigenvalue,
                    "top_share": share,
                    "top_share_random": random_share,
                    "top_by_chance": top / vocab,
                    "tokens": len(read),
                }
            )
    return pd.DataFrame(rows)


def composition(model: LoadedModel) -> pd.DataFrame:
    """How strongly each head could read what each earlier layer's head writes: one row per pair and kind.

    `|L R| / (|L| |R|)` in Frobenius norms, `L = W_V W_O` of the earlier head, and R of the later one:
    `W_Q W_K^T` for kind "q", its transpose for "k", `W_V W_O` for "v" (Elhage et al. 2021). Random
    weights give about `1 / sqrt(d_model)`, the column `by_chance`; only what lies above it says
    something. NaN where a head has no weights. All from factors [d_model, head_dim]; no [d_model, d_model] product is kept.

    Raises:
        LensError: an architecture whose weights are not known here.
    """
    weights = head_weights(model)
    layers, heads, width, _ = weights.value.shape
    rows: list[tuple[str, str, str, float, float]] = []
    for layer in range(1, layers):
        for head in range(heads):
            query, key = weights.query[layer, head], weights.key[layer, head]
            value, output = weights.value[layer, head], weights.output[layer, head]
            readers = {"q": (query, key.T), "k": (key, query.T), "v": (value, output)}
            for kind, (left, right) in readers.items():
                size = _norm(left, right)
                for earlier in range(layer):
                    for other in range(heads):
                        first = weights.value[earlier, other]
                        second = weights.output[earlier, other]
                        joint = _norm(first @ (second @ left), right)
                        both = _norm(first, second) * size
                        score = joint / both if both else float("nan")
                        rows.append(
                            (f"L{earlier}H{other}", f"L{layer}H{head}", kind, score, width**-0.5)
                        )
    return pd.DataFrame(rows, columns=["earlier", "later", "kind", "score", "by_chance"])


def _layout(model: LoadedModel) -> _Layout:
    root = transformer(model)
    kind = getattr(getattr(root, "config", None), "model_type", type(root).__name__)
    layout = _LAYOUTS.get(kind)
    if layout is None or model.is_bridge:
        shown = "a TransformerBridge" if model.is_bridge else f"{kind!r}"
        raise LensError(
            f"where {shown} keeps the weights of its heads is not known; known are the "
            f"transformers models {', '.join(_LAYOUTS)}"
        )
    return layout


def _of_layer(layer: Any, layout: _Layout, model: LoadedModel) -> tuple[Tensor, ...]:
    """Query, key and value [head, d_model, head_dim] and output [head, head_dim, d_model]."""
    info = model.info
    attention = layer.get_submodule(layout.attention)
    norm = layer.get_submodule(layout.norm)
    if layout.joint:
        read = _matrix(attention.get_submodule(layout.joint)).chunk(3, dim=1)
    else:
        read = tuple(_matrix(attention.get_submodule(name)) for name in layout.separate)
    parts = []
    for matrix in read:
        by_head = _fold(norm, matrix).unflatten(1, (-1, info.head_dim)).transpose(0, 1)
        parts.append(by_head.repeat_interleave(info.heads // len(by_head), 0))
    output = _matrix(attention.get_submodule(layout.output)).unflatten(0, (info.heads, -1))
    if isinstance(norm, nn.LayerNorm):  # every reader takes the mean off, so it is never seen
        output = output - output.mean(-1, keepdim=True)
    return (*parts, output)


def _matrix(module: nn.Module) -> Tensor:
    """Weight [in, out] of a projection, float32."""
    weight = module.get_parameter("weight").float()
    return weight.T if isinstance(module, nn.Linear) else weight  # GPT-2's Conv1D is [in, out]


def _fold(norm: nn.Module, matrix: Tensor) -> Tensor:
    """What a normalised vector meets: the norm's scale times `matrix` [d_model, out]."""
    folded = norm.get_parameter("weight").float()[:, None] * matrix
    return folded - folded.mean(0) if isinstance(norm, nn.LayerNorm) else folded


def _copied(
    value: Tensor, output: Tensor, across: Tensor, weights: HeadWeights, read: Tensor, top: int
) -> tuple[float, float]:
    """`eigenvalue` and `top_share` of one head over the tokens `read`, with `across = W_U W_E`."""
    eigenvalues = torch.linalg.eigvals((output @ across @ value).double())
    share = _top_share(weights.embedding[read] @ value, output @ weights.unembedding, read, top)
    return float(eigenvalues.real.sum() / eigenvalues.abs().sum()), share


def _shuffled(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """The same entries in random order."""
    return matrix.flatten()[torch.randperm(matrix.numel(), generator=generator)].view_as(matrix)


def _top_share(read: Tensor, write: Tensor, tokens: Tensor, top: int) -> float:
    """Share of rows of `read @ write` [tokens, vocab] whose own token is among the `top` largest.

    Ties count against it: a token whose embedding is 0 copies nothing.
    """
    if top == write.shape[1]:
        return 1.0
    among = 0
    for start in range(0, len(read), 1024):
        logits = read[start : start + 1024] @ write
        own = logits.gather(1, tokens[start : start + 1024, None])
        among += int((own > logits.topk(top + 1, 1).values[:, -1:]).sum())
    return among / len(read)


def _norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of `left @ right` from the small Gram matrices: tr(left^T left right right^T)."""
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
