"""Rows of attention as logits of a few key groups, which one edit after another changes.

A row is `softmax([l_1, ..., l_G, l_0])`: `l_g` is the log of the summed exponentials of the keys of group
`g`, `l_0` stands for what goes to no key (learned sinks, what was dropped). Its output is
`sum_g P_g o_g` with the output `o_g` of each group alone. An edit changes `l` (and `o` where it changes
values), the next one reads what it left; all terms of the sum are positive, so nothing is lost where a
sink holds 0.999 of the mass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from lens_kernels.redistribution import SMALLEST_TARGET
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True, eq=False)
class Rows:
    """Attention of some heads of one call, [batch, heads, queries] each.

    Attributes:
        logits: [groups + 1, batch, heads, queries], the last of what goes to no key.
        content: [groups, batch, heads, queries, value_dim], output of each group alone.
    """

    logits: Float[Tensor, "shares batch heads queries"]
    content: Float[Tensor, "groups batch heads queries value_dim"]

    @staticmethod
    def of(
        lse: Float[Tensor, "groups batch heads queries"],
        content: Float[Tensor, "groups batch heads queries value_dim"],
        sink_logits: Float[Tensor, "heads"] | None,
    ) -> Rows:
        """Of groups, and perhaps learned sinks."""
        nowhere = torch.full_like(lse[:1], -torch.inf)
        if sink_logits is not None:
            nowhere = sink_logits.to(lse).view(1, 1, -1, 1).expand_as(nowhere)
        return Rows(torch.cat([lse, nowhere]), content)

    @property
    def seen(self) -> Bool[Tensor, "batch heads queries"]:
        """Rows that see a key."""
        return (self.logits[:-1] > -torch.inf).any(0)

    def mass(self, groups: list[int]) -> Float[Tensor, "batch heads queries"]:
        """What these groups hold; 0 in rows that see nothing."""
        return self.probabilities()[groups].sum(0)

    def probabilities(self) -> Float[Tensor, "shares batch heads queries"]:
        """Of each group, and of no key; 0 in rows that see nothing."""
        return self.logits.softmax(0).masked_fill((self.logits == -torch.inf).all(0), 0.0)

    def output(self) -> Float[Tensor, "batch heads queries value_dim"]:
        """What the heads give."""
        p = self.probabilities()
        total = p[0, ..., None] * self.content[0]
        for group in range(1, len(self.content)):
            total = total + p[group, ..., None] * self.content[group]
        return total

    def added(self, groups: list[int], number: float | Tensor) -> Rows:
        """With a number added to the logits of groups (the last is what goes to no key)."""
        logits = self.logits.clone()
        logits[groups] = logits[groups] + number
        return replace(self, logits=logits)

    def where(self, chosen: Bool[Tensor, "batch #heads queries"], other: Rows) -> Rows:
        """These rows where they are chosen, else the other ones."""
        content = self.content
        if content is not other.content:
            content = torch.where(chosen[..., None], content, other.content)
        return Rows(torch.where(chosen, self.logits, other.logits), content)


def scaled(rows: Rows, source: list[int], log_weight: float) -> tuple[Rows, Tensor]:
    """Mask and logit bias: weights of the sources times a number, and renormalised.

    Returns:
        The rows, and which had nothing else to look at.
    """
    stuck = torch.zeros_like(rows.seen)
    if log_weight == -torch.inf:
        others = [group for group in range(len(rows.content)) if group not in source]
        stuck = (rows.mass(source) > 0) & (rows.mass(others) < SMALLEST_TARGET)
    return rows.added(source, log_weight), stuck


def dropped(rows: Rows, source: list[int], amount: float) -> tuple[Rows, Tensor]:
    """A share of the sources' weight goes to no key."""
    lost = rows.logits[source].logsumexp(0) + log_of(amount)
    found = rows.added(source, log_of(1 - amount))
    logits = found.logits.clone()
    logits[-1] = torch.logaddexp(logits[-1], lost)
    return replace(found, logits=logits), torch.zeros_like(rows.seen)


def moved(rows: Rows, source: list[int], target: list[int], amount: float) -> tuple[Rows, Tensor]:
    """A share of the sources' weight goes to the targets, pro rata."""
    gives, takes = rows.mass(source), rows.mass(target)
    stuck = (gives > 0) & (takes < SMALLEST_TARGET)
    gain = torch.log1p(amount * gives / takes.clamp(min=SMALLEST_TARGET))
    return rows.added(source, log_of(1 - amount)).added(target, gain), stuck


def sunk(rows: Rows, amount: float) -> tuple[Rows, Tensor]:
    """A learned sink with exp(logit) = amount."""
    logits = rows.logits.clone()
    logits[-1] = torch.logaddexp(logits[-1], torch.full_like(logits[-1], log_of(amount)))
    return replace(rows, logits=logits), torch.zeros_like(rows.seen)


def forced(
    rows: Rows, target: list[int], amount: float, equal: tuple[Tensor, Tensor] | None
) -> tuple[Rows, Tensor]:
    """`(1 - amount) P + amount w`, w on the targets: as the row looks at them, or equal for all.

    Args:
        rows, target, amount: the rows, and where they are forced to.
        equal: share of all targets [groups, batch, 1, 1] and mean value [groups, batch, heads, 1,
            value_dim] of each group; None: as the row looks at them.
    """
    stuck = torch.zeros_like(rows.seen)
    if equal is None:
        stuck = (rows.logits[target] == -torch.inf).all(0)
    whole = rows.logits.logsumexp(0)
    logits = rows.logits + log_of(1 - amount)
    content = rows.content.clone() if equal is not None else rows.content
    own = rows.logits[target].logsumexp(0)
    for group in target:
        share = rows.logits[group] - own if equal is None else equal[0][group].to(own).log()
        comes = whole + log_of(amount) + share
        both = torch.logaddexp(logits[group], comes)
        if equal is not None:
            new = (comes - both).exp().masked_fill(both == -torch.inf, 0.0)[..., None]
            content[group] = (1 - new) * content[group] + new * equal[1][group].to(content)
        logits[group] = both
    return Rows(logits, content), stuck


def revalued(
    rows: Rows,
    source: list[int],
    amount: float,
    value: Float[Tensor, "batch heads queries value_dim"] | None,
) -> tuple[Rows, Tensor]:
    """The sources' values become 0, or `value`; rows keep their sums."""
    content = rows.content.clone()
    content[source] = (1 - amount) * content[source]
    if value is not None:
        content[source] = content[source] + amount * value.to(content)
    return replace(rows, content=content), torch.zeros_like(rows.seen)


def log_of(number: float) -> float:
    """-inf of 0, or less."""
    return math.log(number) if number > 0 else -math.inf
