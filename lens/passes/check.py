"""The self-check at load: capture reproduces this very model, or says that it does not."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lens_kernels import AttentionResult

from lens.common.errors import LensError
from lens.models.info import ModelInfo
from lens.models.loaded import LoadedModel
from lens.models.wrapped import Wrapped
from lens.passes.calls import LayerCall, attend
from lens.passes.interface import foreign_functions, switched
from lens.passes.sessions import listening, run
from lens.passes.tiny_inputs import tiny_inputs

# The softmax of transformers' eager attention is float32, whatever the type of the model.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ROW_SUM_TOLERANCE = 1e-4
_PROMPT = "a tiny prompt"


class Seen(NamedTuple):
    """What was seen of one attention of a model.

    Attributes:
        attending: layers that attended.
        twice: those that did so more than once.
        heads, kv_heads, head_dim: of the first of them.
        later: whether some of their queries see later tokens of the same sequence.
    """

    attending: tuple[int, ...]
    twice: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    later: bool


class Checked(NamedTuple):
    """What a tiny prompt shows.

    Attributes:
        difference: `max |captured - own| / max |own|`, of the last hidden state; of a wrapped module the largest of all that
            it returns.
        seen: by part of an encoder-decoder; of any other model "" alone.
    """

    difference: float
    seen: dict[str, Seen]


def tolerance_of(dtype: torch.dtype) -> float:
    """Relative error up to which outputs computed in this type are the same."""
    return _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16])


def relative_error(found: torch.Tensor, own: torch.Tensor) -> float:
    """`max |found - own| / max |own|`; NaN where either holds one."""
    return float((found - own).abs().max() / own.abs().max().clamp(min=1e-30))


def self_check(model: LoadedModel) -> Checked:
    """Largest relative difference of the captured from the model's own output, and the layers seen.

    On a tiny prompt; the model's own attention is transformers' `eager`, or the bridge's.

    Raises:
        LensError: no attention was reached, the outputs differ, captured rows do not sum to 1, or the
            model cannot be run.
    """
    inputs = tiny_inputs(model)
    excesses: list[float] = []
    calls: dict[str, dict[int, LayerCall]] = {}

    def on_layer(call: LayerCall) -> torch.Tensor:
        result = attend(call, statistics=("lse", "received"))
        excesses.append(_row_sum_error(result, call.sink_logits))
        calls.setdefault(call.place, {})[call.layer] = call
        return result.output

    with torch.no_grad():
        own = _own(model, inputs)
        with listening(model, on_layer, parts=True):
            captured = _output(model, inputs, f"{_PROMPT} while it is captured")
    if not excesses:
        raise LensError(
            f"cannot reach the attention of {model.info.class_name}: none of its layers asks transformers' "
            "AttentionInterface for its attention function, or computes a softmax over scores in a way that can be followed; "
            "matrices that you have are taken: lens.capture(None, tokens, attentions=...)"
        )
    if not all(bool(one.isfinite().all()) for one in own):
        raise LensError(
            f"{model.info.class_name} gives values that are not numbers on {_PROMPT}; its weights are "
            "damaged, or too large for their type"
        )
    difference, tolerance = _difference(captured, own), tolerance_of(model.precision)
    if not difference <= tolerance:
        _refuse_random(model, inputs, own)
        if torch.is_autocast_enabled(model.device.type):
            raise LensError(
                f"torch.autocast is on, which rounds inside {model.info.class_name} where it likes; load it outside of it, "
                "with dtype= if it shall be smaller"
            )
        raise LensError(
            f"capture does not reproduce {model.info.class_name}: on {_PROMPT} its output differs "
            f"by {difference:.1e} (allowed {tolerance:.0e}); its attention does something that capture "
            "does not know"
        )
    _check_functions(model, inputs, own)
    excess = max(excesses)
    if not excess <= _ROW_SUM_TOLERANCE:
        raise LensError(
            f"captured attention rows of {model.info.class_name} do not sum to 1 (off by "
            f"{excess:.1e}); please report this"
        )
    return Checked(difference, {place: _seen(of_place) for place, of_place in calls.items()})


def measured(info: ModelInfo, seen: Seen) -> ModelInfo:
    """The sizes of a part of a model, as they were seen."""
    return replace(
        info,
        layers=max(seen.attending) + 1,
        heads=seen.heads,
        kv_heads=seen.kv_heads,
        head_dim=seen.head_dim,
        attending=seen.attending,
        twice=seen.twice,
    )


def _seen(calls: dict[int, LayerCall]) -> Seen:
    first = calls[min(calls)]
    return Seen(
        attending=tuple(sorted(calls)),
        twice=tuple(sorted(layer for layer, call in calls.items() if call.part)),
        heads=first.query.shape[1],
        kv_heads=first.key.shape[1],
        head_dim=first.query.shape[3],
        later=any(
            not call.cross and not bool(call.mask.hides_next(call.key.shape[2]).all())
            for call in calls.values()
        ),
    )


def _difference(found: list[torch.Tensor], own: list[torch.Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(found, own, strict=True))


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Of numbers, in the order of what a model returns; its `attentions`, which nobody asked for, are left out."""
    if isinstance(output, Mapping):
        inside = [one for name, one in output.items() if not str(name).endswith("attentions")]
        return [one for value in inside for one in tensors_of(value)]
    if isinstance(output, list | tuple):
        return [one for value in output for one in tensors_of(value)]
    is_numbers = isinstance(output, torch.Tensor) and output.is_floating_point()
    return [output.double()] if is_numbers else []


def _own(model: LoadedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    if model.is_bridge:
        return _output(model, inputs)
    with switched(model.transformer, "eager"):
        return _output(model, inputs)


def _check_functions(
    model: LoadedModel, inputs: dict[str, torch.Tensor], own: list[torch.Tensor]
) -> None:
    """Raises LensError: an attention function that somebody registered computes something else than the model's eager one."""
    names = set() if model.is_bridge else foreign_functions(model.transformer)
    if not names:
        return
    with torch.no_grad():
        difference = _difference(_output(model, inputs), own)
    if not difference <= tolerance_of(model.precision):
        raise LensError(
            f"{model.info.class_name} runs the attention function {', '.join(sorted(names))}, with which its output on "
            f"{_PROMPT} differs by {difference:.1e} from that of its eager attention, which is what capture reproduces; "
            "model.set_attn_implementation('eager') takes it out"
        )


def _refuse_random(
    model: LoadedModel, inputs: dict[str, torch.Tensor], own: list[torch.Tensor]
) -> None:
    with torch.no_grad():
        again = _own(model, inputs)
    if not all(map(torch.equal, again, own)):
        raise LensError(
            f"{model.info.class_name} is random: run twice on {_PROMPT} it gives two different outputs "
            "(masking or sampling inside), so that a trace would be of one draw; load a model without it"
        )


def _output(
    model: LoadedModel, inputs: dict[str, torch.Tensor], what: str = _PROMPT
) -> list[torch.Tensor]:
    """The first tensor that it gives; of a wrapped module, which may have several ends, all of them."""
    output: Any = run(model, inputs, what)
    if isinstance(output, torch.Tensor):
        return [output.double()]
    if isinstance(model.model, Wrapped):
        if found := tensors_of([output]):
            return found
        raise LensError(
            f"{model.info.class_name} gives no numbers to hold a capture against; let it return a tensor, or a list or "
            "mapping of them"
        )
    # InstructBLIP has no logits
    output = getattr(output, "language_model_outputs", output)
    found = output[0] if len(output) else None
    if not isinstance(found, torch.Tensor):
        raise LensError(
            f"{model.info.class_name} gives no tensor first but {type(found).__name__}: it has several "
            "parts; load one of them"
        )
    return [found.double()]


def _row_sum_error(result: AttentionResult, sink_logits: torch.Tensor | None) -> float:
    """Largest error of `sum of a row of P = 1 - sink's share`, averaged over the rows of a head."""
    received = result.statistics["received"].double().sum(-1)  # [batch, heads]
    lse = result.statistics["lse"].double()
    rows = torch.isfinite(lse).double()
    if sink_logits is not None:
        rows = rows - torch.exp(sink_logits.double()[:, None] - lse)
    return float((received / rows.sum(-1) - 1).abs().max())
