"""Edits of attention as recombinations of group states: no probability matrix, no subtraction.

With one state `(o_g, lse_g)` per key group and `m_g = exp(lse_g - lse)` its mass, every edit here
multiplies the probabilities of group `g` by a weight `w_g >= 0` of the row:

    output' = sum_g w_g m_g o_g / Z

with `Z = sum_g w_g m_g` where the edit renormalises and `Z = 1` where it does not. All terms are
positive, so the error is that of the states, also where a sink holds 0.999 of the mass; taking a
sink's part off a stored bfloat16 output is 446% wrong at 0.99.

Rules: `Mask`, `Drop`, `LogitBias`, `Scale`, `Transfer`, `LearnedSink`. They agree where they
should: `LogitBias(log w)` is `Scale(w)`; `Mask` is `Scale` with 0 or `LogitBias` with -inf;
`Transfer` is `Scale(1 - amount, receivers=targets)`, which differs from `Scale(1 - amount)`: that
one gives the freed mass back to the sources too.

After VAR (arXiv 2503.03321), ACT (arXiv 2406.15765), PASTA (arXiv 2311.02262), gpt-oss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens_kernels.arguments import as_number, check_kinds, check_tensors, without_autocast
from lens_kernels.states import AttentionState, merge_weights, sinks_of_rows
from lens_kernels.types import AttentionGroups

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_INF = float("inf")
SMALLEST_TARGET = 1e-8
"""A row whose receivers hold less mass than this is left as it is, and counted."""

PerRow = float | Tensor
"""A number, or a tensor broadcastable to [batch, heads, queries] (for a head: [heads, 1])."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Hide groups and renormalise, as if their keys were not there. LSE is that of the others."""

    groups: Sequence[int]


@dataclass(frozen=True, eq=False)
class Drop:
    """Leave out what groups contribute, without renormalising: rows sum to less than 1."""

    groups: Sequence[int]


@dataclass(frozen=True, eq=False)
class LogitBias:
    """Add a number to the logits of each group (attention steering; PASTA: log 0.01 on the rest).

    Attributes:
        bias: one entry per group, each a number or a tensor broadcastable to [batch, heads,
            queries]; -inf hides the group.
    """

    bias: Sequence[PerRow]


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiply the probabilities of each group, then renormalise.

    Attributes:
        weights: one entry >= 0 per group, each a number or a tensor broadcastable to [batch, heads,
            queries].
        receivers: groups that take up the mass that the others gave away, pro rata, so that the
            row's sum stays; None: all groups are rescaled together. With receivers the weights lie
            in 0..1 and those of the receivers are 1.
    """

    weights: Sequence[PerRow]
    receivers: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Transfer:
    """Move a part of the sources' mass to the targets, pro rata among the targets' keys (VAR, ACT).

    Other groups are untouched, rows keep their sum, LSE is unchanged by definition. Doing it twice
    moves more: with amounts p and q, 1 - (1 - p)(1 - q).

    Attributes:
        sources, targets: groups, disjoint.
        amount: fraction 0..1 of the sources' mass, a number or a tensor broadcastable to [batch,
            heads, queries] (0 for the heads and rows that are not selected). ACT's beta is
            1 - amount.
    """

    sources: Sequence[int]
    targets: Sequence[int]
    amount: PerRow


@dataclass(frozen=True, eq=False)
class LearnedSink:
    """Put a logit with value 0 into each row's denominator: `output' = sigmoid(lse - logit) output`.

    Attributes:
        logits: a number (0 is softmax-off-by-one) or a tensor [heads].
    """

    logits: PerRow


Rule = Mask | Drop | LogitBias | Scale | Transfer | LearnedSink


@dataclass(frozen=True, eq=False)
class Redistribution:
    """Attention after an edit.

    Attributes:
        output: [batch, heads, queries, value_dim].
        lse: [batch, heads, queries]; of the edited logits where the rule is one of logits (`Mask`,
            `LogitBias`, `Scale` without receivers, `LearnedSink`), else that before the edit.
        mass: [groups, batch, heads, queries], mass of each group after the edit. Its sum is 1 minus
            learned sinks and what `Drop` dropped.
        mass_before: likewise, before.
        skipped: bool [batch, heads, queries], rows that were left as they are because the receivers
            hold less than `SMALLEST_TARGET` of the mass.
    """

    output: Float[Tensor, "*rows queries value_dim"]
    lse: Float[Tensor, "*rows queries"]
    mass: Float[Tensor, "groups *rows queries"]
    mass_before: Float[Tensor, "groups *rows queries"]
    skipped: Bool[Tensor, "*rows queries"]

    @property
    def skipped_rows(self) -> int:
        """Number of rows that could not be edited."""
        return int(self.skipped.sum())


@without_autocast
def redistribute(
    states: AttentionGroups | Sequence[AttentionState],
    rule: Rule,
    *,
    output: Float[Tensor, "*rows queries value_dim"] | None = None,
    sink_logits: Float[Tensor, "heads"] | None = None,
) -> Redistribution:
    """Applies `rule` to attention given as one state per key group; differentiable.

    Args:
        states: `attention(..., groups=...).groups`, or states of disjoint key sets.
        rule: the edit; group numbers are places in `states`.
        output: [batch, heads, queries, value_dim], the attention before the edit. Rows that the
            edit does not change are taken from it bit by bit; None: from the merged states.
        sink_logits: [heads], learned sinks that the model has: in the denominator, in no group,
            never edited.

    Returns:
        The edited attention, in the type of `output` (of the states without it).

    Raises:
        ValueError: an unknown group, sources among the targets, an amount outside 0..1, a negative
            weight, tensors that do not fit.

    Example:
        >>> sink = AttentionState(torch.tensor([[0.0]]), torch.tensor([0.9]).log())
        >>> rest = AttentionState(torch.tensor([[5.0]]), torch.tensor([0.1]).log())
        >>> redistribute([sink, rest], Mask([0])).output
        tensor([[5.]])
        >>> redistribute([sink, rest], Transfer([0], [1], 0.5)).mass.flatten()
        tensor([0.4500, 0.5500])
    """
    check_kinds((AttentionGroups, list, tuple), states=states)
    check_kinds((Mask, LogitBias, LearnedSink, Drop, Scale, Transfer), rule=rule)
    check_tensors(output=output)
    parts = states.states if isinstance(states, AttentionGroups) else tuple(states)
    check_kinds(AttentionState, **{f"state {place}": one for place, one in enumerate(parts)})
    outputs, lses = _stacked(parts)
    sinks = _sinks(sink_logits, lses)
    before, lse, mass_before = _combine(outputs, lses, sinks)
    skipped = torch.zeros_like(lse, dtype=torch.bool)
    if isinstance(rule, Mask | LogitBias | LearnedSink) or (
        isinstance(rule, Scale) and rule.receivers is None
    ):
        bias = _logit_bias(rule, lses)
        more = _sinks(rule.logits, lses) if isinstance(rule, LearnedSink) else None
        edited, lse, mass = _combine(outputs, lses + bias, sinks, more)
        changed = (bias != 0).any(0)
        if more is not None:
            changed = changed | (more > -_INF)
    else:
        weights, skipped = _weights(rule, mass_before)
        mass = weights * mass_before
        edited = (mass[..., None] * outputs).sum(0)
        changed = (weights != 1).any(0)
    base = before if output is None else _fitting(output, before)
    edited = torch.where(changed[..., None], edited.to(base.dtype), base)
    return Redistribution(edited, lse, mass, mass_before, skipped)


def _stacked(states: Sequence[AttentionState]) -> tuple[Tensor, Tensor]:
    """Outputs [groups, ..., value_dim] and LSEs [groups, ...] in one type."""
    if not states:
        raise ValueError("redistribute needs at least one state; call attention with groups=")
    shapes = {tuple(state.output.shape) for state in states}
    if len(shapes) > 1:
        raise ValueError(f"states must have equal shapes, got {sorted(shapes)}")
    lses = torch.stack([state.lse for state in states])
    outputs = torch.stack([state.output for state in states])
    return outputs.to(torch.promote_types(outputs.dtype, lses.dtype)), lses


def _sinks(logits: PerRow | None, lses: Tensor) -> Tensor | None:
    """Sink logits as one more part [...] of each row; -inf in rows that see nothing."""
    if logits is None:
        return None
    logits = logits if isinstance(logits, Tensor) else as_number("sink_logits", logits)
    sinks = torch.as_tensor(logits, dtype=lses.dtype, device=lses.device)
    if sinks.dim() == 0:
        return torch.where((lses > -_INF).any(0), sinks, -_INF)
    return sinks_of_rows(sinks, lses)


def _combine(outputs: Tensor, lses: Tensor, *sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and group masses of states with learned sinks in the denominator."""
    extra = [sink for sink in sinks if sink is not None]
    lse, weights = merge_weights(torch.cat([lses, torch.stack(extra)]) if extra else lses)
    mass = weights[: len(lses)]
    return (mass[..., None] * outputs).sum(0), lse, mass


def _logit_bias(rule: Mask | LogitBias | Scale | LearnedSink, lses: Tensor) -> Tensor:
    """What the rule adds to the logits of each group, [groups, ...]."""
    if isinstance(rule, LearnedSink):
        return torch.zeros_like(lses)
    if isinstance(rule, LogitBias):
        return _per_group("bias", rule.bias, lses)
    if isinstance(rule, Scale):
        weights = _per_group("weights", rule.weights, lses)
        _check_weights(weights, _INF)
        return torch.where(weights > 0, torch.where(weights > 0, weights, 1).log(), -_INF)
    hidden = _members(rule.groups, lses)
    return torch.zeros_like(lses).masked_fill(hidden, -_INF)


def _weights(rule: Drop | Scale | Transfer, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of each group [groups, ...], and rows [...] that must stay as they are."""
    weights = torch.ones_like(mass)
    if isinstance(rule, Drop):
        weights = weights.masked_fill(_members(rule.groups, mass), 0)
        return weights, torch.zeros_like(mass[0], dtype=torch.bool)
    if isinstance(rule, Transfer):
        receives, gives = _members(rule.targets, mass), _members(rule.sources, mass)
        _check_disjoint(rule.sources, rule.targets)
        amount = _per_row("amount", rule.amount, mass)
        if bool(((amount < 0) | (amount > 1)).any()):
            raise ValueError(f"amount must lie in 0..1, got {rule.amount}")
        weights = torch.where(gives, 1 - amount, weights)
    else:
        assert rule.receivers is not None
        receives = _members(rule.receivers, mass)
        weights = _per_group("weights", rule.weights, mass)
        _check_weights(weights, 1)
        if bool((weights != 1).logical_and(receives).any()):
            raise ValueError("weights of receivers must be 1: they get what the others give")
    freed = ((1 - weights) * mass).sum(0)
    room = mass.masked_fill(~receives, 0).sum(0)
    skipped = (room < SMALLEST_TARGET) & (freed > 0)
    weights = torch.where(
        receives, 1 + freed / torch.where(skipped | (room == 0), 1, room), weights
    )
    return torch.where(skipped, 1, weights), skipped


def _members(groups: Sequence[int], like: Tensor) -> Tensor:
    """bool [groups, 1, ...]: the groups named."""
    count = len(like)
    wrong = [group for group in groups if not 0 <= group < count]
    if wrong or not len(groups):
        raise ValueError(
            f"groups must be some of 0..{count - 1} (there are {count} states), got {list(groups)}"
        )
    member = torch.zeros(count, dtype=torch.bool, device=like.device)
    member[list(groups)] = True
    return member.view(-1, *(1,) * (like.dim() - 1))


def _per_group(name: str, values: Sequence[PerRow], like: Tensor) -> Tensor:
    if len(values) != len(like):
        raise ValueError(f"{name} must have one entry per state ({len(like)}), got {len(values)}")
    return torch.stack([_per_row(name, value, like) for value in values])


def _per_row(name: str, value: PerRow, like: Tensor) -> Tensor:
    """`value` broadcast to the rows of `like` [groups, ...]."""
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    try:
        return tensor.expand(like.shape[1:])
    except RuntimeError:
        raise ValueError(
            f"{name} must be a number or broadcastable to {list(like.shape[1:])}, got "
            f"{list(tensor.shape)}"
        ) from None


def _check_weights(weights: Tensor, largest: float) -> None:
    if not bool(((weights >= 0) & (weights <= largest)).all()):
        span = "0 or more" if largest == _INF else f"in 0..{largest} where there are receivers"
        raise ValueError(
            f"weights must be {span}, got {float(weights.min()):g}..{float(weights.max()):g}"
        )


def _check_disjoint(sources: Sequence[int], targets: Sequence[int]) -> None:
    common = sorted(set(sources) & set(targets))
    if common:
        raise ValueError(f"sources and targets must be disjoint, both hold {common}")


def _fitting(output: Tensor, like: Tensor) -> Tensor:
    if output.shape != like.shape:
        raise ValueError(
            f"output must be of the states' shape {list(like.shape)}, got {list(output.shape)}"
        )
    return output
