"""`Graph`: who can write to whom in a transformer, from its sizes alone.

Writers are `input` (what enters the first layer), the heads `a0.h1` and the MLPs `m0`. Readers are the
three inputs of each head, `a0.h1<q>`, `a0.h1<k>` and `a0.h1<v>`, the MLPs and `logits` (what the last
norm reads). An edge joins a writer to a later reader; names are those of the Mechanistic
Interpretability Benchmark (Mueller et al. 2025, arXiv 2504.13151).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np

from lens.common.choices import check_choice, check_lists
from lens.common.errors import LensError

Kv = Literal["head", "group"]


class AnyGraph:
    """Writers, readers and the edges between them, however they came to be."""

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    allowed: np.ndarray
    feeds: tuple[tuple[int, ...], ...]

    @cached_property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Reader and writer of each edge, as numbers; the order of the edges is that of the readers."""
        reader, writer = np.nonzero(self.allowed)
        return reader, writer

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Names of the edges, as in `a0.h1->a1.h0<k>`."""
        return tuple(
            f"{self.writers[writer]}->{self.readers[reader]}"
            for reader, writer in zip(*self.ends, strict=True)
        )

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.edges)}

    @property
    def n(self) -> int:
        """Number of edges."""
        return len(self.ends[0])

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Numbers of edges given by name.

        Raises:
            LensError: an edge that is not there.
        """
        found = []
        check_lists(edges=names)
        for name in names:
            if name not in self._numbers:
                raise LensError(
                    f"there is no edge {name!r} among the {self.n:,} of this graph; one is written "
                    f"like {self.edges[0]!r}"
                )
            found.append(self._numbers[name])
        return np.array(found, int)

    def dense(self, values: np.ndarray, fill: float = 0.0) -> np.ndarray:
        """[..., readers, writers] of values [..., edges], `fill` where there is no edge."""
        found = np.full((*values.shape[:-1], *self.allowed.shape), fill, values.dtype)
        found[..., self.allowed] = values
        return found


@dataclass(frozen=True)
class StreamGraph(AnyGraph):
    """A graph whose sub-layers read as one: `a0` (all heads of a layer, of softmax or of a mixer), `m0`, `logits`.

    Attributes:
        writers: `input`, then heads `a0.h1` and MLPs `m0` in the order in which they run.
        readers: in that order.
        before: of each reader, how many writers come before it.
        feeds: of each reader the writers that it is an input of.

    Raises:
        LensError: names and numbers that make no such graph.
    """

    writers: tuple[str, ...]  # type: ignore[reportIncompatibleVariableOverride]
    readers: tuple[str, ...]
    before: tuple[int, ...]
    feeds: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        count = len(self.writers)
        fed = [number for some in self.feeds for number in some]
        if (
            self.writers[:1] != ("input",)
            or self.readers[-1:] != ("logits",)
            or len({*self.writers}) < count
            or len({*self.readers}) < len(self.readers)
            or not len(self.readers) == len(self.before) == len(self.feeds)
            or not all(1 <= number <= count for number in self.before)
            or sorted(fed) != list(range(1, count))
        ):
            raise LensError(
                "writers begin with input, readers end with logits, each once; before and feeds have an entry of each "
                "reader, and each writer but input is fed by one"
            )

    @cached_property
    def allowed(self) -> np.ndarray:
        """[readers, writers], whether there is an edge."""
        return np.arange(len(self.writers)) < np.array(self.before)[:, None]

    def __getattr__(self, name: str) -> Any:
        """Raises LensError: what only a graph of like layers has."""
        if name.startswith("_") or (not hasattr(Graph, name) and name not in Graph.__annotations__):
            raise AttributeError(name)
        raise LensError(
            "this takes circuits of models whose layers all have softmax attention; those of models with mixers are scored, "
            "found, evaluated, saved and drawn (lens.circuits)"
        )

    def __repr__(self) -> str:
        return f"StreamGraph({len(self.writers)} writers, {len(self.readers)} readers, {self.n:,} edges)"


@dataclass(frozen=True)
class Graph(AnyGraph):
    """All edges of a transformer.

    Attributes:
        layers, heads, kv_heads: of the model.
        mlps: whether each layer has an MLP.
        parallel: whether an MLP reads the same as the attention of its layer (GPT-NeoX), so that no
            head writes to the MLP of its own layer.
        kv: with grouped queries, "head" gives every query head its own `<k>` and `<v>` (as the
            benchmark does), "group" has one of each per group: `a0.kv1<k>`.

    Raises:
        LensError: sizes that fit no transformer.
    """

    layers: int
    heads: int
    kv_heads: int
    mlps: bool = True
    parallel: bool = False
    kv: Kv = "head"

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads:
            raise LensError(
                "layers, heads and kv_heads must be positive, and heads a multiple of kv_heads; got "
                f"{self.layers}, {self.heads} and {self.kv_heads}"
            )
        check_choice("kv", self.kv, Kv)

    @property
    def kv_readers(self) -> int:
        """Readers `<k>` of a layer, and as many `<v>`."""
        return self.heads if self.kv == "head" else self.kv_heads

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """`input`, then the heads and the MLP of each layer."""
        names = ["input"]
        for layer in range(self.layers):
            names += [f"a{layer}.h{head}" for head in range(self.heads)]
            names += [f"m{layer}"] * self.mlps
        return tuple(names)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Of each layer all `<q>`, all `<k>`, all `<v>` and the MLP; then `logits`."""
        word = "h" if self.kv_readers == self.heads else "kv"
        names = []
        for layer in range(self.layers):
            names += [f"a{layer}.h{head}<q>" for head in range(self.heads)]
            for kind in "kv":
                names += [f"a{layer}.{word}{head}<{kind}>" for head in range(self.kv_readers)]
            names += [f"m{layer}"] * self.mlps
        return (*names, "logits")

    @cached_property
    def allowed(self) -> np.ndarray:
        """[readers, writers], whether there is an edge."""
        found = np.zeros((len(self.readers), len(self.writers)), bool)
        for layer in range(self.layers):
            before = self.heads_of(layer).start
            found[self.attention_readers(layer), :before] = True
            if self.mlps:
                last = before if self.parallel else self.heads_of(layer).stop
                found[self.mlp_reader(layer), :last] = True
        found[-1] = True
        return found

    @cached_property
    def feeds(self) -> tuple[tuple[int, ...], ...]:
        """For each reader the writers that it is an input of; none for `logits`."""
        found: list[tuple[int, ...]] = []
        size = self.heads // self.kv_readers
        for layer in range(self.layers):
            start = self.heads_of(layer).start
            found += [(start + head,) for head in range(self.heads)]
            groups = [
                tuple(range(start + size * group, start + size * (group + 1)))
                for group in range(self.kv_readers)
            ]
            found += groups * 2
            if self.mlps:
                found.append((self.mlp_writer(layer),))
        return (*found, ())

    def heads_of(self, layer: int) -> slice:
        """Where the heads of a layer stand among the writers."""
        start = 1 + layer * (self.heads + self.mlps)
        return slice(start, start + self.heads)

    def mlp_writer(self, layer: int) -> int:
        """Where the MLP of a layer stands among the writers."""
        return self.heads_of(layer).stop

    def attention_readers(self, layer: int) -> slice:
        """Where `<q>`, `<k>` and `<v>` of a layer stand among the readers, in this order."""
        width = self.heads + 2 * self.kv_readers
        start = layer * (width + self.mlps)
        return slice(start, start + width)

    def mlp_reader(self, layer: int) -> int:
        """Where the MLP of a layer stands among the readers."""
        return self.attention_readers(layer).stop

    def __repr__(self) -> str:
        kind = "parallel" if self.parallel else "serial"
        return (
            f"Graph({self.layers} layers × {self.heads} heads, {'with' if self.mlps else 'no'} MLPs, "
            f"{kind}: {len(self.writers)} writers, {len(self.readers)} readers, {self.n:,} edges)"
        )


def entries(graph: Graph) -> dict[str, Any]:
    """What a file keeps of a graph: its sizes, or of a hybrid (`StreamGraph`) the names of its parts."""
    return {one.name: getattr(graph, one.name) for one in fields(graph)}


def graph_of(given: Mapping[str, Any]) -> Graph:
    """The graph of `entries`.

    Raises:
        LensError: they make none; TypeError, KeyError: they are others.
    """
    if "writers" not in given:
        return Graph(**given)
    names = {key: tuple(given[key]) for key in ("writers", "readers", "before")}
    found: Any = StreamGraph(**names, feeds=tuple(map(tuple, given["feeds"])))
    return found
