"""Attention of models that denoise (diffusers): which pass is which step, which module attends to what.

A denoiser is run once or several times a step, by whatever pipeline; its attention modules hold a `processor`, the
place where the field puts its own attention in. What a module does inside a processor is followed
(`lens.passes.computed`), so that any processor is captured, and the output of the first pass is held against the
denoiser's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.common.isolation import owned
from lens.passes.calls import LayerCall, attend, cut, first_of
from lens.passes.check import relative_error, tolerance_of
from lens.passes.computed import following, put_over
from lens.passes.interface import own_attention, received_by


@dataclass(frozen=True)
class DenoisingCall:
    """One attention of one row of a denoiser's batch.

    Attributes:
        call: its queries, keys, values and mask; `layer` counts the modules of a kind.
        kind: "self" (of the picture), "cross" (of the picture to the text), "joint" (of both together).
        module: its name in the denoiser.
        text: first and past the last of the text among the keys, or None.
    """

    call: LayerCall
    kind: str
    module: str
    text: tuple[int, int] | None


OnCall: TypeAlias = Callable[[DenoisingCall], Tensor]
"""A call -> its output [1, heads, queries, value_dim], of any floating type."""


@dataclass
class Pass:
    """A pass that is captured.

    Attributes:
        step: number of the step, from 0.
        timestep: that the denoiser was told, or NaN.
        inputs: what it was given, by name.
        check: largest difference of its output from the denoiser's own, over the largest of that; None: not measured.
    """

    step: int
    timestep: float
    inputs: dict[str, Any]
    check: float | None = None


@dataclass
class _Listener:
    """Who is asked for the attention of the modules of a denoiser."""

    on_call: OnCall
    row: int
    names: dict[int, str]
    numbers: dict[tuple[str, str], int] = field(default_factory=dict)
    joint: dict[int, tuple[int, int]] = field(default_factory=dict)  # length -> where text stands
    module: nn.Module | None = None
    given: tuple[int, Tensor | None] = (0, None)  # positions of the picture; the text
    crossing: frozenset[int] = frozenset()
    reached: set[str] = field(default_factory=set)
    eager_alone: bool = False

    def attend(self, call: LayerCall) -> Tensor:
        """See `lens.passes.interface.Listener`."""
        batch = len(call.query)
        kind, text = self._kind(call)
        if kind == "cross":
            call = replace(call, mask=replace(call.mask, cross=True))
        assert self.module is not None
        name = self.names[id(self.module)]
        self.reached.add(name)
        same = sum(one == kind for one, _ in self.numbers)
        layer = self.numbers.setdefault((kind, name), same)
        own = replace(_row(call, self.row % batch), layer=layer, place=kind)
        output = self.on_call(DenoisingCall(own, kind, name, text))
        if batch > 1:
            output = attend(call, statistics=()).output
        return output.to(call.value.dtype).transpose(1, 2).contiguous()

    def _kind(self, call: LayerCall) -> tuple[str, tuple[int, int] | None]:
        queries, keys = call.query.shape[2], call.key.shape[2]
        positions, text = self.given
        if text is None:
            where = self.joint.get(keys) if queries == keys else None
            return ("self" if where is None else "joint"), where
        words = text.shape[1]
        if queries == keys == positions + words:
            where = self._text_in(call, text)
            self.joint[keys] = where
            return "joint", where
        return "cross", ((0, words) if keys >= words else None)

    def _text_in(self, call: LayerCall, text: Tensor) -> tuple[int, int]:
        """Where the text stands among the keys: its values say it, which are neither normed nor rotated."""
        module: Any = self.module
        project = getattr(module, "add_v_proj", None) or getattr(module, "to_v", None)
        words, keys = text.shape[1], call.key.shape[2]
        if project is None:
            return 0, words
        with torch.no_grad():
            made = project.forward(text).unflatten(-1, (call.value.shape[1], -1)).transpose(1, 2)
        off = [
            float((call.value[:, :, part] - made).abs().max())
            for part in (slice(0, words), slice(keys - words, keys))
        ]
        return (0, words) if off[0] <= off[1] else (keys - words, keys)


def _row(call: LayerCall, row: int) -> LayerCall:
    """One row of the batch."""

    def one(tensor: Tensor | None) -> Any:
        return tensor if tensor is None or len(tensor) == 1 else tensor[row : row + 1]

    parts = {name: one(getattr(call.mask, name)) for name in ("padding", "allowed", "first")}
    rows = slice(row, row + 1)
    return replace(
        call,
        query=call.query[rows],
        key=call.key[rows],
        value=call.value[rows],
        mask=replace(call.mask, **parts),
        position_bias=cut(call.position_bias, rows=rows),
    )


def denoiser_of(given: Any) -> nn.Module:
    """The denoiser of a pipeline of diffusers, or the module itself, with attention processors in it.

    Raises:
        LensError: neither, or training mode.
    """
    found = given
    if not isinstance(given, nn.Module):
        parts = (getattr(given, name, None) for name in ("transformer", "unet"))
        found = next((part for part in parts if isinstance(part, nn.Module)), None)
    if found is None or not attention_modules(found):
        raise LensError(
            f"a denoiser is a diffusers pipeline, or its transformer or UNet, with attention processors; got "
            f"{type(given).__name__}"
        )
    if found.training:
        raise LensError(f"{type(found).__name__} is in training mode; call .eval() first")
    return found


def attention_modules(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold an attention processor, by name."""
    return {
        name: one
        for name, one in denoiser.named_modules()
        if hasattr(one, "processor") and (hasattr(one, "heads") or hasattr(one, "num_heads"))
    }


@contextmanager
def denoising_calls(
    denoiser: nn.Module,
    on_call: OnCall,
    on_pass: Callable[[Pass], None],
    *,
    steps: Sequence[int] | None,
    row: int,
) -> Iterator[None]:
    """Passes of a denoiser inside the block tell of each attention, at the chosen steps; all is put back after.

    A step begins where the denoiser is told another timestep; of several passes in one step (true guidance) the
    first is taken.

    Args:
        denoiser: see `denoiser_of`.
        on_call: is told of each attention of a pass, and gives its output.
        on_pass: is told when a pass is over.
        steps: numbers of steps; None: all.
        row: of the batch; -1, the last, is the one with the prompt where both are in one batch.

    Raises:
        LensError: nothing was reached, the output is not the denoiser's own, or another thread works with it.
    """
    own = denoiser.forward
    names = {id(one): name for name, one in attention_modules(denoiser).items()}
    parameters = inspect.signature(own)
    state: dict[str, Any] = {"step": -1, "timestep": None, "checked": False}

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = parameters.bind_partial(*args, **kwargs).arguments
        timestep = _number(inputs.get("timestep"))
        again = timestep is not None and timestep == state["timestep"]
        state["step"] += not again
        state["timestep"] = timestep
        step = state["step"]
        if again or (steps is not None and step not in steps):
            return own(*args, **kwargs)
        with torch.no_grad():
            found = _captured(denoiser, own, names, on_call, row, args, kwargs)
            check = None
            if not state["checked"]:
                state["checked"] = True
                check = _checked(denoiser, found, own(*args, **kwargs))
        on_pass(Pass(step, float("nan") if timestep is None else timestep, dict(inputs), check))
        return found

    with owned(denoiser), ExitStack() as stack:
        put_over(stack, denoiser, "forward", forward)
        yield


def _captured(
    denoiser: nn.Module,
    own: Callable[..., Any],
    names: dict[int, str],
    on_call: OnCall,
    row: int,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    listener = _Listener(on_call, row, names)
    modules = list(attention_modules(denoiser).values())
    with ExitStack() as stack:
        stack.enter_context(received_by(listener))
        stack.enter_context(following(denoiser, own_attention, modules))
        for module in modules:
            stack.callback(
                module.register_forward_pre_hook(_before(listener), with_kwargs=True).remove
            )
        found = own(*args, **kwargs)
    if not listener.reached:
        raise LensError(
            f"cannot reach the attention of {type(denoiser).__name__}: its processors call neither torch's attention "
            "nor a softmax over scores in a way that can be followed (xformers, or linear attention)"
        )
    return found


def _before(listener: _Listener) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        named = ("hidden_states", "encoder_hidden_states")
        hidden, text = (
            kwargs.get(name, args[number] if len(args) > number else None)
            for number, name in enumerate(named)
        )
        positions = 0
        if isinstance(hidden, Tensor):
            positions = hidden.shape[1] if hidden.dim() == 3 else hidden[0, 0].numel()
        listener.module = module
        listener.given = (positions, text if isinstance(text, Tensor) else None)

    return before


def _number(timestep: Any) -> float | None:
    if isinstance(timestep, Tensor):
        return float(timestep.flatten()[-1])
    return float(timestep) if isinstance(timestep, int | float) else None


def _checked(denoiser: nn.Module, found: Any, own: Any) -> float:
    """Raises LensError: an output that is not the denoiser's own."""
    ours, theirs = first_of(found), first_of(own)
    error, tolerance = relative_error(ours, theirs), tolerance_of(theirs.dtype)
    if not error <= tolerance:
        raise LensError(
            f"capture does not reproduce {type(denoiser).__name__}: its output differs by {error:.1e} (allowed "
            f"{tolerance:.0e}); its attention does something that capture does not know, or it is random"
        )
    return error
