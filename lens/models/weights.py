"""The weight and bias that a projection multiplies by: its own, or, of an adapter or a quantised one, the effective ones.

What an adapted (LoRA, DoRA, IA3, OFT) or quantised (4 bit, float8) projection computes is `x W + b` with a W that
no attribute holds. It is measured: b is what it makes of 0, and W's rows are what it makes of the unit vectors.
One that is not of this shape (8 bit of bitsandbytes rounds what it reads) has no such W and is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lens.common.errors import LensError, first_line
from lens.models.loaded import LoadedModel

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_DRAWN = 4


def matrix(module: nn.Module, model: LoadedModel) -> tuple[Tensor, Tensor | None]:
    """Weight [in, out] and bias [out] or None, so that the module gives `x W + b`; views where they lie in it.

    Args:
        module: a projection.
        model: what it is part of.

    Raises:
        LensError: weights that are not in memory or lie on several devices, or a module that is no `x W + b`.
    """
    if any(one.is_meta for one in module.parameters()):
        raise LensError(
            f"weights of a {type(module).__name__} are not in memory (offloaded, or on the meta device); load the "
            "model on one device"
        )
    if getattr(getattr(module, "weight", None), "act_quant_kwargs", None):  # of torchao
        raise LensError(
            f"a {type(module).__name__} does not compute x W + b with one W: it rounds what it reads to 8 bit; load the model "
            "with quantised weights alone, or in float32 or bfloat16"
        )
    if _is_plain(module):
        weight = module.get_parameter("weight").detach()
        bias = getattr(module, "bias", None)
        turned = weight if isinstance(module, Conv1D) else weight.T
        return turned, None if bias is None else bias.detach()
    return _measured(
        module, model.dtype, _TOLERANCE.get(model.precision, _TOLERANCE[torch.bfloat16])
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a Linear or GPT-2's Conv1D, nothing else, with weights that are plain numbers."""
    weight: Any = getattr(module, "weight", None)
    return (
        type(module).forward in (nn.Linear.forward, Conv1D.forward)
        and "forward" not in vars(module)
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
        and not nn.utils.parametrize.is_parametrized(module)
    )


@torch.no_grad()
def _measured(
    module: nn.Module, dtype: torch.dtype, tolerance: float
) -> tuple[Tensor, Tensor | None]:
    kind, width = type(module).__name__, getattr(module, "in_features", None)
    device = next((one.device for one in module.parameters()), torch.device("cpu"))
    what = f"a {kind} does not compute x W + b with one W"
    if not isinstance(width, int):
        raise LensError(
            f"{what} whose size it says, so what it writes cannot be taken apart into heads"
        )
    draw = torch.randn(_DRAWN, width, generator=torch.Generator().manual_seed(0))
    draw = draw.to(device, dtype)
    read = torch.cat([draw.new_zeros(1, width), torch.eye(width, dtype=dtype, device=device), draw])
    try:
        # In float8 and 8 bit what is read is scaled by rows, so that rows know nothing of each other.
        found = module.forward(read)
    except Exception as error:  # of somebody else's code: any kind
        raise LensError(f"{what}: {type(error).__name__}: {first_line(error)}") from error
    if type(found) is not Tensor or found.dim() != 2:
        raise LensError(
            f"weights of a {kind} give a {type(found).__name__}: split over devices, or no projection; load the "
            "whole model on one device"
        )
    bias, weight, own = found[0], found[1 : width + 1] - found[0], found[width + 1 :]
    error = (draw @ weight + bias - own).abs().max() / own.abs().max().clamp(min=1e-30)
    if not float(error) <= tolerance:
        raise LensError(
            f"{what} (off by {float(error):.0e} of the largest): it rounds or routes what it reads, so what it writes "
            "cannot be taken apart into heads; load the model in float32, bfloat16 or 4 bit"
        )
    return weight, bias if bool(bias.any()) else None
