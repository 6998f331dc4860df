"""`KnownCircuit`: a model, tasks that it does, and the edges that do them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lens.common.head_ids import HeadId, head_of_node
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task


@dataclass(frozen=True, repr=False, eq=False)
class KnownCircuit:
    """A model with its true circuit.

    Nodes are named as by the Mechanistic Interpretability Benchmark: `input`, `a0.h1` (a head), `m0`
    (an MLP), `logits`; an edge is `writer->reader`, and a head reads by `<q>`, `<k>` and `<v>`, as in
    `a0.h0->a1.h0<k>`.

    Attributes:
        name: of the program.
        model: as `lens.load` returns it.
        tasks: by what its corrupt prompts change; the metric is a logit difference throughout.
        edges: all that are truly active, in the order of the model.
        visible: for each task the edges whose ablation to the corrupt prompts alone changes the
            answer, where that is known; the others do their work in the same way on both prompts.
        inactive: heads and MLPs that write exactly 0 whatever they read.
    """

    name: str
    model: LoadedModel
    tasks: Mapping[str, Task]
    edges: tuple[str, ...]
    inactive: tuple[str, ...]
    visible: Mapping[str, tuple[str, ...]]

    @property
    def task(self) -> Task:
        """The first of the tasks."""
        return next(iter(self.tasks.values()))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Heads and MLPs of the circuit."""
        ends = (re.sub(r"<.>", "", end) for edge in self.edges for end in edge.split("->"))
        return tuple(sorted({end for end in ends if end not in ("input", "logits")}))

    @property
    def components(self) -> dict[str, bool]:
        """Every head and MLP of the model, and whether it is active."""
        names = sorted({*self.nodes, *self.inactive})
        return {name: name in self.nodes for name in names}

    @property
    def heads(self) -> tuple[HeadId, ...]:
        """Heads of the circuit."""
        return _heads(self.nodes)

    @property
    def inactive_heads(self) -> tuple[HeadId, ...]:
        """Heads that do nothing."""
        return _heads(self.inactive)

    def __repr__(self) -> str:
        return (
            f"KnownCircuit({self.name}: {len(self.edges)} edges between {', '.join(self.nodes)}; "
            f"inactive: {', '.join(self.inactive) or 'none'}; tasks: {', '.join(self.tasks)})"
        )


def _heads(names: tuple[str, ...]) -> tuple[HeadId, ...]:
    return tuple(filter(None, map(head_of_node, names)))
