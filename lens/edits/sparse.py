"""A sparse policy run in the model: attention over the blocks that it keeps, at prefill and in decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from lens.common.choices import check_counts
from lens.common.errors import LensError
from lens.edits.base import AttentionEdit, part_of
from lens.edits.language import OfHeads, Running
from lens.models.loaded import LoadedModel
from lens.passes.blocks import BlockView, check_block_size
from lens.passes.calls import LayerCall, attend, of_rows, with_dropped
from lens.passes.keys import KeysAt

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@runtime_checkable
class _Chosen(Protocol):
    @property
    def blocks(self) -> Bool[torch.Tensor, "batch heads query_blocks key_blocks"]: ...


@runtime_checkable
class ChoosesBlocks(Protocol):
    """What `Sparse` takes: `lens.policies.Policy`, or anything of that shape."""

    @property
    def block_size(self) -> tuple[int, int]: ...

    def check(self, model: LoadedModel) -> None: ...

    def choose(self, view: BlockView) -> _Chosen: ...


@dataclass(frozen=True)
class Sparse(OfHeads):
    """Heads attend only to the blocks of keys that a policy keeps; rows are normalised over these.

    The policy sees the whole layer, and the chosen heads follow what it keeps for them. A head of a call of
    which every visible block is kept keeps its bits. A row that is left without a key gives 0, and is counted
    in `skipped_rows`.

    Attributes:
        policy: of `lens.policies`.
        block_size: tokens, one number or (query_block, key_block); None: the policy's own.
        first_row: rows from this position on are sparse, those before it dense: "dense context, sparse
            question"; in generation every later token is.
        heads, layers: as of `Mask`.

    Raises:
        LensError: what is no policy, a first row that is no position; heads and layers.

    Example:
        >>> with lens.edit(model, lens.edits.Sparse(lens.policies.AShape(4, 16), 16)) as (done,):
        ...     logits = model.logits("It was the best of times, it was the worst of times")
        >>> done.density
        1.0
    """

    policy: ChoosesBlocks
    block_size: int | tuple[int, int] | None = None
    first_row: int = 0

    def __post_init__(self) -> None:
        if not hasattr(self.policy, "choose"):
            raise LensError(
                f"Sparse takes a policy such as lens.policies.AShape(64, 256), got {self.policy!r}"
            )
        if self.block_size is not None:
            check_block_size(self.block_size)
        check_counts(0, **{"first_row of Sparse": self.first_row})
        super().__post_init__()

    @property
    def words(self) -> str:
        """See `Edit`."""
        return f"Sparse {self.policy}"

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        self.policy.check(model)
        sizes = check_block_size(
            self.policy.block_size if self.block_size is None else self.block_size
        )
        edit = SparseEdit(self.policy, sizes, self.first_row, self.chosen(model), backend)
        return Running(edit, edit)


class SparseEdit(AttentionEdit):
    """See `AttentionEdit`; `edited_rows` are those of heads with a block less, masses are not counted."""

    word = "Sparse"

    def __init__(
        self,
        policy: ChoosesBlocks,
        block_size: tuple[int, int],
        first_row: int,
        heads: Bool[torch.Tensor, "layers heads"],
        backend: str,
    ) -> None:
        super().__init__(heads, backend)
        self._policy, self._sizes, self._first = policy, block_size, first_row
        self._kept = self._visible = 0

    @property
    def density(self) -> float:
        """Share of the visible blocks that were kept so far, over calls, heads and rows that are sparse."""
        return self._kept / self._visible if self._visible else 1.0

    def _edit(
        self, call: LayerCall, at: KeysAt, heads: Bool[torch.Tensor, "heads"]
    ) -> Float[torch.Tensor, "batch heads queries value_dim"] | None:
        """Blocks begin with the first token of each prompt, also behind padding and where a cache has dropped it."""
        first = -at.positions[:, 0]
        if call.cross or not bool(first.any()):
            return self._from_first(call, heads)
        output = call.value.new_zeros(*call.query.shape[:3], call.value.shape[3])
        edited = False
        for place in first.unique().tolist():
            rows = first == place
            own = of_rows(call, rows, max(0, place))
            own = with_dropped(own, -place) if place < 0 else own
            found = self._from_first(own, heads)
            edited = edited or found is not None
            found = attend(own, backend=self._backend).output if found is None else found
            output[rows, :, -found.shape[2] :] = found.to(output.dtype)
        return output if edited else None

    def _from_first(
        self, call: LayerCall, heads: Bool[torch.Tensor, "heads"]
    ) -> Float[torch.Tensor, "batch heads queries value_dim"] | None:
        keys, queries = call.key.shape[2], call.query.shape[2]
        row = max(0, self._first - (keys - queries))
        if row >= queries:
            self.empty_calls += 1
            return None
        chosen = heads.nonzero()[:, 0]
        whole = torch.arange(len(heads), device=heads.device)
        layer = BlockView(part_of(call, whole, row), *self._sizes, self._backend)
        blocks = self._policy.choose(layer).blocks.expand(layer.shape)[:, chosen]
        visible = layer.visible[:, chosen]
        view = (
            layer if len(chosen) == len(heads) else replace(layer, call=part_of(call, chosen, row))
        )
        blocks = blocks & visible
        self._kept += int(blocks.sum())
        self._visible += int(visible.sum())
        sparse = (blocks != visible).flatten(2).any(-1).any(0)  # [heads chosen]
        if not bool(sparse.any()):
            self.empty_calls += 1
            return None
        found = view.attended(blocks)
        self.calls += 1
        self.skipped_rows += int((found.statistics.lse[:, sparse] == -torch.inf).sum())
        self.edited_rows += len(call.query) * int(sparse.sum()) * (queries - row)
        if row == 0 and len(found.output[0]) == call.query.shape[1] and bool(sparse.all()):
            return found.output
        output = attend(call, backend=self._backend).output
        output[:, chosen[sparse], row:] = found.output[:, sparse].to(output.dtype)
        return output
