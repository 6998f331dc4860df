"""What people pass to `lens.capture`, as one prompt after another: each with its own length, no padding."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the model.

    Attributes:
        inputs: keyword arguments of the model, batch size 1.
        ids: token ids, or None where the model reads no tokens.
        text: as it was passed, or None.
    """

    inputs: dict[str, torch.Tensor]
    ids: list[int] | None
    text: str | None = None

    @property
    def sha256(self) -> str:
        """Of the text; of the bytes of the inputs where no text was passed."""
        digest = hashlib.sha256()
        if self.text is not None:
            digest.update(self.text.encode())
        else:
            for name in sorted(self.inputs):
                digest.update(self.inputs[name].contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def read_prompts(
    model: LoadedModel, prompts: Any, *, with_images: bool = False
) -> tuple[list[Prompt], bool]:
    """The prompts, and whether one prompt was passed and not a list or a batch.

    Args:
        model: the model that they are for.
        prompts: a text; token ids (a list of integers or a 1-D tensor); a list of these; a 2-D
            tensor of ids; a tokenizer's or image processor's output, with padding or without.
        with_images: the caller runs all inputs of a prompt, so that text with images (one prompt of
            a vision-language processor, or a list of such) can be read; others would drop the image.

    Raises:
        LensError: empty, too long, ids outside the vocabulary, or none of the above.
    """
    if with_images and _has_images(prompts):
        return [_from_processor(model, prompts)], True
    if (
        with_images
        and isinstance(prompts, Sequence)
        and len(prompts)
        and all(map(_has_images, prompts))
    ):
        return [_from_processor(model, inputs) for inputs in prompts], False
    if isinstance(prompts, Mapping):
        found = _from_mapping(model, prompts)
        return found, len(found) == 1
    if isinstance(prompts, str) or _is_ids(prompts):
        return [_from_one(model, prompts)], True
    if isinstance(prompts, torch.Tensor) and prompts.dim() == 2 and not prompts.is_floating_point():
        return [_from_one(model, row) for row in prompts], False
    if isinstance(prompts, Sequence) and not isinstance(prompts, bytes):
        if not len(prompts):
            raise LensError("no prompts were given; pass a text, token ids, or a list of them")
        return [_from_one(model, prompt) for prompt in prompts], False
    raise LensError(
        "a prompt must be a text, token ids, a list of these or a tokenizer's output, got "
        f"{_shape_of(prompts)}"
    )


def _from_one(model: LoadedModel, prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return _from_ids(model, model.encode(prompt), prompt)
    if _is_ids(prompt):
        return _from_ids(model, [int(index) for index in prompt], None)
    raise LensError(
        f"a prompt must be a text or token ids (a list of integers), got {_shape_of(prompt)}"
    )


def _from_ids(model: LoadedModel, ids: list[int], text: str | None) -> Prompt:
    check_ids(model, ids)
    return Prompt({"input_ids": torch.tensor([ids], device=model.device)}, ids, text)


def check_ids(model: LoadedModel, ids: Sequence[int]) -> None:
    """Token ids that the model can take.

    Raises:
        LensError: none, too many, or ids outside the vocabulary.
    """
    if not len(ids):
        raise LensError("the prompt has no tokens; pass at least one")
    if model.info.context is not None and len(ids) > model.info.context:
        raise LensError(
            f"the prompt has {len(ids):,} tokens and {model.name} takes {model.info.context:,}; "
            f"shorten it: lens.tasks.take(model, text, {model.info.context})"
        )
    vocab = model.info.vocab
    if vocab is not None and not 0 <= min(ids) <= max(ids) < vocab:
        raise LensError(
            f"token ids of {model.name} go from 0 to {vocab - 1}, got {min(ids)} to {max(ids)}"
        )


def _from_mapping(model: LoadedModel, inputs: Mapping[str, Any]) -> list[Prompt]:
    ids = inputs.get("input_ids")
    if ids is None:
        return _from_features(model, inputs)
    if isinstance(ids, torch.Tensor):
        ids = ids.tolist()
    rows = ids if ids and not isinstance(ids[0], int) else [ids]
    real = inputs.get("attention_mask")
    if isinstance(real, torch.Tensor):
        real = real.tolist()
    if real is None:
        real = [[1] * len(row) for row in rows]
    elif not isinstance(real[0], (list, tuple)):
        real = [real]
    extra = set(inputs) - {"input_ids", "attention_mask", "token_type_ids"}
    if extra:
        raise LensError(
            f"this takes input_ids and attention_mask, got {', '.join(sorted(extra))} too; images with "
            "text go to lens.capture, or run the model yourself inside lens.traces.capturing(model)"
        )
    return [
        _from_ids(model, [token for token, keep in zip(row, kept, strict=True) if keep], None)
        for row, kept in zip(rows, real, strict=True)
    ]


def _has_images(prompt: Any) -> bool:
    return isinstance(prompt, Mapping) and {"input_ids", "pixel_values"} <= set(prompt)


def _from_processor(model: LoadedModel, inputs: Mapping[str, Any]) -> Prompt:
    """One prompt of a vision-language processor, all its tensors kept and its padding cut off."""
    ids = inputs["input_ids"]
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or len(ids) != 1:
        raise LensError(
            "a prompt with images needs input_ids [1, tokens] as a tensor, got "
            f"{_shape_of(ids)}; process prompts one by one (return_tensors='pt') and pass a list: which "
            "image belongs to which prompt of a batch differs from model to model"
        )
    real = torch.as_tensor(inputs.get("attention_mask", torch.ones_like(ids))).bool().cpu()[0]
    tensors = {
        name: (tensor[:, real.to(tensor.device)] if tensor.shape == ids.shape else tensor).to(
            model.device, model.dtype if tensor.is_floating_point() else None
        )
        for name, tensor in inputs.items()
        if isinstance(tensor, torch.Tensor)
    }
    kept = tensors["input_ids"][0].tolist()
    check_ids(model, kept)
    return Prompt(tensors, kept)


def _from_features(model: LoadedModel, inputs: Mapping[str, Any]) -> list[Prompt]:
    tensors = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
        if isinstance(tensor, torch.Tensor)
    }
    if "pixel_values" not in tensors:
        raise LensError(
            f"inputs must hold input_ids or pixel_values, got {', '.join(inputs) or 'nothing'}"
        )
    rows = len(tensors["pixel_values"])
    return [
        Prompt({name: tensor[row : row + 1] for name, tensor in tensors.items()}, None)
        for row in range(rows)
    ]


def _is_ids(prompt: Any) -> bool:
    if isinstance(prompt, torch.Tensor):
        return prompt.dim() == 1 and not prompt.is_floating_point()
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and all(isinstance(index, int) for index in prompt)


def _shape_of(prompt: Any) -> str:
    if isinstance(prompt, torch.Tensor):
        return f"a {prompt.dtype} tensor {list(prompt.shape)}"
    return type(prompt).__name__
