"""The records of a prompt that went through the model in pieces, put together as if it had gone whole.

The rows of a piece are whole rows: they see all their keys. So what belongs to a query is laid side by side,
and what is summed over queries (received mass, diagonals, how many see a key) is added up. Blocks of queries
are whole too, as a piece ends where a block does. With a folder what is put together lies there in files, so
that memory holds no layer longer than a piece of it takes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import check_counts
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, with_dropped
from lens.passes.inputs import Prompt
from lens.passes.pieces import check_looks_back, run_in_pieces
from lens.passes.sessions import OnLayer, listening
from lens.traces.recorder import Once, Recorder
from lens.traces.statistics import LayerRecord, Settings
from lens.traces.store import DIMENSIONS


def check_chunk(chunk: int, settings: Settings) -> None:
    """Raises LensError unless pieces of `chunk` tokens end where blocks end."""
    check_counts(chunk=chunk)
    if chunk % settings.block_size:
        fits = max(1, chunk // settings.block_size) * settings.block_size
        raise LensError(
            f"chunk must be a multiple of block_size, so that no block of the maps is cut, got {chunk} and "
            f"{settings.block_size}; use chunk={fits}"
        )


def pieces_of(prompt: Prompt, chunk: int | None) -> int:
    """How many pieces of `chunk` tokens a prompt has."""
    return 1 if chunk is None or prompt.ids is None else -(-len(prompt.ids) // chunk)


def recorded_in_pieces(
    model: LoadedModel,
    prompt: Prompt,
    settings: Settings,
    chunk: int,
    advance: Callable[[int], None],
    folder: Path | None = None,
) -> Iterator[LayerRecord]:
    """The records of a prompt that goes through the model in pieces of `chunk` tokens.

    `advance` is told of each layer of each piece. `folder` holds what is put together meanwhile; None: memory.
    """
    assert prompt.ids is not None
    with ExitStack() as stack:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix=".pieces-", dir=folder)
            folder = Path(stack.enter_context(made))
        pieces = Pieces(prompt.ids, settings, folder)
        on_layer = into_pieces(pieces, model, settings, advance)
        with torch.no_grad(), listening(model, on_layer, parts=True):
            for _ in run_in_pieces(model, prompt.inputs["input_ids"], chunk):
                pass
        yield from pieces.records()


def into_pieces(
    pieces: Pieces, model: LoadedModel, settings: Settings, advance: Callable[[int], None]
) -> OnLayer:
    """A listener that puts the record of each layer of each piece where it belongs, and tells `advance` of it."""

    def done(record: LayerRecord) -> None:
        pieces.add(record)
        advance(1)

    once = Once(Recorder(settings, done), model.info.class_name)

    def on_layer(call: LayerCall) -> Tensor:
        check_looks_back(call, model.info.class_name)
        return once.on_layer(pieces.aligned(call))

    return on_layer


class Pieces:
    """Takes the records of every piece, layer by layer, and gives those of the whole prompt."""

    def __init__(self, ids: Sequence[int], settings: Settings, folder: Path | None = None) -> None:
        self._folder = folder
        self._ids = torch.tensor([list(ids)])  # of tokens that are still to be written: anything
        self._block = settings.block_size
        self._layers: dict[int, LayerRecord] = {}
        self._files: dict[int, dict[str, tuple[list[int], torch.dtype]]] = {}
        self._rows: dict[int, int] = {}  # of a layer, that it was given so far
        # of each piece of a layer the first row, and the ranges
        self._seen: dict[int, list[tuple[int, Tensor | None]]] = {}
        self._holed: set[int] = set()  # layers with a mask that ranges do not say

    def read(self, ids: Tensor) -> None:
        """The first tokens [tokens], as the next piece will have read them."""
        self._ids[0, : len(ids)] = ids

    def aligned(self, call: LayerCall) -> LayerCall:
        """The call with its tokens, and its first key where a block begins.

        A window's cache has dropped keys up to anywhere; hidden ones of zeros fill the block up. Every
        query is too far from them to see them. No token is padding, so that a cache that holds them all begins
        with the first.
        """
        keys = call.key.shape[2]
        if not call.mask.placed and keys == self._rows.get(call.layer, 0) + call.query.shape[2]:
            first_token = torch.zeros(len(call.key), dtype=torch.long)
            call = replace(call, mask=replace(call.mask, first=first_token, start=0, placed=True))
        if call.mask.allowed is not None and call.mask.ranges() is None:
            self._holed.add(call.layer)
        start = call.mask.start
        short = start % self._block
        first = start - short
        ids = self._ids.to(call.key.device)
        before = ids[:, first - 1] if first else ids.new_full((1,), -1)
        call = with_dropped(call, short) if short else call
        return replace(call, tokens=ids[:, first : start + keys], before=before)

    def add(self, record: LayerRecord) -> None:
        """Take what one layer did with one piece: whole blocks of queries, or queries of one block."""
        length = self._ids.shape[1]
        if record.layer not in self._layers:
            self._layers[record.layer] = replace(
                record, queries=length, keys=length, key_start=0, query_start=0, variables={},
                partition=None,
            )  # fmt: skip
        self._rows[record.layer] = record.query_start + record.queries
        ranges = None if record.seen is None else record.seen + record.key_start
        self._seen.setdefault(record.layer, []).append((record.query_start, ranges))
        for name, part in record.variables.items():
            starts = {
                "query": record.query_start,
                "key": record.key_start,
                "query_block": record.query_start // self._block,
                "key_block": record.key_start // self._block,
            }
            if name == "k":  # each piece brings its own keys; those before came with theirs
                part, starts["key"] = part[:, :, -record.queries :], record.query_start
            place = [slice(None)]
            for axis, size in zip(DIMENSIONS[name], part.shape[1:], strict=True):
                first = starts.get(axis, 0)
                place.append(slice(first, first + size))
            shape = _whole_shape(name, part, length, self._block)
            whole = self._whole(record.layer, name, shape, part.dtype)
            there = whole[tuple(place)]
            before = record.query_start % self._block  # rows of the block that other pieces brought
            if name == "block_max":
                torch.maximum(there, part, out=there)
            elif name == "block_mass" and before:  # the mean over the rows so far, of all keys
                rows = before + record.queries
                whole[:, :, place[2]] *= before / rows
                there += part * (record.queries / rows)
            else:
                there += part

    def _whole(self, layer: int, name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        """The variable of the whole prompt, 0 at first; in a file it leaves memory with the tensor."""
        variables = self._layers[layer].variables
        if self._folder is None:
            if name not in variables:
                variables[name] = torch.zeros(shape, dtype=dtype)
            return variables[name]
        path = self._folder / f"{layer}-{name}"
        kind = torch.zeros((), dtype=dtype).numpy().dtype
        mode = "r+" if path.exists() else "w+"
        if mode == "w+":
            self._files.setdefault(layer, {})[name] = (shape, dtype)
        return torch.from_numpy(np.memmap(path, kind, mode, shape=tuple(shape)))

    def _ranges(self, record: LayerRecord) -> Tensor | None:
        """`seen` of the rows of all pieces; None where no piece has any, or one can say none."""
        pieces = self._seen[record.layer]
        if record.layer in self._holed or all(ranges is None for _, ranges in pieces):
            return None
        query = torch.arange(record.queries)
        reach = record.queries if record.window is None else record.window
        whole = torch.stack([(query - reach + 1).clamp(min=0), query + 1])
        for start, ranges in pieces:
            if ranges is not None:
                whole[:, start : start + ranges.shape[1]] = ranges
        return whole

    def records(self, length: int | None = None) -> Iterator[LayerRecord]:
        """One record for each layer, in order, of the whole or of the first tokens; each is let go of."""
        for layer in sorted(self._layers):
            found, files = self._layers[layer], self._files.pop(layer, {})
            found = replace(found, seen=self._ranges(found))
            for name, (shape, dtype) in files.items():
                found.variables[name] = self._whole(layer, name, shape, dtype)
            del self._layers[layer]
            yield found if length is None else _cut(found, length, self._block)
            for name in files:
                assert self._folder is not None
                (self._folder / f"{layer}-{name}").unlink()


def _cut(record: LayerRecord, length: int, block: int) -> LayerRecord:
    """A record of which nothing came after its first tokens."""
    variables = {
        name: tensor[tuple(map(slice, _whole_shape(name, tensor, length, block)))].clone()
        for name, tensor in record.variables.items()
    }
    seen = None if record.seen is None else record.seen[:, :length]
    return replace(record, queries=length, keys=length, variables=variables, seen=seen)


def _whole_shape(name: str, part: Tensor, length: int, block: int) -> list[int]:
    blocks = -(-length // block)
    sizes = {
        **dict.fromkeys(("query", "key", "offset"), length),
        **dict.fromkeys(("query_block", "key_block"), blocks),
    }
    axes = zip(DIMENSIONS[name], part.shape[1:], strict=True)
    return [len(part), *(sizes.get(axis, size) for axis, size in axes)]
