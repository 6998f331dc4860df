"""The weights of a checkpoint: all of them, and of the model that its configuration makes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from typing import Any

from safetensors import SafetensorError, safe_open
from torch.nn import ModuleList
from transformers import PreTrainedConfig, PreTrainedModel

from lens.common.errors import LensError, first_line
from lens.common.results import few

_NUMBERED = re.compile(r"(?:.*\.)?([A-Za-z_]+\.)\d+\..*")
_LAYERS = re.compile(r"(num_)?(n|hidden|encoder|decoder)?_?layers?|depth")
_LOADING = Lock()  # transformers turns tied weights off, for the whole process, while it loads
_MOST = 4096  # layers: the deepest models have a few hundred


def check_layers(name: str, **where: Any) -> None:
    """Looks at a configuration before transformers makes lists and modules of its numbers.

    Args:
        name: folder or hub id.
        where: `revision` and `local_files_only` of transformers.

    Raises:
        LensError: more layers than any model has.
    """
    settings = PreTrainedConfig.get_config_dict(name, **where)[0]
    if isinstance(settings, Mapping):  # else transformers says what it is
        _check(name, settings)


def _check(name: str, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            _check(name, value)
        elif isinstance(value, int) and value > _MOST and _LAYERS.fullmatch(key):
            raise LensError(
                f"config.json of {name} says {key} {value:,}, and no model has more than {_MOST:,}: it is damaged; get it again"
            )


def trained(model_class: Any, name: str, **options: Any) -> PreTrainedModel:
    """The model with its weights, all of them: what a checkpoint lacks, transformers makes random and goes on.

    Raises:
        LensError: weights are damaged, missing, of another shape, integers, or a pickle of more than tensors.
    """
    try:
        with _LOADING:
            model, found = model_class.from_pretrained(
                name, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
    except UnpicklingError as error:
        raise LensError(
            f"the weights of {name} are a pickle that holds more than tensors, and could run code: refused; save "
            "the model with save_pretrained, which writes safetensors"
        ) from error
    except (SafetensorError, KeyError, EOFError) as error:
        raise LensError(
            f"the weights of {name} are damaged or not all there ({first_line(error)}); get the files again"
        ) from error
    if mismatched := sorted(found["mismatched_keys"]):
        weight, has, needs = mismatched[0]
        raise LensError(
            f"{weight} of {name} is {tuple(has)} where config.json makes {tuple(needs)}: config.json is of another model"
        )
    if missing := sorted(found["missing_keys"]):
        raise LensError(
            f"the checkpoint of {name} lacks {few(missing, 1)}, which "
            "would be random; get all of it, or, if this does not matter, load it yourself and pass the model"
        )
    if beyond := _beyond(model, sorted(found["unexpected_keys"])):
        raise LensError(
            f"the checkpoint of {name} has {few(beyond, 1)}, which config.json makes no layer for: "
            "config.json is of another model"
        )
    if codes := _codes(model, Path(name)):
        raise LensError(
            f"the checkpoint of {name} holds integers for {few(codes, 1)}, which are no weights without the scales that "
            "they are codes of, and config.json names no quantization_config; get all of it"
        )
    return model


def _codes(model: Any, folder: Path) -> list[str]:
    """Weights that the model takes as numbers and the files of a folder hold as integers; none where it dequantises them."""
    if getattr(model.config, "quantization_config", None) is not None or not folder.is_dir():
        return []
    numbers = {name for name, one in model.named_parameters() if one.is_floating_point()}
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            found += [
                key
                for key in numbers.intersection(opened.keys())
                if opened.get_slice(key).get_dtype()[0] in "IU"
            ]
    return sorted(found)


def _beyond(model: Any, unexpected: list[str]) -> list[str]:
    """Weights of layers whose numbers go on where those of the model end."""
    lists = {f"{name}." for name, module in model.named_modules() if isinstance(module, ModuleList)}
    return [
        key
        for key in unexpected
        if (found := _NUMBERED.fullmatch(key)) and any(one.endswith(found[1]) for one in lists)
    ]
