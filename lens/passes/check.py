"""The self-check at load: capture reproduces this very model, or says that it does not."""

from typing import Any, NamedTuple

import torch
from lens_kernels import AttentionResult

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.interface import switched
from lens.passes.sessions import base, listening, transformer

LENGTH = 24
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ROW_SUM_TOLERANCE = 1e-4


class Checked(NamedTuple):
    """What a tiny prompt shows.

    Attributes:
        difference: `max |captured - own| / max |own|`, of the last hidden state.
        attending: layers that attended.
        twice: those that did so more than once.
    """

    difference: float
    attending: tuple[int, ...]
    twice: tuple[int, ...]


def self_check(model: LoadedModel) -> Checked:
    """Largest relative difference of the captured from the model's own output, and the layers seen.

    On a tiny prompt; the model's own attention is
    transformers' `eager`, or the bridge's.

    Raises:
        LensError: no attention was reached, the outputs differ, or captured rows do not sum to 1.
    """
    inputs = tiny_inputs(model)
    excesses: list[float] = []
    parts: dict[int, int] = {}

    def on_layer(call: LayerCall) -> torch.Tensor:
        result = attend(call, statistics=("lse", "received"))
        excesses.append(_row_sum_error(result, call.sink_logits))
        parts[call.layer] = call.part
        return result.output

    with torch.no_grad():
        if model.is_bridge:
            own = _output(model, inputs)
        else:
            with switched(transformer(model), "eager"):
                own = _output(model, inputs)
        with listening(model, on_layer):
            captured = _output(model, inputs)
    if not excesses:
        raise LensError(
            f"cannot reach the attention of {model.info.class_name}: none of its layers asks "
            "transformers' AttentionInterface (ALL_ATTENTION_FUNCTIONS) for its attention function"
        )
    difference = float((captured - own).abs().max() / own.abs().max())
    tolerance = _TOLERANCE[model.dtype]
    if not difference <= tolerance:
        raise LensError(
            f"capture does not reproduce {model.info.class_name}: on a tiny prompt its output differs "
            f"by {difference:.1e} (allowed {tolerance:.0e}); its attention does something that capture "
            "does not know"
        )
    excess = max(excesses)
    if not excess <= _ROW_SUM_TOLERANCE:
        raise LensError(
            f"captured attention rows of {model.info.class_name} do not sum to 1 (off by "
            f"{excess:.1e}); please report this"
        )
    twice = tuple(sorted(layer for layer, part in parts.items() if part))
    return Checked(difference, tuple(sorted(parts)), twice)


def _output(model: LoadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output: Any = base(model)(**inputs)
    return (output if isinstance(output, torch.Tensor) else output[0]).double()


def tiny_inputs(model: LoadedModel) -> dict[str, torch.Tensor]:
    """A short prompt of drawn tokens, or an image of noise."""
    generator = torch.Generator().manual_seed(0)
    config = None if model.is_bridge else model.model.config
    if config is not None and model.info.vocab is None:
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.randn(1, config.num_channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    vocab = model.info.vocab or 2
    length = min(LENGTH, model.info.context or LENGTH)
    ids = torch.randint(vocab, (1, length), generator=generator)
    if model.bos_id is not None:
        ids[0, 0] = model.bos_id
    return {"input_ids": ids.to(model.device)}


def _row_sum_error(result: AttentionResult, sink_logits: torch.Tensor | None) -> float:
    """Largest error of `sum of a row of P = 1 - sink's share`, averaged over the rows of a head."""
    received = result.statistics["received"].double().sum(-1)  # [batch, heads]
    lse = result.statistics["lse"].double()
    rows = torch.isfinite(lse).double()
    if sink_logits is not None:
        rows = rows - torch.exp(sink_logits.double()[:, None] - lse)
    return float((received / rows.sum(-1) - 1).abs().max())
