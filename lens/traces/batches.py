"""Prompts that go through the model together, and the record of each out of that of all.

Prompts of one length are rows of one batch; shorter ones are padded at their end. Whether a model leaves a
row as it is beside others, and padded, is tried out on its first tokens; where not, prompts run one by one.
Padding sees nothing and is seen by nothing, so every record is that of the prompt alone, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.check import relative_error, tolerance_of
from lens.passes.inputs import Prompt, accepted
from lens.passes.pieces import check_length_matters_not
from lens.passes.sessions import listening, run
from lens.traces.statistics import LayerRecord
from lens.traces.store import DIMENSIONS

MOST_TOKENS = 2048
"""Of a batch, padding included: what it holds at a time is what one prompt of this length does."""
_PADDED = 8
"""One token in so many, at most, is padding."""
_PROBE = 16
"""Tokens of a prompt on which it is tried."""


def batches(model: LoadedModel, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The places of the prompts that run together; every place once."""
    lengths = [len(one.ids or ()) if _is_plain(one) else 0 for one in prompts]
    places = sorted(range(len(prompts)), key=lambda place: -lengths[place])
    groups: list[list[int]] = []
    for place in places:
        length, last = lengths[place], groups[-1] if groups else []
        if last and length and _fits([lengths[one] for one in last], length):
            last.append(place)
        else:
            groups.append([place])
    if len(groups) < len(prompts):
        ids = prompts[places[0]].ids
        assert ids is not None
        groups = _allowed(model, ids, groups, lengths)
    return sorted(sorted(group) for group in groups)


def _is_plain(prompt: Prompt) -> bool:
    return prompt.ids is not None and set(prompt.inputs) == {"input_ids"}


def _fits(lengths: list[int], length: int) -> bool:
    """Whether a prompt may join those of these lengths, the first of which is the longest."""
    whole = lengths[0] * (len(lengths) + 1)
    return whole <= MOST_TOKENS and _PADDED * (whole - sum(lengths) - length) <= whole


def _allowed(
    model: LoadedModel, ids: list[int], groups: list[list[int]], lengths: list[int]
) -> list[list[int]]:
    """The groups as far as the model takes them: with padding, of equal lengths, or one by one."""
    probe = ids[:_PROBE]
    if any(len({lengths[one] for one in group}) > 1 for group in groups):
        short = max(1, len(probe) - 5)
        if len(probe) > 1 and _are_alike(model, [probe, probe[:short]], len(ids)):
            return groups
        groups = [
            [one for one in group if lengths[one] == length]
            for group in groups
            for length in dict.fromkeys(lengths[one] for one in group)
        ]
    if any(len(group) > 1 for group in groups) and _are_alike(
        model, [probe, probe[::-1]], len(ids)
    ):
        return groups
    return [[one] for group in groups for one in group]


def _are_alike(model: LoadedModel, rows: list[list[int]], longest: int) -> bool:
    """Whether rows give together what each gives alone."""
    uneven = len(rows[0]) != len(rows[1])
    if uneven and "attention_mask" not in accepted(model):
        return False
    try:
        if uneven:
            check_length_matters_not(model, longest, "a batch")
        together = _hidden(model, rows)
        alone = [_hidden(model, [row])[0] for row in rows]
    except LensError:
        return False
    limit = tolerance_of(model.dtype)
    return all(
        relative_error(batch[: len(one)], one) <= limit
        for batch, one in zip(together, alone, strict=True)
    )


def _hidden(model: LoadedModel, rows: list[list[int]]) -> Tensor:
    """Last hidden states [rows, tokens, width]; LensError where a layer does not see rows of tokens."""
    inputs = joined(model, rows)
    batch, length = inputs["input_ids"].shape

    def on_layer(call: LayerCall) -> Tensor:
        sizes = (len(call.query), call.query.shape[2], call.key.shape[2])
        is_padded = call.mask.padding is not None
        known = call.mask.allowed is None and is_padded == ("attention_mask" in inputs)
        if sizes != (batch, length, length) or call.cross or not known:
            raise LensError(f"layer {call.layer} has other rows than the prompts")
        return attend(call, statistics=()).output

    with torch.no_grad(), listening(model, on_layer, parts=True):
        return run(model, inputs)[0].double()


def joined(model: LoadedModel, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Token ids as one batch, padded at the end, with a mask where some are."""
    several = [torch.tensor(row) for row in rows]
    ids = pad_sequence(several, batch_first=True)
    mask = pad_sequence([torch.ones_like(one) for one in several], batch_first=True)
    found = {"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask}
    return {name: tensor.to(model.device) for name, tensor in found.items()}


def record_of(record: LayerRecord, row: int, length: int, block: int) -> LayerRecord:
    """What a layer did with one row of a batch, of `length` tokens; `block`: positions per block."""
    blocks, whole = -(-length // block), record.keys
    first = 0 if record.causal else whole - length
    offset = slice(first, first + (length if record.causal else 2 * length - 1))
    cut = {
        **dict.fromkeys(("query", "key"), slice(length)),
        **dict.fromkeys(("query_block", "key_block"), slice(blocks)),
        "offset": offset,
    }
    variables = {
        name: part[
            (slice(row, row + 1), *(cut.get(axis, slice(None)) for axis in DIMENSIONS[name]))
        ]
        for name, part in record.variables.items()
    }
    return replace(
        record,
        queries=length,
        keys=length,
        variables={name: part.contiguous() for name, part in variables.items()},
    )
