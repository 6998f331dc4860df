"""What no policy can beat, and what every policy must: the exact map, and a draw."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lens.passes.blocks import BlockView
from lens.policies.base import Kept, Policy, check_shares, ends
from lens.policies.budgets import check_budget, expected, within
from lens.stats.controls import drawing


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
        check_budget(self, "top", "share", "mass", "like")

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        found = view.masses / view.masses.sum(-1, keepdim=True).clamp(min=1e-30)
        ranked = found.mean(1, keepdim=True).expand_as(found) if self.shared else found
        blocks = within(self, ranked, view)
        return Kept(blocks, expected(found, blocks, view))

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
        check_shares(self, "threshold", zero=True)

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
        seed: of the draw; every prompt, layer and step draws anew.

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
        check_budget(self, "share", "like")

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        call = view.call
        shown = view.key if call.tokens is None else call.tokens  # by which a prompt is known
        scores = np.stack(
            [
                drawing(self.seed, call.layer, call.step, _digest(prompt)).random(
                    view.shape[1:], np.float32
                )
                for prompt in shown
            ]
        )
        scores = torch.from_numpy(scores).to(view.query.device)
        if self.ends:
            scores = scores + ends(view)
        return Kept(within(self, scores, view))


def _digest(prompt: Tensor) -> str:
    return hashlib.sha256(prompt.detach().double().cpu().numpy().tobytes()).hexdigest()
