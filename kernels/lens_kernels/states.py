"""Partial attention as a commutative monoid: states of disjoint keys merge into that of their union.

A state is attention over some of the keys: its output, normalised over them, and its log-sum-exp.
With weights `w_k = exp(lse_k - lse)`, where `lse = log sum_k exp(lse_k)`, the union has

    output          sum_k w_k output_k
    linear          sum_k w_k F_k              distance, masses, moments, row block masses
    concentration   sum_k w_k^2 C_k
    entropy         sum_k w_k H_k - sum_k w_k log w_k
    max_logit       max_k m_k
    value_norm      norm of the merged output

exactly, in any order; no keys at all is output 0, LSE -inf, the neutral element. It carries chunked
prefill, split decoding, sequence-parallel capture and every "what if these keys were not there".
Merging only adds, so it is well conditioned where subtracting a part from a stored output is not
(relative error 4.5 at a mass of 0.99 and bfloat16).

Statistics summed over query rows (received, block_mass, ...) have lost the weight of each row and
cannot merge. `row_block_mass` [..., queries, key_blocks], the mass of each row on each key block,
can; `block_mass_of_rows` makes a block map of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens_kernels.arguments import check_kinds, check_tensors
from lens_kernels.slices import Spans, joined

if TYPE_CHECKING:
    from jaxtyping import Float

_INF = float("inf")

LINEAR = frozenset(
    {
        "distance",
        "prefix_mass",
        "match_mass",
        "moments",
        "grid_moments",
        "mean_value_norm",
        "row_block_mass",
    }
)
"""Statistics that are means under `P` of something that the row and the key decide."""

MERGEABLE = LINEAR | {"concentration", "entropy", "max_logit", "value_norm"}
"""Statistics that a state can carry."""

BY_POSITION = frozenset({"distance", "prefix_mass", "moments", "grid_moments"})
"""Statistics that count positions: from slices of the keys they differ from those of the whole."""

_ROW_SUMS = frozenset(
    {
        "received",
        "diagonal",
        "block_mass",
        "block_max",
        "block_max_logit",
        "block_weighted",
        "top_keys",
        "top_mass",
    }
)


@dataclass(frozen=True, eq=False)
class AttentionState:
    """Attention over a set of keys.

    Attributes:
        output: [..., queries, value_dim], normalised over the state's own keys; 0 where it has
            none.
        lse: [..., queries], natural log-sum-exp over those keys, -inf where it has none.
        statistics: name -> tensor [..., queries] or [..., queries, more], of the names in
            `MERGEABLE`, each over the state's own keys.
        placed: True says that the statistics `BY_POSITION` count among the keys of the union, not
            among those of a slice. They are refused without it; `AttentionResult.state` places them.
        spans: which keys of the whole these are, where that is known: `merge` refuses keys that come twice.

    Raises:
        ValueError: shapes that do not fit, a statistic that cannot merge or is not placed.
    """

    output: Float[Tensor, "*rows queries value_dim"]
    lse: Float[Tensor, "*rows queries"]
    statistics: Mapping[str, Float[Tensor, "..."]] = field(default_factory=dict)
    placed: bool = False
    spans: Spans | None = None

    def __post_init__(self) -> None:
        rows = tuple(self.lse.shape)
        if tuple(self.output.shape[:-1]) != rows:
            raise ValueError(
                "output must be [..., queries, value_dim] and lse [..., queries], got "
                f"{list(self.output.shape)} and {list(rows)}"
            )
        for name, tensor in self.statistics.items():
            _check_mergeable(name)
            if tuple(tensor.shape[: len(rows)]) != rows:
                raise ValueError(
                    f"statistic {name!r} must start with the axes of lse {list(rows)}, got "
                    f"{list(tensor.shape)}"
                )
        unplaced = [] if self.placed else sorted(BY_POSITION & self.statistics.keys())
        if unplaced:
            raise ValueError(
                f"{', '.join(unplaced)} of slices count from each slice and merge to wrong values: "
                "make the state with result.state(keys_before=, keys_after=), or give placed=True "
                "where they count among all the keys"
            )
        object.__setattr__(self, "statistics", MappingProxyType(dict(self.statistics)))

    @classmethod
    def empty_like(cls, state: AttentionState) -> AttentionState:
        """The neutral element: attention over no keys, of the same shapes."""
        fills = {"max_logit": -_INF}
        return cls(
            torch.zeros_like(state.output),
            torch.full_like(state.lse, -_INF),
            {
                name: torch.full_like(tensor, fills.get(name, 0.0))
                for name, tensor in state.statistics.items()
            },
            state.placed,
        )


def merge(
    *states: AttentionState, sink_logits: Float[Tensor, "heads"] | None = None
) -> AttentionState:
    """Attention over the union of disjoint key sets; see the module for the formulas.

    Differentiable in outputs, LSEs and statistics, also where some or all LSEs are -inf.

    Args:
        states: at least one; equal shapes and the same statistics.
        sink_logits: [heads], learned sinks: logits with value 0 in the denominator of every row
            [..., heads, queries] that sees a key. Sums run over real keys only, as in `attention`.

    Returns:
        The merged state, in the widest of the outputs' types and the LSE's.

    Raises:
        ValueError: no state, shapes or statistics that differ, or keys that are known to be in two states.

    Example:
        >>> one = AttentionState(torch.tensor([[2.0]]), torch.tensor([0.0]))
        >>> other = AttentionState(torch.tensor([[8.0]]), torch.tensor([0.0]))
        >>> merge(one, other).output
        tensor([[5.]])
    """
    check_kinds(AttentionState, **{f"state {place}": one for place, one in enumerate(states)})
    check_tensors(sink_logits=sink_logits)
    _check_alike(states)
    spans = joined([state.spans for state in states])
    lses = torch.stack([state.lse for state in states])
    parts = lses
    if sink_logits is not None:
        parts = torch.cat([lses, sinks_of_rows(sink_logits, lses)[None]])
    lse, weights = merge_weights(parts)
    weights = weights[: len(lses)]
    dtype = torch.promote_types(states[0].output.dtype, lses.dtype)
    outputs = torch.stack([state.output.to(dtype) for state in states])
    output = (weights[..., None].to(dtype) * outputs).sum(0)
    statistics = {}
    for name in states[0].statistics:
        if name == "value_norm":
            statistics[name] = output.norm(dim=-1)
            continue
        parts = torch.stack([state.statistics[name] for state in states])
        statistics[name] = _merge_statistic(name, parts, weights)
    return AttentionState(output, lse, statistics, all(state.placed for state in states), spans)


def merge_weights(lses: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of `lses` [parts, ...] over the parts, and `w_k = exp(lse_k - lse)`.

    Where every part is -inf, the LSE is -inf and every weight 0; no NaN, in the gradient neither.
    """
    top = lses.detach().amax(0)
    seen = top > -_INF
    shares = torch.exp(lses - torch.where(seen, top, 0))
    total = torch.where(seen, shares.sum(0), 1)
    lse = torch.where(seen, top + total.log(), -_INF)
    return lse, shares / total


def sinks_of_rows(sink_logits: Tensor, lses: Tensor) -> Tensor:
    """Learned sink logits [heads] as a part of each row [..., heads, queries] of `lses`.

    -inf in rows where all of `lses` [parts, ..., heads, queries] are: they stay empty.

    Raises:
        ValueError: not one logit per head.
    """
    if lses.dim() < 3 or tuple(sink_logits.shape) != (lses.shape[-2],):
        raise ValueError(
            f"sink_logits must be one per head, got {list(sink_logits.shape)} for states "
            f"[..., heads, queries] = {list(lses.shape[1:])}"
        )
    seen = (lses > -_INF).any(0)
    return torch.where(seen, sink_logits.to(lses)[:, None], -_INF)


def block_mass_of_rows(state: AttentionState, query_block: int) -> Tensor:
    """`block_mass` [..., query_blocks, key_blocks] from a state that carries `row_block_mass`.

    The mean over the rows of each query block that see at least one key, as `attention` gives it.

    Raises:
        ValueError: the state carries no `row_block_mass`.
    """
    if "row_block_mass" not in state.statistics:
        raise ValueError(
            "block_mass_of_rows needs the statistic 'row_block_mass', the state carries "
            f"{', '.join(state.statistics) or 'none'}; give it to each AttentionState before merging"
        )
    rows = state.statistics["row_block_mass"]
    short = -rows.shape[-2] % query_block
    mass = torch.nn.functional.pad(rows, (0, 0, 0, short)).unflatten(-2, (-1, query_block)).sum(-2)
    return mass / seen_rows(state.lse > -_INF, query_block)[..., None]


def seen_rows(seen: Tensor, query_block: int) -> Tensor:
    """What the mean over a query block divides by: its rows that are True, at least 1.

    [..., query_blocks] int64 from bool [..., queries].
    """
    short = -seen.shape[-1] % query_block
    blocks = torch.nn.functional.pad(seen, (0, short)).unflatten(-1, (-1, query_block))
    return blocks.sum(-1).clamp(min=1)


def _merge_statistic(name: str, parts: Tensor, weights: Tensor) -> Tensor:
    """Merged statistic of `parts` [parts, ..., queries, more] with `weights` [parts, ..., queries]."""
    weights = weights.to(parts.dtype)
    wide = weights.reshape(weights.shape + (1,) * (parts.dim() - weights.dim()))
    if name == "max_logit":
        return parts.amax(0)
    if name == "concentration":
        return (weights.square() * parts).sum(0)
    if name == "entropy":
        between = -weights * torch.where(weights > 0, weights, 1).log()
        return (weights * parts + between).sum(0)
    return (wide * parts).sum(0)


def _check_mergeable(name: str) -> None:
    if name in MERGEABLE:
        return
    if name in _ROW_SUMS:
        raise ValueError(
            f"statistic {name!r} cannot merge: it is summed over query rows and has lost the "
            "weight of each row; merge 'row_block_mass', or compute it anew with all the keys"
        )
    raise ValueError(
        f"statistic {name!r} cannot merge; a state can carry {', '.join(sorted(MERGEABLE))}"
    )


def _check_alike(states: tuple[AttentionState, ...]) -> None:
    if not states:
        raise ValueError("merge needs at least one state; AttentionState.empty_like makes one")
    first = states[0]
    for number, state in enumerate(states[1:], start=1):
        if state.output.shape != first.output.shape:
            raise ValueError(
                f"states must have equal shapes: output of state 0 is {list(first.output.shape)}, "
                f"of state {number} {list(state.output.shape)}"
            )
        if state.statistics.keys() != first.statistics.keys():
            raise ValueError(
                f"states must carry the same statistics: state 0 has {sorted(first.statistics)}, "
                f"state {number} {sorted(state.statistics)}"
            )
        for name, tensor in state.statistics.items():
            if tensor.shape != first.statistics[name].shape:
                raise ValueError(
                    f"states must have equal shapes: {name!r} of state 0 is {list(first.statistics[name].shape)}, "
                    f"of state {number} {list(tensor.shape)}"
                )
        if any(state is other for other in states[:number]) and bool((state.lse > -_INF).any()):
            raise ValueError(f"state {number} is given twice, and its keys would count twice")
