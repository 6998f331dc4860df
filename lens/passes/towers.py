"""Models of several encoders side by side (CLIP, SigLIP): the whole is run once for each tower that is listened to.

So a tower is seen as it works inside the whole, whatever the others hand to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.models.towers import WHOLE
from lens.passes.calls import LayerCall, attend
from lens.passes.check import relative_error, tensors_of, tolerance_of
from lens.passes.inputs import Prompt, placed
from lens.passes.interface import switched
from lens.passes.sessions import OnLayer, listening, run
from lens.passes.tiny_inputs import tiny_inputs


def run_whole(
    model: LoadedModel, tower: LoadedModel, inputs: Mapping[str, Any], on_layer: OnLayer
) -> Any:
    """One pass of the whole model, the attention of one tower computed by `on_layer`."""
    with torch.no_grad(), listening(tower, on_layer, parts=True):
        return run(model, inputs, "this prompt while one tower is captured")


def check_whole(model: LoadedModel) -> float:
    """Largest relative difference of what the whole gives while a tower is captured from what it gives by itself.

    Raises:
        LensError: towers that do not run together, do not all run, or give something else.
    """
    towers = model.towers
    inputs = tiny_inputs(model)
    try:
        with torch.no_grad(), switched(model.model, "eager"):
            own = tensors_of(run(model, inputs, "tiny inputs of its towers"))
    except LensError as error:
        raise LensError(
            f"the towers of {model.info.class_name} do not run together on a tiny prompt of each "
            f"({str(error).partition(';')[0].rpartition('): ')[2]}); {WHOLE}"
        ) from error
    worst, tolerance = 0.0, tolerance_of(model.precision)
    for short, one in towers.items():
        seen: set[int] = set()

        def on_layer(call: LayerCall, seen: set[int] = seen) -> Tensor:
            seen.add(call.layer)
            return attend(call, statistics=()).output

        found = tensors_of(run_whole(model, one, inputs, on_layer))
        if seen != set(one.info.attending):
            raise LensError(
                f"the tower {short!r} of {model.info.class_name} has other layers inside the whole than alone; {WHOLE}"
            )
        for a, b in zip(found, own, strict=True):
            error = relative_error(a, b)
            if not error <= tolerance:
                raise LensError(
                    f"capture does not reproduce {model.info.class_name}: its output differs by {error:.1e} (allowed "
                    f"{tolerance:.0e}); {WHOLE}"
                )
            worst = max(worst, error)
    return worst


def read_pairs(model: LoadedModel, prompts: Any) -> tuple[list[dict[str, Tensor]], bool]:
    """Inputs of every prompt, and whether one was passed and not a list.

    Raises:
        LensError: no mapping of one text and one picture.
    """
    several = list(prompts) if isinstance(prompts, list) else [prompts]
    found = []
    for one in several:
        if not isinstance(one, Mapping) or not one:
            raise LensError(
                f"{model.info.class_name} reads several things at once: pass what its processor makes of one pair, "
                f"a mapping such as {{'input_ids': ..., 'pixel_values': ...}}, or a list of these; got "
                f"{type(one).__name__}"
            )
        inputs = {str(name): placed(model, torch.as_tensor(value)) for name, value in one.items()}
        for name, value in inputs.items():
            if value.dim() and len(value) != 1:
                raise LensError(
                    f"{name} {list(value.shape)} must hold one prompt; pass a list of mappings, one for each pair"
                )
        found.append(inputs)
    return found, not isinstance(prompts, list)


def prompt_of(tower: LoadedModel, inputs: dict[str, Tensor]) -> Prompt:
    """The same inputs as one tower reads them."""
    ids = inputs.get("input_ids")
    if ids is not None and tower.info.vocab is not None:
        return Prompt({"input_ids": ids}, ids[0].tolist())
    return Prompt({name: value for name, value in inputs.items() if name != "input_ids"}, None)
