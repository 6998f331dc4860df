"""The definition: float64, materialised, differentiable by plain autograd.

Everything that the package computes is defined here, in the shortest form that is right, and every
other backend is tested against it. It builds `P` and is therefore for small sizes; `auto` never
chooses it. Output and statistics stay float64 whatever the input type is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lens_kernels.problem import (
    BackendResult,
    Problem,
    group_statistics,
    row_features,
    statistic_shape,
    top_blocks,
)
from lens_kernels.statistics import STATISTICS
from lens_kernels.types import AttentionGroups

DIFFERENTIABLE = True
_INF = float("inf")


def supports(problem: Problem) -> str | None:
    """It can do everything."""
    return None


def visible(problem: Problem) -> Tensor:
    """bool [batch, heads, queries, keys]: the structural mask with `block_mask` applied.

    A bias of -inf hides keys beyond it.
    """
    plan = problem.plan
    index = torch.arange(problem.keys, device=problem.device)
    seen = (plan.low[..., None] <= index) & (index < plan.high[..., None])
    seen = seen[:, None].expand(problem.batch, problem.heads, -1, -1)
    if plan.keep is not None:
        seen = seen & plan.keep[:, None, None]
    if plan.allowed is not None:
        seen = seen & plan.allowed
    if problem.block_mask is not None:
        rows, columns = problem.block_size
        kept = problem.block_mask.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
        seen = seen & kept[:, :, : problem.queries, : problem.keys]
    return seen


def logits(problem: Problem) -> Tensor:
    """`s`, float64 [batch, heads, queries, keys]; -inf where the key is not visible."""
    plan = problem.plan
    share = problem.heads // problem.kv_heads
    key = problem.key.double().repeat_interleave(share, 1)
    scores = problem.query.double() @ key.transpose(-1, -2) * problem.scale
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if plan.bias is not None:
        scores = scores + plan.bias.double()
    if plan.slopes is not None:
        scores = scores - plan.slopes.double()[:, None, None] * _distance(problem).abs()[:, None]
    return scores.masked_fill(~visible(problem), -_INF)


def probabilities(problem: Problem) -> Tensor:
    """`P`, float64 [batch, heads, queries, keys]; rows sum to 1 minus the learned sink's share."""
    return _softmax(logits(problem), problem.sink_logits)[0]


def run(problem: Problem) -> BackendResult:
    """All statistics from the materialised `P`.

    Differentiable through output, `lse`, group states and the statistics in
    `problem.differentiable`; hooks on `P` and `s` fill the statistics of the backward pass.
    """
    scores = logits(problem)
    exports = _exports(problem)
    if exports and not scores.requires_grad:
        scores.requires_grad_()  # only values have a gradient, but those of P and s are asked for
    probability, lse = _softmax(scores, problem.sink_logits)
    share = problem.heads // problem.kv_heads
    value = problem.value.double().repeat_interleave(share, 1)
    weight = _watched(problem, scores, probability, lse, exports) if exports else probability
    output = weight @ value
    tensors = {
        "lse": lse,
        **_row_statistics(problem, scores, probability, output),
        **_column_statistics(problem, probability),
        **_block_statistics(problem, scores, probability),
    }
    flows = {"lse", *problem.differentiable}
    wanted = {
        name: (tensor if name in flows else tensor.detach()).contiguous()
        for name, tensor in tensors.items()
        if problem.wants(name)
    }
    groups = _group_states(problem, scores, value)
    return BackendResult(output, {"lse": lse, **wanted}, groups, exports)


def _exports(problem: Problem) -> dict[str, Tensor | None]:
    """A place for each statistic of the backward pass that is asked for."""
    names = sorted(name for name in problem.statistics if STATISTICS[name].from_backward)
    return dict.fromkeys(names)


def _watched(
    problem: Problem,
    scores: Tensor,
    probability: Tensor,
    lse: Tensor,
    exports: dict[str, Tensor | None],
) -> Tensor:
    """The `P` to make the output with; gradients that reach it and `scores` fill `exports`.

    The gradient `a` of that `P` is the one through the output alone; the gradient of `s` is whole.
    """
    weight = probability.clone()

    def fill(**found: Tensor) -> None:
        exports.update({name: tensor for name, tensor in found.items() if name in exports})

    def at_probability(a: Tensor) -> None:
        p = probability.detach()
        mean = (p * a).sum(-1, keepdim=True)
        fill(
            block_attribution=_block_sums(problem, p * a),
            row_attribution=mean.squeeze(-1),
            block_influence=_block_sums(problem, _influence(problem, p, a, lse.detach())),
        )

    def at_scores(gradient: Tensor) -> None:
        fill(
            block_logit_gradient=_block_sums(problem, gradient),
            block_logit_gradient_abs=_block_sums(problem, gradient.abs()),
        )
        for name, tensor in exports.items():
            if tensor is None:  # the loss does not depend on the output
                exports[name] = gradient.new_zeros(statistic_shape(problem, name))

    weight.register_hook(at_probability)
    scores.register_hook(at_scores)
    return weight


def _influence(problem: Problem, p: Tensor, a: Tensor, lse: Tensor) -> Tensor:
    """`p` times the mean of `a` without each key, less its own: summed over the others, as `1 - p` of one near 1 has no
    digits left."""
    others = 1 - torch.eye(problem.keys, dtype=p.dtype, device=p.device)
    room = p @ others
    if problem.sink_logits is not None:
        room = room + torch.exp(problem.sink_logits.detach().double()[:, None] - lse)[..., None]
    left = (p * a) @ others / torch.where(room > 0, room, 1)
    return p * (left - a)


def _softmax(scores: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """`P` and LSE; rows without keys are 0 and -inf, also with a learned sink."""
    top = scores.detach().amax(-1, keepdim=True)
    seen = top > -_INF
    sink = scores.new_full((1, 1, 1), -_INF)
    if sink_logits is not None:
        sink = sink_logits.double()[:, None, None]
    pivot = torch.where(seen, torch.maximum(top, sink.detach()), 0)
    weight = torch.exp(scores - pivot)
    total = weight.sum(-1, keepdim=True) + torch.exp(sink - pivot) * seen
    total = torch.where(seen, total, 1)
    lse = torch.where(seen, pivot + total.log(), -_INF)
    return weight / total, lse.squeeze(-1)


def _distance(problem: Problem) -> Tensor:
    """`anchor - j`, float64 [batch, queries, keys]."""
    index = torch.arange(problem.keys, device=problem.device)
    return (problem.plan.anchor[..., None] - index).double()


def _row_statistics(
    problem: Problem, scores: Tensor, probability: Tensor, output: Tensor
) -> dict[str, Tensor]:
    log_probability = torch.where(probability > 0, probability, 1).log()
    features, columns = row_features(problem)
    share = problem.heads // problem.kv_heads
    means = probability @ features.double().repeat_interleave(share, 1)
    tensors = {name: means[..., place] for name, place in columns.items()}
    for name in ("prefix_mass", "mean_value_norm"):
        if name in tensors:
            tensors[name] = tensors[name].squeeze(-1)
    tensors |= {
        "max_logit": scores.amax(-1),
        "entropy": -(probability * log_probability).sum(-1),
        "concentration": probability.square().sum(-1),
        "distance": (probability * _distance(problem)[:, None]).sum(-1),
        "value_norm": output.norm(dim=-1),
    }
    if problem.query_labels is not None and problem.key_labels is not None:
        row, column = problem.query_labels[:, :, None], problem.key_labels[:, None]
        equal = ((row == column) & (row >= 0)).double()  # [batch, queries, keys, pairs]
        tensors["match_mass"] = torch.einsum("bhqk,bqkp->bhqp", probability, equal)
    return tensors


def _column_statistics(problem: Problem, probability: Tensor) -> dict[str, Tensor]:
    place = (_distance(problem).long() - problem.diagonal_start)[:, None].expand_as(probability)
    inside = (place >= 0) & (place < problem.distances)
    diagonal = probability.new_zeros(problem.batch, problem.heads, problem.distances)
    diagonal = diagonal.scatter_add(
        2, torch.where(inside, place, 0).flatten(2), (probability * inside).flatten(2)
    )
    return {"received": probability.sum(-2), "diagonal": diagonal}


def _blocks(problem: Problem, matrix: Tensor, fill: float = 0.0) -> Tensor:
    """[batch, heads, queries, keys] as [batch, heads, query_blocks, rows, key_blocks, columns]."""
    rows, columns = problem.block_size
    short = (0, -problem.keys % columns, 0, -problem.queries % rows)
    padded = pad(matrix, short, value=fill)
    return padded.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))


def _block_sums(problem: Problem, matrix: Tensor) -> Tensor:
    return _blocks(problem, matrix).sum((3, 5))


def _block_statistics(problem: Problem, scores: Tensor, probability: Tensor) -> dict[str, Tensor]:
    rows = problem.block_size[0]
    seen = (scores.amax(-1) > -_INF).double()
    count = pad(seen, (0, -problem.queries % rows)).unflatten(2, (-1, rows)).sum(-1).clamp(min=1)
    mass = _block_sums(problem, probability) / count[..., None]
    tensors = {
        "block_mass": mass,
        "block_max": _blocks(problem, probability).amax((3, 5)),
        "block_max_logit": _blocks(problem, scores, -_INF).amax((3, 5)),
    }
    tensors["top_keys"], tensors["top_mass"] = top_blocks(mass, problem.top_k)
    if problem.key_weights is not None:
        weighted = probability * problem.key_weights.double()[:, :, None]
        tensors["block_weighted"] = _block_sums(problem, weighted) / count[..., None]
    return tensors


def _group_states(problem: Problem, scores: Tensor, value: Tensor) -> AttentionGroups | None:
    if problem.groups is None:
        return None
    outputs, lses = [], []
    statistics = {name: [] for name in group_statistics(problem)}
    for group in range(problem.group_count):
        inside = scores.masked_fill((problem.groups != group)[:, None, None], -_INF)
        probability, lse = _softmax(inside, None)
        outputs.append(probability @ value)
        lses.append(lse)
        rows = _row_statistics(problem, inside, probability, outputs[-1])
        for name, parts in statistics.items():
            parts.append(rows[name].detach())
    found = {name: torch.stack(parts) for name, parts in statistics.items()}
    return AttentionGroups(torch.stack(outputs), torch.stack(lses), found)
