"""States of a few groups of keys, computed on these keys alone: nothing else is read a second time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from lens_kernels import AttentionMask, AttentionResult

from lens.passes.calls import LayerCall, attend

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

MOST_MASKED = 256  # keys of one call that may carry a mask [queries, keys] of their own


def gathered_states(
    call: LayerCall,
    groups: Int[torch.Tensor, "batch keys"],
    count: int,
    rows: Bool[torch.Tensor, "batch queries"],
    backend: str,
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """LSE [batch, heads, queries] and output [..., value_dim] of each of the key groups 0 to count - 1.

    Exact in the chosen rows; others may hold anything. The last group is taken whole by every row, so
    its keys must come before the first chosen row; the others are few and carry a mask.

    Args:
        call: causal.
        groups: of each key, below 0 for keys of no group.
        count: number of groups.
        rows: those that are chosen.
        backend: of `lens_kernels`.

    Returns:
        One pair per group, or None where the chosen rows see different keys of the last group (text between images, a
        window), where the others are many, or where logits have a bias.
    """
    queries = call.query.shape[2]
    keys = call.key.shape[2]
    index = torch.arange(keys, device=groups.device)
    last = groups == count - 1
    few = (groups >= 0) & ~last
    first_row = torch.where(rows, index[keys - queries :], keys).amin(-1)
    beyond = torch.where(last, index, -1).amax(-1) >= first_row
    if (
        not call.mask.causal
        or call.mask.window is not None
        or call.mask.allowed is not None
        or call.position_bias is not None
        or bool(beyond.any())
        or int(few.sum(-1).max()) > MOST_MASKED
    ):
        return None
    order, inside = _packed(last)
    padding = None if bool(inside.all()) else inside
    part = _attend(call, order, AttentionMask(key_padding=padding), None, backend)
    found = [(part.statistics["lse"], part.output)]
    if count > 1:
        order, inside = _packed(few)
        allowed = inside[:, None] & (order[:, None] <= index[keys - queries :, None])
        chosen = torch.where(inside, groups.gather(1, order), 0).int()
        states = _attend(call, order, AttentionMask(allowed=allowed[:, None]), chosen, backend)
        assert states.groups is not None
        present = list(zip(states.groups.lse, states.groups.output, strict=True))
        nothing = torch.full_like(found[0][0], -torch.inf), torch.zeros_like(found[0][1])
        found = present + [nothing] * (count - 1 - len(present)) + found
    return found


def _packed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, most] indices of the chosen keys of each prompt, ascending, and which of these are real."""
    count = chosen.sum(-1)
    most = max(int(count.max()), 1)
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    return order, torch.arange(most, device=chosen.device) < count[:, None]


def _attend(
    call: LayerCall,
    order: torch.Tensor,
    mask: AttentionMask,
    groups: torch.Tensor | None,
    backend: str,
) -> AttentionResult:
    def taken(tensor: torch.Tensor) -> torch.Tensor:
        place = order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, place)

    chosen = replace(call, key=taken(call.key), value=taken(call.value), sink_logits=None)
    return attend(chosen, mask=mask, groups=groups, backend=backend)
