"""Our attention in the model's place, for the length of a `with` block.

transformers looks up the attention function by `config._attn_implementation`, at each call. One
function is registered under one name, with its mask function; `switched` points every configuration
of a model to that name and puts everything back afterwards. Of a model that reads images inside its
text, that is the language model alone: its vision tower has positions of its own.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lens.common.errors import LensError
from lens.common.isolation import owned
from lens.models.sizes import image_token
from lens.passes.calls import LayerCall
from lens.passes.masks import structure_of, structured_mask, with_chosen

IMPLEMENTATION = "attention_lens"

# What models pass along that does not change which keys are read or with what weight.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "layer_idx",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)


class Listener(Protocol):
    """Computes the attention of one layer and keeps what it wants to know.

    Attributes:
        crossing: `id` of modules that read keys of another sequence, beside those that say so themselves.
        eager_alone: whether the model has no other attention than `eager`, in which no mask means that all is seen.
    """

    crossing: frozenset[int]
    eager_alone: bool

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Output [batch, queries, heads, value_dim] of the call."""
        ...


_LISTENER: ContextVar[Listener] = ContextVar("lens_listener")


def current_listener() -> Listener | None:
    """Who receives the attention calls of this thread; None outside of `received_by`."""
    return _LISTENER.get(None)


def lens_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    halves: torch.Tensor | None = None,
    extra: tuple[str, ...] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that is registered with `AttentionInterface`.

    Raises:
        LensError: outside of a capture or in another thread, dropout, or an argument that capture does not understand.
    """
    listener = current_listener()
    if listener is None:
        raise LensError(
            f"{type(module).__name__} runs with the attention implementation {IMPLEMENTATION!r} outside of what set it "
            "(lens.capture, lens.traces.capturing, lens.edit): run it inside of the block and in its thread, or, where it "
            "was left behind, model.set_attn_implementation('sdpa')"
        )
    if dropout:
        raise LensError(
            f"{type(module).__name__} drops out attention (p={dropout}); call model.eval() first"
        )
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise LensError(
                f"{type(module).__name__} passes {name}={_brief(given)} to its attention, which "
                "capture does not understand; the result would not be this model's"
            )
    if is_causal is None:
        unmasked = attention_mask is None and listener.eager_alone  # as BridgeTower's pictures
        is_causal = bool(getattr(module, "is_causal", True)) and not unmasked
    mask, added = structure_of(attention_mask, is_causal, sliding_window, query.shape[2])
    if sinks is not None:  # of each query: their logits are 0 where they are taken off the row's
        s_aux = sinks.new_zeros(sinks.shape[1])
    for more in (added, None if sinks is None else -sinks):
        if more is not None:
            position_bias = more if position_bias is None else position_bias + more
    if indices is not None:
        mask = with_chosen(mask, indices, query.shape[2], key.shape[2])
    fewer = key.shape[2] < query.shape[2]  # keys of another kind: means of blocks, say
    if _crosses(module, listener.crossing) or extra or fewer:
        mask = replace(mask, cross=True)
    call = LayerCall(
        query=query,
        key=key,
        value=value,
        mask=mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=softcap or None,
        sink_logits=s_aux,
        position_bias=position_bias,
        halves=halves,
        extra=extra,
    )
    return listener.attend(call), None


def _crosses(module: nn.Module, known: frozenset[int]) -> bool:
    """Whether a module reads keys of another sequence: it is known to or says so, or, where none is known, is a decoder's
    that is not causal (PegasusX says so of both attentions of its decoder)."""
    of_decoder = getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True)
    named = "crossattention" in type(module).__name__.lower() or id(module) in known
    return bool(getattr(module, "is_cross_attention", False) or named or (of_decoder and not known))


def own_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    bias: torch.Tensor | None,
    causal: bool = False,
    window: int | None = None,
    halves: torch.Tensor | None = None,
    extra: tuple[str, ...] = (),
) -> torch.Tensor:
    """That of a module that asks no registry (`lens.passes.computed`): no mask lets everything through."""
    return lens_attention(
        *(module, query, key, value, mask),
        scaling=scale,
        is_causal=causal,
        position_bias=bias,
        sliding_window=window,
        halves=halves,
        extra=extra,
    )[0]


AttentionInterface.register(IMPLEMENTATION, lens_attention)
AttentionMaskInterface.register(IMPLEMENTATION, structured_mask)


@contextmanager
def received_by(listener: Listener) -> Iterator[None]:
    """`listener` receives the attention calls of this thread inside the block."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def switched(model: nn.Module, implementation: str = IMPLEMENTATION) -> Iterator[None]:
    """Every configuration inside `model`, which other models may have too, uses `implementation` inside the block.

    Raises:
        LensError: another thread is inside such a block of one of them.
    """
    name = "_attn_implementation_internal"
    with ExitStack() as stack:
        for config in _configs(language_model(model)):
            stack.enter_context(owned(config))
            stack.callback(setattr, config, name, getattr(config, name))
            setattr(config, name, implementation)
        yield


def foreign_functions(model: nn.Module) -> set[str]:
    """Names of the attention functions that configurations inside `model` ask for and transformers did not write."""
    names = {one._attn_implementation for one in _configs(language_model(model))}
    functions = {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in names}
    return {
        str(name)
        for name, function in functions.items()
        if function is not None
        and not getattr(function, "__module__", "").startswith("transformers.")
    }


def language_model(model: nn.Module) -> nn.Module:
    """The part that reads the text, of a model whose text holds image tokens; else `model` itself."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or image_token(config) is None:
        return model
    text = config.get_text_config()
    if text is config:
        return model
    return next((part for part in model.modules() if getattr(part, "config", None) is text), model)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """All configurations that modules of `model` look at, each once."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: Any) -> None:
        if not isinstance(config, PreTrainedConfig) or id(config) in found:
            return
        found[id(config)] = config
        for name in config.sub_configs:
            add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"<tensor {list(value.shape)}>"
    return repr(value)[:60]
