"""What every edit of attention has in common: it stands in the model's place and counts what it did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from lens_kernels import AttentionResult

from lens.common.choices import is_whole
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.models.loaded import LoadedModel
from lens.passes.blocks import in_blocks
from lens.passes.calls import LayerCall, attend, cut
from lens.passes.keys import KeysAt

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

BLOCK = 64


def selected_heads(
    model: LoadedModel, layers: Sequence[int] | None, heads: Sequence[AnyHead] | None
) -> Bool[torch.Tensor, "layers heads"]:
    """The chosen ones of the model.

    Raises:
        LensError: both are given, or the model has not got them.
    """
    info = model.info
    info.check_attends()
    chosen = torch.zeros(info.layers, info.heads, dtype=torch.bool)
    if heads is not None:
        if layers is not None:
            raise LensError("give layers or heads, not both; heads name their layer: 'L3H5'")
        for head in heads:
            chosen[info.head(head)] = True
        return chosen
    for layer in info.attending if layers is None else layers:
        if not is_whole(layer) or not 0 <= layer < info.layers:
            raise LensError(f"layers must be numbers 0 to {info.layers - 1}, got {layer!r}")
        info.check_layer(layer, f"attention to edit in layer {layer}")
        chosen[layer] = True
    return chosen


class NothingEditedError(LensError):
    """Rows were looked at, and every one had to be left as it was."""


def check_edited(edits: Sequence[AttentionEdit], prompt: int) -> None:
    """Raises NothingEditedError where rows were looked at and every one had to be left as it was; `prompt` is its number."""
    if any(one.skipped_rows for one in edits) and not any(one.edited_rows for one in edits):
        named = " and ".join(dict.fromkeys(one.word for one in edits))
        raise NothingEditedError(
            f"{named} changed nothing in prompt {prompt}: in no row that it would change do keys that the row sees and "
            "that could take over hold 1e-8 of the attention or more, and such rows are left as they are"
        )


class AttentionEdit(ABC):
    """One edit of a model's attention, and what it has done so far.

    Attributes:
        steps: forward passes so far.
        calls: attention calls that were edited.
        empty_calls: those of selected layers with no key to move attention from or to; they were left
            as they are.
        edited_rows: rows (queries of a head) whose sources lost or gained something.
        skipped_rows: rows with nowhere to put the mass; they were left as they are.
        word: what it is called in messages.
        mass_before, mass_after: mean mass of the sources over the rows that the edit looked at, before
            and after, so far; NaN while there is none.
    """

    word = "an edit"

    def __init__(self, heads: Bool[torch.Tensor, "layers heads"], backend: str) -> None:
        self.calls = self.empty_calls = self.edited_rows = self.skipped_rows = self.steps = 0
        self._heads = heads
        self._backend = backend
        self._masses = torch.zeros(3, dtype=torch.float64)  # rows, before, after

    @abstractmethod
    def _edit(self, call: LayerCall, at: KeysAt, heads: torch.Tensor) -> torch.Tensor | None:
        """The output [batch, heads, queries, value_dim] with the heads (at least one) edited.

        None where there is nothing to edit: the call then keeps its bits, and so does a head that is
        not in `heads`.
        """

    @property
    def mass_before(self) -> float:
        """See the class."""
        return float(self._masses[1] / self._masses[0])

    @property
    def mass_after(self) -> float:
        """See the class."""
        return float(self._masses[2] / self._masses[0])

    @property
    def heads(self) -> Bool[torch.Tensor, "layers heads"]:
        """Those of the model that are edited."""
        return self._heads

    def on_layer(self, call: LayerCall) -> Float[torch.Tensor, "batch heads queries value_dim"]:
        """See `lens.passes.sessions.listening`."""
        output = self.edited(call, self.keys_at(call))
        return attend(call, backend=self._backend).output if output is None else output

    def edited(
        self, call: LayerCall, at: KeysAt
    ) -> Float[torch.Tensor, "batch heads queries value_dim"] | None:
        """The output of a call, or None where there is nothing to edit."""
        self.steps = call.step + 1
        heads = self._heads[call.layer].to(call.query.device)
        return self._edit(call, at, heads) if bool(heads.any()) else None

    def _count(
        self, before: torch.Tensor, after: torch.Tensor, skipped: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Count one call, all arguments [batch, heads, queries].

        Args:
            before, after: mass of the sources.
            skipped: bool, rows that had nowhere to put it.
            rows: bool, those that the edit looked at.
        """
        skipped = skipped & rows
        self.calls += 1
        self.skipped_rows += int(skipped.sum())
        self.edited_rows += int(((before > 0) & rows & ~skipped).sum())
        sums = [rows.sum(dtype=torch.float64)]
        sums += [torch.where(rows, mass, 0).sum(dtype=torch.float64) for mass in (before, after)]
        self._masses += torch.stack(sums).cpu()

    def _check_follows(
        self, call: LayerCall, prompts: Mapping[int, torch.Tensor], unknown: str
    ) -> None:
        """Raises LensError unless the call is one token behind prompts that this edit saw whole.

        Args:
            call: one that is no whole prompt.
            prompts: layer -> [batch, ...], what is known of the prompts.
            unknown: what is not known of others, in words.
        """
        if call.query.shape[2] > 1:
            raise LensError(
                "several tokens on cached keys are a prompt in pieces or drafts (prefill_chunk_size, "
                f"assistant_model, prompt_lookup_num_tokens), and where the prompt of {self.word.upper()} "
                "ends is not known then; run the prompt in one pass and generate token by token"
            )
        if call.layer not in prompts or len(prompts[call.layer]) != len(call.query):
            raise LensError(
                f"the cache of layer {call.layer} began outside the block, so {unknown} not known; "
                "start the generation inside"
            )

    def keys_at(self, call: LayerCall) -> KeysAt:
        """Where each key stands in its prompt, also when a window has dropped older ones.

        Raises:
            LensError: a mask of the model's own that does not say it.
        """
        if not call.mask.placed:
            raise LensError(
                f"layer {call.layer} hides the first cached key, by padding or by a window, in a mask of "
                "its own, so that the positions of its keys are not known; run the prompt without padding"
            )
        place = torch.arange(call.key.shape[2], device=call.key.device)
        first = call.mask.first_token(len(call.query)).to(place.device)
        return KeysAt(call.layer, call.step, place - first[:, None], call.tokens)


def queries_at(call: LayerCall, at: KeysAt) -> Int[torch.Tensor, "batch queries"]:
    """Places of the queries, those of the last keys; of cross-attention of the target's tokens."""
    count = call.query.shape[2]
    if not call.cross:
        return at.positions[:, -count:]
    places = torch.arange(call.seen, call.seen + count, device=at.positions.device)
    return places.expand(len(at.positions), -1)


def part_of(call: LayerCall, heads: Int[torch.Tensor, "some"], start: int = 0) -> LayerCall:
    """The call of some heads only, each with its own keys, from query `start` on."""
    share = call.query.shape[1] // call.key.shape[1]
    sinks, mask, queries = call.sink_logits, call.mask, slice(start, None)
    if mask.allowed is not None and start:
        mask = mask.with_allowed(mask.allowed[:, :, queries])
    everything = len(heads) == call.query.shape[1]
    return replace(
        call,
        query=(call.query if everything else call.query[:, heads])[:, :, queries],
        key=call.key if everything else call.key[:, heads // share],
        value=call.value if everything else call.value[:, heads // share],
        mask=mask,
        sink_logits=None if sinks is None else sinks[heads],
        position_bias=cut(call.position_bias, heads=heads, queries=queries),
    )


def grouped(
    call: LayerCall,
    groups: Int[torch.Tensor, "batch keys"],
    backend: str,
    *,
    only: Bool[torch.Tensor, "batch keys"] | None = None,
) -> AttentionResult:
    """Attention of one call, with a state per key group.

    Args:
        call, groups, backend: see `lens_kernels.attention`.
        only: only blocks of `BLOCK` keys that hold one of these are visited, so
            that only groups made of these alone are complete, and the output is not the call's.
    """
    block_mask = None
    if only is not None:
        blocks = in_blocks(only, BLOCK).any(-1)[:, None, None]
        block_mask = blocks.expand(-1, -1, -(-call.query.shape[2] // BLOCK), -1)
    return attend(call, groups=groups, block_size=BLOCK, block_mask=block_mask, backend=backend)
