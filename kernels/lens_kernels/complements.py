"""What is left of a row when one part of it goes: `1 - P` and `a - A` without cancellation.

With `A_i = sum_j P_ij a_ij` the effect of taking part `j` out of row `i` and renormalising is
`P (A - a) / (1 - P)`: `A' - A` for `A' = sum_{n != j} P_n a_n / (1 - P_j)`. Where one part holds
nearly all the mass both differences lose their digits, so for the largest part of each row they are
summed over the other parts instead. Only one part of a row can hold more than half of it. Others that hold less together
than the smallest number of their type (87 nats below it in float32) count as nothing.

Parts are keys, or blocks of keys with `a` their mean under `P` (arXiv 2406.14909 ranks them so).
"""

from __future__ import annotations

import torch
from torch import Tensor


def complements(
    probability: Tensor, through: Tensor, sink_share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`1 - P` (a learned sink's share included) and `a - A`, both [..., rows, parts].

    Args:
        probability: `P` [..., rows, parts].
        through: `a` [..., rows, parts].
        sink_share: [..., rows], mass of the learned sink (value 0), or None.
    """
    largest = probability.argmax(-1, keepdim=True)
    others = probability.scatter(-1, largest, 0)
    rest = others.sum(-1, keepdim=True)
    if sink_share is not None:
        rest = rest + sink_share[..., None]
    at_largest = through.gather(-1, largest)
    total = (probability * through).sum(-1, keepdim=True)
    beyond = rest * at_largest - (others * through).sum(-1, keepdim=True)
    return (
        (1 - probability).scatter(-1, largest, rest),
        (through - total).scatter(-1, largest, beyond),
    )


def removal_effect(probability: Tensor, through: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """Effect of taking each part out and renormalising, [..., rows, parts].

    `-P (a - A) / (1 - P)`; a row that had nothing else becomes empty, with output 0: `-P a`.

    Args:
        probability, through: as for `complements`.
        room, gap: what `complements` gave.
    """
    empty = room <= 0
    return -probability * torch.where(empty, through, gap / torch.where(empty, 1, room))
