"""What every earlier part of a model contributes to what one head writes: its values, taken apart as logits are."""

from __future__ import annotations

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.passes.sessions import run
from lens.passes.visit import visiting
from lens.reading._head import Head
from lens.reading._writers import Make, Taking

VALUE_BIAS = "value bias"


def written_shares(head: Head, rows: Tensor) -> dict[str, float]:
    """Part -> its share in what the head writes in these rows, mean over rows; they sum to 1.

    With `z_a = A_i V_a W_O` of part a and `z` their sum, the share is `z_a·z / z·z`.

    Raises:
        LensError: parts that do not sum to what the head gives.
    """
    taking = _Values(head, rows)
    with torch.no_grad(), visiting(head.layout, 1, taking):
        run(head.layout.model, head.inputs)
        taking.finish()
    parts = torch.stack(list(taking.found.values()))  # [parts, rows, head_dim]
    whole, attention = parts.sum(0), head.rows(rows)
    own = attention @ head.call.value[0, head.group].double()
    error = float((whole - own).abs().max()) / max(float(own.abs().max()), 1e-30)
    if not error <= head.tolerance:
        raise LensError(
            f"the parts of the values of {head.id} do not sum to them (off by {error:.1e}), so they would explain "
            "another model"
        )
    output = head.layout.blocks[head.id.layer].output[head.id.head].double()
    parts, whole = parts @ output, whole @ output
    sizes = whole.square().sum(-1)
    shares = (parts * whole).sum(-1) / sizes.where(sizes > 0, torch.nan)
    return dict(zip(taking.found, shares.mean(-1).tolist(), strict=True))


class _Values(Taking):
    """The pass in which writers give their parts of the values."""

    def __init__(self, head: Head, rows: Tensor) -> None:
        super().__init__(head, None)
        weight, bias = head.layout.blocks[head.id.layer].weights[2]
        self._weight = weight[head.group].double()
        self._bias = None if bias is None else bias[head.group].double()
        self._rows = head.rows(rows)
        self.found: dict[str, Tensor] = {}

    def give(self, name: str, start: int, make: Make) -> None:
        part = self.through(start, make, slice(0, self.head.tokens))
        self._put(name, self._rows @ part @ self._weight)

    def finish(self) -> None:
        """And what the values' own projection adds."""
        super().finish()
        if self._bias is not None:
            self._put(VALUE_BIAS, self._rows.sum(-1, keepdim=True) * self._bias)

    def _put(self, name: str, part: Tensor) -> None:
        self.found[name] = self.found[name] + part if name in self.found else part
