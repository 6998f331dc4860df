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
        totals: [rows], mass on all keys, 1 less the share of a learned sink.
        sums: [rows, key_blocks], of the largest, the two largest, ... blocks, as shares of the total.
        masses: [rows, key_blocks], as shares of the total.
        live: bool [rows], those that see a key.
    """

    totals: Tensor
    sums: Tensor
    masses: Tensor
    live: Tensor


def ranked(view: BlockView, row: int, head: int) -> Ranked:
    """The masses of one head of one row of the batch."""
    masses = view.row_masses[row, head]
    totals = masses.sum(-1)
    shares = masses / totals.clamp(min=_SMALLEST)[:, None]
    sums = shares.sort(-1, descending=True).values.cumsum(-1)
    return Ranked(totals, sums, shares, totals > 0)


def measure(
    view: BlockView,
    kept: Kept,
    cost: float,
    dense: Tensor,
    projection: Tensor | None,
    found: list[Ranked] | None = None,
    written: Tensor | None = None,
) -> list[dict[str, float]]:
    """`COLUMNS` of each head of a call of a single prompt.

    Args:
        dense: [1, heads, queries, value_dim], the output without a policy.
        projection: [heads, value_dim, d_model], or None.
        found: `ranked` of each head, if it is there already.
        written: [queries], the size of what all heads of the layer write, if it is there already.
    """
    blocks = kept.blocks & view.visible
    whole = (blocks == view.visible).flatten(2).all(-1)  # these heads keep their bits
    sparse = torch.where(
        whole[..., None, None], dense, view.attended(blocks).output.to(dense.dtype)
    )
    heads = view.shape[1]
    ranks = found or [ranked(view, 0, head) for head in range(heads)]
    if projection is not None and written is None:
        written = sizes(dense, projection)
    return [
        _of_head(view, blocks[0, head], ranks[head], kept, head, cost)
        | _errors(dense[0, head], sparse[0, head], ranks[head].live, projection, head, written)
        for head in range(heads)
    ]


def sizes(dense: Tensor, projection: Tensor) -> Tensor:
    """[queries]: the norm of what the heads of a layer, [1, heads, queries, value_dim], write together."""
    return torch.einsum("htk,hkd->td", dense[0].float(), projection.float()).norm(dim=-1)


def _of_head(
    view: BlockView, blocks: Tensor, ranks: Ranked, kept: Kept, head: int, cost: float
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
        "cost": cost,
    }


def _errors(
    dense: Tensor,
    sparse: Tensor,
    live: Tensor,
    projection: Tensor | None,
    head: int,
    written: Tensor | None,
) -> dict[str, float]:
    dense, missing = dense[live].float(), (sparse - dense)[live].float()
    errors = {"output_error": _relative(missing.norm(dim=-1), dense.norm(dim=-1))}
    if projection is None or written is None:
        return errors | {"projected_error": float("nan"), "layer_error": float("nan")}
    weight = projection[head].float()
    lost = (missing @ weight).norm(dim=-1)
    errors["projected_error"] = _relative(lost, (dense @ weight).norm(dim=-1))
    errors["layer_error"] = _relative(lost, written[live])
    return errors


def _relative(missing: Tensor, whole: Tensor) -> float:
    some = whole > _SMALLEST
    return float((missing[some] / whole[some]).double().mean())
