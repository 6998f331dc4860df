"""Attention over the first keys and the last ones, beside that over all: what streaming is made of.

The first keys and the others inside the window are two groups of keys, whose states merge exactly, so
N×N is never built. Positions stay what they were.
"""

from typing import Any

import torch
from lens_kernels import AttentionMask, AttentionState, merge
from torch import Tensor

from lens.common.choices import check_counts
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.inputs import Prompt, read_prompts


class Streamer:
    """What each layer's attention is in full and over the first and nearest keys."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def states(self, call: LayerCall) -> tuple[AttentionState, AttentionState, Tensor]:
        """Attention over all keys and over the first and nearest ones, and the LSE of these alone.

        Learned sinks are in both states and not in that LSE.
        """
        mask = call.mask
        if not mask.causal or mask.allowed is not None or call.position_bias is not None:
            raise LensError(
                f"layer {call.layer} has attention that is not plain causal or windowed; what it "
                "would be without its far keys is not known here"
            )
        reach = call.key.shape[2] if mask.window is None else mask.window
        is_first = torch.arange(call.key.shape[2], device=call.key.device) < self.first
        parts = [(is_first, mask.window), (~is_first, min(reach, self.last))]
        near = merge(*(self._state(call, keys, window) for keys, window in parts))
        whole = self._state(call, None, mask.window)
        if call.sink_logits is None:
            return whole, near, near.lse
        sinks = call.sink_logits
        return merge(whole, sink_logits=sinks), merge(near, sink_logits=sinks), near.lse

    def _state(self, call: LayerCall, keys: Tensor | None, window: int | None) -> AttentionState:
        padding = None if keys is None else keys[None].expand(len(call.key), -1)
        mask = AttentionMask(causal=True, window=window, key_padding=padding)
        return attend(call, mask=mask, sink_logits=None, statistics=("lse",)).state()


def read_long_prompts(model: LoadedModel, prompts: Any, first: int, last: int) -> list[Prompt]:
    """The prompts, each longer than the keys that are kept.

    Raises:
        LensError: numbers that are none, or a shorter prompt.
    """
    check_counts(0, first=first)
    check_counts(last=last)
    model.info.check_all_attend("streaming")
    read, _ = read_prompts(model, prompts)
    for prompt in read:
        if prompt.ids is None or len(prompt.ids) <= first + last:
            count = "no" if prompt.ids is None else len(prompt.ids)
            raise LensError(
                f"a prompt has {count} tokens; it takes more than first + last = {first + last} "
                "for a head to miss any: take longer prompts or fewer last keys"
            )
    return read
