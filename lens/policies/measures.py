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


COLUMNS = {
    "density": "kept blocks among those that are seen",
    "recall": "mass on the kept blocks, mean over rows",
    "recall_p5": "its 5th percentile over rows",
    "recall_min": "its least over rows",
    "oracle_recall": "with as many blocks, the best ones for each row",
    "random_recall": "expected with as many blocks drawn at random",
    "output_error": "mean over rows of |o' - o| / |o|",
    "projected_error": "the same after the output projection; NaN where that is not known",
    "budget_90": "blocks that the best choice for each row needs for a recall of 0.9",
    "budget_95": "of 0.95",
    "budget_99": "of 0.99",
    "predicted": "the recall that the policy expected; NaN where it says nothing",
    "cost": "products q·k that choosing took, as a share of those of dense attention",
}
"""What is measured of each head and prompt, over the rows that see a key; all are shares."""


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
) -> list[dict[str, float]]:
    """`COLUMNS` of each head of a call of a single prompt.

    Args:
        dense: [1, heads, queries, value_dim], the output without a policy.
        projection: [heads, value_dim, d_model], or None.
        found: `ranked` of each head, if it is there already.
    """
    blocks = kept.blocks & view.visible
    whole = (blocks == view.visible).flatten(2).all(-1)  # these heads keep their bits
    sparse = torch.where(
        whole[..., None, None], dense, view.attended(blocks).output.to(dense.dtype)
    )
    heads = view.shape[1]
    ranks = found or [ranked(view, 0, head) for head in range(heads)]
    return [
        _of_head(view, blocks[0, head], ranks[head], kept, head, cost)
        | _errors(dense[0, head], sparse[0, head], ranks[head].live, projection, head)
        for head in range(heads)
    ]


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
    dense: Tensor, sparse: Tensor, live: Tensor, projection: Tensor | None, head: int
) -> dict[str, float]:
    dense, missing = dense[live].float(), (sparse - dense)[live].float()
    errors = {"output_error": _relative(missing, dense), "projected_error": float("nan")}
    if projection is not None:
        weight = projection[head].float()
        errors["projected_error"] = _relative(missing @ weight, dense @ weight)
    return errors


def _relative(missing: Tensor, whole: Tensor) -> float:
    size = whole.norm(dim=-1)
    some = size > _SMALLEST
    return float((missing.norm(dim=-1)[some] / size[some]).double().mean())
