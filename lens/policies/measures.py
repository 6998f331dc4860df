"""What a policy keeps of one call, row by row: recall, the oracle's recall, output error, budgets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.passes.blocks import BlockView
from lens.policies.base import Kept
from lens.stats import quantile

BUDGETS = (0.9, 0.95, 0.99)
"""Recalls whose price in blocks is given."""

_SMALLEST = 1e-30


@dataclass(frozen=True, eq=False)
class Ranked:
    """The exact masses of one head, summed from the largest on: shared by all policies of a block size.

    Attributes:
        sums: [rows, key_blocks], of the largest, the two largest, ... blocks, as shares of the mass on all
            keys (which is 1 less the share of a learned sink).
        masses: [rows, key_blocks], as shares of it.
        live: bool [rows], those that see a key and count.
    """

    sums: Tensor
    masses: Tensor
    live: Tensor


def ranked(view: BlockView, head: int, first_row: int = 0) -> Ranked:
    """The masses of one head of a call of a single prompt; rows before `first_row` do not count."""
    masses = view.row_masses[0, head]
    totals = masses.sum(-1)
    shares = masses / totals.clamp(min=_SMALLEST)[:, None]
    sums = shares.sort(-1, descending=True).values.cumsum(-1)
    counts = torch.arange(len(totals), device=totals.device) >= first_row
    return Ranked(sums, shares, (totals > 0) & counts)


class Dense:
    """The output of a layer without a policy, and sizes that errors are measured against: once for all policies.

    Attributes:
        output: [1, heads, queries, value_dim].
        projection: W_O [heads, value_dim, d_model], or None where it is not known.
        own: [heads, queries], norm of each head's output.
        projected: the same after the output projection, or None.
        written: [queries], norm of what all heads write together, or None.
    """

    def __init__(self, output: Tensor, projection: Tensor | None) -> None:
        self.output = output
        self.projection = None if projection is None else projection.float()
        heads = output[0].float()
        self.own, self.projected, self.written = heads.norm(dim=-1), None, None
        self._gram = None
        if self.projection is not None:
            self._gram = self.projection @ self.projection.transpose(-1, -2)
            self.projected = self.after(heads)
            summed = torch.einsum("htk,hkd->td", heads, self.projection)
            self.written = summed.norm(dim=-1)

    def after(self, heads: Tensor) -> Tensor:
        """[heads, queries]: norms of [heads, queries, value_dim] after the projection, by `x W W^T x`."""
        assert self._gram is not None
        return ((heads @ self._gram) * heads).sum(-1).clamp(min=0).sqrt()


def measure(
    view: BlockView, kept: Kept, cost: float, dense: Dense, ranks: list[Ranked]
) -> list[dict[str, float]]:
    """`COLUMNS` of each head of a call of a single prompt; `ranks`: `ranked` of each head."""
    blocks = kept.blocks & view.visible
    whole = (blocks == view.visible).flatten(2).all(-1)  # these heads keep their bits
    plain = dense.output
    sparse = torch.where(
        whole[..., None, None], plain, view.attended(blocks).output.to(plain.dtype)
    )
    missing = (sparse - plain)[0].float()
    errors = {"output_error": (missing.norm(dim=-1), dense.own)}
    if dense.projected is not None and dense.written is not None:
        lost = dense.after(missing)
        errors["projected_error"] = (lost, dense.projected)
        errors["layer_error"] = (lost, dense.written.expand_as(lost))
    return [
        _of_head(view, blocks[0, head], ranks[head], kept, head)
        | {"cost": cost, "projected_error": float("nan"), "layer_error": float("nan")}
        | {
            name: _relative(lacks[head], of[head], ranks[head].live)
            for name, (lacks, of) in errors.items()
        }
        for head in range(view.shape[1])
    ]


def _of_head(
    view: BlockView, blocks: Tensor, ranks: Ranked, kept: Kept, head: int
) -> dict[str, float]:
    visible = view.visible[0, head]
    rows = torch.arange(view.queries, device=blocks.device) // view.query_block
    recall = torch.where(blocks[rows], ranks.masses, 0).sum(-1)[ranks.live]
    count, seen = blocks.sum(-1)[rows][ranks.live], visible.sum(-1)[rows][ranks.live]
    sums = ranks.sums[ranks.live]
    best = sums.gather(-1, (count - 1).clamp(min=0)[:, None])[:, 0] * (count > 0)
    needed = [((sums < share).sum(-1) + 1).clamp(max=seen) / seen for share in BUDGETS]
    values = recall.double().cpu().numpy()
    predicted = float("nan") if kept.predicted is None else float(kept.predicted[0, head])
    return {
        "density": float(blocks.sum() / visible.sum()),
        "recall": float(values.mean()),
        "recall_p5": float(quantile(values, 0.05)),
        "recall_min": float(values.min()),
        "oracle_recall": float(best.double().mean()),
        "random_recall": float((count / seen).double().mean()),
        **{
            f"budget_{share:.0%}"[:-1]: float(one.mean())
            for share, one in zip(BUDGETS, needed, strict=True)
        },
        "predicted": predicted,
    }


def _relative(missing: Tensor, whole: Tensor, live: Tensor) -> float:
    some = live & (whole > _SMALLEST)
    return float((missing[some] / whole[some]).double().mean())
