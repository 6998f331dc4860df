"""Prompts of encoder-decoders: a source (text, sound, picture) and what the decoder reads after it.

Where nobody says what the decoder reads, the model writes it itself, greedily; each prompt then is what the model
said about its source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from lens.common.errors import LensError, first_line
from lens.models.ids import shape_of
from lens.models.loaded import LoadedModel
from lens.models.stacks import stacks
from lens.passes.inputs import (
    Prompt,
    accepted,
    model_input,
    placed,
    read_prompts,
)
from lens.passes.pictures import Picture, is_picture, prepared, reads_pictures_alone
from lens.passes.sessions import base
from lens.passes.sounds import is_sound, prepared_sound, reads_sounds

MOST_WRITTEN = 64
"""Tokens that the model writes where no target is given."""


class Asked(NamedTuple):
    """What a model shall write for each source.

    Attributes:
        new: tokens at most, and no more than the decoder has positions for.
        temperature, seed: of the draws; 0 takes the likeliest token.
    """

    new: int = MOST_WRITTEN
    temperature: float = 0.0
    seed: int | None = None


def read_any(model: LoadedModel, prompts: Any) -> tuple[list[Prompt], bool]:
    """`read_sources` of an encoder-decoder, `read_prompts` with all inputs of any other model."""
    if isinstance(model, LoadedModel) and model.is_encoder_decoder:
        return read_sources(model, prompts)
    return read_prompts(model, prompts, whole=True)


def paired(model: LoadedModel, sources: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """The inputs of an encoder-decoder: sources [rows, ...] and what its decoder reads [rows, tokens].

    Raises:
        LensError: a decoder that reads no tokens.
    """
    names = accepted(model)
    reads = "decoder_input_ids" if "decoder_input_ids" in names else "input_ids"
    main = model_input(model)
    if main == reads or reads not in names:
        raise LensError(f"the decoder of {model.info.class_name} reads no tokens")
    return {main: placed(model, sources), reads: placed(model, targets)}


def read_sources(
    model: LoadedModel, prompts: Any, asked: Asked | None = None
) -> tuple[list[Prompt], bool]:
    """The prompts of an encoder-decoder, and whether one was passed and not a list.

    Args:
        model: an encoder-decoder.
        prompts: a text or ids (the source), of a model of sounds a .wav file, samples, or samples and their rate (`read_sound`), of one of pictures a file, an
            array or a picture of PIL; a pair of these (source, target); a mapping of the model's inputs, of one
            prompt (`input_ids`, `input_features` or `pixel_values`, and `decoder_input_ids` or none); or a
            list of such. Token ids of a target are what the decoder reads, its first token included; a target
            text is preceded by the model's own.
        asked: the model shall write every target; None: those that are not given.

    Raises:
        LensError: none of these, an input that the model does not take, no target for a model that cannot write, or one
            where the model shall write it.
    """
    several = prompts if isinstance(prompts, list) else []
    if several and reads_sounds(model) and isinstance(several[0], float):
        prompts = np.array(prompts)  # samples of one sound
    if isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int)):
        if not prompts:
            raise LensError("no prompts were given; pass a source, a pair, or a list of them")
        return [_one(model, prompt, asked) for prompt in prompts], False
    return [_one(model, prompts, asked)], True


def _one(model: LoadedModel, prompt: Any, asked: Asked | None) -> Prompt:
    source, target = prompt, None
    if isinstance(prompt, tuple) and not (reads_sounds(model) and is_sound(prompt)):
        if len(prompt) != 2:
            raise LensError(f"a pair is (source, target), got {len(prompt)} parts")
        source, target = prompt
    source, picture = _read(model, source)
    text = source if isinstance(source, str) else None
    inputs = _inputs(model, source)
    names = accepted(model)
    for name in ("labels", "decoder_attention_mask"):
        if name in inputs:
            raise LensError(f"leave {name} out; give what the decoder reads as decoder_input_ids")
    if unknown := sorted(set(inputs) - set(names)):
        raise LensError(f"{model.info.class_name} takes no {', '.join(unknown)}; leave it out")
    ids = _row(inputs.get("input_ids"))
    of_decoder = "decoder_input_ids"
    if asked is not None and (target is not None or of_decoder in inputs):
        raise LensError(
            "new= has the model write the target; give the source alone, or leave new out"
        )
    if asked is not None and of_decoder not in names:
        raise LensError(
            f"the decoder of {model.info.class_name} reads no target that it writes; leave new out"
        )
    if of_decoder not in names:  # BLIP's decoder reads input_ids, DETR's queries are weights
        reads = model_input(model) != "input_ids" and "input_ids" in names
        if target is not None:
            if not reads:
                raise LensError(f"the decoder of {model.info.class_name} reads no tokens")
            inputs["input_ids"] = placed(model, torch.tensor([_target(model, target)]))
        read = _row(inputs.get("input_ids")) if reads else None
        _check_target(model, read)
        return Prompt(inputs, None if reads else ids, text, picture, read)
    if target is not None:
        inputs[of_decoder] = placed(model, torch.tensor([_target(model, target)]))
    if of_decoder not in inputs:
        inputs[of_decoder] = _written(model, inputs, asked or Asked())
    target = _row(inputs[of_decoder])
    _check_target(model, target)
    return Prompt(inputs, ids, text, picture, target)


def _read(model: LoadedModel, source: Any) -> tuple[Any, Picture | None]:
    """What the model's processor makes of a sound or a picture, which is handed on beside it; others as they are."""
    if reads_sounds(model) and is_sound(source):
        return prepared_sound(model, source), None
    if reads_pictures_alone(model) and (isinstance(source, str) or is_picture(source)):
        return prepared(model, source)
    if isinstance(source, Path):
        raise LensError(f"{model.info.class_name} reads texts; pass what stands in {source}")
    return source, None


def _inputs(model: LoadedModel, source: Any) -> dict[str, torch.Tensor]:
    if isinstance(source, str):
        source = model.encode(source)
    if isinstance(source, Mapping):
        found = {}
        for name, value in source.items():
            if value is None:
                continue
            try:
                tensor = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise LensError(f"{name} must be a tensor or lists of numbers") from error
            if tensor.dim() == 1:
                tensor = tensor[None]
            if tensor.dim() == 0 or len(tensor) != 1:
                raise LensError(
                    f"{name} {list(tensor.shape)} must hold one prompt of an encoder-decoder; pass a list of "
                    "mappings"
                )
            found[str(name)] = placed(model, tensor)
        mask = found.get("attention_mask")
        if "input_ids" in found and mask is not None and mask.shape == found["input_ids"].shape:
            end = int(mask[0].nonzero()[-1]) + 1 if mask.any() else 0
            found["input_ids"] = found["input_ids"][:, :end]
            found["attention_mask"] = mask[:, :end]
            # what is hidden before or among tokens stays hidden, where it is
            if bool(mask[:, :end].all()):
                del found["attention_mask"]
        ids = _row(found.get("input_ids"))
        if ids is not None and model_input(model) == "input_ids":
            model.check_ids(ids)
        return found
    if isinstance(source, torch.Tensor) and source.is_floating_point():
        return {model_input(model): placed(model, source)}
    if isinstance(source, torch.Tensor | Sequence):
        ids = torch.as_tensor(source).reshape(1, -1)
        if model_input(model) != "input_ids":
            raise LensError(
                f"the source of {model.info.class_name} is {model_input(model)}, and these are token ids; pass "
                f"({{{model_input(model)!r}: ...}}, target)"
            )
        model.check_ids(ids[0].tolist())
        return {"input_ids": placed(model, ids)}
    sounds = reads_sounds(model)
    kind = "a .wav file, samples (samples, rate)" if sounds else "a text, token ids"
    raise LensError(f"a source must be {kind} or a mapping, got {shape_of(source)}")


def _target(model: LoadedModel, target: Any) -> list[int]:
    """What the decoder reads: [start, tokens without the end] of a text, ids as they are."""
    if not isinstance(target, str):
        ids = torch.as_tensor(target).flatten().tolist()
        if not ids:
            raise LensError("the target has no tokens; give at least the decoder's first one")
        return ids
    if model.tokenizer is None:
        raise LensError(f"{model.name} has no tokenizer; give the target as token ids")
    try:
        ids = list(model.tokenizer(text_target=target, verbose=False)["input_ids"])
    except (TypeError, ValueError):  # a tokenizer without one for targets
        ids = list(model.tokenizer(target, verbose=False)["input_ids"])
    if ids and ids[-1] == getattr(model.tokenizer, "eos_token_id", None):
        ids = ids[:-1]
    start = _start(model)
    return ids if start is None or ids[:1] == [start] else [start, *ids]


def _check_target(model: LoadedModel, ids: list[int] | None) -> None:
    """Raises LensError: an id that the decoder has no embedding for."""
    halves = stacks(model.model)
    find = getattr(halves and halves.decoder, "get_input_embeddings", None)
    table = None if find is None or not ids else find()
    count = getattr(table, "num_embeddings", None)
    if ids and count is not None and not 0 <= min(ids) <= max(ids) < count:
        raise LensError(
            f"target ids of {model.name} go from 0 to {count - 1}, got {min(ids)} to {max(ids)}"
        )


def _start(model: LoadedModel) -> int | None:
    for settings in (getattr(model.model, "generation_config", None), model.model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            number = getattr(settings, name, None)
            if isinstance(number, int):
                return number
    return None


def _written(model: LoadedModel, inputs: Mapping[str, torch.Tensor], asked: Asked) -> torch.Tensor:
    """What the decoder reads at first and what the model writes after it, without the end."""
    from transformers import StoppingCriteriaList

    if not getattr(model.model, "can_generate", lambda: False)():
        raise LensError(
            f"{model.info.class_name} has no head and cannot write a target; give one: (source, target), or "
            "decoder_input_ids"
        )
    read: list[torch.Tensor] = []

    def reads(_: Any, __: tuple, given: dict[str, Any]) -> None:
        ids, cache = given.get("decoder_input_ids"), given.get("past_key_values")
        if ids is None:
            return
        if cache is None or not int(cache.get_seq_length()):  # from the start (again)
            read.clear()
        read.append(ids[:1])

    last: list[torch.Tensor] = []

    def goes_on(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        last[:] = [ids[:1, -1:]]  # it is written, and read by nobody where the model stops
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    how: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    how["stopping_criteria"] = StoppingCriteriaList([goes_on])
    if asked.temperature:
        how |= {"do_sample": True, "temperature": float(asked.temperature)}
    hook = base(model).register_forward_pre_hook(reads, with_kwargs=True)
    loud = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it says of settings that it wrote itself
    try:
        with torch.no_grad(), torch.random.fork_rng(enabled=bool(asked.temperature)):
            if asked.temperature:
                torch.manual_seed(asked.seed or 0)
            model.model.generate(**inputs, max_new_tokens=_most_written(model, asked.new), **how)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        raise LensError(
            f"{model.info.class_name} cannot write a target ({first_line(error)}); give one: (source, target)"
        ) from error
    finally:
        transformers_logging.set_verbosity(loud)
        hook.remove()
    if not read:
        raise LensError(
            f"what the decoder of {model.info.class_name} reads cannot be seen; give it: (source, target)"
        )
    ends = getattr(getattr(model.model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return torch.cat([*read, *(one for one in last if one.item() not in ends)], 1)


def _most_written(model: LoadedModel, new: int) -> int:
    """As many tokens as are asked for or the decoder has positions for, whichever is less; some are the model's."""
    config = getattr(model.model.config, "decoder", None) or model.model.config
    names = ("max_target_positions", "max_position_embeddings", "n_positions")
    limits = [getattr(config, name, None) for name in names if hasattr(config, name)]
    known = [limit - _OWN for limit in limits if isinstance(limit, int) and limit > _OWN + 1]
    return min([new, *known[:1]])


_OWN = 6
"""Tokens that a model may put before what it writes (language, task)."""


def _row(ids: torch.Tensor | None) -> list[int] | None:
    return None if ids is None or ids.is_floating_point() else ids[0].tolist()
