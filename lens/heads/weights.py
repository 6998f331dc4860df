"""What a head's weights say without any input: copying, and composition with later heads.

Weights are taken as the residual stream meets them: the scales of norms are folded in (of those before the
attention, of queries and keys, after the heads, and of the last one), and where a norm takes the mean off,
so is it here, as TransformerLens' `fold_ln` and `center_writing_weights` do. Biases, and the division by
what norms divide by, which depend on the input, are left out; so are rotary positions and softcaps.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lens.common.choices import check_counts, is_whole, shown
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.models.loaded import LoadedModel
from lens.models.parts import Layout, Norm
from lens.passes.replay import proved


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """Weights of every head, float32, on the CPU; a vector x is a row: `v = x W_V`.

    Attributes:
        query, key, value: [layer, head, d_model, head_dim], scales of norms folded in; heads of one
            group have the same key and value.
        output: [layer, head, head_dim, d_model].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    _layout: Layout = field(repr=False)

    @cached_property
    def embedding(self) -> Tensor:
        """[vocab, d_model] of the tokens, without positions.

        Raises:
            LensError: a model that reads no tokens.
        """
        vocab = self._layout.model.info.vocab or 0
        with torch.no_grad():
            ids = torch.arange(vocab, device=self._layout.model.device)
            return self._layout.embedding(ids).float().cpu()

    @cached_property
    def unembedding(self) -> Tensor:
        """[d_model, vocab], the last norm's scale folded in.

        Raises:
            LensError: no unembedding, or one behind a layer of its own.
        """
        return self._layout.final_norm.fold(self._layout.unembed_weight()).cpu()


def head_weights(model: LoadedModel) -> HeadWeights:
    """Weights of every head of a model.

    Raises:
        LensError: parts that are not known, or do not make this model (`lens.passes.replay`).
    """
    layout = proved(model)
    layers = []
    for block in layout.blocks:
        norms = (*block.head_norms, Norm())
        parts = []
        for (weight, _), norm in zip(block.weights, norms, strict=True):
            read = _of_heads(norm, torch.stack([block.norm.fold(part.float()) for part in weight]))
            parts.append(read.repeat_interleave(model.info.heads // len(read), 0))
        output = block.output.float()
        if block.after.scale is not None:
            output = output * block.after.scale
        if layout.final_norm.centred:  # every reader takes the mean off, so it is never seen
            output = output - output.mean(-1, keepdim=True)
        layers.append((*parts, output))
    query, key, value, output = (torch.stack(parts).cpu() for parts in zip(*layers, strict=True))
    return HeadWeights(query, key, value, output, layout)


def _of_heads(norm: Norm, weight: Tensor) -> Tensor:
    """[heads, d_model, head_dim] of a projection, with the scale of the norm after it folded in."""
    if norm.centred:
        weight = weight - weight.mean(-1, keepdim=True)
    if norm.scale is None:
        return weight
    return weight * norm.scale.float().reshape(-1, 1, weight.shape[-1])


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
        LensError: as in `head_weights`, no linear way from heads to logits, a `top` that is none, or no tokens.

    Example:
        >>> table = lens.heads.weights.copying(small)
        >>> table[table.top_share == 1]["name"].tolist()
        ['L1H0', 'L1H2', 'L1H3']
    """
    check_counts(0, seed=seed)
    weights = head_weights(model)
    vocab = len(weights.embedding)
    if not (is_whole(top) and 1 <= top <= vocab):
        raise LensError(f"top must be 1 to {vocab}, the size of the vocabulary, got {top}")
    if tokens is not None and not (is_whole(tokens) and tokens >= 1):
        raise LensError(f"tokens must be at least 1, or None for all, got {shown(tokens)}")
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
                    "name": str(HeadId(layer, head)),
                    "layer": layer,
                    "head": head,
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
        LensError: as in `head_weights`.
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
