"""The table of architectures: where each keeps its parts, as paths to modules and names of settings.

An entry is a claim; `lens.passes.replay` proves it for every model before a number rests on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Paths to modules: `blocks`, `final_norm` and what begins with `embed` or is of the embedding from the
    model without its head; `head` from the model; those of `qkv` from `attention`; all others from a
    block. None: there is no such part.

    Attributes:
        shared: whether one of `blocks` is run for several layers, as many for each.
        attention: the module that calls the attention function.
        qkv: three projections, or a joint one.
        joint: of a joint one, "parts": all of q, then of k, then of v; "heads": q, k, v of each head.
        output: W_O.
        before_attention, before_mlp: norms through which they read; in a `closing` block `before_mlp`
            norms the sum of stream and heads.
        after_attention, after_mlp: norms of what they write.
        closing: the norm that ends a block whose stream goes on from its norms.
        mlp: modules that are run one after another; a mixture of experts is one of them.
        norm: "layer"; "rms"; "rms+1", whose scale is 1 + weight; "none", which changes nothing.
        parallel: whether the MLP reads what the attention reads, or the name of the setting that says so.
        positions, token_types: embeddings that are added to those of the tokens.
        after_embedding: modules that are run on the sum.
        embedding: of a model that reads no tokens, the module that makes what enters the first block.
        head: modules from the last norm to the logits; the last one is the unembedding.
        embedding_scale, residual_scale, logit_scale, logit_divisor, softcap: names of settings.
    """

    blocks: str = "layers"
    shared: bool = False
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    joint: Literal["", "parts", "heads"] = ""
    output: str = "self_attn.o_proj"
    before_attention: str | None = "input_layernorm"
    before_mlp: str | None = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None
    closing: str | None = None
    mlp: tuple[str, ...] = ("mlp",)
    final_norm: str | None = "norm"
    norm: Literal["layer", "rms", "rms+1", "none"] = "rms"
    parallel: bool | str = False
    positions: str | None = None
    token_types: str | None = None
    after_embedding: tuple[str, ...] = ()
    embedding: str | None = None
    head: tuple[str, ...] = ("lm_head",)
    embedding_scale: str | None = None
    residual_scale: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = None


_LLAMA = Architecture()
_GEMMA2 = Architecture(
    before_mlp="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
    norm="rms+1",
    softcap="final_logit_softcapping",
)
_OLMO2 = Architecture(
    before_attention=None,
    before_mlp=None,
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_COHERE = Architecture(before_mlp="input_layernorm", norm="layer", parallel=True)
_BERT = Architecture(
    blocks="encoder.layer",
    attention="attention.self",
    qkv=("query", "key", "value"),
    output="attention.output.dense",
    before_attention=None,
    before_mlp="attention.output.LayerNorm",
    closing="output.LayerNorm",
    mlp=("intermediate", "output.dense"),
    final_norm=None,
    norm="layer",
    positions="embeddings.position_embeddings",
    token_types="embeddings.token_type_embeddings",
    after_embedding=("embeddings.LayerNorm",),
    head=("cls.predictions.transform", "cls.predictions.decoder"),
)
_TOY = Architecture(
    blocks="blocks",
    attention="attn",
    qkv=("q", "k", "v"),
    output="attn.o",
    before_attention="ln1",
    before_mlp="ln2",
    final_norm="ln_final",
    norm="layer",
    positions="pos_embed",
    head=("unembed",),
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "gpt_oss": _LLAMA,
    "gemma": replace(_LLAMA, norm="rms+1"),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "granite": replace(
        _LLAMA,
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    "starcoder2": replace(_LLAMA, norm="layer"),
    "cohere": replace(_COHERE, logit_scale="logit_scale"),
    "cohere2": replace(_COHERE, logit_scale="logit_scale"),
    "phi": replace(_COHERE, output="self_attn.dense", final_norm="final_layernorm"),
    "phi3": replace(_LLAMA, qkv=("qkv_proj",), joint="parts"),
    "gpt2": Architecture(
        blocks="h",
        attention="attn",
        qkv=("c_attn",),
        joint="parts",
        output="attn.c_proj",
        before_attention="ln_1",
        before_mlp="ln_2",
        final_norm="ln_f",
        norm="layer",
        positions="wpe",
    ),
    "gpt_neox": Architecture(
        attention="attention",
        qkv=("query_key_value",),
        joint="heads",
        output="attention.dense",
        final_norm="final_layer_norm",
        norm="layer",
        parallel="use_parallel_residual",
    ),
    "bloom": Architecture(
        blocks="h",
        attention="self_attention",
        qkv=("query_key_value",),
        joint="heads",
        output="self_attention.dense",
        mlp=("mlp.dense_h_to_4h", "mlp.gelu_impl", "mlp.dense_4h_to_h"),
        final_norm="ln_f",
        norm="layer",
        after_embedding=("word_embeddings_layernorm",),
    ),
    "smollm3": _LLAMA,
    "opt": Architecture(
        blocks="decoder.layers",
        output="self_attn.out_proj",
        before_attention="self_attn_layer_norm",
        before_mlp="final_layer_norm",
        mlp=("fc1", "activation_fn", "fc2"),
        final_norm="decoder.final_layer_norm",
        norm="layer",
        positions="decoder.embed_positions",
    ),
    "bert": _BERT,
    "albert": replace(
        _BERT,
        blocks="encoder.albert_layer_groups",
        shared=True,
        attention="albert_layers.0.attention",
        output="albert_layers.0.attention.dense",
        before_mlp="albert_layers.0.attention.LayerNorm",
        closing="albert_layers.0.full_layer_layer_norm",
        mlp=("albert_layers.0.ffn", "albert_layers.0.activation", "albert_layers.0.ffn_output"),
        after_embedding=("embeddings.LayerNorm", "encoder.embedding_hidden_mapping_in"),
        head=(
            "predictions.dense",
            "predictions.activation",
            "predictions.LayerNorm",
            "predictions.decoder",
        ),
    ),
    "vit": Architecture(
        attention="attention",
        output="attention.o_proj",
        before_attention="layernorm_before",
        before_mlp="layernorm_after",
        final_norm="layernorm",
        norm="layer",
        embedding="embeddings",
        head=("classifier",),
    ),
    "lens-attention-only": _TOY,
    "lens-program": replace(_TOY, norm="none"),
}
