"""`Batch`: what every method of scoring edges is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lens.circuits.graph.activations import Activations
from lens.circuits.graph.nodes import Nodes


def fractions_of(steps: int, rule: str, shift: float = 0.0) -> list[float]:
    """Where gradients are taken, from the reference (0) to the clean run (1); "left" `shift` steps later."""
    shift = 0.5 if rule == "midpoint" else shift
    return [(step + shift) / steps for step in range(steps)]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some prompts of a task, as every method gets them.

    Attributes:
        nodes: of the model.
        ids: [rows, tokens], clean.
        measure: logits [rows, tokens, vocab] -> [rows], larger is better.
        reference: outputs of all writers that are put in place of the clean ones.
        differences: clean - reference.
        steps, rule: of integrated gradients.
    """

    nodes: Nodes
    ids: Tensor
    measure: Callable[[Tensor], Tensor]
    reference: Activations
    differences: Activations
    steps: int
    rule: str

    @property
    def fractions(self) -> list[float]:
        """Where gradients are taken, from the reference (0) to the clean run (1)."""
        return fractions_of(self.steps, self.rule)

    @property
    def later_fractions(self) -> list[float]:
        """The same, but "left" begins one step after the reference and ends at the clean run."""
        return fractions_of(self.steps, self.rule, 1.0)
