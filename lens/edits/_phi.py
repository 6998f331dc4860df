"""phi: how far a token's largest coordinates stick out of the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel

if TYPE_CHECKING:
    from jaxtyping import Float

KNOWN = {
    "llava-1.5-7b": (1415, 2533),
    "llava-1.5-13b": (2100, 4743),
    "qwen2-vl-7b": (458, 2570),
    "internvl2-8b": (3584,),
}
"""Published sink dimensions (arXiv 2503.03321 and its released code), by the model's usual name."""

EPSILON = 1e-6


def phi(
    hidden: Float[Tensor, "*batch tokens width"], dims: Sequence[int] | None = None
) -> Float[Tensor, "*batch tokens"]:
    """`max_d |x_d| / RMS(x)` over the dimensions, which never passes `sqrt(width)`.

    Args:
        hidden: [..., tokens, width], what enters a layer.
        dims: the sink dimensions; None: all, where they are not known.

    Reference:
        Kang et al., arXiv 2503.03321.
    """
    values = hidden.float()
    scale = values.pow(2).mean(-1).add(EPSILON).rsqrt()
    chosen = values if dims is None else values[..., list(dims)]
    return chosen.abs().amax(-1) * scale


def width_of(model: LoadedModel) -> int:
    """Dimensions of the residual stream."""
    config = model.model.cfg if model.is_bridge else model.model.config.get_text_config()
    return config.d_model if model.is_bridge else config.hidden_size


def check_dims(model: LoadedModel, dims: Sequence[int] | None) -> None:
    """Raises LensError unless the model has these dimensions; None is all of them."""
    width = width_of(model)
    if dims is not None and (not len(dims) or not all(0 <= dim < width for dim in dims)):
        raise LensError(
            f"dims must be some of 0 to {width - 1} of {model.name}, got {list(dims)}; find them with "
            "lens.sinks.dims"
        )
