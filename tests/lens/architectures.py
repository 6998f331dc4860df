"""Small transformers models with random weights, one of each shape that capture must reproduce."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 97
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=128,
        n_embd=48,
        n_layer=3,
        n_head=6,
        scale_attn_by_inverse_layer_idx=True,
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def _qwen3() -> PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT))


def _mistral() -> PreTrainedModel:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, sliding_window=11))


def _gemma2() -> PreTrainedModel:
    config = transformers.Gemma2Config(
        **TEXT,
        sliding_window=11,
        attn_logit_softcapping=0.7,
        query_pre_attn_scalar=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return transformers.Gemma2ForCausalLM(config)


def _gemma3() -> PreTrainedModel:
    config = transformers.Gemma3TextConfig(
        **TEXT,
        sliding_window=11,
        query_pre_attn_scalar=5,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    )
    return transformers.Gemma3ForCausalLM(config)


def _gpt_oss() -> PreTrainedModel:
    config = transformers.GptOssConfig(
        **TEXT,
        sliding_window=11,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    model = transformers.GptOssForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(1.0, 1.0)
    return model


def _bert() -> PreTrainedModel:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=128,
    )
    return transformers.BertModel(config)


def _modernbert() -> PreTrainedModel:
    config = transformers.ModernBertConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=128,
        local_attention=14,
        global_attn_every_n_layers=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return transformers.ModernBertModel(config)


def _vit() -> PreTrainedModel:
    config = transformers.ViTConfig(
        image_size=10,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=6,
    )
    return transformers.ViTModel(config)


def _t5_encoder() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=48, d_kv=8, d_ff=56, num_layers=3, num_heads=6
    )
    return transformers.T5EncoderModel(config)


def _llama4() -> PreTrainedModel:
    config = transformers.Llama4TextConfig(
        **TEXT,
        attention_chunk_size=11,
        num_local_experts=2,
        num_experts_per_tok=1,
        intermediate_size_mlp=56,
    )
    return transformers.Llama4ForCausalLM(config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt_oss": _gpt_oss,
    "bert": _bert,
    "modernbert": _modernbert,
    "vit": _vit,
    "t5_encoder": _t5_encoder,
    "llama4": _llama4,
}


def build(name: str) -> PreTrainedModel:
    """The model in eval mode, its weights large enough for attention that is far from uniform."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in parameter_name:
                parameter.mul_(4)
    return model


def save_tokenizer(folder: Path, vocab: int = VOCAB) -> None:
    """A tokenizer of the words `t0`, `t1`, ... that fits these models, into a folder."""
    words = Tokenizer(WordLevel({f"t{index}": index for index in range(vocab)}, unk_token="t0"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "t0", "unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
