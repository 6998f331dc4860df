"""Which keys a query sees, as a few numbers instead of N×N."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lens_kernels import AttentionMask
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor


@dataclass(frozen=True)
class MaskStructure:
    """Which keys a query sees.

    Attributes:
        causal: no key after the query; the last query stands on the last key.
        window: keys at a distance below this, or None; both ways unless causal.
        padding: bool [batch, keys], True for a real key; None when all are.
        allowed: bool [batch, 1, queries, keys], which says all of the above itself, or None.
        start: position of key 0 among all tokens so far; above 0 where a cache has dropped older keys.
        first: [batch], position of the first real token; None: 0 unless `padding` says else.
        placed: whether `start` and `first` are known.
        cross: whether the keys are of another sequence than the queries; `padding` is of the keys then.
    """

    causal: bool
    window: int | None = None
    padding: Bool[Tensor, "batch keys"] | None = None
    allowed: Bool[Tensor, "batch 1 queries keys"] | None = None
    start: int = 0
    first: Int[Tensor, "batch"] | None = None
    placed: bool = True
    cross: bool = False

    def with_allowed(self, allowed: Bool[Tensor, "batch 1 queries keys"]) -> MaskStructure:
        """The mask of some of these queries and keys, as `allowed` says."""
        return replace(self, allowed=allowed)

    def for_kernel(self, queries: int) -> AttentionMask:
        """The mask as `lens_kernels` takes it; padded queries see nothing."""
        if self.padding is None or self.allowed is not None:
            return AttentionMask(causal=self.causal, window=self.window, allowed=self.allowed)
        first = self.first_key(len(self.padding))
        if self.cross or queries < self.padding.shape[1]:  # or cached: every query is a real token
            return AttentionMask(
                causal=self.causal,
                window=self.window,
                key_start=first,
                key_padding=self.padding,
            )
        past = first + self.padding.sum(-1)
        return AttentionMask(
            causal=self.causal,
            window=self.window,
            cu_seqlens=torch.stack([torch.zeros_like(first), first, past], dim=-1),
            key_padding=self.padding,
        )

    def seen_by(self, queries: Int[Tensor, "queries"], keys: int) -> Bool[Tensor, "queries keys"]:
        """bool [queries, keys]: which keys these queries (their places) of the first prompt see."""
        if self.allowed is not None:
            return self.allowed[0, 0, queries]
        return self._pairs(queries, keys)[0]

    def pairs(self, queries: int, keys: int, device: Any) -> Bool[Tensor, "#batch queries keys"]:
        """Which keys each of the queries sees, the last of which stands on the last key."""
        if self.allowed is not None:
            return self.allowed[:, 0].to(device)
        return self._pairs(torch.arange(keys - queries, keys, device=device), keys)

    def _pairs(
        self, place: Int[Tensor, "queries"], keys: int
    ) -> Bool[Tensor, "#batch queries keys"]:
        """The same of queries at these places, where `allowed` does not say it."""
        behind = place[:, None] - torch.arange(keys, device=place.device)
        seen = torch.ones_like(behind, dtype=torch.bool)[None]
        if self.causal:
            seen = seen & (behind >= 0)
        if self.window is not None:
            seen = seen & (behind.abs() < self.window)
        return seen if self.padding is None else seen & self.padding[:, None].to(place.device)

    def first_key(self, batch: int) -> Int[Tensor, "batch"]:
        """[batch]: index of the first real key."""
        if self.padding is None:
            return torch.zeros(batch, dtype=torch.long)
        return self.padding.int().argmax(-1)

    def first_token(self, batch: int) -> Int[Tensor, "batch"]:
        """[batch]: where the first real token stands among the keys; negative where a cache dropped it."""
        if self.first is not None:
            return self.first - self.start
        return self.first_key(batch) - (self.start if self.padding is None else 0)

    def without_last(self, count: int) -> MaskStructure:
        """The mask without the last queries, which are the last keys too."""
        padding, allowed = self.padding, self.allowed
        return replace(
            self,
            padding=None if padding is None else padding[:, :-count],
            allowed=None if allowed is None else allowed[..., :-count, :-count],
        )

    def hides_next(self, tokens: int) -> Bool[Tensor, "before"]:
        """bool [tokens - 1] of queries that are the keys, of the first prompt: the next token is seen by none up to there."""
        key = torch.arange(tokens)
        if self.allowed is None:
            return (key[:-1] >= 0) & self.causal
        furthest = torch.where(self.allowed[0, 0].cpu(), key, -1).amax(-1).cummax(-1).values
        return furthest[:-1] <= key[:-1]

    def ranges(self) -> Int[Tensor, "2 queries"] | None:
        """First key that each query of one prompt sees and one past its last, where `allowed` says it; None where it does
        not, or a query sees keys with others between."""
        if self.allowed is None or len(self.allowed) > 1:
            return None
        seen = self.allowed[0, 0].cpu()
        first, past = seen.int().argmax(-1), seen.shape[-1] - seen.flip(-1).int().argmax(-1)
        return torch.stack([first, past]) if bool((past - first == seen.sum(-1)).all()) else None

    def visible(self, batch: int, queries: int, keys: int) -> Int[Tensor, "batch keys"]:
        """[batch, keys]: how many real queries see each key."""
        if self.allowed is not None:
            return self.allowed[:, 0].sum(-2).expand(batch, -1)
        real = torch.ones(batch, keys, dtype=torch.bool) if self.padding is None else self.padding
        if self.cross:
            return real * queries
        device = None if self.padding is None else self.padding.device
        key = torch.arange(keys, device=device)
        reach = keys if self.window is None else self.window
        first = (key if self.causal else key - reach + 1).clamp(min=keys - queries)
        last = (key + reach - 1).clamp(max=keys - 1)
        before = pad(real.cumsum(-1), (1, 0))  # [batch, keys + 1]
        return (before[:, last + 1] - before[:, first]).clamp(min=0) * real


@dataclass(frozen=True, kw_only=True)
class BlockStructure(MaskStructure):
    """That of block-causal masks: a query sees what is before it, and its own block whole (frames of a video, images).

    Attributes:
        allowed: the same spelled out, made where it is asked for: `lens.passes.masks.StructuredMask`.
        bounds: [batch, segments + 1], where the blocks begin, rising from 0, and the number of keys; a
            token of no block is one alone.
        queries: how many there are; the last one stands on the last key.
    """

    bounds: Int[Tensor, "batch bounds"]
    queries: int

    def with_allowed(self, allowed: Bool[Tensor, "batch 1 queries keys"]) -> MaskStructure:
        """See `MaskStructure`; spelled out."""
        return MaskStructure(
            self.causal, allowed=allowed, start=self.start, first=self.first, placed=self.placed
        )

    def for_kernel(self, queries: int) -> AttentionMask:
        """See `MaskStructure`."""
        return AttentionMask(causal=True, blocks=self.bounds)

    def seen_by(self, queries: Int[Tensor, "queries"], keys: int) -> Bool[Tensor, "queries keys"]:
        """See `MaskStructure`."""
        past = self._ends(queries.cpu() + keys - self.queries)[0]
        return torch.arange(keys, device=queries.device) < past.to(queries.device)[:, None]

    def without_last(self, count: int) -> MaskStructure:
        """See `MaskStructure`; spelled out."""
        allowed = None if self.allowed is None else self.allowed[..., :-count, :-count]
        return MaskStructure(self.causal, allowed=allowed, start=self.start, first=self.first)

    def hides_next(self, tokens: int) -> Bool[Tensor, "before"]:
        """See `MaskStructure`."""
        place = torch.arange(tokens)
        return self._ends(place)[0, :-1].cummax(-1).values <= place[:-1] + 1

    def ranges(self) -> Int[Tensor, "2 queries"] | None:
        """See `MaskStructure`."""
        if len(self.bounds) > 1:
            return None
        keys = int(self.bounds[0, -1])
        past = self._ends(torch.arange(keys - self.queries, keys))[0]
        return torch.stack([torch.zeros_like(past), past])

    def visible(self, batch: int, queries: int, keys: int) -> Int[Tensor, "batch keys"]:
        """See `MaskStructure`: what stands from the first token of a key's block on sees the key."""
        bounds = self.bounds.cpu()
        own = self._block_of(torch.arange(keys)) - 1
        first = bounds.gather(1, own).clamp(min=keys - queries)
        return (keys - first).expand(batch, -1)

    def _block_of(self, place: Int[Tensor, "places"]) -> Int[Tensor, "batch places"]:
        """The number of the block that each place is in, from 1."""
        bounds = self.bounds.cpu()
        return torch.searchsorted(bounds, place.expand(len(bounds), -1).contiguous(), right=True)

    def _ends(self, place: Int[Tensor, "places"]) -> Int[Tensor, "batch places"]:
        """One past the last key of that block."""
        return self.bounds.cpu().gather(1, self._block_of(place))


def bounds_of(blocks: Int[Tensor, "batch tokens"], keys: int) -> Int[Tensor, "batch bounds"] | None:
    """The bounds of a `BlockStructure` of `keys` tokens.

    Args:
        blocks: the number of the block that each token is in; -1: none.

    Returns:
        None where there are fewer tokens, or a block has others between its own.
    """
    blocks = blocks[:, :keys].cpu()
    if blocks.shape[1] < keys:
        return None
    starts = torch.ones_like(blocks, dtype=torch.bool)
    starts[:, 1:] = (blocks[:, 1:] != blocks[:, :-1]) | (blocks[:, 1:] < 0)
    rows = []
    for row, start in zip(blocks, starts, strict=True):
        named = row[start & (row >= 0)]
        if len(named.unique()) < len(named):
            return None
        rows.append(start.nonzero()[:, 0])
    return pad(pad_sequence(rows, batch_first=True, padding_value=keys), (0, 1), value=keys)
