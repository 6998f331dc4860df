"""Small random models of which only some layers have softmax attention, or one attends twice."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_LINEAR_FIRST = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

MODELS: dict[str, tuple[dict, tuple[int, ...]]] = {
    "qwen3_next": ({**_DELTA, **_EXPERTS, "head_dim": 16, "layer_types": _LINEAR_FIRST}, (1, 3)),
    "qwen3_5_text": ({**_DELTA, "head_dim": 16, "layer_types": _LINEAR_FIRST}, (1, 3)),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, (1, 3)),
    "jamba": (
        {
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        (1, 3),
    ),
    "bamba": ({**_MAMBA2, "attn_layer_indices": [1, 3]}, (1, 3)),
    "zamba": (
        {
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "use_mamba_kernels": False,
        },
        (1, 3),
    ),
    "zamba2": (
        {
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 16,
            "n_mamba_heads": 4,
            "use_mamba_kernels": False,
        },
        (1, 3),
    ),
    "nemotron_h": (
        {
            "layers_block_type": ["mamba", "attention", "mlp", "attention"],
            "head_dim": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 16,
            "chunk_size": 8,
        },
        (1, 3),
    ),
    "olmo_hybrid": ({**_DELTA, "layer_types": _LINEAR_FIRST}, (1, 3)),
    "minimax": ({"num_local_experts": 2, "block_size": 8, "layer_types": _LINEAR_FIRST}, (1, 3)),
    "granitemoehybrid": (
        {
            **_MAMBA2,
            "num_local_experts": 2,
            "shared_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "position_embedding_type": "rope",
        },
        (1, 3),
    ),
    "recurrent_gemma": (
        {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
        (1, 3),
    ),
    "falcon_h1": ({**_MAMBA2, "mamba_d_ssm": 128}, (0, 1, 2, 3)),
    "kimi_linear": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "linear_num_heads": 4,
            "linear_head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "layer_types": _LINEAR_FIRST,
        },
        (1, 3),
    ),
    "diffllama": ({}, (0, 1, 2, 3)),
}


def hybrid(kind: str, *, eager: bool = False, **more: Any) -> PreTrainedModel:
    """A model of four layers in eval mode; of the same weights each time."""
    given, _ = MODELS[kind]
    config = transformers.CONFIG_MAPPING[kind](**{**SIZES, "num_hidden_layers": 4, **given, **more})
    torch.manual_seed(0)
    options = {"attn_implementation": "eager"} if eager else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
    return model.eval()
