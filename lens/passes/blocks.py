"""One attention call as blocks of queries and keys: what a sparse policy may look at to choose blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from lens_kernels import AttentionResult
from lens_kernels.masks import lower_mask
from torch import Tensor
from torch.nn.functional import pad

from lens.common.errors import LensError
from lens.passes.calls import LayerCall, attend, cut, kernel_options, of_heads

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped


@dataclass(frozen=True, eq=False)
class BlockView:
    """A call cut into blocks; everything that costs a pass over all pairs is computed once, when asked for.

    Query block I holds rows `I * query_block` on, key block J keys `J * key_block` on; the last ones
    may be short.

    Attributes:
        call: the call.
        query_block, key_block: sizes, tokens.
        backend: of `lens_kernels`.
    """

    call: LayerCall
    query_block: int
    key_block: int
    backend: str = "auto"

    @property
    def query(self) -> Float[Tensor, "batch heads queries head_dim"]:
        """After rotary embedding."""
        return self.call.query

    @cached_property
    def key(self) -> Float[Tensor, "batch heads keys head_dim"]:
        """Each query head beside the keys that it reads."""
        return of_heads(self.call, self.call.key)

    @property
    def share(self) -> int:
        """Query heads that read one key head."""
        return self.call.query.shape[1] // self.call.key.shape[1]

    @property
    def queries(self) -> int:
        return self.call.query.shape[2]

    @property
    def keys(self) -> int:
        return self.call.key.shape[2]

    @property
    def offset(self) -> int:
        """Keys before the first query: 0 at prefill, the cache's length in decoding."""
        return self.keys - self.queries

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """batch, heads, query blocks, key blocks."""
        batch, heads = self.call.query.shape[:2]
        return batch, heads, -(-self.queries // self.query_block), -(-self.keys // self.key_block)

    def sees(
        self, start: int = 0, end: int | None = None
    ) -> Bool[Tensor, "batch #heads rows keys"]:
        """Which keys the rows `start` to `end` see."""
        plan = self._plan
        key = torch.arange(self.keys, device=plan.low.device)
        rows = slice(start, self.queries if end is None else end)
        seen = (plan.low[:, rows, None] <= key) & (key < plan.high[:, rows, None])
        if plan.keep is not None:
            seen = seen & plan.keep[:, None]
        seen = seen[:, None]
        return seen if plan.allowed is None else seen & cut(plan.allowed, queries=rows)

    @cached_property
    def visible(self) -> Bool[Tensor, "batch heads query_blocks key_blocks"]:
        """Blocks with a pair that is seen."""
        plan, (batch, heads, rows, columns) = self._plan, self.shape
        if plan.keep is None and plan.allowed is None:
            far = torch.iinfo(torch.int32).max
            empty = plan.high <= plan.low
            low = in_blocks(plan.low.masked_fill(empty, far), self.query_block, empty=far)
            high = in_blocks(plan.high.masked_fill(empty, 0), self.query_block)
            low, high = low.amin(-1)[..., None], high.amax(-1)[..., None]
            first = torch.arange(columns, device=low.device) * self.key_block
            seen = ((low < first + self.key_block) & (first < high))[:, None]
        else:
            step = self.query_block
            parts = [self.any_pair(self.sees(at, at + step)) for at in range(0, self.queries, step)]
            seen = torch.cat(parts, 2)
        return seen.expand(batch, heads, rows, columns)

    @cached_property
    def looks_ahead(self) -> bool:
        """Whether some row sees a key after its own position."""
        plan = self._plan
        if plan.causal:
            return False
        place = torch.arange(self.offset, self.keys, device=plan.high.device)
        if plan.keep is None and plan.allowed is None:
            return bool((plan.high > place + 1).any())
        key = torch.arange(self.keys, device=place.device)
        step = self.query_block
        return any(
            bool((self.sees(at, at + step) & (key > place[at : at + step, None])).any())
            for at in range(0, self.queries, step)
        )

    def any_pair(
        self, pairs: Bool[Tensor, "*rest rows keys"]
    ) -> Bool[Tensor, "*rest query_blocks key_blocks"]:
        """Blocks with one True pair, of the rows of whole query blocks."""
        return in_blocks(in_blocks(pairs, self.key_block).any(-1), self.query_block, -2).any(-2)

    def probabilities(
        self, start: int = 0, end: int | None = None
    ) -> Float[Tensor, "batch heads rows keys"]:
        """Exact P, float32, of the rows `start` to `end`: meant for a few probes."""
        end = self.queries if end is None else end
        logits = self.query[:, :, start:end].float() @ self.key.float().transpose(-1, -2)
        logits = logits * self.call.scale
        if self.call.softcap is not None:
            logits = self.call.softcap * torch.tanh(logits / self.call.softcap)
        if self.call.position_bias is not None:
            logits = logits + cut(self.call.position_bias, queries=slice(start, end)).float()
        logits = logits.masked_fill(~self.sees(start, end), -torch.inf)
        if self.call.sink_logits is None:
            return logits.softmax(-1).nan_to_num(nan=0)
        sink = self.call.sink_logits.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]

    @cached_property
    def row_masses(self) -> Float[Tensor, "batch heads queries key_blocks"]:
        """Exact mass that each row gives to each key block: a dense pass."""
        asked = {"block_size": (1, self.key_block), "statistics": ("block_mass",)}
        found = attend(self.call, backend=self.backend, **asked)
        return found.statistics.block_mass

    @cached_property
    def masses(self) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
        """Exact mass, mean over the rows of the block."""
        return means(self.row_masses, self.query_block)

    @cached_property
    def pooled(
        self,
    ) -> tuple[
        Float[Tensor, "batch heads query_blocks head_dim"],
        Float[Tensor, "batch heads key_blocks head_dim"],
    ]:
        """Mean query of each query block, mean key of each key block."""
        return means(self.query, self.query_block), means(self.key, self.key_block)

    def attended(
        self,
        blocks: Bool[Tensor, "#batch #heads query_blocks key_blocks"] | None = None,
        **asked: object,
    ) -> AttentionResult:
        """The attention over `blocks`; None: all."""
        return attend(
            self.call,
            block_mask=blocks,
            block_size=(self.query_block, self.key_block),
            backend=self.backend,
            **asked,
        )

    @cached_property
    def _plan(self):
        return lower_mask(kernel_options(self.call)["mask"], self.call.query, self.call.key)


def check_block_size(block_size: int | Sequence[int]) -> tuple[int, int]:
    """(query_block, key_block).

    Raises:
        LensError: not one or two positive integers.
    """
    sizes = (block_size, block_size) if isinstance(block_size, int) else block_size
    fine = (
        isinstance(sizes, Sequence)
        and len(sizes) == 2
        and all(isinstance(one, int) and not isinstance(one, bool) and one >= 1 for one in sizes)
    )
    if not fine:
        raise LensError(
            f"block_size must be a positive integer or (query_block, key_block), got {block_size!r}"
        )
    return sizes[0], sizes[1]


def in_blocks(
    values: Shaped[Tensor, "*rest"], size: int, dim: int = -1, *, empty: float = 0
) -> Shaped[Tensor, "..."]:
    """[..., n, ...] along `dim` (-1 or -2) -> [..., blocks, size, ...]; `empty` fills the last block."""
    short = -values.shape[dim] % size
    padded = pad(values, (0, short) if dim == -1 else (0, 0, 0, short), value=empty)
    return padded.unflatten(dim, (-1, size))


def means(
    values: Shaped[Tensor, "batch heads rows dim"], size: int
) -> Float[Tensor, "batch heads blocks dim"]:
    """Mean of each `size` rows, a short last block over its own rows."""
    rows = values.shape[2]
    blocks = in_blocks(values.float(), size, -2).sum(-2)
    count = torch.full((blocks.shape[2], 1), float(size), device=values.device)
    count[-1] = rows - (blocks.shape[2] - 1) * size
    return blocks / count
