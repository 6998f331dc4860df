"""What goes into and comes out of `attention`: the mask, the statistics, the groups, the result.

Axis words are those of the whole project: batch, heads, kv_heads, queries, keys, query_blocks,
key_blocks, pairs, groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lens_kernels.slices import Seen, check_place, moved
from lens_kernels.states import BY_POSITION, MERGEABLE, AttentionState
from lens_kernels.statistics import STATISTICS, Exactness

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Says which keys each query sees, and what is added to the logits.

    A key is visible when *every* part that was given allows it.

    **Positions.** Query `i` stands at key index `anchor = i + keys - queries` (bottom-right
    alignment: the last query stands on the last key). When `key_lengths` and `query_lengths` are
    both given, it is `i + key_length - query_length` per batch row, so that the last *real* query
    stands on the last *real* key. With more queries than keys the first queries stand before key 0
    and see nothing under `causal`. The *origin* of a sequence is its first key: 0, or `key_start`,
    or the start of the packed segment; `prefix`, `prefix_mass` and `moments` count from it.

    Attributes:
        causal: key `j` is visible when `j <= anchor`.
        window: key `j` is visible when `anchor - j < window` (the query's own key included);
            without `causal` also `j - anchor < window`.
        key_lengths: [batch], keys from this index on are padding (right padding).
        query_lengths: [batch], queries from this index on are padding: output 0, LSE -inf, absent
            from received mass, diagonals and block means.
        key_start: [batch], keys before this index are padding (left padding). With `causal`, the
            padded queries beside them then see nothing, as they should.
        key_padding: bool [batch, keys], True for a real key; for padding in any place.
        prefix: int or [batch], prefix-LM: the first `prefix` keys of the sequence are visible to
            all its queries in spite of `causal`; `window` still limits both ways.
        blocks: [blocks + 1] (the same for each batch row) or [batch, blocks + 1], cumulative lengths of blocks of
            keys from 0 (frames of a video, pictures among texts), with `causal`: a query sees its own block whole and all
            before it; behind the last block it sees what `causal` says, and `window` still limits both ways.
        cu_seqlens: [segments + 1] (the same for each batch row) or [batch, segments + 1],
            cumulative lengths of packed sequences, from 0; queries and keys must be the same
            positions. What follows the last one is padding.
        alibi_slopes: [heads], adds `-slope * |anchor - j|` to the logits, after softcap
            (arXiv 2108.12409). No gradient flows to them.
        bias: float, broadcastable [batch | 1, heads | 1, queries | 1, keys], added to the logits
            after softcap (T5, Swin). `-inf` hides a key.
        allowed: bool, broadcastable [batch | 1, heads | 1, queries | 1, keys], True where the key
            is visible; the general, slow case.
    """

    causal: bool = False
    window: int | None = None
    key_lengths: Int[Tensor, "batch"] | Sequence[int] | None = None
    query_lengths: Int[Tensor, "batch"] | Sequence[int] | None = None
    key_start: Int[Tensor, "batch"] | Sequence[int] | None = None
    key_padding: Bool[Tensor, "batch keys"] | None = None
    prefix: int | Int[Tensor, ""] | Int[Tensor, "batch"] | Sequence[int] | None = None
    blocks: Int[Tensor, "bounds"] | Int[Tensor, "batch bounds"] | Sequence[Any] | None = None
    cu_seqlens: (
        Int[Tensor, "bounds"]
        | Int[Tensor, "batch bounds"]
        | Sequence[int]
        | Sequence[Sequence[int]]
        | None
    ) = None
    alibi_slopes: Float[Tensor, "heads"] | None = None
    bias: Float[Tensor, "... #keys"] | None = None
    allowed: Bool[Tensor, "... #keys"] | None = None


class AttentionStatistics(Mapping[str, Tensor]):
    """The statistics that were asked for, by name: `statistics.entropy` or `statistics["entropy"]`.

    Shapes and definitions are in `lens_kernels.STATISTICS`. Names that the backward pass fills
    (`block_attribution`, ...) raise until `backward()` has run.

    Attributes:
        diagonal_start: the distance `query - key` of `diagonal[..., 0]`: 0 for causal masks,
            `1 - queries` otherwise; `diagonal[..., t]` is distance `diagonal_start + t`.
        block_size: (query_block, key_block) of the block maps.
        block_sparse: True when a `block_mask` cut the attention; see `exactness`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        block_size: tuple[int, int],
        diagonal_start: int = 0,
        block_sparse: bool = False,
        from_backward: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        """`from_backward` is kept, not copied: the backward pass writes its tensors into it."""
        self._tensors = dict(tensors)
        self._from_backward = {} if from_backward is None else from_backward
        self.block_size = block_size
        self.diagonal_start = diagonal_start
        self.block_sparse = block_sparse

    def __getitem__(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name]
        if name in self._from_backward:
            tensor = self._from_backward[name]
            if tensor is None:
                raise KeyError(f"statistic {name!r} comes from the backward pass: call backward()")
            return tensor
        raise KeyError(f"statistic {name!r} was not asked for; got {', '.join(self) or 'none'}")

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors
        yield from self._from_backward

    def __len__(self) -> int:
        return len(self._tensors) + len(self._from_backward)

    def __repr__(self) -> str:
        shapes = [f"{name} {list(tensor.shape)}" for name, tensor in self._tensors.items()]
        shapes += [f"{name} (backward)" for name in self._from_backward]
        return f"AttentionStatistics({', '.join(shapes)})"

    def exactness(self, name: str) -> Exactness:
        """How statistic `name` stands to the attention over all visible keys.

        Everything is exact as it is. With a `block_mask` the numbers are exact for the sparse
        attention that was run, and this says what they are for the attention that was not. No
        statistic is an upper bound as a whole: masses of kept blocks are one, and those of dropped
        blocks, which are 0, are lower bounds; together "approx".
        """
        self[name]
        return STATISTICS[name].sparse_exactness if self.block_sparse else "exact"


@dataclass(frozen=True, eq=False)
class AttentionGroups:
    """One attention state per key group, from the same pass; a learned sink is in none of them.

    Attributes:
        output: [groups, batch, heads, queries, value_dim], attention over the group's keys alone
            (normalised in the group); 0 where the row sees none of them. float32 (or float64).
        lse: [groups, batch, heads, queries], log-sum-exp over the group's keys, -inf where none.
        statistics: those of `max_logit`, `entropy`, `concentration` and `distance` that were asked
            for, [groups, batch, heads, queries], of the row restricted to the group's keys and
            renormalised: what they are with all other keys hidden.
    """

    output: Float[Tensor, "groups batch heads queries value_dim"]
    lse: Float[Tensor, "groups batch heads queries"]
    statistics: Mapping[str, Float[Tensor, "groups batch heads queries"]] = field(
        default_factory=dict
    )

    @property
    def states(self) -> tuple[AttentionState, ...]:
        """One `AttentionState` per group; `merge(*groups.states)` is the whole attention."""
        return tuple(
            AttentionState(
                self.output[group],
                self.lse[group],
                {name: tensor[group] for name, tensor in self.statistics.items()},
                placed=True,
            )
            for group in range(len(self.lse))
        )


@dataclass(frozen=True, eq=False)
class AttentionResult:
    """What `attention` returns.

    Attributes:
        output: [batch, heads, queries, value_dim], of the query's dtype; differentiable.
        statistics: what was asked for.
        groups: one state per key group where `groups=` was given, else None.
        backend: the name of the backend that ran.
        seen: the keys and the mask of the call, where they are known.
    """

    output: Float[Tensor, "batch heads queries value_dim"]
    statistics: AttentionStatistics
    groups: AttentionGroups | None
    backend: str
    seen: Seen | None = None

    def state(
        self, *, keys_before: int | None = None, keys_after: int | None = None
    ) -> AttentionState:
        """What this result is for `merge`, when it saw some of the keys only.

        Carried is what can merge of the statistics. `distance` and `moments` are moved to where they
        would be among all the keys; `prefix_mass` and `grid_moments` cannot be moved.

        Learned sinks are for `merge`: with `sink_logits` in each part they would count twice. A mask
        that counts positions (`causal`, `window`, `alibi_slopes`, ...) counts those of the slice: give
        slices their own part of `allowed` or `bias`.

        Args:
            keys_before: keys of the whole sequence in front of the slice that `attention` got; 0
                when it got all keys and a mask hid the others.
            keys_after: keys of the whole sequence behind the slice, likewise.

        Raises:
            TypeError, ValueError: `lse` was not asked for; learned sinks; statistics that count positions,
                and it is not said where the slice lies, or they cannot be moved there; a mask that sees
                other keys in the slice than in the whole.

        Example:
            >>> import torch
            >>> from lens_kernels import attention, merge
            >>> key = torch.zeros(1, 1, 6, 4)
            >>> asked = {"statistics": ("lse", "distance")}
            >>> left = attention(key[:, :, 5:], key[:, :, :2], key[:, :, :2], **asked)
            >>> right = attention(key[:, :, 5:], key[:, :, 2:], key[:, :, 2:], **asked)
            >>> states = left.state(keys_before=0, keys_after=4), right.state(keys_before=2, keys_after=0)
            >>> merge(*states).statistics["distance"]
            tensor([[[2.5000]]])
        """
        found, seen = self.statistics, self.seen
        if "lse" not in found:
            raise ValueError(
                f"a state needs 'lse', the result has {', '.join(found) or 'no statistics'}; "
                "add 'lse' to statistics="
            )
        if seen is not None and seen.sinks:
            raise ValueError(
                "sink_logits are in the rows of this result, and would count in each part: leave them out of "
                "attention, and give them to merge(..., sink_logits=)"
            )
        carried = {name: found[name] for name in found if name in MERGEABLE}
        placed = BY_POSITION & carried.keys()
        check_place(placed, keys_before, keys_after)
        spans = None
        if keys_before is not None and keys_after is not None:
            if seen is not None:
                spans = seen.placed(carried.keys(), keys_before, keys_after)
            carried |= moved(carried, found["lse"], keys_before, keys_after)
        return AttentionState(self.output, found["lse"], carried, bool(placed), spans)

    def __repr__(self) -> str:
        shape = list(self.output.shape)
        return f"AttentionResult(output={shape}, backend={self.backend!r}, {self.statistics!r})"
