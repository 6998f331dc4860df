"""Graphs of hybrids: heads of softmax attention and of mixers (Mamba-2, delta rules, convolutions) write alike.

What a head writes is its part of what the output projection reads, times its rows of that projection: of a mixer behind
gate and norm, which belong to the node. Heads of a layer read as one, since projections, convolution and the keys of a
group are theirs together. That each sub-layer reads the sum of what was written before, through its norm, is proved on
the model's own pass before anything is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lens.circuits.graph.activations import Activations
from lens.circuits.graph.graph import StreamGraph
from lens.circuits.graph.nodes import find_nodes
from lens.common.errors import LensError
from lens.mixers.ablating import heads_of
from lens.mixers.reading import mixers_of
from lens.models.layout import blocks
from lens.models.loaded import LoadedModel
from lens.models.weights import matrix
from lens.passes.calls import first_of
from lens.passes.logits import logits_of
from lens.passes.sessions import transformer
from lens.passes.visit import Hooks

_TOLERANCE = 1e-4
Change = Callable[[int, Tensor], Tensor]
"""(number of a reader, what it reads) -> what it reads instead."""


@dataclass(frozen=True, eq=False)
class _SubLayer:
    """One norm and what reads through it.

    Attributes:
        name: `a0` or `m0`.
        norm, module: of it.
        output: of a layer of heads the projection that they write through, else None.
        heads: how many; 1 of an MLP.
    """

    name: str
    norm: nn.Module
    module: nn.Module
    output: nn.Module | None
    heads: int


@dataclass(eq=False)
class Written(Activations):
    """What was written in one pass, and what was read.

    Attributes:
        input: [rows, tokens, d_model].
        heads: of each sub-layer [rows, heads, tokens, width], what its output projection read, or what an MLP, which is
            one head, wrote.
        logits: [rows, tokens, vocab].
        read: of each reader what entered its norm.
    """

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    read: list[Tensor] = field(default_factory=list)


class Mixed:
    """A hybrid with its graph.

    Raises:
        LensError: a model whose sub-layers are not in a row, each behind a norm, or whose heads cannot be told apart.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self._first, self._last = _ends(model)
        self._layers = _sublayers(model)
        writers, readers, before, feeds = ["input"], [], [], []
        for one in self._layers:
            readers.append(one.name)
            before.append(len(writers))
            own = (
                [one.name] if one.output is None else [f"{one.name}.h{h}" for h in range(one.heads)]
            )
            feeds.append(tuple(range(len(writers), len(writers) + len(own))))
            writers += own
        readers, before, feeds = [*readers, "logits"], [*before, len(writers)], [*feeds, ()]
        self.graph = StreamGraph(tuple(writers), tuple(readers), tuple(before), tuple(feeds))
        self._prove()

    def run(
        self, ids: Tensor, change: Change | None = None, entered: Tensor | None = None
    ) -> Written:
        """One pass; readers get what `change` makes of what they would read, the first layer gets `entered`."""
        found = Written(torch.empty(0))
        with self._listening(found, change, entered):
            found.logits = logits_of(self.model, ids)
        return found

    @torch.no_grad()
    def outputs(self, ids: Tensor) -> Activations:
        """What is written in a plain pass."""
        return self.run(ids)

    def masked(self, ids: Tensor, reference: Activations, masks: Tensor) -> Tensor:
        """Logits [masks, rows, tokens, vocab] of a pass in which each edge carries what its mask [masks, readers, writers] says.

        As `lens.circuits.graph.masked_forward`: a reader gets what it reads and, of each writer before it, alpha times
        (what the writer gave in the reference - what it gives in this pass).
        """
        copies, rows = len(masks), len(ids)
        alphas = masks.where(torch.as_tensor(self.graph.allowed), 0).repeat_interleave(rows, 0)
        found, differences = Written(torch.empty(0)), []

        def of_rows(part: Tensor) -> Tensor:
            own = part.expand(rows, *part.shape[1:])
            return own.repeat(copies, *[1] * (part.dim() - 1))

        def change(number: int, read: Tensor) -> Tensor:
            if not differences:
                differences.append((of_rows(reference.input) - found.input)[:, None])
            for one in range(len(differences) - 1, len(found.heads)):
                own = of_rows(reference.heads[one]) - found.heads[one]
                differences.append(self.written(one, own))
            before = torch.cat(differences, 1)
            alpha = alphas[:, number, : before.shape[1]].to(before)
            return read + torch.einsum("rw,rwtd->rtd", alpha, before)

        with self._listening(found, change, None):
            logits = logits_of(self.model, ids.repeat(copies, 1))
        return logits.unflatten(0, (copies, rows))

    def written(self, number: int, heads: Tensor) -> Tensor:
        """[rows, heads, tokens, d_model] that a sub-layer adds to the stream, without a bias, of its `heads`."""
        one = self._layers[number]
        if one.output is None:
            return heads
        weight = matrix(one.output, self.model)[0].to(heads)
        return torch.einsum("rhtw,hwd->rhtd", heads, weight.unflatten(0, (one.heads, -1)))

    @contextmanager
    def _listening(
        self, found: Written, change: Change | None, entered: Tensor | None
    ) -> Iterator[None]:
        with ExitStack() as stack:
            hooks = Hooks(stack)

            def enter(hidden: Tensor) -> Tensor | None:
                found.input = hidden if entered is None else entered
                return entered

            def reads(number: int) -> Callable[[Tensor], Tensor | None]:
                def read(hidden: Tensor) -> Tensor | None:
                    found.read.append(hidden)
                    return None if change is None else change(number, hidden)

                return read

            hooks.before(self._first, "enter", enter)
            for number, one in enumerate(self._layers):
                hooks.before(one.norm, "read", reads(number))
                if one.output is None:
                    hooks.after(
                        one.module,
                        "write",
                        lambda _, __, output: found.heads.append(first_of(output)[:, None]),
                    )
                else:
                    hooks.before(one.output, "write", _keeping(found, one.heads))
            hooks.before(self._last, "read", reads(len(self._layers)))
            yield

    def _prove(self) -> None:
        """Raises LensError: what is read is not the sum of what was written before."""
        ids = torch.arange(3, 9, device=self.model.device)[None] % (self.model.info.vocab or 9)
        with torch.no_grad():
            found = self.run(ids)
            stream = found.input
            for number, read in enumerate(found.read):
                off = float((read - stream).abs().max() / stream.abs().max())
                if not off <= _TOLERANCE:
                    raise LensError(
                        f"{self.graph.readers[number]} of {self.model.info.class_name} does not read the sum of what was "
                        f"written before (off by {off:.0e}), so its edges cannot be replaced; ablation of heads can: "
                        "lens.mixers.Ablate, lens.edits.Ablate"
                    )
                if number < len(self._layers):
                    one = self._layers[number]
                    bias = None if one.output is None else matrix(one.output, self.model)[1]
                    stream = stream + self.written(number, found.heads[number]).sum(1)
                    stream = stream if bias is None else stream + bias


def mixed_of(model: LoadedModel) -> Mixed | None:
    """The graph of a hybrid, proved; None of a model whose layers all have softmax attention."""
    return Mixed(model) if model.info.without_attention and not model.parts else None


def check_edges(model: LoadedModel, edges: int) -> None:
    """Raises LensError where the graph of a model has fewer edges; and as `find_nodes` or `Mixed`."""
    total = (mixed_of(model) or find_nodes(model)).graph.n
    if edges > total:
        raise LensError(f"edges must be 1 to {total:,}, as many as {model.name} has; got {edges:,}")


def _keeping(found: Written, heads: int) -> Callable[[Tensor], None]:
    def keep(z: Tensor) -> None:
        found.heads.append(z.unflatten(-1, (heads, -1)).transpose(1, 2))

    return keep


def _ends(model: LoadedModel) -> tuple[nn.Module, nn.Module]:
    """The first layer, and the norm behind the last one."""
    layers = blocks(model)
    root: Any = transformer(model)
    inside = {id(one) for layer in layers for one in layer.modules()}
    norms = [one for one in root.modules() if _is_norm(one) and id(one) not in inside]
    if len(norms) != 1:
        raise LensError(
            f"{model.info.class_name} has {len(norms)} norms outside of its layers, and one must come before its logits; "
            "its edges are not known here"
        )
    return layers[0], norms[0]


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def _sublayers(model: LoadedModel) -> list[_SubLayer]:
    """Norms of the layers with what runs behind each, in the order of a pass."""
    mixers = {id(module): number for number, module in mixers_of(transformer(model))}
    counts: dict[int, int] = {}
    for head in heads_of(model):
        counts[head.layer] = counts.get(head.layer, 0) + 1
    layers = blocks(model)
    found: list[_SubLayer] = []
    for number, (layer, ran) in enumerate(zip(layers, _ran(model, layers), strict=True)):
        norm, is_first, children = None, True, set(layer.children())
        for child in (one for one in ran if one in children):
            if _is_norm(child):
                norm = child
                continue
            if norm is None or not any(True for _ in child.parameters()):
                continue
            own = next((mixers[id(one)] for one in child.modules() if id(one) in mixers), None)
            is_softmax = own is None and is_first and number in model.info.attending
            heads = counts[number] if own is not None else model.info.heads if is_softmax else 1
            output = _output(child, heads, ran) if own is not None or is_softmax else None
            name = f"{'m' if output is None else 'a'}{number}"
            found.append(_SubLayer(name, norm, child, output, heads))
            norm, is_first = None, False
    return found


def _ran(model: LoadedModel, layers: list[nn.Module]) -> list[list[nn.Module]]:
    """Of each layer its children and all its linear modules, in the order in which they run."""
    found: list[list[nn.Module]] = [[] for _ in layers]
    with ExitStack() as stack, torch.no_grad():
        for layer, own in zip(layers, found, strict=True):
            linear = (one for one in layer.modules() if isinstance(one, nn.Linear))
            for one in {*layer.children(), *linear}:
                stack.callback(one.register_forward_pre_hook(_adding(own)).remove)
        logits_of(model, torch.zeros(1, 3, dtype=torch.long, device=model.device))
    return found


def _adding(found: list[nn.Module]) -> Callable[[nn.Module, Any], None]:
    def add(module: nn.Module, _: Any) -> None:
        found.append(module)

    return add


def _output(module: nn.Module, heads: int, ran: list[nn.Module]) -> nn.Module:
    """The projection that the heads of a sub-layer write through: its linear module that runs last."""
    inside = set(module.modules())
    linear = [one for one in ran if one in inside and isinstance(one, nn.Linear)]
    if not linear or linear[-1].in_features % heads:
        raise LensError(
            f"where the {heads} heads of {type(module).__name__} write is not known here, so their edges cannot be replaced"
        )
    return linear[-1]
