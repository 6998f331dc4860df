"""How many blocks a policy that ranks them takes: a number, a share, a mass, a threshold, or as another one."""

from __future__ import annotations

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.passes.blocks import BlockView
from lens.policies.base import Policy, check_counts, check_shares, covering, largest

_SHARES = ("share", "mass", "threshold")


def check_budget(policy: Policy, *names: str) -> None:
    """Raises LensError unless exactly one of these fields is given, and is what it must be."""
    given = [name for name in names if getattr(policy, name) is not None]
    if len(given) != 1:
        raise LensError(
            f"{type(policy).__name__} takes exactly one of {', '.join(names)}; got "
            f"{' and '.join(given) or 'none'}"
        )
    if given[0] in _SHARES:
        check_shares(policy, given[0], zero=given[0] == "threshold")
    elif given[0] == "top":
        check_counts(policy, "top", least=1)
    elif not isinstance(getattr(policy, "like", None), Policy):
        raise LensError(f"like must be a policy, got {getattr(policy, 'like', None)!r}")


def within(policy: Policy, shares: Tensor, view: BlockView) -> Tensor:
    """bool [batch, heads, query_blocks, key_blocks]: the best blocks by `shares`, as many as the policy says.

    Args:
        policy: with some of the fields `top`, `share`, `mass`, `threshold`, `like`, one of them given.
        shares: [batch, heads, query_blocks, key_blocks], not negative; they sum to 1 in a row for `mass`.
    """
    if (mass := getattr(policy, "mass", None)) is not None:
        return covering(shares, mass) & view.visible
    if (threshold := getattr(policy, "threshold", None)) is not None:
        return (shares > threshold) & view.visible
    return largest(shares, _count(policy, view), view.visible)


def _count(policy: Policy, view: BlockView) -> Tensor | int:
    """How many blocks of each row of blocks, [batch, heads, query_blocks, 1]."""
    if (like := getattr(policy, "like", None)) is not None:
        return (like.choose(view).blocks & view.visible).sum(-1, keepdim=True)
    if (share := getattr(policy, "share", None)) is not None:
        return (view.visible.sum(-1, keepdim=True) * share).ceil()
    top = getattr(policy, "top", None)
    assert top is not None  # `check_budget` saw to it
    return top


def expected(shares: Tensor, blocks: Tensor, view: BlockView) -> Tensor:
    """[batch, heads]: of `shares` that sum to 1 in a row of blocks, the part that is kept, mean over rows."""
    seen = view.visible.any(-1)
    return torch.where(blocks, shares, 0).sum((-1, -2)) / seen.sum(-1).clamp(min=1)
