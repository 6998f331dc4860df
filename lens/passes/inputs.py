"""What people pass to `lens.capture`, as one prompt after another: each with its own length, no padding.

What a mapping holds reaches the model as it is: padding at the ends of a prompt is cut off, of every input, if the model then
computes the same (`lens.passes.padding`); holes stay holes. A name that the forward pass does not have is refused.
"""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lens.common.choices import is_whole
from lens.common.errors import LensError
from lens.models.ids import is_ids, length_of, shape_of
from lens.models.loaded import LoadedModel, check_loaded
from lens.models.sizes import reads_pictured_text
from lens.passes.padding import without_padding_before
from lens.passes.pictures import Picture, check_noise, is_picture, prepared, reads_pictures_alone
from lens.passes.sessions import PACKED, base, main_input
from lens.passes.sounds import is_sound, prepared_sound, reads_sounds


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the model.

    Attributes:
        inputs: keyword arguments of the model, batch size 1.
        ids: token ids, or None where the model reads no tokens.
        text: as it was passed, or None.
        picture: as it was passed, where a picture was, or None.
        target: of an encoder-decoder the ids that the decoder reads, or None; `ids` are the source's.
    """

    inputs: dict[str, torch.Tensor]
    ids: list[int] | None
    text: str | None = None
    picture: Picture | None = None
    target: list[int] | None = None

    @property
    def predicted(self) -> list[int] | None:
        """Ids each of which is predicted from those before it: the target's, of other models the prompt's own."""
        return self.ids if self.target is None else self.target

    @property
    def sha256(self) -> str:
        """Of the text; of the bytes of the inputs where no text was passed."""
        if self.text is not None and self.picture is None:
            return hashlib.sha256(self.text.encode()).hexdigest()
        return self.inputs_sha256

    @property
    def inputs_sha256(self) -> str:
        """Of the bytes of the inputs: the same for a text and for its ids."""
        digest = hashlib.sha256()
        for name in sorted(self.inputs):
            numbers = self.inputs[name].contiguous().cpu().flatten()
            digest.update(numbers.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def read_prompts(
    model: LoadedModel, prompts: Any, *, whole: bool = False
) -> tuple[list[Prompt], bool]:
    """The prompts, and whether one prompt was passed and not a list or a batch.

    Args:
        model: the model that they are for.
        prompts: a text; token ids (a list of integers or a 1-D tensor); a tokenizer's or processor's
            output, with padding or without; a picture (of PIL, an array, a path) or a pair (picture, text);
            of a model of sounds the path of a .wav file, or samples [samples] at the rate of its feature extractor; a list of these, or of pairs (text, text); a 2-D tensor of ids; an array of pictures
            [pictures, height, width, channels].
        whole: the caller runs all inputs of a prompt and not its ids alone, so that segments,
            positions, images and masks with holes can be read; for others these are refused by name.

    Raises:
        LensError: empty, too long, ids outside the vocabulary, an input that the model does not take,
            or none of the above.
    """
    check_loaded(model)
    if model.is_encoder_decoder:
        raise LensError(
            f"{model.info.class_name} is an encoder-decoder, whose prompts are a source and a target; "
            "lens.capture, lens.edit and lens.traces.capturing take it"
        )
    if isinstance(prompts, Mapping):
        found = _from_mapping(model, prompts, whole)
        return found, len(found) == 1
    if _is_table_of_ids(model, prompts):
        prompts = torch.from_numpy(prompts.astype(np.int64))
    one = _is_pixels(model, prompts) or (reads_sounds(model) and is_sound(prompts))
    if isinstance(prompts, str) or one or is_ids(prompts) or _is_pictured(model, prompts):
        return [_from_one(model, prompts, whole)], True
    if isinstance(prompts, torch.Tensor) and prompts.dim() == 2 and not prompts.is_floating_point():
        return [_from_one(model, row, whole) for row in prompts], False
    if _is_batch(model, prompts):  # as a processor makes them
        return _from_mapping(model, {model_input(model): prompts}, whole), False
    if isinstance(prompts, np.ndarray) and prompts.ndim == 4:
        prompts = list(prompts)
    if isinstance(prompts, Sequence) and not isinstance(prompts, bytes):
        if not len(prompts):
            raise LensError("no prompts were given; pass a text, token ids, or a list of them")
        return [_from_one(model, prompt, whole) for prompt in prompts], False
    raise LensError(
        "a prompt must be a text, token ids, a picture, a list of these or a tokenizer's output, got "
        f"{shape_of(prompts)}"
    )


def _is_table_of_ids(model: LoadedModel, given: Any) -> bool:
    """Rows of token ids as an array, of a model that reads no pictures: of others it is a picture without colours."""
    is_table = isinstance(given, np.ndarray) and given.ndim == 2 and given.dtype.kind in "iu"
    return is_table and model.processor is None and model_input(model) == "input_ids"


def _is_pixels(model: LoadedModel, given: Any) -> bool:
    """The pixels [channels, height, width] of one picture, as a processor makes them."""
    pixels = isinstance(given, torch.Tensor) and given.dim() == 3 and given.is_floating_point()
    return pixels and model_input(model) == "pixel_values"


def _is_batch(model: LoadedModel, given: Any) -> bool:
    """Rows of what a model reads that reads no tokens."""
    rows = isinstance(given, torch.Tensor) and given.dim() > 1 and given.is_floating_point()
    return rows and model_input(model) not in ("input_ids", "hidden_states")


def _is_pictured(model: LoadedModel, given: Any) -> bool:
    """One picture, or a pair of a picture and a text; a model of pictures and texts has no pairs of texts."""
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], str):
        reads_both = model.processor is not None and not reads_pictures_alone(model)
        paired = isinstance(given[0], str) and reads_both
        return paired or is_picture(given[0])
    return is_picture(given) or (isinstance(given, str) and reads_pictures_alone(model))


def _from_picture(model: LoadedModel, given: Any, whole: bool) -> Prompt:
    picture, text = given if isinstance(given, tuple) else (given, None)
    made, seen = prepared(model, picture, text)
    names = accepted(model)
    made = {name: value for name, value in made.items() if name in {"input_ids", *names}}
    (found,) = _from_mapping(model, made, whole)
    return replace(found, text=text, picture=seen)


def _from_one(model: LoadedModel, prompt: Any, whole: bool) -> Prompt:
    if reads_sounds(model) and is_sound(prompt):
        return _from_features(model, prepared_sound(model, prompt))[0]
    if _is_pictured(model, prompt):
        return _from_picture(model, prompt, whole)
    if _is_pixels(model, prompt):
        return _from_mapping(model, {"pixel_values": prompt[None]}, whole)[0]
    if isinstance(prompt, str):
        return _from_text(model, prompt, whole)
    if is_ids(prompt):
        return _from_ids(model, [int(index) for index in prompt], None)
    if isinstance(prompt, Mapping):
        found = _from_mapping(model, prompt, whole)
        if len(found) != 1:
            raise LensError(
                f"a mapping in a list must hold one prompt, got {len(found)}; pass it alone"
            )
        return found[0]
    if isinstance(prompt, tuple) and len(prompt) == 2 and all(isinstance(t, str) for t in prompt):
        model.encode(prompt[0])  # says what is missing
        return _from_mapping(model, _of_tokenizer(model, *prompt), whole)[0]
    if length_of(prompt) == 0:
        raise LensError("a prompt of the list has no tokens; pass at least one")
    raise LensError(
        "a prompt must be a text or token ids (a list of integers), a picture, a pair of texts or of a picture and "
        "a text, or a mapping, got "
        f"{shape_of(prompt)}"
    )


def _from_text(model: LoadedModel, text: str, whole: bool) -> Prompt:
    """Its segments are handed on where the tokenizer gives other than the default (XLNet)."""
    ids = model.encode(text)
    given = _of_tokenizer(model, text) if whole else {}
    if any(given.get("token_type_ids", ())):
        return Prompt(_from_mapping(model, given, whole)[0].inputs, ids, text)
    return _from_ids(model, ids, text)


def _of_tokenizer(model: LoadedModel, *texts: str) -> dict[str, Any]:
    """Ids, and segments where the model takes them: a tokenizer of several models gives them to all."""
    given = model.tokenizer(*texts, verbose=False)
    names = {"input_ids", "token_type_ids"} & {"input_ids", *accepted(model)}
    return {name: given[name] for name in names if name in given}


def _from_ids(model: LoadedModel, ids: list[int], text: str | None) -> Prompt:
    model.check_ids(ids)
    return Prompt({"input_ids": torch.tensor([ids], device=model.device)}, ids, text)


def _from_mapping(model: LoadedModel, given: Mapping[str, Any], whole: bool) -> list[Prompt]:
    """One prompt per row.

    Raises:
        LensError: an input by its name: one that the model does not take, or that is no tensor, has other
            rows than the rest, or cannot be cut where padding is.
    """
    given = {str(name): value for name, value in given.items() if value is not None}
    if "input_ids" not in given:
        return _from_features(model, given)
    ids = given["input_ids"]
    if not whole and (extra := sorted(set(given) - {"input_ids", "attention_mask"})):
        raise LensError(
            f"this takes input_ids and attention_mask, got {', '.join(extra)} too; images, segments and "
            "positions with text go to lens.capture, or run the model yourself inside "
            "lens.traces.capturing(model)"
        )
    _check_names(model, given)
    if isinstance(ids, torch.Tensor | np.ndarray):
        ids = ids[None] if ids.ndim == 1 else ids
    elif isinstance(ids, Sequence):
        ids = ids if len(ids) and not is_whole(ids[0]) else [ids]
    lengths = {length_of(row) for row in ids} if isinstance(ids, list | tuple) else {0}
    if len(lengths) > 1 and None not in lengths:
        return [
            prompt
            for number in range(len(ids))
            for prompt in _from_mapping(
                model, {name: value[number] for name, value in given.items()}, whole
            )
        ]
    tensors = {name: _tensor(name, value) for name, value in given.items()}
    tensors["input_ids"] = rows = _tensor("input_ids", ids)
    if rows.dim() != 2:
        raise LensError(f"input_ids must be [prompts, tokens], got {list(rows.shape)}")
    for name, tensor in tensors.items():
        if tensor.dim() == 1 and tensor.shape == rows.shape[1:]:
            tensors[name] = tensor[None]
    if len(rows) != 1 and any(t.is_floating_point() and t.dim() > 2 for t in tensors.values()):
        raise LensError(
            f"a prompt with images needs input_ids [1, tokens] as a tensor, got {shape_of(rows)}; process "
            "prompts one by one (return_tensors='pt') and pass a list: which image belongs to which "
            "prompt of a batch differs from model to model"
        )
    return [_from_row(model, tensors, row, whole) for row in range(len(rows))]


def _from_row(
    model: LoadedModel, tensors: Mapping[str, torch.Tensor], row: int, whole: bool
) -> Prompt:
    """One row of each input, without the padding at its ends."""
    rows, length = tensors["input_ids"].shape
    mask = tensors.get("attention_mask", torch.ones(rows, length))
    is_square = mask.dim() == 4
    if not is_square and mask.shape != (rows, length):
        raise LensError(
            f"attention_mask must be [prompts, tokens] = {[rows, length]}, got {list(mask.shape)}"
        )
    if not is_square and not bool(((mask == 0) | (mask == 1)).all()):
        raise LensError("attention_mask must hold 0 and 1 only: which tokens are padding")
    real = torch.ones(length) if is_square else mask[row]
    places = real.nonzero()[:, 0]
    if not len(places):
        raise LensError("the prompt has no tokens; pass at least one")
    start, end = int(places[0]), int(places[-1]) + 1
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        axis = 1 if name == "position_ids" and tensor.dim() == 3 else 0  # [3, prompts, tokens]
        if rows > 1 and tensor.shape[axis] != rows:
            raise LensError(
                f"{name} {list(tensor.shape)} has other rows than input_ids [{rows}, {length}]; pass "
                "prompts one by one"
            )
        part = tensor.narrow(axis, row, 1) if rows > 1 else tensor
        if part.shape[axis : axis + 2] == (1, length) and not tensor.dtype.is_floating_point:
            part = part.narrow(axis + 1, start, end - start)
        elif end - start < length and length in part.shape[1:]:
            raise LensError(f"padding cannot be cut from {name} {list(part.shape)}; leave it out")
        found[name] = placed(model, part)
    if not is_square and len(places) == end - start:
        if set(found) <= {"input_ids", "attention_mask", "token_type_ids"}:
            found.pop("attention_mask", None)  # it says nothing
    elif not whole:
        raise LensError(
            "attention_mask hides tokens in the middle of a prompt; this takes token ids alone, and "
            "lens.capture takes such masks"
        )
    kept = found["input_ids"][0].tolist()
    model.check_ids(kept)
    if start and not is_square and "position_ids" not in found and not model.parts:
        alone = {
            name: placed(model, tensor[row : row + 1] if rows > 1 else tensor)
            for name, tensor in tensors.items()
        }
        found = without_padding_before(model, alone, found, start, whole)
    return Prompt(found, kept)


def _from_features(model: LoadedModel, given: Mapping[str, Any]) -> list[Prompt]:
    """Images, sounds or embeddings: one prompt per row."""
    main = next(
        (n for n in ("inputs_embeds", model_input(model), "pixel_values") if n in given), None
    )
    if main is None:
        expected = dict.fromkeys(["input_ids", "pixel_values", model_input(model)])
        raise LensError(
            f"inputs must hold {' or '.join(expected)}, got {', '.join(given) or 'nothing'}"
        )
    _check_names(model, given)
    check_noise(model, given)
    tensors = {name: _tensor(name, value) for name, value in given.items()}
    if PACKED in tensors:
        return _unpacked(model, tensors, main)
    if not tensors[main].dim():
        raise LensError(f"{main} must have a row for each prompt, and is one number")
    rows = len(tensors[main])
    for name, tensor in tensors.items():
        if tensor.dim() == 0 or len(tensor) != rows:
            raise LensError(
                f"{name} {list(tensor.shape)} has other rows than {main} {list(tensors[main].shape)}; pass "
                "one prompt at a time"
            )
        if name.endswith("mask") and tensor.dim() < 4 and not bool((tensor == 1).all()):
            raise LensError(f"{name} hides a part of {main}; cut that part off instead")
    return [
        Prompt({name: placed(model, part[row : row + 1]) for name, part in tensors.items()}, None)
        for row in range(rows)
    ]


def _unpacked(model: LoadedModel, tensors: Mapping[str, torch.Tensor], main: str) -> list[Prompt]:
    """One prompt per picture of those whose patches stand in one row."""
    patches, sizes = tensors[main], tensors[PACKED]
    counts = sizes.prod(-1).tolist() if sizes.dim() == 2 and sizes.shape[1] == 3 else []
    more = {name: one for name, one in tensors.items() if name == "merge_sizes"}
    if len(tensors) > 2 + len(more) or patches.dim() != 2 or sum(counts) != len(patches):
        raise LensError(
            f"{PACKED} must be [pictures, 3] (frames, height, width of each) whose products add up to the rows of "
            f"{main} [patches, numbers], got {', '.join(f'{n} {list(t.shape)}' for n, t in tensors.items())}"
        )
    return [
        Prompt(
            {main: placed(model, part), PACKED: placed(model, sizes[row : row + 1])}
            | {name: placed(model, one[row : row + 1]) for name, one in more.items()},
            None,
        )
        for row, part in enumerate(patches.split(counts))
    ]


def model_input(model: LoadedModel) -> str:
    """The name of what the model reads: as transformers notes it, which of some vision towers and of BLIP-2 is another."""
    noted, takes = main_input(base(model)) or "input_ids", accepted(model)
    if noted in takes:
        return "input_ids" if reads_pictured_text(base(model)) else noted
    if "pixel_values" in takes:
        return "pixel_values"
    return "hidden_states" if {"hidden_states", PACKED} <= set(takes) else noted


def accepted(model: LoadedModel) -> list[str]:
    """Inputs that the forward pass names; what it hands on unseen (`**kwargs`) may reach nobody."""
    parameters = inspect.signature(base(model).forward).parameters.values()
    return [one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]


def _check_names(model: LoadedModel, given: Mapping[str, Any]) -> None:
    takes = accepted(model)
    unknown = sorted(set(given) - {"input_ids", *takes})
    if unknown:
        names = ", ".join(name for name in takes if name in _USUAL)
        raise LensError(
            f"{model.info.class_name} takes no {', '.join(unknown)} (of inputs it takes {names}); leave "
            "out what is not for it"
        )


_USUAL = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox"),
    *("pixel_values", "input_features", "input_values", "image_sizes", "image_grid_thw"),
}


def _tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, bool | str):
        raise LensError(f"{name}={value!r} is no tensor; leave it out")
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        given = shape_of(value)
        raise LensError(f"{name} must be a tensor or lists of numbers, got {given}") from error


def placed(model: LoadedModel, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
