"""The internal contract: what every backend receives and what it hands back.

`make_problem` (validation.py) checks the user's arguments once and lowers them to a `Problem`. A
backend is a module (or package) with

    supports(problem) -> str | None      None when it can do all of it, else the reason why not
    run(problem) -> BackendResult        computes what `problem.statistics` names

registered by its name in dispatch.py. `run` never checks arguments again, never falls back, and
works on detached tensors: gradients are attached afterwards by `backward.attach`, computed by
tiled_backward.py, or by the backend itself where it also has

    supports_gradients(problem) -> str | None
    gradients(saved: Saved, upstream: Upstream) -> Gradients

(backward.py). A module whose `run` is differentiable by itself, the reference, says
`DIFFERENTIABLE = True`.

**One mask form.** Causal, window, padding, prefix-LM and packing all lower to one interval of keys
per query row: key `j` is visible to query `i` of batch row `b` when
`low[b, i] <= j < high[b, i]`, and `keep[b, j]`, `allowed[b, h, i, j]`, `block_mask` where they are
given. A row whose interval is empty has `low == high == 0`; padding queries are such rows. Whether
a row saw any key is told by its LSE alone (> -inf): `keep`, `allowed`, a bias of -inf or a
`block_mask` may hide the whole interval.

**Logits.** `s = scale * q.k`, then `softcap * tanh(s / softcap)`, then `+ bias`, then
`- slope * |anchor - j|`, then the mask (-inf).

**Padding is already clean.** Keys and values that no query may see (padding) and padding queries
are zero in `problem.key`, `problem.value`, `problem.query`, so NaN in them cannot leak.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lens_kernels.statistics import STATISTICS, Statistic
from lens_kernels.types import AttentionGroups

_KEPT = 1 << 22
"""Numbers that a plan keeps for calls to come: 16 MB."""


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """The mask, lowered. All index tensors are int32 on the query's device.

    Attributes:
        low: [batch, queries], first key of the row's interval.
        high: [batch, queries], one past its last; `low == high == 0` for an empty interval.
        anchor: [batch, queries], key index at which the query stands; distance is `anchor - j`.
            Consecutive in each batch row: `anchor[b, i] = anchor[b, 0] + i`.
        key_position: [batch, keys], key index counted from the origin of its sequence (negative in
            left padding).
        keep: bool [batch, keys], False for keys hidden from all queries by `key_padding`, or None.
        allowed: bool [batch | 1, heads | 1, queries | 1, keys], or None.
        bias: [batch | 1, heads | 1, queries | 1, keys] in the input's float type, or None.
        slopes: ALiBi, [heads] float32 (float64 with float64 inputs), or None.
        causal: no query sees a key after its anchor (False for a prefix-LM).
        simple: the interval is exactly that of `causal`, `window` and `offset` over all the keys,
            for every batch row: kernels may compute it from three numbers instead of loading it.
        window: as in `AttentionMask`.
        offset: `anchor = i + offset`; meaningful where `simple`.
        made: what was made from it alone, and serves every call that shares the plan.
    """

    low: Tensor
    high: Tensor
    anchor: Tensor
    key_position: Tensor
    causal: bool
    simple: bool
    window: int | None
    offset: int
    keep: Tensor | None = None
    allowed: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    made: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def ranges(self, rows: int) -> list[list[tuple[int, int]]]:
        """Keys that each panel of `rows` queries can see: [batch][panels] of (first, end).

        `end` is one past the last; (0, 0) for a panel that sees nothing. One transfer
        from the device in all.
        """
        batch, queries = self.low.shape
        panels = -(-queries // rows)
        pad = (0, panels * rows - queries)
        empty = self.high <= self.low
        far = torch.iinfo(torch.int32).max
        low = torch.nn.functional.pad(self.low.masked_fill(empty, far), pad, value=far)
        high = torch.nn.functional.pad(self.high.masked_fill(empty, 0), pad, value=0)
        low = low.view(batch, panels, rows).amin(-1)
        high = high.view(batch, panels, rows).amax(-1)
        pairs = torch.stack((torch.minimum(low, high), high), dim=-1).tolist()
        return [[(first, last) for first, last in row] for row in pairs]


@dataclass(frozen=True, eq=False)
class Problem:
    """A validated call of `attention`.

    Attributes:
        query: [batch, heads, queries, head_dim], any strides; may carry a gradient graph.
        key: [batch, kv_heads, keys, head_dim]. Head `h` reads key-value head
            `h // (heads // kv_heads)`; never repeat them.
        value: [batch, kv_heads, keys, value_dim].
        plan: the mask.
        scale: factor of the logits.
        softcap: or None.
        sink_logits: [heads] in the compute type, or None: a logit in each row's denominator, with
            value 0. A row that sees no key stays empty (LSE -inf) in spite of it.
        block_size: (query_block, key_block); the grid starts at index 0, last blocks may be short.
        statistics: names to compute (see statistics.py); those `from_backward` are not for `run`.
        query_labels: [batch, queries, pairs] int32, at least -1, or None.
        key_labels: [batch, keys, pairs] int32, likewise. A row label of -1 matches no key.
        prefix: for `prefix_mass`: keys with `key_position < prefix` (those before 0 are hidden).
        top_k: number of key blocks in `top_keys`, at most key_blocks.
        grid: (height, width, first key) of the image keys, or None.
        groups: [batch, keys] int32, group of each key, or None.
        group_count: 0 without groups.
        group_outputs: False: their outputs are left out, [..., 0].
        block_mask: bool [batch | 1, heads | 1, query_blocks, key_blocks], True for a block that is
            computed, or None.
        key_weights: [batch, heads, keys] in the compute type, or None.
        differentiable: names of statistics through which gradients shall flow, beside the output
            and `lse`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    plan: MaskPlan
    scale: float
    softcap: float | None
    sink_logits: Tensor | None
    block_size: tuple[int, int]
    statistics: frozenset[str]
    query_labels: Tensor | None
    key_labels: Tensor | None
    prefix: int
    top_k: int
    grid: tuple[int, int, int] | None
    groups: Tensor | None
    group_count: int
    block_mask: Tensor | None
    key_weights: Tensor | None
    differentiable: frozenset[str] = frozenset()
    group_outputs: bool = True

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def value_dim(self) -> int:
        return self.value.shape[3]

    @property
    def query_blocks(self) -> int:
        return math.ceil(self.queries / self.block_size[0])

    @property
    def key_blocks(self) -> int:
        return math.ceil(self.keys / self.block_size[1])

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of logits, sums and statistics: float64 for float64 inputs, else float32."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def diagonal_start(self) -> int:
        """Distance of the first entry of `diagonal`."""
        return 0 if self.plan.causal else 1 - self.queries

    @property
    def distances(self) -> int:
        """Length of `diagonal`: keys when causal, else queries + keys - 1."""
        return self.keys - self.diagonal_start

    @property
    def needs_gradients(self) -> bool:
        """Whether any input that gradients reach asks for one."""
        inputs = (self.query, self.key, self.value, self.sink_logits, self.plan.bias)
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in inputs
        )

    def wants(self, *names: str) -> bool:
        """Whether any of the names is to be computed."""
        return not self.statistics.isdisjoint(names)


@dataclass(frozen=True, eq=False)
class BackendResult:
    """What `run` hands back.

    Attributes:
        output: [batch, heads, queries, value_dim] in the query's dtype.
        tensors: name -> tensor for each of `problem.statistics` that is not `from_backward`, in the
            compute type and contiguous, and always `lse` (asked for or not: gradients need it).
        groups: the group states where `problem.groups` is given.
        infinite: whether any query, key or `q.k` was not finite, hidden ones included; None where `run` did not look.
        looked_at_values: whether `infinite` speaks of values too.
    """

    output: Tensor
    tensors: dict[str, Tensor]
    groups: AttentionGroups | None = None
    from_backward: dict[str, Tensor | None] = field(default_factory=dict)
    infinite: bool | None = None
    looked_at_values: bool = False


def statistic_shape(
    problem: Problem, name: str, table: Mapping[str, Statistic] = STATISTICS
) -> tuple[int, ...]:
    """Shape of a statistic, from the axes of its table entry (`heads` and `batch` in front)."""
    pairs = 0 if problem.query_labels is None else problem.query_labels.shape[-1]
    sizes = {
        "batch": problem.batch,
        "heads": problem.heads,
        "queries": problem.queries,
        "keys": problem.keys,
        "query_blocks": problem.query_blocks,
        "key_blocks": problem.key_blocks,
        "distances": problem.distances,
        "pairs": pairs,
        "k": problem.top_k,
    }
    return tuple(sizes[axis] if axis in sizes else int(axis) for axis in table[name].axes)


def group_statistics(problem: Problem) -> list[str]:
    """Names that each key group's state carries: those asked for that any group has by itself."""
    names = ("max_logit", "entropy", "concentration", "distance")
    return [name for name in names if problem.wants(name)]


def row_features(problem: Problem) -> tuple[Tensor, dict[str, slice]]:
    """Per-key numbers whose mean under `P` is a row statistic: `sum_j P_ij f_j`.

    Covers `prefix_mass`, `moments`, `grid_moments` and `mean_value_norm`, as far as they are asked
    for. A backend may append them to the values as extra columns.

    Returns:
        [batch, kv_heads, keys, features] in the compute type, in memory with features outermost,
        and the columns of each statistic.
    """
    plan, kinds = problem.plan, ("prefix_mass", "moments", "grid_moments")
    wanted = tuple(name for name in kinds if problem.wants(name))
    lines, dtype = (problem.batch, problem.kv_heads), problem.compute_dtype
    prefix, grid = (problem.prefix, problem.grid) if wanted else (0, None)
    known = (wanted, prefix, grid, lines, dtype)
    features = plan.made.get(known)
    if features is None:
        with torch.inference_mode(False):
            features = _of_positions(plan.key_position, *known)
        if features.numel() <= _KEPT:
            plan.made[known] = features
    counts = {"prefix_mass": 1, "moments": 2, "grid_moments": 5, "mean_value_norm": 1}
    if problem.wants("mean_value_norm"):
        value = problem.value.detach()  # not made float32 first: at 128k tokens that is 2 GiB
        norm = torch.linalg.vector_norm(value, dim=-1, dtype=dtype)
        features = torch.cat((features, norm[None]))
        wanted = (*wanted, "mean_value_norm")
    names, first = {}, 0
    for name in wanted:
        names[name] = slice(first, first + counts[name])
        first += counts[name]
    return features.movedim(0, -1), names


def _of_positions(
    position: Tensor,
    wanted: tuple[str, ...],
    prefix: int,
    grid: tuple[int, int, int] | None,
    lines: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The features that a key's position decides: [features, *lines, keys]."""
    keys, columns = position.shape[-1], []
    if "prefix_mass" in wanted:
        columns.append(position < prefix)
    if "moments" in wanted:
        columns += [position, position.to(dtype).square()]
    if "grid_moments" in wanted:
        assert grid is not None
        height, width, first = grid
        index = torch.arange(keys, device=position.device) - first
        inside = (index >= 0) & (index < height * width)
        x = (index % width) * inside
        y = torch.div(index, width, rounding_mode="floor") * inside
        columns += [x, y, x * x, y * y, inside]
    found = position.new_empty((len(columns), *lines, keys), dtype=dtype)
    for place, column in zip(found, columns, strict=True):
        place.copy_(column.unsqueeze(-2) if column.dim() == 2 else column)
    return found


def top_blocks(block_mass: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`top_keys` and `top_mass` of block maps [..., key_blocks]; ties go to the lower index."""
    mass, index = block_mass.sort(dim=-1, descending=True, stable=True)
    return index[..., :top_k].contiguous(), mass[..., :top_k].contiguous()
