"""What every earlier part of a model wrote into the queries and keys of one head.

The stream that a head reads is a sum: embedding, positions, what each earlier head and MLP wrote, biases.
With the sizes that norms divide by held at their values of the whole, each of these goes on its own through
norm, projection, norm of the head and rotary embedding, and the parts sum to the head's query and key.
A second pass takes the parts as they are written, so that of a long prompt only the chosen rows are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.models.parts import Layout, Norm
from lens.passes.calls import LayerCall
from lens.passes.sessions import run
from lens.passes.visit import visiting
from lens.reading._head import Head, Plain
from lens.reading._rows import row_at

if TYPE_CHECKING:
    from jaxtyping import Float

_AT_ONCE = 2048  # tokens of one writer that are projected together
QUERY_BIAS, KEY_BIAS, NORM_BIAS = "query bias", "key bias", "norm bias"

Make = Callable[[slice], Tensor]
"""Some tokens -> what a writer added to the stream there, [tokens, d_model]."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts of a head's queries and keys, after rotary embedding; float64.

    Attributes:
        head: whose.
        names: of the parts of the queries, and of the keys.
        queries: [parts, rows, head_dim] of the chosen rows.
        keys: [parts, chosen keys, head_dim].
        unturned: the same keys before rotary embedding.
        mean: [parts, rows, head_dim], the parts of all keys, weighted as asked for.
        whole: of parts that were asked for by name, all their keys [tokens, head_dim].
        sources: of heads, at each of the places that were asked for: (key that it attends to most, mass).
    """

    head: Head
    names: tuple[tuple[str, ...], tuple[str, ...]]
    queries: Float[Tensor, "query_parts rows width"]
    keys: Float[Tensor, "key_parts chosen width"]
    unturned: Float[Tensor, "key_parts chosen width"]
    mean: Float[Tensor, "key_parts rows width"]
    whole: dict[str, Tensor]
    sources: dict[str, list[tuple[int, float]]]


def take_apart(
    head: Head,
    rows: Tensor,
    keys: Tensor,
    weights: Tensor,
    *,
    whole: Collection[str] = (),
    look: Tensor | None = None,
) -> Parts:
    """Parts of the queries at `rows` and of the keys at `keys`.

    Args:
        head: of `read_head`.
        rows, keys: places.
        weights: [rows, tokens], of the keys in the mean that each row is held against.
        whole: names of parts whose keys are kept at all tokens.
        look: places at which it is asked where earlier heads look.

    Raises:
        LensError: parts that do not sum to the queries and keys.
    """
    sides = _Sides(head, rows, keys, weights, whole)
    taking = _Apart(head, sides, look)
    with torch.no_grad(), visiting(head.layout, 1, taking):
        run(head.layout.model, head.inputs)
    with torch.no_grad():
        taking.finish()
    parts = sides.parts(taking.sources)
    sums = (
        (parts.queries.sum(0), head.query[rows], head.query),
        (parts.keys.sum(0), head.key[keys], head.key),
    )
    for found, own, every in sums:
        error = float((found - own).abs().max()) / max(float(every.abs().max()), 1e-30)
        if not error <= head.tolerance:
            raise LensError(
                f"the parts of {head.id} do not sum to its queries and keys (off by {error:.1e} of the largest, "
                f"allowed {head.tolerance:.0e}), so they would explain another model"
            )
    return parts


class _Sides:
    """Takes what a writer gives the norm before the head, and keeps what it is in queries and keys."""

    def __init__(
        self, head: Head, rows: Tensor, keys: Tensor, weights: Tensor, whole: Collection[str]
    ) -> None:
        block = head.layout.blocks[head.id.layer]
        heads = (head.id.head, head.group)
        self._head, self._rows, self._keys, self._names = head, rows, keys, set(whole)
        self._weights = [
            weight[which].double() for (weight, _), which in zip(block.weights, heads, strict=False)
        ]
        self._biases = [
            None if bias is None else bias[which].double()
            for (_, bias), which in zip(block.weights, heads, strict=False)
        ]
        self._norms = [
            of_head(norm, which, head) for norm, which in zip(block.head_norms, heads, strict=True)
        ]
        self._means = weights
        self._found: tuple[dict[str, Tensor], ...] = ({}, {}, {}, {})
        self.whole: dict[str, Tensor] = {}

    def add(self, name: str, make: Make) -> None:
        """`make` gives the part of what the norm before the head returns."""
        tokens = self._head.tokens
        keys, queries = [], []
        for start in range(0, tokens, _AT_ONCE):
            some = slice(start, min(start + _AT_ONCE, tokens))
            part = make(some)
            keys.append(part @ self._weights[1])
            here = self._rows[(self._rows >= some.start) & (self._rows < some.stop)] - start
            queries.append(part[here] @ self._weights[0])
        order = _in_order(self._rows, tokens)
        self._put(name, 0, self._query(torch.cat(queries)[order]))
        self._put_keys(name, self._key(torch.cat(keys)))

    def finish(self) -> None:
        """What projections and norms of the head add themselves."""
        query, key = (
            bias if bias is None else bias.expand(count, -1)
            for bias, count in zip(self._biases, (len(self._rows), self._head.tokens), strict=False)
        )
        shifts = [norm.shift for norm in self._norms]
        if query is not None or shifts[0] is not None:
            found = self._head.query.new_zeros(len(self._rows), self._head.query.shape[1])
            found = found if query is None else self._query(query)
            self._put(QUERY_BIAS, 0, found if shifts[0] is None else found + self._shift(0))
        if key is not None or shifts[1] is not None:
            found = torch.zeros_like(self._head.key) if key is None else self._key(key)
            self._put_keys(KEY_BIAS, found if shifts[1] is None else found + self._shift(1))

    def _shift(self, side: int) -> Tensor:
        shift = self._norms[side].shift
        assert shift is not None
        return shift.double() * self._head.rotation.factors[side]

    def _query(self, projected: Tensor) -> Tensor:
        found = self._norms[0].frozen(projected, self._head.head_sizes[0][self._rows])
        return found * self._head.rotation.factors[0]

    def _key(self, projected: Tensor) -> Tensor:
        return (
            self._norms[1].frozen(projected, self._head.head_sizes[1])
            * self._head.rotation.factors[1]
        )

    def _put_keys(self, name: str, keys: Tensor) -> None:
        turned = self._head.rotation.turned(keys, slice(None))
        self._put(name, 1, turned[self._keys])
        self._put(name, 2, keys[self._keys])
        self._put(name, 3, self._means @ turned)
        if name in self._names:
            self.whole[name] = self.whole.get(name, 0) + turned

    def _put(self, name: str, place: int, part: Tensor) -> None:
        found = self._found[place]
        found[name] = found[name] + part if name in found else part

    def parts(self, sources: dict[str, list[tuple[int, float]]]) -> Parts:
        """What was found."""
        queries, keys, unturned, mean = (torch.stack(list(found.values())) for found in self._found)
        return Parts(
            head=self._head,
            names=(tuple(self._found[0]), tuple(self._found[1])),
            queries=self._head.rotation.turned(queries, self._rows),
            keys=keys,
            unturned=unturned,
            mean=mean,
            whole=self.whole,
            sources=sources,
        )


class Taking(Plain):
    """The pass in which writers give their parts."""

    def __init__(self, head: Head, look: Tensor | None) -> None:
        super().__init__(head.layout)
        self.head, self._look = head, look
        self.stops, self.starts = _way(head.layout, head.id.layer)
        self.sources: dict[str, list[tuple[int, float]]] = {}

    def enter(self, hidden: Tensor) -> Tensor:
        for name, part in self.layout.embed_parts(self.head.inputs).items():
            self.give(name, 0, lambda some, part=part: part[0, some])
        return hidden

    def attention(self, layer: int, call: LayerCall) -> None:
        if self._look is None or layer >= self.head.id.layer:
            return
        mass, key = row_at(call, self._look).max(-1)
        for head in range(len(mass)):
            name = str(HeadId(layer, head))
            self.sources[name] = list(zip(key[head].tolist(), mass[head].tolist(), strict=True))

    def heads(self, layer: int, z: Tensor) -> Tensor:
        if layer >= self.head.id.layer:
            return z
        block, start = self.layout.blocks[layer], self.starts[layer, "heads"]
        size = block.after.size(block.attended(z)[0]).double()
        output = block.output.double()

        def make(number: int) -> Make:
            return lambda some: block.after.frozen(
                z[0, number, some].double() @ output[number], size[some]
            )

        for number in range(z.shape[1]):
            self.give(str(HeadId(layer, number)), start, make(number))
        bias = torch.zeros_like(size) + (
            0 if block.output_bias is None else block.output_bias.double()
        )
        if block.output_bias is not None or block.after.shift is not None:
            shift = 0 if block.after.shift is None else block.after.shift.double()
            self.give(
                f"L{layer} bias",
                start,
                lambda some: block.after.frozen(bias[some], size[some]) + shift,
            )
        return z

    def mlp(self, layer: int, output: Tensor) -> Tensor:
        if layer < self.head.id.layer:
            start = self.starts[layer, "mlp"]
            self.give(f"L{layer} MLP", start, lambda some: output[0, some].double())
        return output

    def finish(self) -> None:
        """What norms on the way add."""
        for number, (norm, _) in enumerate(self.stops):
            if norm.shift is not None:
                shift = norm.shift.double()
                self.give(
                    NORM_BIAS,
                    number + 1,
                    lambda some, shift=shift: shift.expand(some.stop - some.start, -1),
                )

    def through(self, start: int, make: Make, some: slice, stop: int | None = None) -> Tensor:
        """What is left of a part of these tokens behind the norms from `start` on, at the end or before `stop`."""
        part = make(some)
        for norm, size in self.stops[start:stop]:
            part = norm.frozen(part, self.head.sizes[size][some])
        return part

    def give(self, name: str, start: int, make: Make) -> None:
        """What a writer added before stop number `start` of the way to the head."""
        raise NotImplementedError


class _Apart(Taking):
    """Hands every part to both sides."""

    def __init__(self, head: Head, sides: _Sides, look: Tensor | None) -> None:
        super().__init__(head, look)
        self._sides = sides

    def finish(self) -> None:
        """And what the head itself adds."""
        super().finish()
        self._sides.finish()

    def give(self, name: str, start: int, make: Make) -> None:
        """Through the rest of the way."""
        self._sides.add(name, lambda some: self.through(start, make, some))


def _way(
    layout: Layout, layer: int
) -> tuple[list[tuple[Norm, tuple[int, str]]], dict[tuple[int, str], int]]:
    """Norms between the first block and the queries of a layer, and at which of them a writer joins."""
    stops: list[tuple[Norm, tuple[int, str]]] = []
    starts = {}
    for number, block in enumerate(layout.blocks[:layer]):
        if layout.normed:
            stops.append((block.norm, (number, "read")))
        starts[number, "heads"] = len(stops)
        if layout.normed and block.mlp:
            stops.append((block.mlp_norm, (number, "mlp")))
        starts[number, "mlp"] = len(stops)
    stops.append((layout.blocks[layer].norm, (layer, "read")))
    return stops, starts


def of_head(norm: Norm, which: int, head: Head) -> Norm:
    """The norm of queries or keys, as it is for one head."""
    width = head.key.shape[-1]

    def own(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.shape == (width,):
            return tensor
        return tensor.reshape(-1, width)[which]

    if norm.centred and norm.together(width):
        raise LensError(
            f"the queries of {head.id} are normed with the mean over all heads, which is not taken apart here"
        )
    return Norm(
        norm.module, own(norm.scale), own(norm.shift), norm.centred, norm.epsilon, norm.changes
    )


def _in_order(rows: Tensor, tokens: int) -> Tensor:
    """Where each row stands among the rows taken chunk by chunk."""
    chunk = torch.div(rows, _AT_ONCE, rounding_mode="floor")
    return chunk.argsort(stable=True).argsort()
