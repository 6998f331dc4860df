"""A transformer without norms, whose weights are written down and not trained.

Token and position embeddings, attention with any head_dim, an optional ReLU MLP per layer, and an
unembedding. Its modules are named as in `lens.models.attention_only`, so that what finds the weights of
one finds those of the other; its attention goes through transformers' `AttentionInterface`.
"""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

from lens.models.attention_only import AttentionOnlyConfig, AttentionOnlyModel, SelfAttention


class ProgramConfig(AttentionOnlyConfig):
    """Sizes; `mlp_size` 0 is a model without MLPs, `scaling` what attention scores are multiplied by."""

    model_type = "lens-program"

    vocab_size: int = 3
    hidden_size: int = 2
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    head_dim: int = 1
    mlp_size: int = 0
    scaling: float = 1.0
    is_causal: bool = True
    max_position_embeddings: int = 8
    bos_token_id: int | None = None


class Unnormed(nn.Module):
    """Where other models have a norm: changes nothing; its scale is 1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same."""
        return hidden


class Attention(SelfAttention):
    """Attention with biases on q, k, v and o, and heads of any size."""

    def __init__(self, config: ProgramConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.config, self.layer_idx = config, layer_idx
        self.is_causal, self.head_dim, self.scaling = (
            config.is_causal, config.head_dim, config.scaling
        )  # fmt: skip
        width = config.num_attention_heads * config.head_dim
        self.q, self.k, self.v = (nn.Linear(config.hidden_size, width) for _ in range(3))
        self.o = nn.Linear(width, config.hidden_size)


class Mlp(nn.Module):
    """`relu(x W_1 + b_1) W_2 + b_2`."""

    def __init__(self, config: ProgramConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc_out = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What it adds to the residual stream."""
        return self.fc_out(self.fc_in(hidden).relu())


class Block(nn.Module):
    """Attention, then the MLP if there is one, each added to the residual stream."""

    def __init__(self, config: ProgramConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln1 = Unnormed(config.hidden_size)
        self.attn = Attention(config, layer_idx)
        if config.mlp_size:
            self.ln2 = Unnormed(config.hidden_size)
            self.mlp = Mlp(config)

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any):
        """Residual stream after the layer, and the attention weights."""
        output, weights = self.attn(self.ln1(hidden), attention_mask, **kwargs)
        hidden = hidden + output
        if hasattr(self, "mlp"):
            hidden = hidden + self.mlp(self.ln2(hidden))
        return hidden, weights


class ProgramModel(AttentionOnlyModel):
    """The model with its unembedding: `logits` [batch, tokens, vocab]. All weights start at 0."""

    config_class = ProgramConfig
    config: ProgramConfig
    block = Block

    def __init__(self, config: ProgramConfig) -> None:
        super().__init__(config)
        self.ln_final = Unnormed(config.hidden_size)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.fill_(".ln" in f".{name}")

    def mask(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
        """See `AttentionOnlyModel`."""
        if self.config.is_causal:
            return super().mask(hidden, attention_mask)
        return create_bidirectional_mask(self.config, hidden, attention_mask)
