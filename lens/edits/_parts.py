"""Heads and sub-layers replaced by a constant, coordinates set: what `lens.edits.parts` runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.edits.base import AttentionEdit, queries_at
from lens.edits.language import Hooked
from lens.models.layout import blocks
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend, first_of, with_first
from lens.passes.head_outputs import FEWEST, mean_heads
from lens.passes.inputs import read_prompts
from lens.passes.keys import KeysAt
from lens.passes.residual import changed
from lens.passes.sessions import base

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class HeadsOut(AttentionEdit):
    """Outputs of heads replaced; `calls` is counted, no mass is moved.

    Args:
        means: of each layer, NaN where there is none, at each position or at all alike; None: 0.
    """

    word = "Ablate"

    def __init__(
        self,
        means: Sequence[Float[Tensor, "heads positions value_dim"]] | None,
        heads: Bool[Tensor, "layers heads"],
        backend: str,
    ) -> None:
        super().__init__(heads, backend)
        self._means = means

    def _edit(
        self, call: LayerCall, at: KeysAt, heads: Bool[Tensor, "heads"]
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        output = attend(call, backend=self._backend).output.clone()
        instead = torch.zeros((), dtype=output.dtype, device=output.device)
        if self._means is not None:
            if call.halves is not None:
                raise LensError(
                    "global tokens have values of their own, so a head has no one mean; take baseline='zero'"
                )
            mean = self._means[call.layer].to(output.device)
            places = queries_at(call, at).clamp(min=0)
            if mean.shape[1] == 1:
                places = torch.zeros_like(places)
            if int(places.max()) >= mean.shape[1]:
                raise LensError(
                    f"position {int(places.max())} has no mean: fewer than {FEWEST} of the prompts that "
                    f"it was taken over reach {mean.shape[1]}; give longer ones, or use 'pooled_mean'"
                )
            instead = mean[heads][:, places].transpose(0, 1).to(output.dtype)
        output[:, heads] = instead.expand(output[:, heads].shape)
        self.calls += 1
        return output


class SubLayersOut(Hooked):
    """What sub-layers return, replaced by 0 or a mean."""

    def __init__(
        self, modules: Mapping[str, nn.Module], means: Mapping[str, Float[Tensor, "width"]]
    ) -> None:
        super().__init__()
        self._modules, self._means = modules, means

    @contextmanager
    def open(self) -> Iterator[None]:
        """The sub-layers are out inside the block."""
        with ExitStack() as stack:
            for name, module in self._modules.items():

                def hook(_: nn.Module, __: Any, output: Any, name: str = name) -> Any:
                    self.calls += 1
                    first = first_of(output)
                    instead = torch.zeros_like(first)
                    if name in self._means:
                        instead += self._means[name].to(first)
                    return with_first(output, instead)

                stack.callback(module.register_forward_hook(hook).remove)
            yield


@dataclass(frozen=True, eq=False)
class Means:
    """Means over prompts of what heads and sub-layers give.

    Attributes:
        heads: per layer [heads, positions | 1, value_dim].
        sublayers: [width] of each sub-layer, over all positions.
    """

    heads: list[Tensor]
    sublayers: dict[str, Tensor]

    @staticmethod
    def of(
        model: LoadedModel,
        prompts: Any,
        baseline: str,
        heads: bool,
        modules: Mapping[str, nn.Module],
    ) -> Means:
        """Of all heads, or none, and of these sub-layers.

        Raises:
            LensError: no position that `FEWEST` prompts reach.
        """
        return Means(
            mean_heads(model, prompts, baseline == "mean") if heads else [],
            mean_sublayers(model, prompts, modules) if modules else {},
        )


def mean_sublayers(
    model: LoadedModel, prompts: Any, modules: Mapping[str, nn.Module]
) -> dict[str, Float[Tensor, "width"]]:
    """Of each sub-layer the mean of what it returns, over all positions of the prompts.

    Raises:
        LensError: one that returns more than its layer, which is the padding of windows.
    """
    sums: dict[str, Tensor] = {}
    rows = dict.fromkeys(modules, 0)
    latest: dict[str, int] = {}  # numbers that it gave
    layers = blocks(model)
    with ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():

            def hook(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                given = first_of(output).double().flatten(0, -2)  # [positions, width]
                sums[name] = sums.get(name, 0.0) + given.sum(0)
                rows[name] += len(given)
                latest[name] = given.numel()

            def check(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                if latest.get(name, 0) > first_of(output).numel():
                    raise LensError(
                        f"{name} attends in windows that padding fills up, and its mean would be of padding too; take "
                        "its heads, or baseline='zero'"
                    )

            layer = layers[int(name[1:].partition(".")[0])]
            stack.callback(layer.register_forward_hook(check).remove)
            stack.callback(module.register_forward_hook(hook).remove)
        for prompt in read_prompts(model, prompts)[0]:
            base(model)(**prompt.inputs)
    return {name: total / rows[name] for name, total in sums.items()}


@contextmanager
def setting(
    model: LoadedModel,
    layer: int,
    places: Int[Tensor, "places"],
    dims: Sequence[int],
    value: float,
    done: Hooked,
) -> Iterator[None]:
    """Coordinates of what leaves `layer` (-1: enters layer 0) at some positions are `value` in the block.

    Raises:
        LensError: a layer that the model has not got; in the first pass, such dims.
    """
    positions: Tensor | None = None

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal positions
        positions = _positions(args, kwargs).to(model.device)

    def change(hidden: Tensor) -> Tensor:
        assert positions is not None
        if max(dims) >= hidden.shape[-1]:
            raise LensError(f"dim must be 0 to {hidden.shape[-1] - 1}, got {max(dims)}")
        chosen = torch.isin(positions, places.to(positions)).expand(hidden.shape[:2])
        if not bool(chosen.any()):
            return hidden
        done.calls += 1
        hidden = hidden.clone()
        for dim in dims:
            hidden[..., dim] = hidden[..., dim].masked_fill(chosen, value)
        return hidden

    with ExitStack() as stack:
        stack.callback(base(model).register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.enter_context(changed(model, layer, change))
        yield


def _positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int[Tensor, "#batch tokens"]:
    """Places of the tokens of a forward pass from the first real one of each prompt."""
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    tokens = next((one for one in given if one is not None), None)
    if tokens is None:
        raise LensError("Activation reads input_ids or inputs_embeds, and this pass has neither")
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    places = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
    real = kwargs.get("attention_mask")
    if isinstance(real, Tensor) and real.dim() == 2:
        places = places - real.int().argmax(-1)[:, None]
    return places
