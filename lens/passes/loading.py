"""`lens.load`: a model, and the proof that capture reaches its attention."""

from dataclasses import replace
from typing import Any

import torch

from lens.common.errors import LensError
from lens.models.catalogue import DEFAULT_MODEL
from lens.models.loaded import LoadedModel
from lens.models.loading import load_unchecked
from lens.models.towers import cannot_take
from lens.passes.check import Checked, measured, self_check
from lens.passes.sessions import has_blocks
from lens.passes.towers import check_whole


def load(
    name_or_model: Any = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    processor: Any = None,
) -> LoadedModel:
    """Load a model, and prove that capture reaches its attention.

    Args:
        name_or_model: an embedded name (`text-lm-3l`, `stories260k`, `induction-2l`, `vit-digits`), `smollm2-135m`,
            `dinov2-small`, `whisper-tiny.en`,
            a folder with `config.json`, a GGUF file or its folder, a folder with an adapter of peft and its base
            beside it, a hub id `owner/name` (the only case that uses the network), a transformers model in
            eval mode, a `PeftModel`, or a `TransformerBridge` of TransformerLens 4.
        revision: branch, tag or commit of a hub model.
        dtype: type of the weights; float32 on a CPU, else the checkpoint's own, if None.
        device: where to put the weights; the CPU if None.
        tokenizer: instead of the model's own; needed for text when a model object is passed.
        processor: instead of the model's own; needed for pictures and sounds when a model object is passed.

    Returns:
        The model with its tokenizer, sizes and the result of the self-check: one tiny prompt through the
        model's own `eager` attention and through capture must agree, and captured rows must sum to 1. A model of
        recurrent mixers alone (Mamba, RWKV-4, xLSTM) has no attention to check: what needs softmax attention
        refuses it; `lens.mixers` and `lens.circuits` take it.

    Raises:
        LensError: unknown name, missing package, unreachable hub, weights that are damaged or not all there, or
            attention that cannot be reached.

    Example:
        >>> load("text-lm-3l").info.heads
        6
    """
    if isinstance(name_or_model, LoadedModel):
        return name_or_model
    loaded = load_unchecked(
        name_or_model,
        revision=revision,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
        processor=processor,
    )
    if loaded.towers:
        towers = {name: _tower(loaded, name) for name in loaded.towers}
        return replace(loaded, towers=towers, check=check_whole(replace(loaded, towers=towers)))
    return _proved(loaded)


def _tower(loaded: LoadedModel, name: str) -> LoadedModel:
    try:
        tower = loaded.towers[name]
        return _proved(tower).part(tower.chosen) if tower.chosen else _proved(tower)
    except LensError as error:
        raise LensError(cannot_take(loaded.info.class_name, loaded.towers, name, error)) from error


def _proved(loaded: LoadedModel) -> LoadedModel:
    """After its self-check, with what that saw; of a model of recurrent mixers alone there is nothing to capture."""
    if not loaded.info.attending:
        return loaded
    checked = self_check(loaded)
    if loaded.parts:
        return _with_parts(loaded, checked)
    seen = checked.seen[""]
    info = replace(loaded.info, attending=seen.attending, twice=seen.twice, sees_later=seen.later)
    if not has_blocks(loaded):
        # half of an encoder-decoder, a tower in stages: what ran is what there is
        info = replace(info, layers=max(info.attending) + 1)
    return replace(loaded, info=info, check=checked.difference)


def _with_parts(loaded: LoadedModel, checked: Checked) -> LoadedModel:
    """The sizes of each part as they were seen; a half of an encoder-decoder that attends in stages has no place."""
    parts = {
        name: measured(loaded.info, seen)
        for name in loaded.parts
        if (seen := checked.seen.get(name)) and not seen.twice
    }
    if "cross" in loaded.parts and "cross" not in parts:
        raise LensError(
            f"cannot find the cross-attention of {loaded.info.class_name}: no layer of its decoder reads its "
            "encoder once; pass one half: lens.load(model.get_encoder())"
        )
    info = next((parts[name] for name in ("decoder", "cross") if name in parts), loaded.info)
    return replace(loaded, info=info, parts=parts, check=checked.difference)
