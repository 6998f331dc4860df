"""Sums of `P = exp(s - lse)` where each row's LSE is known already: one pass, and nothing to normalise.

It is known from a first pass over other keys (a sequence split over processes), or was kept from an earlier
step whose pattern serves this one (AdaSpa, arXiv 2502.21079: the LSE of a denoising step for the search of
the next). Every backend can do it as it is: `-lse` is a bias of the row, and a learned sink of logit `SINK`
makes the denominator `exp(SINK) + sum P`, which is `exp(SINK)` to `exp(-SINK)` of a row's sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lens_kernels import tiled
from lens_kernels.api import run_problem
from lens_kernels.arguments import check_names, check_tensors, without_autocast
from lens_kernels.problem import Problem
from lens_kernels.types import AttentionMask, AttentionStatistics
from lens_kernels.validation import make_problem

if TYPE_CHECKING:
    from jaxtyping import Float

    from lens_kernels.labels import LabelPairs

SINK = 20.0
"""Large enough that a row sum of 1, or of 1,000, changes no float32 denominator by more than 2e-6; not so large that
logits 20 below it lose digits."""
SUMS = frozenset(
    {"received", "diagonal", "block_mass", "block_max", "match_mass", "top_keys", "top_mass"}
)
_INF = float("inf")


@dataclass(frozen=True, eq=False)
class KnownMasses:
    """What `masses_from_lse` returns.

    Attributes:
        statistics: what was asked for, of `exp(s - lse)`; names and shapes as in `attention`.
        drift: [batch, heads, queries], true LSE minus the given one: a row's numbers are `exp(drift)` times
            the true ones. 0 to rounding where the LSE is the row's own; NaN where the row is.
        lowest, highest: [batch, heads, query_blocks], smallest and largest `exp(drift)` of the rows of a
            block: its true block mass lies between `block_mass / highest` and `block_mass / lowest`.
    """

    statistics: AttentionStatistics
    drift: Float[Tensor, "batch heads queries"]
    lowest: Float[Tensor, "batch heads query_blocks"]
    highest: Float[Tensor, "batch heads query_blocks"]


@torch.no_grad()
@without_autocast
def masses_from_lse(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    lse: Float[Tensor, "batch heads queries"],
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    block_size: int | tuple[int, int] = 64,
    statistics: Iterable[str] = ("block_mass",),
    match: LabelPairs | None = None,
    top_k: int = 8,
    backend: str = "auto",
) -> KnownMasses:
    """Block mass and other sums of `exp(s - lse)` in one pass, and the error that an old LSE makes.

    Rows whose given LSE is -inf count as rows that see nothing. No gradients.

    Args:
        query, key: as in `attention`; values are not needed.
        lse: of each row, from this step or an earlier one; learned sinks are in it, if there are any.
        mask, scale, softcap, block_size, match, top_k, backend: as in `attention`.
        statistics: of received, diagonal, block_mass, block_max, match_mass, top_keys, top_mass.

    Raises:
        TypeError, ValueError: as `attention` does; an LSE of another shape.

    Example:
        >>> import torch
        >>> key = torch.zeros(1, 1, 4, 8)
        >>> old = torch.full((1, 1, 4), 3.0).log()
        >>> found = masses_from_lse(key, key, old, block_size=2)
        >>> mass, too_much = found.statistics.block_mass[0, 0, 0, 0], found.highest[0, 0, 0]
        >>> round(float(mass), 4), round(float(too_much), 4)
        (0.6667, 1.3333)
    """
    check_tensors(query=query, key=key, lse=lse)
    names = check_names("statistics", statistics)
    if unknown := sorted(names - SUMS):
        raise ValueError(
            f"{', '.join(unknown)} cannot be had from a known LSE; it gives {', '.join(sorted(SUMS))}"
        )
    if tuple(lse.shape) != tuple(query.shape[:3]) or not lse.is_floating_point():
        raise ValueError(
            f"lse must be floating point [batch, heads, queries] = {list(query.shape[:3])}, got "
            f"{lse.dtype} {list(lse.shape)}"
        )
    problem = make_problem(
        query,
        key,
        key[..., :1],
        mask=mask,
        scale=scale,
        softcap=softcap,
        block_size=block_size,
        statistics=names,
        match=match,
        top_k=top_k,
    )
    lse = lse.to(problem.compute_dtype)
    tensors = known_sums(problem, lse, names | {"row_sum"}, backend)
    drift = torch.where(lse == -_INF, 0, tensors.pop("row_sum").log())
    factor = torch.where(lse == -_INF, torch.nan, drift.exp())
    short = (0, -problem.queries % problem.block_size[0])
    by_block = [
        pad(factor.nan_to_num(fill), short, value=fill).unflatten(-1, (-1, problem.block_size[0]))
        for fill in (_INF, -_INF)
    ]
    found = AttentionStatistics(
        {name: tensors[name] for name in sorted(names)},
        block_size=problem.block_size,
        diagonal_start=problem.diagonal_start,
    )
    return KnownMasses(found, drift, by_block[0].amin(-1), by_block[1].amax(-1))


def known_sums(
    problem: Problem, lse: Tensor, names: frozenset[str], backend: str = "auto"
) -> dict[str, Tensor]:
    """`names` of `SUMS`, and "row_sum" [batch, heads, queries], of `exp(s - lse)`.

    Args:
        problem: without learned sinks and groups; its values are not read.
        lse: [batch, heads, queries] in the compute type.
        names: what is computed.
        backend: as in `attention`.
    """
    asked = (names - {"row_sum"}) | ({"prefix_mass"} if "row_sum" in names else set())
    everything = int(problem.plan.key_position.max()) + 1
    problem = replace(problem, statistics=frozenset(asked), prefix=everything)
    if problem.plan.bias is not None:  # the sum of both biases would be N x N
        tensors = tiled.run(problem, lse.masked_fill(lse == -_INF, _INF)).tensors
        factor = 1.0
    else:
        row = (-lse).masked_fill(lse == -_INF, -_INF)[..., None]
        plan = replace(problem.plan, bias=row.expand(-1, -1, -1, problem.keys))
        sinks = torch.full((problem.heads,), SINK, dtype=lse.dtype, device=lse.device)
        shifted = replace(problem, plan=plan, sink_logits=sinks)
        tensors = dict(run_problem(shifted, backend).statistics)
        factor = math.exp(SINK)
    found = {
        name: tensor if name == "top_keys" else tensor * factor for name, tensor in tensors.items()
    }
    if "row_sum" in names:
        found["row_sum"] = found.pop("prefix_mass")
    return {name: found[name] for name in names}
