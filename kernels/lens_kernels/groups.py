"""Key groups for a backend that keeps one accumulator per row: one problem per group, merged.

The keys of each group are gathered and run as attention of their own, which costs about one plain
pass over all groups together. An interval of keys per row stays one: `[low, high)` becomes the ranks
of its ends among the group's keys. Where the logits or the mask need each key in its place (ALiBi,
`block_mask`) the keys stay and those of other groups are hidden: one plain pass per group.

Where one of two groups is a single key, as the first of a sequence, a backend can make everything in
one pass: it hides that key, keeps what it has then, and adds the key (`lone_key`, `lone_states`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lens_kernels.problem import BackendResult, MaskPlan, Problem, group_statistics
from lens_kernels.states import AttentionState, merge
from lens_kernels.types import AttentionGroups

_INF = float("inf")


@torch.no_grad()
def run_by_group(problem: Problem, run: Callable[[Problem], BackendResult]) -> BackendResult:
    """What `run(problem)` would give if it knew groups.

    Args:
        problem: with groups.
        run: of a backend, for problems without groups.

    Returns:
        The whole attention, merged from the groups' states (or run once more where statistics are
        asked for that do not merge), and the states.
    """
    names = group_statistics(problem)
    states = [_state(problem, group, names, run) for group in range(problem.group_count)]
    groups = AttentionGroups(
        torch.stack([state.output for state in states]),
        torch.stack([state.lse for state in states]),
        {name: torch.stack([state.statistics[name] for state in states]) for name in names},
    )
    if problem.statistics <= {"lse", *names}:
        sinks = None if problem.sink_logits is None else problem.sink_logits.detach()
        whole = merge(*states, sink_logits=sinks)
        tensors = {"lse": whole.lse, **whole.statistics}
        return BackendResult(whole.output.to(problem.query.dtype), tensors, groups)
    plain = run(replace(problem, groups=None, group_count=0))
    return replace(plain, groups=groups)


def lone_key(problem: Problem, first: bool) -> Tensor | None:
    """The one key of each batch row that is group 0, [batch] int32, where all others are group 1.

    Args:
        first: whether it must be key 0.

    Returns:
        None where it is not so.
    """
    groups = problem.groups
    if groups is None or problem.group_count != 2 or problem.block_mask is not None:
        return None
    member = groups == 0
    place = member.to(torch.int8).argmax(1).to(torch.int32)
    alone = (member.sum(1) == 1).all() & ((place == 0).all() | (not first))
    return place if bool(alone) else None


def lone_states(
    problem: Problem, key: Tensor, logit: Tensor, output: Tensor, others: dict[str, Tensor]
) -> AttentionGroups:
    """The states of two groups, the first of which is one key.

    Args:
        key: [batch].
        logit: its logits [batch, heads, queries], -inf where it is hidden.
        output: [batch, heads, queries, value_dim] of the other group.
        others: its LSE and statistics by name.
    """
    seen = (logit > -_INF).to(logit.dtype)
    rows = key.long()[:, None, None, None].expand(-1, problem.kv_heads, 1, problem.value_dim)
    value = problem.value.gather(2, rows).to(output.dtype)  # [batch, kv_heads, 1, value_dim]
    value = value.repeat_interleave(problem.heads // problem.kv_heads, dim=1)
    distance = (problem.plan.anchor - key[:, None])[:, None].to(logit.dtype)
    mine = {
        "lse": logit,
        "max_logit": logit,
        "entropy": torch.zeros_like(logit),
        "concentration": seen,
        "distance": distance * seen,
    }
    both = {name: torch.stack((mine[name], tensor)) for name, tensor in others.items()}
    if not problem.group_outputs:
        value, output = value[..., :0], output[..., :0]
    outputs = torch.stack((torch.where(seen[..., None] > 0, value, 0), output))
    return AttentionGroups(outputs, both.pop("lse"), both)


def _state(
    problem: Problem, group: int, names: list[str], run: Callable[[Problem], BackendResult]
) -> AttentionState:
    """The state of one group."""
    assert problem.groups is not None
    member = problem.groups == group
    if problem.plan.slopes is None and problem.block_mask is None:
        part = _gathered(problem, member)
    else:
        part = _hidden(problem, member)
    positions = "distance" in names
    asked = {"lse", *names} - {"distance"} | ({"moments"} if positions else set())
    result = run(replace(part, statistics=frozenset(asked)))
    lse = result.tensors["lse"]
    statistics = {name: result.tensors[name] for name in names if name != "distance"}
    if positions:
        mean = result.tensors["moments"][..., 0]
        distance = problem.plan.anchor[:, None].to(mean.dtype) - mean
        statistics["distance"] = torch.where(lse > -_INF, distance, 0)
    return AttentionState(result.output.to(problem.compute_dtype), lse, statistics, placed=True)


def _plain(problem: Problem, plan: MaskPlan) -> Problem:
    """The problem with another mask, and nothing but attention in it."""
    return replace(
        problem,
        plan=plan,
        sink_logits=None,
        groups=None,
        group_count=0,
        query_labels=None,
        key_labels=None,
        key_weights=None,
        grid=None,
        differentiable=frozenset(),
    )


def _hidden(problem: Problem, member: Tensor) -> Problem:
    """All keys in their place, those of other groups hidden; key positions are key indices."""
    plan = problem.plan
    keep = member if plan.keep is None else member & plan.keep
    index = torch.arange(problem.keys, dtype=torch.int32, device=problem.device)
    position = index.expand(problem.batch, -1).contiguous()
    return _plain(problem, replace(plan, keep=keep, key_position=position))


def _gathered(problem: Problem, member: Tensor) -> Problem:
    """Only the keys of the group, in their order; key positions are their indices in `problem`.

    Batch rows with fewer of them are filled up with keys that no interval holds.
    """
    plan = problem.plan
    rank = torch.nn.functional.pad(member.cumsum(1), (1, 0))
    count = max(1, int(rank[:, -1].max()))
    index = (~member).to(torch.int8).argsort(dim=1, stable=True)[:, :count]  # members first
    low, high = (rank.gather(1, end.long()).to(torch.int32) for end in (plan.low, plan.high))
    empty = high <= low

    def keys(tensor: Tensor) -> Tensor:
        """The group's keys of [batch, kv_heads, keys, dim]."""
        return tensor.gather(
            2, index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        )

    def columns(tensor: Tensor | None) -> Tensor | None:
        """The group's keys of [batch | 1, heads | 1, queries | 1, keys]."""
        if tensor is None:
            return None
        full = tensor.expand(problem.batch, -1, -1, -1)
        return full.gather(3, index[:, None, None].expand(-1, *full.shape[1:3], -1))

    part = replace(
        plan,
        low=low.masked_fill(empty, 0),
        high=high.masked_fill(empty, 0),
        key_position=index.to(torch.int32),
        keep=None if plan.keep is None else plan.keep.gather(1, index),
        allowed=columns(plan.allowed),
        bias=columns(plan.bias),
        simple=False,
    )
    return replace(_plain(problem, part), key=keys(problem.key), value=keys(problem.value))
