"""Models with adapters of PEFT: a `PeftModel` as the transformers model inside it, and a folder with an adapter alone.

Adapters that change projections (LoRA, DoRA, IA3, OFT, VeRA and others) sit in the modules of the model, which is
captured as any other; `lens.models.weights` reads their effective weights. Those that add keys or tokens (prefix and
prompt tuning) are refused: what they add is no token of the prompt.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from lens.common.errors import LensError, first_line
from lens.common.files import on_disk, read_json
from lens.common.results import few

CONFIG = "adapter_config.json"


def unwrapped(model: Any) -> Any:
    """The transformers model in a `PeftModel`, its adapters in its modules; anything else as it is.

    Raises:
        LensError: an adapter that adds keys or tokens.
    """
    if not any(one.__name__ == "PeftModel" for one in type(model).__mro__):
        return model
    _refuse_prompts(
        str(model.active_peft_config.peft_type).rpartition(".")[2], model.active_peft_config
    )
    return model.get_base_model()


def adapter_base(folder: Path) -> str:
    """The model that the adapter in a folder is of: a folder, or a name of the hub.

    It is looked for where `adapter_config.json` says, then beside the folder under the same name.

    Raises:
        LensError: peft is not installed, or the file says no model, or another adapter.
    """
    if importlib.util.find_spec("peft") is None:
        raise LensError(f"{folder} holds an adapter, which peft reads: pip install peft")
    try:
        base = read_json(folder / CONFIG)["base_model_name_or_path"]
    except (LensError, KeyError) as error:
        raise LensError(f"cannot read {folder / CONFIG}: {first_line(error)}") from error
    if not isinstance(base, str) or not base:
        raise LensError(
            f"{folder / CONFIG} does not say whose adapter it is (base_model_name_or_path); load the model, put the "
            "adapter on it with peft.PeftModel.from_pretrained, and pass that to lens.load"
        )
    beside = [on_disk(base), folder / base, folder.parent / base]
    beside += [folder.parent / Path(base).name]
    found = next((str(one) for one in beside if (one / "config.json").is_file()), base)
    if found == base and (beside[0] / CONFIG).is_file():
        raise LensError(
            f"{folder / CONFIG} names {base} as its base, which is an adapter and no model; put the model's folder there"
        )
    return found


def adapted(model: Any, folder: Path) -> Any:
    """The model with the adapter of a folder in its modules, in eval mode.

    Raises:
        LensError: an adapter that adds keys or tokens, that is not of this model, is damaged, or not all there.
    """
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at names that peft uses
        return _adapted(peft, model, folder)


def _adapted(peft: Any, model: Any, folder: Path) -> Any:
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        _refuse_prompts(str(config.peft_type).rpartition(".")[2], config)
        found = peft.PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
        file = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
        # Whether the vocabulary has grown it would look up at the base's name, on the hub too.
        own = peft.get_peft_model_state_dict(found, save_embedding_layers=False)
    except LensError:
        raise
    except Exception as error:  # of somebody else's code: any kind
        raise LensError(
            f"the adapter in {folder} does not go onto {type(model).__name__} ({first_line(error)}); it is of "
            "another model, or damaged"
        ) from error
    there = {name.replace(".default", "") for name in found.state_dict()}
    odd = (set(own) - set(file)) | {name for name in set(file) - set(own) if name not in there}
    if odd:
        raise LensError(
            f"the adapter in {folder} is not of this {type(model).__name__}: {few(sorted(odd), 1)} is in one of them "
            "alone"
        )
    return found.get_base_model().eval()


def _refuse_prompts(kind: str, config: Any) -> None:
    if config.is_prompt_learning:
        raise LensError(
            f"{kind.lower().replace('_', ' ')} puts keys or tokens of its own before every prompt, and a trace has no "
            "name for them; load the model without it"
        )
