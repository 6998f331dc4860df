"""A small random model of every row of the table of architectures."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from lens.circuits.known.program import ProgramConfig, ProgramModel
from lens.models.attention_only import AttentionOnlyConfig, AttentionOnlyModel

VOCAB = 61
_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MULTI = {
    name: size for name, size in _TEXT.items() if name not in ("num_key_value_heads", "head_dim")
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
_ENCODER = {**_MULTI, "type_vocab_size": 2}
_SLIDING = {"sliding_window": 5}
_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_TEXT, "attention_bias": True}),
    "mistral": ("Mistral", {**_TEXT, **_SLIDING}),
    "mixtral": ("Mixtral", {**_TEXT, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", _TEXT),
    "qwen2_moe": ("Qwen2Moe", {**_TEXT, **_EXPERTS, "num_experts": 3, "shared_expert_intermediate_size": 8}),
    "qwen3": ("Qwen3", _TEXT),
    "qwen3_moe": ("Qwen3Moe", {**_TEXT, **_EXPERTS, "num_experts": 3}),
    "gemma": ("Gemma", _TEXT),
    "gemma2": ("Gemma2", {**_TEXT, **_SLIDING, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 5}),
    "gemma3_text": ("Gemma3", {**_TEXT, **_SLIDING, "query_pre_attn_scalar": 5}),
    "olmo2": ("Olmo2", _TEXT),
    "olmo3": ("Olmo3", {**_TEXT, **_SLIDING}),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 24, "n_layer": 3, "n_head": 6}),
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 24, "n_layer": 3, "n_head": 6}),
    "smollm3": ("SmolLM3", _TEXT),
    "gpt_neox": ("GPTNeoX", {**_MULTI, "use_parallel_residual": True}),
    "phi": ("Phi", {**_MULTI, "num_key_value_heads": 2, "qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {**_MULTI, "num_key_value_heads": 2}),
    "opt": ("OPT", {**_MULTI, "ffn_dim": 20, "word_embed_proj_dim": 24}),
    "cohere": ("Cohere", {**_TEXT, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {**_TEXT, **_SLIDING}),
    "granite": (
        "Granite",
        {**_TEXT, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 5.0},
    ),
    "starcoder2": ("Starcoder2", {**_TEXT, **_SLIDING}),
    "gpt_oss": ("GptOss", {**_TEXT, **_SLIDING, "num_local_experts": 3, "num_experts_per_tok": 2}),
}  # fmt: skip
KINDS = (*_CAUSAL, "bert", "albert", "vit", "lens-attention-only", "lens-program")
ALWAYS = ("gpt2", "llama", "gpt_oss", "gemma2", "olmo2", "phi", "cohere", "bert")
"""One of each way through the table, the last not linear; test_layout.py holds every kind's table to its model."""


def layout_model(kind: str, **changed: Any) -> PreTrainedModel:
    """In eval mode; every weight is drawn, so that no part can be left out unseen."""
    torch.manual_seed(5)
    model = _build(kind, changed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = "embed" in name or "wte" in name
            parameter.add_(torch.randn_like(parameter) * (1.0 if wide else 0.25))
    return model


def _build(kind: str, changed: dict[str, Any]) -> PreTrainedModel:
    library: Any = transformers
    if kind in _CAUSAL:
        name, sizes = _CAUSAL[kind]
        config_class = getattr(library, f"{name}{'Text' * (name == 'Gemma3')}Config")
        head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
        return getattr(library, head)(config_class(**{**sizes, **changed}))
    if kind == "bert":
        return library.BertForMaskedLM(library.BertConfig(**{**_ENCODER, **changed}))
    if kind == "albert":
        sizes = {**_ENCODER, "embedding_size": 10, "num_hidden_groups": 2, "num_hidden_layers": 4}
        return library.AlbertForMaskedLM(library.AlbertConfig(**{**sizes, **changed}))
    if kind == "vit":
        sizes = {
            name: _TEXT[name]
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
        }
        sizes |= {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 7}
        return library.ViTForImageClassification(library.ViTConfig(**{**sizes, **changed}))
    if kind == "lens-attention-only":
        return AttentionOnlyModel(
            AttentionOnlyConfig(vocab_size=VOCAB, hidden_size=24, num_attention_heads=6)
        )
    return ProgramModel(
        ProgramConfig(
            vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, head_dim=4,
            mlp_size=10, max_position_embeddings=32,
        )
    )  # fmt: skip


def modules_named(model: nn.Module, ending: str) -> list[nn.Module]:
    """Those whose path ends so."""
    return [part for name, part in model.named_modules() if name.endswith(ending)]
