"""What each rule does to one attention call, out of the states of its key groups.

With `m_S` the mass of the sources, `m_R` that of the targets and `a` the amount, each row's
probabilities become

    mask           P_S (1 - a), then all divided by their sum 1 - a m_S
    drop           P_S (1 - a), and nothing else: rows sum to 1 - a m_S
    logit_bias     softmax of the logits with a added to those of S
    transfer       P_S (1 - a), P_R (1 + a m_S / m_R), the rest as it was
    learned_sink   all divided by 1 + a exp(-lse), where a = exp(b) is a learned sink with logit b
    off_by_one     the same with a fraction a: 1 is softmax-off-by-one, exp(x) / (1 + sum exp(x)), which is
                   a learned sink with logit 0; 0 is the softmax

In the terms of `edit(kind, renorm)`: `logit_bias` is the logit edit; `drop`, `mask` and `transfer` are
a scaling of probabilities by 1 - a that renormalises nothing, everything, or the receivers alone. So
`mask(a)` equals `logit_bias(log(1 - a))`, and `transfer` to all others equals `mask` at a = 1 only.

No rule changes anything at a = 0. A row that has nowhere to put the mass (`mask`, `logit_bias` of
-inf: nothing left; `transfer`: targets below `SMALLEST_TARGET`) is left as it is and counted.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from lens_kernels import AttentionGroups, AttentionState
from lens_kernels.redistribution import (
    SMALLEST_TARGET,
    Drop,
    LearnedSink,
    LogitBias,
    Redistribution,
    Scale,
    Transfer,
    redistribute,
)

from lens.common.errors import LensError

RULES = ("mask", "drop", "logit_bias", "transfer", "learned_sink", "off_by_one")
WHOLE_ROWS = ("learned_sink", "off_by_one")  # rules without sources
REST, SOURCES, TARGETS = 0, 1, 2


def check_rule(rule: str, amount: float | None, has_sources: bool, has_targets: bool) -> None:
    """Raises LensError where rule, amount and keys do not make sense together."""
    if rule not in RULES:
        raise LensError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if amount is None:
        raise LensError(f"rule {rule!r} needs an amount, such as amount=0.5")
    if isinstance(amount, bool) or not isinstance(amount, int | float) or math.isnan(amount):
        raise LensError(f"amount must be a number, got {amount!r}")
    if rule in ("mask", "drop", "transfer", "off_by_one") and not 0 <= amount <= 1:
        raise LensError(f"amount of rule {rule!r} is a fraction 0..1, got {amount}")
    if rule == "logit_bias" and amount == math.inf:
        raise LensError("amount of rule 'logit_bias' is added to logits and cannot be +inf")
    if rule == "learned_sink" and not 0 <= amount < math.inf:
        raise LensError(f"amount of rule 'learned_sink' is exp(its logit), 0 or more, got {amount}")
    if has_targets and rule != "transfer":
        raise LensError(f"rule {rule!r} has no targets; only 'transfer' moves mass to some")
    if has_sources == (rule in WHOLE_ROWS):
        raise LensError(
            f"rule {rule!r} acts on whole rows: leave sources out"
            if has_sources
            else f"rule {rule!r} needs sources"
        )


def apply(
    rule: str,
    amount: float,
    groups: AttentionGroups,
    to_targets: bool,
    output: torch.Tensor,
    lse: torch.Tensor,
    sink_logits: torch.Tensor | None,
) -> Redistribution:
    """The edited attention.

    Args:
        rule, amount: see above; an amount other than 0.
        groups: states of the rest, the sources and, where there are some, the targets.
        to_targets: whether targets were chosen; else "transfer" moves to the rest.
        output, lse: of the whole attention, [batch, heads, queries(, value_dim)].
        sink_logits: [heads], learned sinks that the model has, or None.

    Returns:
        With the rows that had nowhere to put the mass in `skipped`.
    """
    if rule in WHOLE_ROWS:
        edit = LearnedSink(math.log(amount))
        return redistribute(groups, edit, output=output, sink_logits=sink_logits)
    if rule == "drop":
        dropped = redistribute(groups, Drop([SOURCES]), output=output, sink_logits=sink_logits)
        return _faded(dropped, amount, output)
    if rule == "transfer":
        states = list(groups.states)
        if to_targets and len(states) == TARGETS:  # no key of this call is a target
            states.append(AttentionState.empty_like(states[SOURCES]))
        edit = Transfer([SOURCES], [TARGETS if to_targets else REST], amount)
        return redistribute(states, edit, output=output, sink_logits=sink_logits)
    has_sources = groups.lse[SOURCES] > -math.inf
    others = (groups.lse[REST] - torch.where(has_sources, lse, 0)).exp()
    all_goes = amount == (1 if rule == "mask" else -math.inf)
    stuck = has_sources & (others < SMALLEST_TARGET) & all_goes
    given = torch.where(stuck, 0.0, amount)
    edit = Scale([1.0, 1 - given]) if rule == "mask" else LogitBias([0.0, given])
    edited = redistribute(groups, edit, output=output, sink_logits=sink_logits)
    return replace(edited, skipped=stuck)


def _faded(dropped: Redistribution, amount: float, output: torch.Tensor) -> Redistribution:
    """`amount` of the way from the attention to the one without its sources: both parts positive."""
    before = dropped.mass_before
    faded = ((1 - amount) * output + amount * dropped.output).to(output.dtype)
    return replace(
        dropped,
        output=torch.where((before[SOURCES] > 0)[..., None], faded, output),
        mass=(1 - amount) * before + amount * dropped.mass,
    )
