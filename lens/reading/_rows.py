"""Rows of attention written out from the call of a layer: of chosen queries, or of all with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens.passes.calls import LayerCall, of_heads

if TYPE_CHECKING:
    from jaxtyping import Float


def row_at(call: LayerCall, queries: Tensor) -> Float[Tensor, "heads queries keys"]:
    """What these rows of every head of a layer attend to; float32 at least."""
    query, key = call.query[0, :, queries].float(), of_heads(call, call.key)[0].float()
    logits = call.scale * query @ key.transpose(-1, -2)
    logits = capped(call, logits)
    if call.position_bias is not None:
        bias = call.position_bias.expand(-1, len(query), call.query.shape[2], logits.shape[-1])
        logits = logits + bias[0, :, queries]
    sinks = call.sink_logits
    return softmaxed(call, logits, queries, None if sinks is None else sinks.detach())


def dense(call: LayerCall, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits and attention [rows, heads, queries, keys] of a call, written out, with gradients.

    Args:
        call: of one layer.
        added: [heads, queries, keys], to the logits behind the softcap.
    """
    key = of_heads(call, call.key)
    logits = capped(call, call.scale * call.query @ key.transpose(-1, -2))
    if call.position_bias is not None:
        logits = logits + call.position_bias
    if added is not None:
        logits = logits + added.to(logits)
    places = torch.arange(logits.shape[-2], device=logits.device)
    return logits, softmaxed(call, logits, places, call.sink_logits)


def with_values(call: LayerCall, attention: Tensor) -> Tensor:
    """[rows, heads, queries, value_dim] of attention [rows, heads, queries, keys]."""
    return attention @ of_heads(call, call.value)


def capped(call: LayerCall, logits: Tensor) -> Tensor:
    """Logits behind the softcap of the layer, if it has one."""
    return logits if call.softcap is None else (logits / call.softcap).tanh() * call.softcap


def softmaxed(call: LayerCall, logits: Tensor, queries: Tensor, sinks: Tensor | None) -> Tensor:
    """Attention of logits [..., heads, queries, keys], behind the softcap and before the mask, of these queries.

    Args:
        call: whose mask it is.
        logits: of all its heads, or of some.
        queries: their places.
        sinks: logits of the learned sinks of these heads, which take what is left of 1; or None.
    """
    keys = logits.shape[-1]
    logits = logits.masked_fill(~call.mask.seen_by(queries, keys), -torch.inf)
    if sinks is not None:
        more = sinks.to(logits)[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, more], -1)
    return logits.softmax(-1)[..., :keys]
