"""`ring_attention`: two rotations of a sequence that is split over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from lens_kernels.arguments import without_autocast
from lens_kernels.distributed.layout import Layout
from lens_kernels.distributed.links import Links
from lens_kernels.distributed.parts import (
    OF_GROUPS,
    Asked,
    Keys,
    Queries,
    states,
    sums,
)
from lens_kernels.states import AttentionState, merge, seen_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_INF = float("inf")
Transfer: TypeAlias = Literal["keys", "queries"]
_ROWS = frozenset(
    {
        *("lse", "max_logit", "entropy", "concentration", "distance"),
        *("prefix_mass", "match_mass", "value_norm", "mean_value_norm"),
    }
)
_SUMS = frozenset({"received", "diagonal", "block_mass", "block_max"})


@dataclass(frozen=True, eq=False)
class RingResult:
    """What one rank has of the attention of the whole sequence.

    Attributes:
        output: [batch, heads, tokens, value_dim] of the rank's own queries, in the query's type.
        statistics: name -> tensor; of rows and `received` those of the rank's own tokens, `block_mass` and
            `block_max` [batch, heads, own query blocks, all key blocks], `diagonal` the whole.
        groups: one state per key group, of the rank's own queries; empty without groups.
    """

    output: Float[Tensor, "batch heads tokens value_dim"]
    statistics: dict[str, Tensor]
    groups: tuple[AttentionState, ...] = ()


@torch.no_grad()
@without_autocast
def ring_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    layout: Layout,
    links: Links,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, "heads"] | None = None,
    statistics: Iterable[str] = ("lse",),
    match: Sequence[tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]] | None = None,
    prefix: int = 4,
    groups: Int[Tensor, "batch tokens"] | None = None,
    group_count: int = 2,
    transfer: Transfer = "keys",
    backend: str = "auto",
) -> RingResult:
    """Attention over the whole sequence, on every rank for its own tokens. Every rank must call it.

    The first rotation merges `(output, LSE, row statistics)` of each rank's keys exactly. The second, where a
    sum over rows is asked for, computes `exp(s - lse)` with the LSE known. Each rank holds its own tokens and
    those of one other rank at a time. No gradients.

    Args:
        query, key, value: of the rank's own tokens, in the order of `layout.positions(rank)`.
        layout: which tokens each rank holds; block maps are of its `block`.
        links: of this rank.
        causal, window, scale, softcap, sink_logits, prefix, backend: as in `attention`.
        statistics: of lse, max_logit, entropy, concentration, distance, prefix_mass, match_mass, value_norm,
            mean_value_norm, received, diagonal, block_mass, block_max, as `attention` defines them.
        match: labels of the rank's own tokens as queries and as keys.
        groups: group of each of the rank's own keys, for a state per group.
        group_count: number of groups, the same on every rank.
        transfer: "keys": keys and values go round, one way; "queries": queries go round and what is found goes
            back to where they are from at the same time, so that links are used both ways (TokenRing, arXiv
            2412.20501); less for few queries and many keys, more under grouped-query attention.

    Raises:
        ValueError: a layout for other ranks or sizes, an unknown statistic, or as `attention`.

    Example:
        >>> layout, x = Layout(8, 2), torch.zeros(1, 1, 8, 4)
        >>> def rank(links):
        ...     own = layout.take(x, links.rank, 2)
        ...     return ring_attention(own, own, own, layout, links, statistics=("received",))
        >>> from lens_kernels.distributed import Simulated
        >>> parts = [result.statistics["received"] for result in Simulated.run(2, rank)]
        >>> round(float(layout.join(parts, 2)[0, 0, 0]), 3)  # 1 + 1/2 + ... + 1/8
        2.718
    """
    names = _names(statistics, match)
    _check(query, key, layout, links, transfer)
    asked = Asked(
        length=layout.length,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        block=layout.block,
        rows=(names & _ROWS) - {"lse", "value_norm"},
        sums=names & _SUMS,
        prefix=prefix,
        group_count=0 if groups is None else group_count,
        backend=backend,
    )
    labels = [None, None]
    if match is not None:
        labels = [torch.stack([pair[side] for pair in match], -1) for side in (0, 1)]
    queries = Queries(query, labels[0], layout.pieces(links.rank))
    keys = Keys(key, value, labels[1], groups, layout.pieces(links.rank))
    found = _first(asked, queries, keys, layout, links, transfer)
    whole = merge(found[0], sink_logits=sink_logits)
    statistics_ = {"lse": whole.lse, **whole.statistics}
    if "value_norm" in names:
        statistics_["value_norm"] = whole.output.norm(dim=-1)
    if asked.sums:
        statistics_ |= _second(asked, queries, keys, whole.lse, layout, links, transfer)
    kept = {name: statistics_[name] for name in sorted(names)}  # in one order on every rank
    return RingResult(whole.output.to(query.dtype), kept, tuple(found[1:]))


def _names(asked: Iterable[str], match: object) -> frozenset[str]:
    names = frozenset([asked] if isinstance(asked, str) else asked)
    if unknown := sorted(names - _ROWS - _SUMS):
        raise ValueError(
            f"a split sequence has no {', '.join(unknown)}; it has {', '.join(sorted(_ROWS | _SUMS))}"
        )
    if ("match_mass" in names) != (match is not None):
        raise ValueError("statistic 'match_mass' and match= go together: give both or neither")
    return names


def _check(query: Tensor, key: Tensor, layout: Layout, links: Links, transfer: str) -> None:
    if transfer not in ("keys", "queries"):
        raise ValueError(f"transfer must be 'keys' or 'queries', got {transfer!r}")
    if layout.ranks != links.size:
        raise ValueError(
            f"the layout is for {layout.ranks} ranks and there are {links.size}; make it for those"
        )
    expected = layout.size(links.rank)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4 or tensor.shape[2] != expected:
            raise ValueError(
                f"{name} of rank {links.rank} must hold its {expected} tokens, [batch, heads, {expected}, "
                f"dim], got {list(tensor.shape)}"
            )


# --- rotations ------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Rotation:
    """Own tensors go round all ranks; what each rank finds with them comes back."""

    links: Links
    layout: Layout
    axes: Sequence[int]  # of the tokens, in each of the tensors
    given: Sequence[Tensor]
    compute: Callable[[int, list[Tensor]], list[Tensor]]  # (whose, tensors) -> what goes back
    take: Callable[[int, list[Tensor]], None]  # (by whom, what came back)
    _buffers: dict[int, list[Tensor]] = field(default_factory=dict)

    def _empty(self, rank: int) -> list[Tensor]:
        """Room for the tensors of another rank."""
        shapes = [list(tensor.shape) for tensor in self.given]
        for shape, axis in zip(shapes, self.axes, strict=True):
            shape[axis] = self.layout.size(rank)
        return [tensor.new_empty(shape) for tensor, shape in zip(self.given, shapes, strict=True)]

    def run(self, room: Callable[[int], list[Tensor]]) -> None:
        """`room(rank)`: tensors like those that come back from a rank, after its own were taken."""
        rank, size = self.links.rank, self.links.size
        held = list(self.given)
        leaving: tuple[int, list[Tensor]] | None = None
        for step in range(size + 1):
            sends: list[tuple[int, Tensor]] = []
            receives: list[tuple[int, Tensor]] = []
            following: list[Tensor] = []
            if step < size - 1:
                following = self._empty((rank - step - 1) % size)
                sends += [((rank + 1) % size, tensor) for tensor in held]
                receives += [((rank - 1) % size, tensor) for tensor in following]
            coming: list[Tensor] = []
            helper = (rank + step - 1) % size
            if leaving is not None:
                coming = room(helper)
                sends += [(leaving[0], tensor) for tensor in leaving[1]]
                receives += [(helper, tensor) for tensor in coming]
            wait = self.links.exchange(sends, receives) if sends or receives else None
            leaving = None
            if step < size:
                owner = (rank - step) % size
                found = self.compute(owner, held)
                if step:
                    leaving = (owner, found) if found else None
                else:
                    self.take(rank, found)
            if wait is not None:
                wait()
            if coming:
                self.take(helper, coming)
            held = following


def _first(
    asked: Asked,
    queries: Queries,
    keys: Keys,
    layout: Layout,
    links: Links,
    transfer: Transfer,
) -> list[AttentionState]:
    """The state of the rank's queries over all keys, and over the keys of each group."""
    total: list[AttentionState] = []

    def add(found: Sequence[AttentionState]) -> None:
        total[:] = [merge(*both) for both in zip(total, found, strict=True)] if total else found

    if transfer == "keys":
        given, names = _present(
            key=keys.key, value=keys.value, labels=keys.labels, groups=keys.groups
        )

        def with_keys(owner: int, held: list[Tensor]) -> list[Tensor]:
            parts = dict(zip(names, held, strict=True))
            other = Keys(
                parts["key"],
                parts["value"],
                parts.get("labels"),
                parts.get("groups"),
                layout.pieces(owner),
            )
            add(states(asked, queries, other))
            return []

        axes = [2 if name in ("key", "value") else 1 for name in names]
        _Rotation(links, layout, axes, given, with_keys, lambda *_: None).run(lambda _: [])
        return total
    given, names = _present(query=queries.query, labels=queries.labels)

    def with_queries(owner: int, held: list[Tensor]) -> list[Tensor]:
        parts = dict(zip(names, held, strict=True))
        other = Queries(parts["query"], parts.get("labels"), layout.pieces(owner))
        return _packed(states(asked, other, keys))

    def take(_: int, back: list[Tensor]) -> None:
        add(_unpacked(asked, back))

    axes = [2 if name == "query" else 1 for name in names]
    rotation = _Rotation(links, layout, axes, given, with_queries, take)
    rotation.run(lambda _: [torch.empty_like(tensor) for tensor in _packed(total)])
    return total


def _second(
    asked: Asked,
    queries: Queries,
    keys: Keys,
    lse: Tensor,
    layout: Layout,
    links: Links,
    transfer: Transfer,
) -> dict[str, Tensor]:
    """Received mass of the rank's keys, its rows of the block maps, the whole diagonals."""
    lines, rank = lse.shape[:2], links.rank
    size = layout.size(rank)
    received = lse.new_zeros(*lines, size)
    diagonal = lse.new_zeros(*lines, asked.distances if "diagonal" in asked.sums else 0)
    maps: dict[int, tuple[Tensor, Tensor]] = {}  # mass and largest, of the keys of each rank

    if transfer == "keys":

        def with_keys(owner: int, held: list[Tensor]) -> list[Tensor]:
            other = Keys(held[0], held[0][..., :1], None, None, layout.pieces(owner))
            found = sums(asked, queries, lse, other)
            diagonal.add_(found.diagonal)
            maps[owner] = (found.mass, found.largest)
            return [found.received] if "received" in asked.sums else []

        def take_received(_: int, back: list[Tensor]) -> None:
            for part in back:
                received.add_(part)

        rotation = _Rotation(links, layout, [2], [keys.key], with_keys, take_received)
        rotation.run(lambda _: [torch.empty_like(received)] if "received" in asked.sums else [])
    else:
        own = Keys(keys.key, keys.key[..., :1], None, None, keys.pieces)
        wants_maps = bool({"block_mass", "block_max"} & asked.sums)

        def with_queries(owner: int, held: list[Tensor]) -> list[Tensor]:
            other = Queries(held[0], None, layout.pieces(owner))
            found = sums(asked, other, held[1], own)
            diagonal.add_(found.diagonal)
            received.add_(found.received)
            return [found.mass, found.largest] if wants_maps else []

        def take_maps(helper: int, back: list[Tensor]) -> None:
            if back:
                maps[helper] = (back[0], back[1])

        def room(helper: int) -> list[Tensor]:
            shape = (*lines, *(layout.size(one, asked.block) for one in (rank, helper)))
            return [lse.new_empty(shape), lse.new_empty(shape)] if wants_maps else []

        given = [queries.query, lse]
        _Rotation(links, layout, [2, 2], given, with_queries, take_maps).run(room)

    def joined(number: int) -> Tensor:
        """Maps over the keys of each rank as one over all keys, in their order."""
        parts = [maps[one][number] for one in range(layout.ranks)]
        return layout.join(parts, 3, asked.block)

    tensors = {"received": received}
    if "diagonal" in asked.sums:
        tensors["diagonal"] = links.add(diagonal)
    if "block_max" in asked.sums:
        tensors["block_max"] = joined(1)
    if "block_mass" in asked.sums:
        local = layout.local(rank)
        seen = [seen_rows(lse[:, :, part] > -_INF, asked.block) for part in local]
        tensors["block_mass"] = joined(0) / torch.cat(seen, -1)[..., None]
    return tensors


def _present(**tensors: Tensor | None) -> tuple[list[Tensor], list[str]]:
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return [tensor.contiguous() for tensor in found.values()], list(found)


def _packed(found: Sequence[AttentionState]) -> list[Tensor]:
    """The tensors of states, in one order."""
    return [
        tensor.contiguous()
        for state in found
        for tensor in (
            state.output,
            state.lse,
            *(state.statistics[n] for n in sorted(state.statistics)),
        )
    ]


def _unpacked(asked: Asked, tensors: Sequence[Tensor]) -> list[AttentionState]:
    found, at = [], iter(tensors)
    for number in range(1 + asked.group_count):
        names = sorted(asked.rows if not number else asked.rows & set(OF_GROUPS))
        output, lse = next(at), next(at)
        found.append(AttentionState(output, lse, {name: next(at) for name in names}, placed=True))
    return found
