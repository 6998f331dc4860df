"""What a trace keeps of attention in windows, so that its rows are exact: who sees whom, and the bias by distance.

Windows, shifted or not, part the positions of a picture: those of one part see each other and nothing else. Of a position
bias that depends on how far apart two cells are alone (Swin's), the numbers of each head by rows and columns apart say all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lens.passes.structures import MaskStructure

if TYPE_CHECKING:
    from torch import Tensor

    from lens.passes.calls import LayerCall

_ROWS = 256  # of a bias that are looked at at once


def partition(mask: MaskStructure) -> Tensor | None:
    """[positions] int, the part that each position of one prompt is in, -1 of one that sees nothing; None where the mask parts nothing."""
    if mask.allowed is None or len(mask.allowed) > 1 or mask.cross:
        return None
    seen = mask.allowed[0, 0].cpu()
    if seen.shape[0] != seen.shape[1]:
        return None
    part = torch.where(seen.any(-1), seen.int().argmax(-1), -1)
    return part if bool((seen == ((part[:, None] == part) & (part >= 0))).all()) else None


def bias_table(call: LayerCall) -> Tensor | None:
    """[batch, heads, row_offset, column_offset], what is added to the logits by rows and columns from key to query, the largest way up and left first.

    Zeros where nothing is added, NaN where a bias depends on more than the distance (SAM's on the query), and between cells
    so far apart that none sees the other. None of a layer whose positions are no cells.
    """
    places = call.key_places
    if places is None or places.cells is None or call.cross:
        return None
    cells = torch.tensor(places.cells)
    height, width = (cells.amax(0) + 1).tolist()
    batch, heads = call.query.shape[:2]
    size = (2 * height - 1, 2 * width - 1)
    if call.position_bias is None:
        return torch.zeros(batch, heads, *size)
    bias = call.position_bias.detach()
    alike = 4 * torch.finfo(bias.dtype).eps * float(bias.abs().amax())  # Swin v2: a sigmoid of each
    bias = bias.float().cpu().expand(batch, heads, len(cells), len(cells))
    found = torch.full((batch, heads, size[0] * size[1]), torch.nan)
    for start in range(0, len(cells), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(cells)))
        down, across = (cells[rows, None] - cells).unbind(-1)
        code = (down + height - 1) * size[1] + across + width - 1
        own = call.mask.seen_by(rows.to(call.query.device), len(cells)).cpu()
        added, before = bias[:, :, rows][:, :, own], found[:, :, code[own]]
        found[:, :, code[own]] = torch.where(before.isnan(), added, before)
        if bool(((found[:, :, code[own]] - added).abs() > alike).any()):
            return torch.full((batch, heads, *size), torch.nan)
    return found.unflatten(-1, size)
