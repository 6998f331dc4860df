"""The parts of a model, in one shape for every architecture.

A block adds to the residual stream what its heads write, `sum of z W_O + b_O`, and what its MLP writes.
Each reads the stream through the norm before it. Architectures differ in the rest:

    after        a norm of what the heads together, or the MLP, write, before it is added (Gemma 2, OLMo-2)
    parallel     heads and MLP read the same stream (Cohere, GPT-NeoX, Phi)
    normed       the stream goes on from what a norm returned, not from what it read (BERT, ALBERT)
    multiplier   what is written is multiplied before it is added (Granite)

`lens.models.layout` finds the parts, `lens.passes.replay` proves that they make the model before a number
rests on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.models.architectures import Architecture
from lens.models.loaded import LoadedModel
from lens.models.weights import matrix


@dataclass(frozen=True, eq=False)
class Norm:
    """`(x - mean) / size * scale + shift`, the mean taken off where it is `centred`.

    Attributes:
        module: the norm, or None: what is read is not normed.
        scale, shift: [width] or None; [heads, head_dim] in a norm of keys that knows its heads.
        centred: whether the mean is taken off.
        epsilon: added to the mean square.
        changes: False where the output is the input.
    """

    module: nn.Module | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    centred: bool = False
    epsilon: float = 0.0
    changes: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """What the module gives, past its hooks; [..., width]."""
        return x if self.module is None else self.module.forward(x)

    def size(self, x: Tensor) -> Tensor:
        """[..., 1] that `x` [..., width] is divided by; in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.changes:
            return torch.ones_like(x[..., :1])
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def recomputed(self, x: Tensor) -> Tensor:
        """The formula above, whatever the module does."""
        if not self.changes:
            return x
        found = self.frozen(x, self.size(x))
        return (found if self.shift is None else found + self.shift).to(x.dtype)

    def frozen(self, x: Tensor, size: Tensor) -> Tensor:
        """What a part [..., width] of the input is in the output when the size [..., 1] stays that of the whole.

        Parts of the input then give parts of the output, which sum to it less `shift`.
        """
        if not self.changes:
            return x
        found = (x - x.mean(-1, keepdim=True) if self.centred else x) / size
        return found if self.scale is None else found * self.scale.to(found)

    def of_heads(self, x: Tensor) -> Tensor:
        """`recomputed` of [..., heads, head_dim]: each head alone, or all of them as one row (OLMo-2)."""
        if self.together(x.shape[-1]):
            return self.recomputed(x.flatten(-2)).view(x.shape)
        return self.recomputed(x)

    def together(self, head_dim: int) -> bool:
        """Whether it takes all heads as one row."""
        return self.scale is not None and self.scale.dim() == 1 and len(self.scale) != head_dim

    def fold(self, matrix: Tensor) -> Tensor:
        """The matrix [width, out] that `x` meets when the size is left out: `fold(M)` of x is M of the norm."""
        folded = matrix if self.scale is None else self.scale.to(matrix)[:, None] * matrix
        return folded - folded.mean(0) if self.centred else folded


@dataclass(frozen=True, eq=False)
class Block:
    """The parts of one block; weights are views and map rows, `q = x W + b`.

    Attributes:
        module: the block; shared between layers in ALBERT.
        attention: the module that calls the attention function.
        norm, mlp_norm: through which attention and MLP read.
        after, mlp_after: norms of what they write.
        projections: modules that make q, k and v: three, or one.
        joint: of one, as in `Architecture`.
        weights: of q, k and v: [heads, d_model, head_dim] and [heads, 1, head_dim] or None; k and v have
            as many heads as they are stored with.
        head_norms: of q and k, after their projection.
        output_module: what makes `z W_O`.
        output: [heads, head_dim, d_model], the multiplier in it.
        output_bias: [d_model], the multiplier in it, or None.
        mlp: modules that are run one after another; empty without an MLP.
        multiplier: of what is written.
    """

    module: nn.Module
    attention: nn.Module
    norm: Norm
    mlp_norm: Norm
    after: Norm
    mlp_after: Norm
    projections: tuple[nn.Module, ...]
    joint: str
    weights: tuple[tuple[Tensor, Tensor | None], ...]
    head_norms: tuple[Norm, Norm]
    output_module: nn.Module
    output: Tensor
    output_bias: Tensor | None
    mlp: tuple[nn.Module, ...]
    multiplier: float

    def projected(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [rows, tokens, heads, head_dim] of what the norm before the attention gives."""
        q, k, v = (
            torch.einsum("rtd,hdk->rthk", normed, weight)
            + (0 if bias is None else bias.transpose(0, 1))
            for weight, bias in self.weights
        )
        return q, k, v

    def attended(self, z: Tensor) -> Tensor:
        """What the heads together give the norm after them, [..., d_model], of z [..., heads, tokens, head_dim]."""
        summed = torch.einsum("...htk,hkd->...td", z, self.output)
        return summed if self.output_bias is None else summed + self.output_bias


@dataclass(frozen=True, eq=False)
class Layout:
    """A model with its parts.

    Attributes:
        model: as loaded; what a bridge wraps.
        kind: name in the table.
        blocks: in order of the layers.
        final_norm: what the unembedding reads through.
        parallel, normed: see the module's words.
        head: modules between the last norm and the unembedding.
        unembedding: the module that gives logits, or None: the model has none that is known.
        logit_scale, softcap: of the logits.
    """

    model: LoadedModel
    kind: str
    blocks: tuple[Block, ...]
    final_norm: Norm
    parallel: bool
    normed: bool
    head: tuple[nn.Module, ...]
    unembedding: nn.Module | None
    logit_scale: float
    softcap: float | None
    _row: Architecture
    _base: nn.Module

    @property
    def bends(self) -> bool:
        """Whether a norm comes between what a head writes and the stream that others read."""
        return self.normed or any(block.after.changes for block in self.blocks)

    @property
    def adds_positions(self) -> bool:
        """Whether what enters the first block is more than the embedded tokens: learned positions, say."""
        return self._row.positions is not None or self._row.embedding is not None

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What enters the first block, [rows, tokens, d_model]."""
        row, base = self._row, self._base
        if row.embedding is not None:
            return base.get_submodule(row.embedding)(**inputs)
        ids = inputs["input_ids"]
        found = self.embedding(ids)
        if row.positions is not None:
            table: Any = base.get_submodule(row.positions)
            start = int(getattr(table, "offset", 0))
            found = found + table.weight[start : start + ids.shape[1]]
        if row.token_types is not None:
            found = found + base.get_submodule(row.token_types).get_parameter("weight")[0]
        for name in row.after_embedding:
            found = base.get_submodule(name)(found)
        return found

    def embed_parts(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`embed` as a sum, float64: "embedding" of the tokens; "position", with token types; "embedding bias".

        Norms after the sum divide every part by the size of the whole. Of a model that reads no tokens
        there is one part.
        """
        row, base = self._row, self._base
        if row.embedding is not None or "input_ids" not in inputs:
            return {"embedding": self.embed(inputs).double()}
        ids = inputs["input_ids"]
        whole = self.embedding(ids)
        parts = {"embedding": whole.double()}
        if self.adds_positions or row.token_types is not None:
            before = replace(row, after_embedding=())
            added = replace(self, _row=before).embed(inputs).double() - parts["embedding"]
            parts["position"] = added
        bias = torch.zeros_like(parts["embedding"])
        shifted = False
        for name in row.after_embedding:
            module: Any = base.get_submodule(name)
            if isinstance(module, nn.LayerNorm):
                norm = Norm(module, module.weight.detach(), None, True, module.eps, True)
                size = norm.size(torch.stack(list(parts.values())).sum(0) + bias)
                parts = {one: norm.frozen(part, size) for one, part in parts.items()}
                bias, shift = norm.frozen(bias, size), module.bias
            else:
                weight, shift = matrix(module, self.model)
                parts = {one: part @ weight.double() for one, part in parts.items()}
                bias = bias @ weight.double()
            if shift is not None:
                bias, shifted = bias + shift.detach().double(), True
        return parts | ({"embedding bias": bias} if shifted else {})

    def embedding(self, ids: Tensor) -> Tensor:
        """Of tokens [...] what they add to the sum before positions, [..., d_model].

        Raises:
            LensError: a model that reads no tokens.
        """
        root: Any = self.model.model
        if self._row.embedding is not None or self.model.info.vocab is None:
            raise LensError(f"{self.model.info.class_name} reads no tokens, so it embeds none")
        return root.get_input_embeddings()(ids) * setting(self._base, self._row.embedding_scale, 1)

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [..., vocab] of what the last norm gave; errors as in `unembed_weight`."""
        module = self._unembedding()
        for part in self.head:
            normed = part.forward(normed)
        weight, bias = matrix(module, self.model)
        found = normed @ weight
        found = (found if bias is None else found + bias) * self.logit_scale
        return found if self.softcap is None else (found / self.softcap).tanh() * self.softcap

    def unembed_weight(self) -> Tensor:
        """[d_model, vocab] from what the last norm gives to the logits, before a softcap; float32.

        Raises:
            LensError: no unembedding, or one behind a layer of its own.
        """
        module = self._unembedding()
        if self.head:
            raise LensError(
                f"{self.model.info.class_name} has {type(self.head[0]).__name__} between its last norm "
                "and its unembedding, so no head writes straight into its logits; methods that run the "
                "model, such as lens.heads.importance by ablation, need no such path"
            )
        return matrix(module, self.model)[0].float() * self.logit_scale

    def _unembedding(self) -> nn.Module:
        if self.unembedding is None:
            raise LensError(
                f"{self.model.info.class_name} has no unembedding that is known here; load the model "
                "with its head, such as its ForCausalLM class"
            )
        return self.unembedding


def setting(base: nn.Module, name: str | None, default: Any) -> Any:
    """A setting of the configuration; `default` for none."""
    if name is None:
        return default
    found = getattr(base.config, name)
    return default if found is None else found
