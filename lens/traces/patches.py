"""Where the patches of a picture stand among the positions of a vision model, from the picture itself.

Everything is read from what the model was given (the shape of the pixels, or `image_grid_thw`) and from the
parameters that it has for positions that are no patches; nothing is taken from the configured image size,
which says another thing for pictures of another shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel

_BEFORE = {
    "cls_token": "CLS",
    "class_embedding": "CLS",
    "distillation_token": "DIST",
    "register_tokens": "REG",
}
"""Parameters of positions before the patches, in the order in which models put them, and their names."""
_BEHIND = {"detection_tokens": "DET"}
_PIXELS = ("pixel_values", "pixel_values_images")


def grid_of(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) in patches of the pictures in `inputs`, which have one shape; None where it does not say it."""
    for name in ("image_grid_thw", "grid_thw"):
        if isinstance(sizes := inputs.get(name), torch.Tensor):
            frames, height, width = sizes[0].tolist()
            return (height, width) if len(sizes) == 1 and frames == 1 else None
    if isinstance(shapes := inputs.get("spatial_shapes"), torch.Tensor):
        return tuple(shapes[0].tolist()) if len(shapes) == 1 else None
    found = _pixels_and_sides(config, inputs)
    return None if found is None else (found[0] // found[2], found[1] // found[3])


def in_whole_patches(config: Any, inputs: Mapping[str, Any]) -> tuple[float, float]:
    """Shares of a picture's height and width that are whole patches; models leave the rest out, at its lower and right end."""
    found = _pixels_and_sides(config, inputs)
    if found is None:
        return 1.0, 1.0
    height, width, down, across = found
    return height // down * down / height, width // across * across / width


def _pixels_and_sides(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    """Height and width of the pictures in pixels, and of a patch; None where they are not known."""
    sides = _sides(getattr(getattr(config, "vision_config", None) or config, "patch_size", None))
    pixels = next((inputs[name] for name in _PIXELS if name in inputs), None)
    if sides is None or not isinstance(pixels, torch.Tensor) or pixels.dim() < 4:
        return None
    height, width = pixels.shape[-2:]
    sizes = None if hasattr(config, "vision_config") else inputs.get("image_sizes")
    if isinstance(sizes, torch.Tensor) and len(sizes) == 1:
        height, width = sizes[0].tolist()  # without what makes pictures of a batch equally large
    return height, width, *sides


def describe_patches(
    model: LoadedModel, inputs: Mapping[str, Any], length: int
) -> tuple[list[str], dict[str, Any]]:
    """Names of all positions, and what a trace notes of them.

    Patches are named `row,column`, other positions by the parameter that they come from (`[CLS]`, `[REG0]`).
    Where the picture and these parameters do not add up to the positions, they are only numbered.

    Returns:
        The names; `{"first": position of the first patch, "height": h, "width": w}`, in patches, or
        `{"first": None, "why": reason}`.
    """
    before, behind = (_named(model, names) for names in (_BEFORE, _BEHIND))
    grid = grid_of(model.model.config, inputs)
    if grid is None:
        return _numbered(length, "the picture's shape does not give its patches")
    height, width = grid
    if getattr(model.model.config, "spatial_merge_size", 1) > 1:
        return _numbered(length, "patches that are merged later stand side by side")
    patches = [f"{row},{column}" for row in range(height) for column in range(width)]
    noise = inputs.get("noise")
    if isinstance(noise, torch.Tensor) and noise.shape == (1, len(patches)):
        kept = noise[0].argsort().tolist()[: length - len(before) - len(behind)]
        if kept != list(range(len(patches))):
            why = "patches are left out, and the others are in the order of the noise"
            return [*before, *(patches[number] for number in kept), *behind], {
                "first": None,
                "why": why,
            }
    names = [*before, *patches, *behind]
    if len(names) != length:
        return _numbered(
            length,
            f"{height} × {width} patches and {len(before) + len(behind)} other positions are not "
            f"{length} positions",
        )
    return names, {"first": len(before), "height": height, "width": width}


def _numbered(length: int, why: str) -> tuple[list[str], dict[str, Any]]:
    return [str(position) for position in range(length)], {"first": None, "why": why}


def _named(model: LoadedModel, names: Mapping[str, str]) -> list[str]:
    """Of the positions that the model has parameters for."""
    sizes = {
        name.rpartition(".")[2]: parameter.numel() // parameter.shape[-1]
        for name, parameter in model.model.named_parameters()
        if name.rpartition(".")[2] in names
    }
    return [
        f"[{label}]" if sizes[name] == 1 else f"[{label}{index}]"
        for name, label in names.items()
        for index in range(sizes.get(name, 0))
    ]


def _sides(patch: Any) -> tuple[int, int] | None:
    if isinstance(patch, int):
        return patch, patch
    if (
        isinstance(patch, list | tuple)
        and len(patch) == 2
        and all(isinstance(n, int) for n in patch)
    ):
        return patch[0], patch[1]
    return None
