"""What no policy can beat, and what every policy must: the exact map, and a draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.passes.blocks import BlockView
from lens.policies.base import Kept, Policy, check_counts, check_shares, covering, ends, largest


@dataclass(frozen=True)
class Oracle(Policy):
    """The best blocks by the exact mass of each: of all policies with as many blocks the most recall.

    Attributes:
        top: number of blocks in each row of blocks;
        share: or a share of those that the row sees;
        mass: or the fewest that hold this share of the attention (top-p).
        like: or as many, row by row, as another policy keeps.
        shared: one choice for all heads of a layer, by the sum of their masses: what an indexer that all
            heads share (DeepSeek Sparse Attention) could reach at best.

    Raises:
        LensError: not exactly one of top, share, mass and like.

    Example:
        >>> str(lens.policies.Oracle(mass=0.95))
        'Oracle(mass=0.95)'
    """

    top: int | None = None
    share: float | None = None
    mass: float | None = None
    like: Policy | None = None
    shared: bool = False
    is_reference = True

    def __post_init__(self) -> None:
        _check_budget(self, "top", "share", "mass", "like")

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        found = view.masses / view.masses.sum(-1, keepdim=True).clamp(min=1e-30)
        ranked = found.mean(1, keepdim=True).expand_as(found) if self.shared else found
        if self.mass is not None:
            blocks = covering(ranked, self.mass) & view.visible
        else:
            blocks = largest(ranked, _budget(self, view), view.visible)
        seen = view.visible.any(-1)
        return Kept(blocks, (found * blocks).sum((-1, -2)) / seen.sum(-1).clamp(min=1))

    def cost(self, view: BlockView) -> float:
        """See `Policy`: all of it."""
        return 1.0


@dataclass(frozen=True)
class LargestEntry(Policy):
    """Blocks whose largest entry of P is above a threshold: what SeerAttention's gate is trained towards.

    The largest entry and the mass of a block rank differently: a block of many small entries holds mass
    and no peak.

    Attributes:
        threshold: 2e-3 in its description, 0 in its configuration.

    Raises:
        LensError: a threshold that is no share.

    Reference: Gao et al., SeerAttention, arXiv 2410.13276; microsoft/SeerAttention.

    Example:
        >>> str(lens.policies.LargestEntry(0.01))
        'LargestEntry(threshold=0.01)'
    """

    threshold: float = 2e-3
    is_reference = True

    def __post_init__(self) -> None:
        check_shares(self, "threshold")

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        found = view.attended(statistics=("block_max",)).statistics.block_max
        return Kept((found > self.threshold) & view.visible)

    def cost(self, view: BlockView) -> float:
        """See `Policy`: all of it."""
        return 1.0


@dataclass(frozen=True)
class RandomBlocks(Policy):
    """Blocks drawn at random: the baseline of every policy.

    Attributes:
        share: of the blocks that a row of blocks sees;
        like: or as many, row by row, as another policy keeps.
        ends: the first block and those of the query itself are among them, so that no row loses its sink
            or its own key: the harder baseline.
        seed: of the draw; every layer and step draws anew.

    Raises:
        LensError: not exactly one of share and like.

    Example:
        >>> policy = lens.policies.RandomBlocks(like=lens.policies.AShape(16, 16))
    """

    share: float | None = None
    like: Policy | None = None
    ends: bool = False
    seed: int = 0
    is_reference = True

    def __post_init__(self) -> None:
        _check_budget(self, "share", "like")

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        number = (self.seed * 1_000_003 + view.call.layer) * 1_000_003 + view.call.step
        generator = torch.Generator().manual_seed(number % 2**63)
        scores = torch.rand(view.shape, generator=generator).to(view.query.device)
        if self.ends:
            scores = scores + ends(view)
        return Kept(largest(scores, _budget(self, view), view.visible))


def _check_budget(policy: Policy, *names: str) -> None:
    given = [name for name in names if getattr(policy, name) is not None]
    if len(given) != 1:
        raise LensError(
            f"{type(policy).__name__} takes exactly one of {', '.join(names)}; got "
            f"{' and '.join(given) or 'none'}"
        )
    if given[0] in ("share", "mass"):
        check_shares(policy, given[0])
    elif given[0] == "top":
        check_counts(policy, "top", least=1)
    elif not isinstance(getattr(policy, "like", None), Policy):
        raise LensError(f"like must be a policy, got {getattr(policy, 'like', None)!r}")


def _budget(policy: Oracle | RandomBlocks, view: BlockView) -> Tensor | int:
    """How many blocks of each row of blocks, [batch, heads, query_blocks, 1]."""
    if policy.like is not None:
        return (policy.like.choose(view).blocks & view.visible).sum(-1, keepdim=True)
    if policy.share is not None:
        return (view.visible.sum(-1, keepdim=True) * policy.share).ceil()
    top = getattr(policy, "top", None)
    assert top is not None
    return top
