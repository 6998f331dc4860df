"""Sizes of a model, read from its configuration."""

import inspect
from typing import Any

from torch import nn

from lens.common.errors import LensError
from lens.models.info import ModelInfo
from lens.models.recurrent import has_mixers

_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size")


def describe(model: Any, licence: str = "unknown") -> ModelInfo:
    """Sizes of a transformers model; one of recurrent mixers alone counts as one head of its whole width, and no layer attends.

    Raises:
        LensError: the configuration does not say how many layers and heads there are, and it is no model of recurrent
            mixers alone.
    """
    try:
        config = model.config.get_text_config()
    except ValueError as error:  # it has several texts (MusicGen)
        raise LensError(
            f"cannot read the sizes of {type(model).__name__}: its configuration holds several models that read tokens; "
            "load one of them, or give an example of what the whole reads: lens.passes.wrap(model, inputs)"
        ) from error
    sizes = [_setting(config, name) for name in _SIZES]
    layers, heads, hidden = (size if isinstance(size, int) else 0 for size in sizes)
    missing = [n for n, size in zip(_SIZES, (layers, heads, hidden), strict=True) if not size]
    recurrent = missing == ["num_attention_heads"] and has_mixers(model)
    if missing and not recurrent:
        raise LensError(
            f"cannot read the sizes of {type(model).__name__}: its {type(config).__name__} has no integer "
            f"{', '.join(missing)}; attention of any module goes to lens.passes.wrap(model, inputs)"
        )
    heads = 1 if recurrent else heads
    return ModelInfo(
        layers=layers,
        heads=heads,
        kv_heads=_setting(config, "num_key_value_heads") or heads,
        head_dim=hidden if recurrent else _setting(config, "head_dim") or hidden // heads,
        vocab=_setting(config, "vocab_size") if reads_tokens(model) else None,
        context=_context(model, config),
        parameters=_parameters(model),
        licence=licence,
        class_name=type(model).__name__,
        attending=() if recurrent else tuple(range(layers)),
    )


def in_stages(model: Any) -> ModelInfo:
    """Of a model in stages, before they are measured: 1 for each size that every stage has of its own."""
    ones = {"layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 1, "attending": (0,)}
    return ModelInfo(
        **ones,
        vocab=None,
        context=_context(model, model.config) if reads_tokens(model) else None,
        parameters=_parameters(model),
        licence="unknown",
        class_name=type(model).__name__,
    )


def reads_tokens(model: nn.Module) -> bool:
    """A model of sounds has a vocabulary too: of what it writes (Wav2Vec2)."""
    return "input_ids" in inspect.signature(model.forward).parameters


def _context(model: nn.Module, config: Any) -> int | None:
    """Most tokens; RoBERTa and its kin count positions from behind the padding's id, which its table has places for."""
    most = _setting(config, "max_position_embeddings")
    if not isinstance(most, int) or most < 1:  # -1 in XLNet: any length
        return None
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or not name.endswith("position_embeddings"):
            continue
        if module.num_embeddings == most and module.padding_idx is not None:
            return most - module.padding_idx - 1
    return most


def _setting(config: Any, name: str) -> Any:
    """None where there is none; that of the first layer where layers have their own (Gemma 4)."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        found = getattr(config.per_layer_config[0], name, None)
    return found[0] if isinstance(found, list | tuple) and len(found) else found


def image_token(config: Any) -> int | None:
    """Id of the token that stands for a piece of an image in the text, or None."""
    for name in ("image_token_id", "image_token_index"):
        number = getattr(config, name, None)
        if isinstance(number, int):
            return number
    return None


def reads_pictured_text(model: Any) -> bool:
    """Whether it reads a text with image tokens by a language model that is no encoder-decoder."""
    config = getattr(model, "config", None)
    if config is None or image_token(config) is None or not reads_tokens(model):
        return False
    return not config.get_text_config().is_encoder_decoder


def reads_picture_first(model: Any) -> bool:
    """Whether it reads tokens, and runs on them only beside a picture."""
    pixels = inspect.signature(model.forward).parameters.get("pixel_values")
    needed = pixels is not None and pixels.default is inspect.Parameter.empty
    return needed and reads_tokens(model)


def describe_bridge(bridge: Any) -> ModelInfo:
    """Sizes of a `TransformerBridge`, from its `cfg`."""
    config = bridge.cfg
    return ModelInfo(
        layers=config.n_layers,
        heads=config.n_heads,
        kv_heads=getattr(config, "n_key_value_heads", None) or config.n_heads,
        head_dim=config.d_head,
        vocab=config.d_vocab,
        context=config.n_ctx,
        parameters=_held_once(bridge.original_model),
        licence="unknown",
        class_name=f"TransformerBridge of {type(bridge.original_model).__name__}",
        attending=tuple(range(config.n_layers)),
    )


def _parameters(model: nn.Module) -> int:
    count = getattr(model, "num_parameters", None)  # of 4 bits a parameter holds two
    return count() if count is not None else sum(one.numel() for one in model.parameters())


def _held_once(model: nn.Module) -> int:
    """Weights of what a bridge wraps: q, k and v of its own can be views of one matrix that it has too."""
    counted: dict[int, list[int]] = {}  # memory -> its room, and what views of it add up to
    for one in model.parameters():
        memory = one.untyped_storage()
        room = memory.nbytes() // one.element_size()
        counted.setdefault(memory.data_ptr() or id(one), [room, 0])[1] += one.numel()
    return sum(map(min, counted.values()))
