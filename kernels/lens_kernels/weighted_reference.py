"""The definition of `weighted_attention`: float64, materialised, differentiable by plain autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lens_kernels import reference
from lens_kernels.normalisers import Differential, Normaliser, OffByOne, Relu, Sigmoid
from lens_kernels.problem import BackendResult, Problem

_INF = float("inf")


def weights(problem: Problem, normaliser: Normaliser) -> Tensor:
    """`W`, float64 [batch, heads, queries, keys]."""
    if isinstance(normaliser, Differential):
        size = problem.head_dim // 2
        maps = []
        for part in (slice(0, size), slice(size, None)):
            scores = reference.logits(_part(problem, part))
            maps.append(torch.nan_to_num(torch.softmax(scores, -1), nan=0.0))
        return maps[0] - _per_head(normaliser.subtracted) * maps[1]
    scores = reference.logits(problem)
    match normaliser:
        case Sigmoid(bias=bias):
            found = _per_head(-math.log(problem.keys) if bias is None else bias)
            seen = scores > -_INF
            return seen / (1 + torch.exp(-(torch.where(seen, scores, 0) + found)))
        case Relu(power=power, over=over, bias=bias):
            seen = scores > -_INF
            raised = torch.where(seen, scores + _per_head(bias), 0).clamp(min=0) ** power
            count = seen.sum(-1, keepdim=True).clamp(min=1) if over == "seen" else problem.keys
            return raised / count
    assert isinstance(normaliser, OffByOne)
    with_nothing = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)
    return torch.softmax(with_nothing, -1)[..., :-1]


def run_reference(problem: Problem, normaliser: Normaliser, names: frozenset[str]) -> BackendResult:
    """Output and the statistics that are asked for, from the materialised `W`."""
    w = weights(problem, normaliser)
    share = problem.heads // problem.kv_heads
    output = w @ problem.value.double().repeat_interleave(share, 1)
    index = torch.arange(problem.keys, device=problem.device)
    distance = (problem.plan.anchor[..., None] - index).double()[:, None]
    size = w.abs()
    total = size.sum(-1, keepdim=True)
    shares = size / torch.where(total > 0, total, 1)
    place = (distance.long() - problem.diagonal_start).expand_as(w)
    diagonal = [(w * (place == offset)).sum((-1, -2)) for offset in range(problem.distances)]
    rows, columns = problem.block_size
    seen = reference.logits(problem).amax(-1) > -_INF
    blocks: dict[str, list[Tensor]] = {"block_mass": [], "block_magnitude": [], "block_max": []}
    for top in range(0, problem.queries, rows):
        count = seen[:, :, top : top + rows].sum(-1).clamp(min=1)
        for left in range(0, problem.keys, columns):
            block = w[:, :, top : top + rows, left : left + columns]
            blocks["block_mass"].append(block.sum((-1, -2)) / count)
            blocks["block_magnitude"].append(block.abs().sum((-1, -2)) / count)
            blocks["block_max"].append(block.abs().amax((-1, -2)))
    shape = (problem.query_blocks, problem.key_blocks)
    tensors = {
        "row_sum": w.sum(-1),
        "magnitude": total.squeeze(-1),
        "active": (w != 0).sum(-1).double(),
        "entropy": -(shares * torch.where(shares > 0, shares, 1).log()).sum(-1),
        "concentration": (shares**2).sum(-1),
        "distance": (shares * distance).sum(-1),
        "prefix_mass": (w * (problem.plan.key_position < problem.prefix)[:, None, None]).sum(-1),
        "value_norm": output.norm(dim=-1),
        "received": w.sum(-2),
        "diagonal": torch.stack(diagonal, -1),
        **{name: torch.stack(parts, -1).unflatten(-1, shape) for name, parts in blocks.items()},
    }
    if problem.query_labels is not None and problem.key_labels is not None:
        row, column = problem.query_labels[:, :, None], problem.key_labels[:, None]
        equal = ((row == column) & (row >= 0)).double()
        tensors["match_mass"] = torch.einsum("bhqk,bqkp->bhqp", w, equal)
    return BackendResult(output, {name: tensors[name].contiguous() for name in names})


def _part(problem: Problem, part: slice) -> Problem:
    return replace(problem, query=problem.query[..., part], key=problem.key[..., part])


def _per_head(number: float | Tensor) -> float | Tensor:
    return number.double()[:, None, None] if isinstance(number, Tensor) else number
