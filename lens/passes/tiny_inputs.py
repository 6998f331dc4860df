"""A short prompt for any model, drawn or made of noise: what checks run that must run something."""

import inspect
from dataclasses import replace
from typing import Any

import torch

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.models.sizes import image_token, reads_picture_first
from lens.models.towers import WHOLE
from lens.models.wrapped import Wrapped
from lens.passes.inputs import model_input
from lens.passes.pictures import hides_at_random
from lens.passes.sessions import PACKED
from lens.passes.sparse import shortest

LENGTH = 24
_FRAMES = 128  # of fewer the streaming encoder of Nemotron leaves rows without a key
_PICTURE = 64
_CHANNELS = "feature_projection_input_dim"
_SOUND = 4000  # a quarter of a second
_CHARACTERS = 128  # of models that read characters and have no vocabulary (Canine)
_SIZES = (
    *("image_size", "num_channels", "num_frames", "max_length", "num_mel_bins"),
    *("max_source_positions", _CHANNELS, "input_feat_per_channel"),
)


def tiny_inputs(model: LoadedModel) -> dict[str, torch.Tensor]:
    """A short prompt of drawn tokens, or noise where the model reads none: an image, frames, a sound."""
    if isinstance(model.model, Wrapped):
        return model.model.example
    if model.towers:
        return {
            name: one for tower in model.towers.values() for name, one in tiny_inputs(tower).items()
        }
    generator = torch.Generator().manual_seed(0)
    if model.is_encoder_decoder:
        return _of_both(model, generator)
    name = "input_ids" if model.is_bridge else model_input(model)
    takes = {} if model.is_bridge else inspect.signature(model.model.forward).parameters
    if PACKED in takes and hasattr(model.model.config, "patch_size"):
        return _packed(model, name, generator)
    if name == "past_values" and hasattr(model.model.config, "context_length"):
        return _series(model, generator)
    if "spatial_shapes" in takes and hasattr(model.model.config, "num_channels"):
        return _patches(model, generator)
    if name not in ("input_ids", "inputs_embeds"):
        shape = _noise(model, name)
        pixels = torch.randn(1, *shape, generator=generator).to(model.device, model.dtype)
        if hides_at_random(model):
            side = model.model.config.patch_size
            noise = torch.rand(1, shape[1] // side * (shape[2] // side), generator=generator)
            return {name: pixels, "noise": noise.to(model.device, model.dtype)}
        return {name: pixels}
    vocab = model.info.vocab or _CHARACTERS
    ids = torch.randint(vocab, (1, _length(model)), generator=generator)
    if model.bos_id is not None:
        ids[0, 0] = model.bos_id
    if not model.is_bridge and reads_picture_first(model.model):
        return _pictured(model, ids, generator)
    return {"input_ids": ids.to(model.device)}


def _pictured(
    model: LoadedModel, ids: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """A text with the image tokens of one picture before it, for a model that reads no text alone (BLIP-2)."""
    config: Any = model.model.config
    image = image_token(config)
    assert image is not None
    ids[ids == image] = image - 1
    tokens = torch.full((1, config.num_query_tokens), image)
    sides = _noise(replace(model, model=model.model.vision_model), "pixel_values")
    pixels = torch.randn(1, *sides, generator=generator).to(model.device, model.dtype)
    found = {"input_ids": torch.cat([tokens, ids], 1), "pixel_values": pixels}
    if "qformer_input_ids" in inspect.signature(model.model.forward).parameters:
        found["qformer_input_ids"] = ids % config.qformer_config.vocab_size
    return {name: one.to(model.device) for name, one in found.items()}


def _length(model: LoadedModel) -> int:
    """Of the prompt: so long that attention is sparse where the model has positions for it."""
    context = model.info.context or LENGTH
    needed = 0 if model.is_bridge else shortest(model.model.config)
    return max(min(LENGTH, context), needed if needed <= context else 0)


def _of_both(model: LoadedModel, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What an encoder-decoder reads: a source, and a few tokens of the decoder where it takes them."""
    name, config = model_input(model), model.model.config
    takes = inspect.signature(model.model.forward).parameters
    if "query_embeds" in takes:
        sizes = {"query_embeds": config.hidden_size}
        sizes["encoder_hidden_states"] = config.encoder_hidden_size
        found = {
            n: torch.randn(1, length, size, generator=generator)
            for length, (n, size) in zip((5, 9), sizes.items(), strict=True)
        }
        return {n: one.to(model.device, model.dtype) for n, one in found.items()}
    vocab = model.info.vocab or getattr(config.get_text_config(), "vocab_size", _CHARACTERS)
    found = {}
    if name == "input_ids":
        found[name] = torch.randint(vocab, (1, _length(model)), generator=generator).to(
            model.device
        )
    else:
        shape = _noise(model, name)
        found[name] = torch.randn(1, *shape, generator=generator).to(model.device, model.dtype)
    target = next((n for n in ("decoder_input_ids", "input_ids") if n in takes and n != name), None)
    if target is not None:
        found[target] = torch.randint(vocab, (1, 7), generator=generator).to(model.device)
    return found


def _packed(model: LoadedModel, name: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A picture of a few patches, for a tower that reads patches in one row and the sizes of the pictures."""
    config: Any = model.model.config
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", None) or 3
    numbers = channels * getattr(config, "temporal_patch_size", 1) * config.patch_size**2
    side = 2 * getattr(config, "spatial_merge_size", 1)
    patches = torch.randn(side * side, numbers, generator=generator)
    sizes = torch.tensor([[1, side, side]], device=model.device)
    found = {name: patches.to(model.device, model.dtype), PACKED: sizes}
    if "merge_sizes" in inspect.signature(model.model.forward).parameters:
        found["merge_sizes"] = torch.tensor([2], device=model.device)
    return found


def _patches(model: LoadedModel, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A picture of 2 × 3 patches, one a row, for a tower that takes pictures of any shape (SigLIP 2)."""
    config: Any = model.model.config
    patches = torch.randn(1, 6, config.num_channels * config.patch_size**2, generator=generator)
    return {
        "pixel_values": patches.to(model.device, model.dtype),
        "pixel_attention_mask": torch.ones(1, 6, dtype=torch.long, device=model.device),
        "spatial_shapes": torch.tensor([[2, 3]], device=model.device),
    }


def _series(model: LoadedModel, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Values over time, of one variable or several (TimesFM, PatchTST)."""
    config: Any = model.model.config
    several = getattr(config, "num_input_channels", None)
    shape = (1, config.context_length, *([several] if several else []))
    found = {"past_values": torch.randn(shape, generator=generator).to(model.device, model.dtype)}
    if "freq" in inspect.signature(model.model.forward).parameters:
        none = torch.zeros(1, config.context_length, dtype=torch.long, device=model.device)
        found |= {"past_values_padding": none, "freq": none[:, :1]}
    return found


def _noise(model: LoadedModel, name: str) -> tuple[int, ...]:
    """Shape, without the batch, of what a model of images, videos or sounds reads.

    Raises:
        LensError: the configuration does not say it.
    """
    config = model.model.config
    for part in ("encoder", "encoder_config", "vision_config"):  # of an encoder-decoder
        inner = getattr(config, part, None)
        config = inner if model.is_encoder_decoder and hasattr(inner, "to_dict") else config
    found: Any = {key: getattr(config, key, None) for key in _SIZES}
    found["num_channels"] = found["num_channels"] or 3
    if name == "pixel_values" and model.parts and not found["image_size"]:  # of any size (DETR)
        return found["num_channels"], _PICTURE, _PICTURE
    if name == "pixel_values" and found["image_size"]:
        size = found["image_size"]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        frames = found["num_frames"]
        return (*([frames] if frames else []), found["num_channels"], height, width)
    if name == "input_values" and found["max_length"] and found["num_mel_bins"]:
        return found["max_length"], found["num_mel_bins"]  # a spectrogram
    if name == "input_values":
        return (_SOUND,)
    if name == "input_features" and found["num_mel_bins"] and found["max_source_positions"]:
        return found["num_mel_bins"], 2 * found["max_source_positions"]  # Whisper halves its time
    if name == "input_features" and (
        bins := found["num_mel_bins"] or found[_CHANNELS] or found["input_feat_per_channel"]
    ):
        return _FRAMES, bins
    raise LensError(
        f"what {model.info.class_name} reads ({name}) is not known from its configuration, so capture of it cannot be "
        f"checked; {WHOLE}"
    )
