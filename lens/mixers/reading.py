"""Mixers of transformers' models while they run: what each scan was given becomes a `Phi`, its output the check.

Every modelling file has its own copy of a scan, looked up by name at each call: inside the block a recording wrapper
stands there. What surrounds the scan (the short convolution before it, gate and norm behind it) is not in Phi.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.common.isolation import owned, replaced
from lens.mixers import kinds, recurrences
from lens.mixers.differential import record_differential
from lens.mixers.phi import Phi
from lens.models.loaded import LoadedModel
from lens.models.recurrent import has_mixers, scan_class, scan_function
from lens.passes.computed import put_over
from lens.passes.sessions import around

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, eq=False)
class Scan:
    """One call of a mixer's scan.

    Attributes:
        layer: the model's own number.
        kind: name of the mixer.
        phi: of the first prompt of the batch.
        output: [heads, tokens, value_dim], what the scan itself gave, without what is not linear in its values.
    """

    layer: int
    kind: str
    phi: Phi
    output: Tensor


@contextmanager
def recorded(root: nn.Module) -> Iterator[list[Scan]]:
    """The scans of every forward pass inside the block, in order.

    Raises:
        LensError: a model without a mixer that is known here, training mode, kernels in the place of functions, another
            thread that works with it; in the block a scan that continues an earlier state.
    """
    if root.training:
        raise LensError(
            "the model is in training mode, where its mixers run fused; call model.eval()"
        )
    found: list[Scan] = []
    layers: list[int] = []
    with ExitStack() as stack:
        stack.enter_context(owned(root))
        for number, module in mixers_of(root):
            recipe = _recipe(module)
            assert recipe is not None
            before = module.register_forward_pre_hook(
                lambda *_, number=number: layers.append(number)
            )
            stack.callback(before.remove)
            recipe(
                stack,
                module,
                lambda kind, phi, output: found.append(Scan(layers[-1], kind, phi, output)),
            )
            after = module.register_forward_hook(lambda *_: layers.clear(), always_call=True)
            stack.callback(after.remove)
        yield found


def mixers_of(root: nn.Module) -> list[tuple[int, nn.Module]]:
    """Layer and module of every mixer that is known.

    Raises:
        LensError: there is none.
    """
    found = [
        (_number(name, module), module)
        for name, module in root.named_modules()
        if _recipe(module) is not None
    ]
    if not found:
        raise LensError(
            f"{type(root).__name__} has no mixer that is known here (of Mamba, Mamba-2, gated delta rule, KDA, "
            "RG-LRU, RWKV-4, Lightning, short convolution, mLSTM, differential attention); its softmax attention is for lens.capture"
        )
    return found


def has_mixer_heads(model: LoadedModel) -> bool:
    """Whether layers have a mixer in the place of softmax attention, or beside it."""
    return bool(model.info.without_attention) or has_mixers(model.transformer)


Keep = Callable[[str, Phi, Tensor], None]
_Recipe = Callable[[ExitStack, nn.Module, Keep], None]


def _number(name: str, module: nn.Module) -> int:
    number = getattr(module, "layer_idx", None)
    if isinstance(number, int):
        return number
    match = _LAYER.search(name)
    return int(match[1]) if match else 0


def _recipe(module: nn.Module) -> _Recipe | None:
    """How the scans of a module are recorded; None of one that has none."""
    if (ending := scan_class(module)) is not None:
        return _BY_CLASS[ending]
    return None if scan_function(module) is None else _recorded_function


def standing_in(
    stack: ExitStack, module: nn.Module, function: str, wrapped: Callable[[Any], Any]
) -> None:
    """While this module runs, the function of its file is `wrapped(function)`, for the thread that runs it."""
    home = sys.modules[type(module).__module__]
    running = ExitStack()

    def begin(*_: Any) -> None:
        running.enter_context(replaced(home, function, wrapped))

    around(stack, module, begin, running.close)


def _recorded_function(stack: ExitStack, module: nn.Module, keep: Keep) -> None:
    function = scan_function(module)
    assert function is not None
    read = _BY_FUNCTION[function]

    def recording(own: Any) -> Any:
        signature = inspect.signature(own)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            result = own(*args, **kwargs)
            output = result[0] if isinstance(result, tuple) else result
            keep(*read(given.arguments, output))
            return result

        return call

    standing_in(stack, module, function, recording)


def _fresh(given: dict[str, Any], *names: str) -> None:
    """Raises LensError: a scan that goes on from a state, of which Phi of these tokens alone says nothing."""
    if any(given.get(name) is not None for name in names):
        raise LensError(
            "this pass goes on from a cached state, whose tokens Phi does not have; run the prompt in one pass without "
            "a cache"
        )


def _mamba2(given: dict[str, Any], output: Tensor) -> tuple[str, Phi, Tensor]:
    _fresh(given, "initial_states")
    x, step = given["hidden_states"][0].double(), given["dt"][0].double()
    if given["dt_bias"] is not None:
        step = step + given["dt_bias"].double()
    if given["dt_softplus"]:
        step = torch.nn.functional.softplus(step)
    step = step.clamp(*given["dt_limit"])
    heads = x.shape[1]
    into, out = (
        given[name][0].double().repeat_interleave(heads // given[name].shape[2], 1) for name in "BC"
    )
    skip = given["D"]
    skip = None if skip is None else skip.reshape(heads, -1)[:, 0]
    phi = kinds.mamba2(
        x.transpose(0, 1), step.T, given["A"], into.transpose(0, 1), out.transpose(0, 1), skip
    )
    return "mamba2", phi, output[0].transpose(0, 1)


def _mamba(given: dict[str, Any], output: Tensor) -> tuple[str, Phi, Tensor]:
    x, step = given["hidden_states"][0].double(), given["dt"][0].double()
    if given["delta_bias"] is not None:
        step = step + given["delta_bias"].double()[:, None]
    if given["delta_softplus"]:
        step = torch.nn.functional.softplus(step)
    phi = kinds.mamba(x, step, given["A"], given["B"][0].T, given["C"][0].T, given["D"])
    own = output[0].double()
    if given["z"] is not None:  # the gate is inside of this scan
        gate = torch.nn.functional.silu(given["z"][0].double())
        own = own / torch.where(gate.abs() > 1e-12, gate, torch.nan)
        own = torch.where(own.isnan(), phi.output()[..., 0], own)
    return "mamba", phi, own[..., None]


def _delta(name: str, given: dict[str, Any], output: Tensor) -> tuple[str, Phi, Tensor]:
    _fresh(given, "initial_state")
    query, key, value, g, beta = (
        given[one][0].double().transpose(0, 1) for one in ("query", "key", "value", "g", "beta")
    )
    shared = value.shape[0] // key.shape[0]
    query, key = query.repeat_interleave(shared, 0), key.repeat_interleave(shared, 0)
    if given["use_qk_l2norm_in_kernel"]:
        query, key = (
            one / (one.square().sum(-1, keepdim=True) + 1e-6).sqrt() for one in (query, key)
        )
    phi = kinds.delta(query * query.shape[-1] ** -0.5, key, value, beta, g)
    return name, phi, output[0].transpose(0, 1)


def _rwkv4(given: dict[str, Any], output: Tensor) -> tuple[str, Phi, Tensor]:
    _fresh(given, "state")
    phi = recurrences.rwkv4(
        -given["time_decay"].double().exp(),
        given["time_first"],
        given["key"][0].T,
        given["value"][0].T,
    )
    return "rwkv4", phi, output[0].T[..., None]


def _rglru(stack: ExitStack, module: nn.Module, keep: Keep) -> None:
    own: Any = module._rnn_scan

    def scan(
        hidden_states: Tensor,
        recurrent_gate: Tensor,
        reset: Tensor,
        recurrent_states: Any,
        **more: Any,
    ) -> Any:
        is_new = bool(reset.reshape(reset.shape[0], -1)[0, 0])
        if not is_new:
            _fresh({"recurrent_states": recurrent_states}, "recurrent_states")
        result = own(hidden_states, recurrent_gate, reset, recurrent_states, **more)
        gate = (recurrent_gate * ~reset)[0].double().T
        keep("rglru", recurrences.rglru(gate.log(), hidden_states[0].T), result[0][0].T[..., None])
        return result

    put_over(stack, module, "_rnn_scan", scan)


def _between(
    stack: ExitStack, first: nn.Module, second: nn.Module, read: Callable[[Tensor, Tensor], None]
) -> None:
    """`read(output of the first, input of the second)` of mixers that are written out."""
    seen: list[Tensor] = []
    made = first.register_forward_hook(lambda *given: seen.append(given[-1]))
    used = second.register_forward_pre_hook(lambda _, args: read(seen.pop(), args[0]))
    for hook in (made, used):
        stack.callback(hook.remove)


def _short_conv(stack: ExitStack, module: Any, keep: Keep) -> None:
    def read(projected: Tensor, mixed: Tensor) -> None:
        into, out, value = projected[0].T.double().chunk(3, 0)
        weight, bias = module.conv.weight.squeeze(1), module.conv.bias
        own = mixed[0].T.double()
        if bias is not None:
            own = own - out * bias.double()[:, None]
        keep("short_conv", kinds.short_conv(into, out, weight, value), own[..., None])

    _between(stack, module.in_proj, module.out_proj, read)


def _lightning(stack: ExitStack, module: Any, keep: Keep) -> None:
    def read(projected: Tensor, mixed: Tensor) -> None:
        heads = module.num_attention_heads
        parts = module.act_fn(projected[0]).double().unflatten(-1, (heads, -1))
        query, key, value = parts.transpose(0, 1).chunk(3, -1)
        slopes = module.slope_rate.reshape(-1).double().cpu()
        phi = kinds.linear(query, key, value, decay=-slopes)
        keep("lightning", phi, mixed[0].unflatten(-1, (heads, -1)).transpose(0, 1))

    _between(stack, module.qkv_proj, module.norm, read)


def _mlstm(stack: ExitStack, module: Any, keep: Keep) -> None:
    names = list(inspect.signature(module.forward).parameters)

    def read(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        _fresh(given, "c_initial")
        parts = [given[one][0].double() for one in ("query", "key", "value", "igate", "fgate")]
        phi = recurrences.mlstm(*parts, epsilon=module.config.eps)
        keep("mlstm", phi, (output[0] if isinstance(output, tuple) else output)[0])

    stack.callback(module.register_forward_hook(read, with_kwargs=True).remove)


_BY_FUNCTION: dict[str, Callable[[dict[str, Any], Tensor], tuple[str, Phi, Tensor]]] = {
    "mamba2_chunk_scan": _mamba2,
    "mamba_selective_scan": _mamba,
    "torch_chunk_gated_delta_rule": partial(_delta, "gated_delta"),
    "chunk_kimi_delta_attention": partial(_delta, "kda"),
    "rwkv_linear_attention": _rwkv4,
}
_BY_CLASS: dict[str, _Recipe] = {
    "Rglru": _rglru,
    "ShortConv": _short_conv,
    "LightningAttention": _lightning,
    "xLSTMBackend": _mlstm,
    "DiffLlamaAttention": record_differential,
}
"""Endings of class names of mixers that are no function."""
