"""Graphs of hybrids and of models of mixers alone: heads of softmax attention and of mixers (Mamba-2, RWKV-4) write alike.

What a head writes is its part of what the output projection reads, times its rows of that projection: of a mixer behind
gate and norm, which belong to the node. Heads of a layer read as one, since projections, convolution and the keys of a
group are theirs together; where softmax attention and a mixer read one norm side by side (Falcon-H1) they are one reader
too, and the heads of the mixer are `a0.s1`; so are those of DiffLlama, each a pair of softmax heads. That each sub-layer
reads the sum of what was written before, through its norm, is proved on the model's own pass before anything is scored;
numbers that outputs are multiplied by before they are added are measured there. Where a norm comes between heads and the
stream (softmax layers of OLMo-hybrid) a replaced head goes through it with the others, as in `lens.circuits.graph.nodes`,
and the norm behind an MLP belongs to its node.
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
from lens.circuits.graph.sublayers import NO_STATE, ends, sublayers
from lens.common.errors import LensError
from lens.mixers.reading import has_mixer_heads
from lens.models.loaded import LoadedModel
from lens.models.weights import matrix
from lens.passes.calls import first_of
from lens.passes.logits import logits_of
from lens.passes.visit import Hooks

_TOLERANCE = 1e-4
Change = Callable[[int, Tensor], Tensor]
"""(number of a reader, what it reads) -> what it reads instead."""


@dataclass(eq=False)
class Written(Activations):
    """What was written in one pass, and what was read.

    Attributes:
        input: [rows, tokens, d_model].
        heads: of each part of a sub-layer [rows, heads, tokens, width], what its output projection read, or what an
            MLP, which is one head, wrote.
        logits: [rows, tokens, vocab].
        read: of each reader what it reads of the stream.
    """

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    read: list[Tensor] = field(default_factory=list)


class Mixed:
    """A model with mixers, and its graph.

    Raises:
        LensError: a model whose sub-layers are not in a row, each behind a norm, or whose heads cannot be told apart.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self._first, self._last = ends(model)
        self._opening, self._layers = sublayers(model)
        writers, readers, before, feeds = ["input"], [], [], []
        self._parts = [part for one in self._layers for part in one.parts]
        for one in self._layers:
            readers.append(one.name)
            before.append(len(writers))
            own = [name for part in one.parts for name in part.names]
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
            found.logits = logits_of(self.model, ids, **NO_STATE)
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
            start = 0
            for one, own in enumerate(differences, -1):  # what entered, then each part
                alpha = alphas[:, number, start : start + own.shape[1]].to(own)
                shift = torch.einsum("rw,rwtd->rtd", alpha, own)
                start += own.shape[1]
                if one >= 0 and (norm := self._parts[one].after) is not None:
                    whole = self._whole(one, found.heads[one])
                    shift = norm(whole + shift) - norm(whole)
                read = read + shift
            return read

        with self._listening(found, change, None):
            logits = logits_of(self.model, ids.repeat(copies, 1), **NO_STATE)
        return logits.unflatten(0, (copies, rows))

    def written(self, number: int, heads: Tensor) -> Tensor:
        """[rows, heads, tokens, d_model] that a part adds to the stream, without a bias, of its `heads`."""
        one = self._parts[number]
        if one.output is None:
            return heads * one.scale
        weight = matrix(one.output, self.model)[0].to(heads) * one.scale
        return torch.einsum("rhtw,hwd->rhtd", heads, weight.unflatten(0, (len(one.names), -1)))

    def moved(self, number: int, heads: Tensor, change: Tensor) -> Tensor:
        """[rows, heads, tokens, d_model]: by what the stream is less where each of a part's `heads` alone is less by `change`."""
        own = self.written(number, change)
        if (norm := self._parts[number].after) is None:
            return own
        whole = self._whole(number, heads)[:, None]
        return norm(whole) - norm(whole - own)

    def slope(self, number: int, heads: Tensor, slope: Tensor) -> Tensor:
        """Gradient [rows, tokens, d_model] by the sum of a part's `heads`, of that by what it adds to the stream."""
        if (norm := self._parts[number].after) is None:
            return slope
        with torch.enable_grad():
            whole = self._whole(number, heads.detach()).detach().requires_grad_()
            return torch.autograd.grad(norm(whole), whole, slope)[0]

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

            if self._opening is None:
                hooks.before(self._first, "enter", enter)
            else:
                hooks.after(self._opening, "enter", lambda _, __, hidden: enter(hidden))
            for number, one in enumerate(self._layers):
                hooks.before(one.reader, "read", reads(number))
                for part in one.parts:
                    if part.output is not None:
                        keep = _keeping(found, len(part.names), len(self._parts))
                        hooks.before(part.output, "write", keep)
                    for is_more, module in enumerate(part.modules if part.output is None else ()):
                        hooks.after(module, "write", _adding_up(found, bool(is_more)))
            hooks.before(self._last, "read", reads(len(self._layers)))
            yield

    @torch.no_grad()
    def _prove(self) -> None:
        """Raises LensError: what is read is not the sum of what was written before."""
        ids = torch.arange(3, 9, device=self.model.device)[None] % (self.model.info.vocab or 9)
        found, at = self.run(ids), 0
        stream = found.input
        for number, (one, read) in enumerate(zip([None, *self._layers], found.read, strict=True)):
            if one is not None:
                own = [self._whole(at + n, found.heads[at + n]) for n in range(len(one.parts))]
                own = [
                    part if step.after is None else step.after(part)
                    for part, step in zip(own, one.parts, strict=True)
                ]
                scaled = all(part.after is None for part in one.parts)  # a norm undoes a scale
                if scaled and not _off(read, stream + sum(own)) <= _TOLERANCE:
                    for part, scale in zip(one.parts, _scales(own, read - stream), strict=True):
                        part.scale = scale
                    own = [part * step.scale for part, step in zip(own, one.parts, strict=True)]
                stream, at = stream + sum(own), at + len(own)
            if not (off := _off(read, stream)) <= _TOLERANCE:
                if self.model.precision not in (torch.float32, torch.float64):
                    raise LensError(
                        f"edges of models with mixers are proved to {_TOLERANCE:.0e}, and {self.model.name} rounds to "
                        f"{str(self.model.precision).removeprefix('torch.')}; load it in float32"
                    )
                raise LensError(
                    f"{self.graph.readers[number]} of {self.model.info.class_name} does not read the sum of what was "
                    f"written before (off by {off:.0e}), so its edges cannot be replaced; ablation of heads can: "
                    "lens.mixers.Ablate, lens.edits.Ablate"
                )

    def _whole(self, number: int, heads: Tensor) -> Tensor:
        """[rows, tokens, d_model] that a part gives, with its bias, before a norm behind it."""
        part, whole = self._parts[number], self.written(number, heads).sum(1)
        bias = None if part.output is None else matrix(part.output, self.model)[1]
        return whole if bias is None else whole + bias * part.scale


def _off(read: Tensor, stream: Tensor) -> float:
    return float((read - stream).abs().max() / stream.abs().max())


def _scales(parts: list[Tensor], added: Tensor) -> list[float]:
    """The numbers whose products with the parts add up to what was added best (least squares)."""
    columns = torch.stack([one.flatten().double() for one in parts], 1).cpu()
    found = torch.linalg.lstsq(columns, added.flatten().double().cpu()[:, None]).solution[:, 0]
    return found.where(columns.abs().sum(0) > 0, 1.0).tolist()


def mixed_of(model: LoadedModel) -> Mixed | None:
    """The graph of a model with mixers, proved; None of a model of softmax attention alone."""
    return Mixed(model) if has_mixer_heads(model) and not model.parts else None


def check_edges(model: LoadedModel, edges: int) -> None:
    """Raises LensError where the graph of a model has fewer edges; and as `find_nodes` or `Mixed`."""
    total = (mixed_of(model) or find_nodes(model)).graph.n
    if edges > total:
        raise LensError(f"edges must be 1 to {total:,}, as many as {model.name} has; got {edges:,}")


def _keeping(found: Written, heads: int, parts: int) -> Callable[[Tensor], None]:
    def keep(z: Tensor) -> None:
        if len(found.heads) == parts:
            raise LensError(
                "this pass runs its layers on one piece of the prompt after another (max_inference_chunksize of xLSTM), and "
                "edges are of whole prompts; raise it above their length"
            )
        found.heads.append(z.unflatten(-1, (heads, -1)).transpose(1, 2))

    return keep


def _adding_up(found: Written, is_more: bool) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        own = first_of(output)[:, None]
        if is_more:
            found.heads[-1] = found.heads[-1] + own
        else:
            found.heads.append(own)

    return keep
