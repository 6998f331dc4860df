"""A small attention-only transformer in the manner of transformers, for the embedded toys.

Token and position embeddings, pre-LayerNorm attention layers, final LayerNorm, unembedding with bias.
Its parameters are named as in TransformerLens 4 `TransformerBridge.boot_native`, so that the same file
loads in both; its attention goes through transformers' `AttentionInterface`, so that capture reaches it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class AttentionOnlyConfig(PreTrainedConfig):
    """Sizes of the toy; the defaults are those of `induction-2l`."""

    model_type = "lens-attention-only"

    vocab_size: int = 65
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 128
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 64


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in transformers' manner: output [batch, queries, heads, head_dim] and the weights."""
    scores = query @ key.transpose(-1, -2) * scaling  # [batch, heads, queries, keys]
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(-1)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class SelfAttention(nn.Module):
    """Causal attention with biases on q, k, v and o."""

    is_causal = True

    def __init__(self, config: AttentionOnlyConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q, self.k, self.v, self.o = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any):
        """Attention output [batch, tokens, hidden_size] and the weights, if the implementation has them."""
        query, key, value = (
            project(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention
        )
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs
        )
        return self.o(output.flatten(-2)), weights


class Block(nn.Module):
    """One residual attention layer."""

    def __init__(self, config: AttentionOnlyConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SelfAttention(config, layer_idx)

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any):
        """Residual stream after the layer, and the attention weights."""
        output, weights = self.attn(self.ln1(hidden), attention_mask, **kwargs)
        return hidden + output, weights


class AttentionOnlyModel(PreTrainedModel):
    """The toy with its unembedding: `logits` [batch, tokens, vocab]."""

    config_class = AttentionOnlyConfig
    config: AttentionOnlyConfig
    _supports_sdpa = True
    _supports_attention_backend = True
    block: type[nn.Module] = Block

    def __init__(self, config: AttentionOnlyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos_embed = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(
            self.block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.ln_final = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def mask(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
        """What each layer's attention is given beside the stream that enters the first one."""
        return create_causal_mask(self.config, hidden, attention_mask, past_key_values=None)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        return self.unembed

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits, and the attention weights of each layer when asked for (`eager` only)."""
        hidden = self.embed(input_ids) + self.pos_embed.weight[: input_ids.shape[1]]
        mask = self.mask(hidden, attention_mask)
        weights = []
        for block in self.blocks:
            hidden, layer_weights = block(hidden, mask, **kwargs)
            weights.append(layer_weights)
        logits = self.unembed(self.ln_final(hidden))
        return CausalLMOutput(
            logits=logits, attentions=tuple(weights) if output_attentions else None
        )
