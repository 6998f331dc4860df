"""Head outputs read, replaced and differentiated while the model runs.

The output `z = P v` of each head, before the output projection, is where all of this happens: inside
the attention function that capture registers, so it works for every model that can be captured. N×N
is never built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lens_kernels import AttentionResult
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend, first_of, with_first
from lens.passes.inputs import read_prompts
from lens.passes.logits import Given, logits_of
from lens.passes.sessions import OnLayer, listening, run
from lens.passes.sources import read_any

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FEWEST = 2
"""Prompts that a mean at a position is taken over at least."""
Source = Callable[[int, Tensor], Tensor]
"""(layer, z [rows, heads, queries, value_dim]) -> what to put in place of z, broadcastable to it."""


@dataclass(frozen=True, eq=False)
class HeadGradient:
    """Heads of one layer and the gradient of a number with respect to them.

    Attributes:
        output: z [rows, heads, queries, value_dim].
        slope: of the same shape, the derivative by z.
        attribution: [rows, heads, queries], `sum of slope * z` as the kernel's backward pass gives it.
        call: what the layer computed z from, without its graph.
    """

    output: Float[Tensor, "batch heads queries value_dim"]
    slope: Float[Tensor, "batch heads queries value_dim"]
    attribution: Float[Tensor, "batch heads queries"]
    call: LayerCall


def read_calls(model: LoadedModel, ids: Int[Tensor, "batch tokens"]) -> list[LayerCall]:
    """What each attention layer is given on token ids; errors as in `read_heads`."""
    calls: list[LayerCall] = []

    def on_layer(call: LayerCall) -> Tensor:
        calls.append(_detached(call))
        return attend(call, statistics=()).output

    with torch.no_grad():
        _run(model, ids, on_layer)
    return calls


def read_heads(
    model: LoadedModel, ids: Given, keep: Callable[[int, Tensor], None], *, padding: bool = True
) -> Float[Tensor, "batch tokens vocab"]:
    """Logits of what is given; z [rows, heads, queries, value_dim] of each layer goes to `keep`.

    Without `padding` it goes there without the positions that fill windows up.

    Raises:
        LensError: as `lens.capture`, or layers that are not those of `model.info`.
    """

    def on_layer(call: LayerCall) -> Tensor:
        output = attend(call, statistics=()).output
        keep(call.layer, output if padding else without_padding(call, output))
        return output

    with torch.no_grad():
        return _run(model, ids, on_layer)


def mean_outputs(
    model: LoadedModel,
    parts: Iterable[tuple[Given, Tensor | None]],
    *,
    keep_positions: bool,
    of: Callable[[Tensor], Tensor] = lambda z: z,
) -> dict[int, Tensor]:
    """Mean z of each layer, [1, heads, queries | 1, value_dim] float64, over prompts of one length (and positions).

    Args:
        parts: what is given at a time, and which positions are a prompt's own, [rows, tokens] bool; None: all.
        keep_positions: a mean at each position; else one over all, of pictures in windows over patches alone.
        of: what of z is averaged instead, from float64.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    axes = (0,) if keep_positions else (0, 2)
    for given, own in parts:
        weights = None if own is None else own.to(model.device)[:, None, :, None].double()

        def add(layer: int, output: Tensor, weights: Tensor | None = weights) -> None:
            each = torch.ones_like(output[:, :1, :, :1]).double() if weights is None else weights
            sums[layer] = sums.get(layer, 0) + (of(output.double()) * each).sum(axes, keepdim=True)
            counts[layer] = counts.get(layer, 0) + each.sum(axes, keepdim=True)

        read_heads(model, given, add, padding=keep_positions)
    return {layer: total / counts[layer].clamp(min=1) for layer, total in sums.items()}


def without_padding(call: LayerCall, output: Tensor) -> Tensor:
    """[rows, heads, queries, value_dim] at the positions that do not fill windows up."""
    places = call.query_places
    return output if places is None else output[:, :, : places.real]


def mean_heads(model: LoadedModel, prompts: Any, keep_positions: bool) -> list[Tensor]:
    """Per layer [heads, positions | 1, value_dim], mean output of every head over prompts.

    Of pictures in windows the positions are those of the trace, whose last ones fill the windows up; a mean over positions
    is one over patches alone.

    Raises:
        LensError: no position that `FEWEST` prompts reach, or positions of pictures that are other patches in each.
    """
    read = read_any if model.is_encoder_decoder else read_prompts
    given = [prompt.inputs for prompt in read(model, prompts)[0]]
    if keep_positions and len(given) < FEWEST:
        raise LensError(
            "the mean over one prompt is that prompt, so nothing would change; take more prompts, or "
            "baseline='pooled_mean', the mean over positions too"
        )
    sums: list[Tensor] = [torch.zeros(())] * model.info.layers
    counts = list(sums)  # [1, positions | 1, 1]: prompts, or positions of all prompts
    grids: set[Any] = set()

    def on_layer(call: LayerCall) -> Tensor:
        output = attend(call, statistics=()).output
        z = output if keep_positions else without_padding(call, output)
        z = z[0].double().cpu()  # [heads, positions, value_dim]
        count = torch.ones(1, z.shape[1], 1)
        if keep_positions:
            grids.add(None if call.query_places is None else call.query_places.cells)
        else:
            z, count = z.sum(1, keepdim=True), count.sum(1, keepdim=True)
        for kept, more in ((sums, z), (counts, count)):
            kept[call.layer] = _added(kept[call.layer], more)
        return output

    with torch.no_grad():
        for one in given:
            _run(model, one, on_layer, run)
    if len(grids) > 1:
        raise LensError(
            "the pictures have grids of several sizes, so that a position is another patch in each; take "
            "pictures of one size, or baseline='pooled_mean', the mean over positions too"
        )
    if not keep_positions:
        return [total / count.clamp(min=1) for total, count in zip(sums, counts, strict=True)]
    reached = [int((count >= FEWEST).sum()) for count in counts]
    return [
        (total / count)[:, :length] if total.dim() else total
        for total, count, length in zip(sums, counts, reached, strict=True)
    ]


def _added(total: Tensor, more: Tensor) -> Tensor:
    """[heads, positions, value_dim], the sum of two of other lengths; a number has none."""
    if not total.dim():
        return more
    length = max(total.shape[1], more.shape[1])
    one, other = (
        nn.functional.pad(part, (0, 0, 0, length - part.shape[1])) for part in (total, more)
    )
    return one + other


def edited_logits(
    model: LoadedModel,
    ids: Given,
    groups: Sequence[Sequence[HeadId]],
    sources: Sequence[Source],
    *,
    differentiable: bool = False,
) -> Float[Tensor, "groups batch tokens vocab"]:
    """Logits [groups, rows, tokens, vocab] with the heads of each group replaced, in one forward pass.

    Args:
        model: as `lens.load` returns it.
        ids: of the prompts, or all their inputs.
        groups: heads that are replaced together; each group runs on a copy of the rows.
        sources: of each group, what to put in their place; it sees z of the rows of that group.
        differentiable: keep the graph from what the sources return to the logits.

    Raises:
        LensError: as in `read_heads`.
    """
    with torch.set_grad_enabled(differentiable):
        logits = _run(model, _copies(ids, len(groups)), _editing(groups, sources))
    return logits.unflatten(0, (len(groups), -1))


def edited_outputs(
    model: LoadedModel,
    inputs: Mapping[str, Tensor],
    groups: Sequence[Sequence[HeadId]],
    sources: Sequence[Source],
) -> Any:
    """What the model returns, [groups * rows, ...], as in `edited_logits`, for any inputs [rows, ...]."""
    copies = _copies({name: one.to(model.device) for name, one in inputs.items()}, len(groups))
    with torch.no_grad():
        return _run(model, copies, _editing(groups, sources), lambda _, given: model.model(**given))


def _copies(given: Given, count: int) -> Any:
    """All rows, `count` times over."""
    if isinstance(given, Tensor):
        return given.repeat(count, *[1] * (given.dim() - 1))
    return {name: one.repeat(count, *[1] * (one.dim() - 1)) for name, one in given.items()}


def with_gradients(
    model: LoadedModel,
    ids: Given,
    objective: Callable[[Tensor], Tensor],
    *,
    blocked: Sequence[nn.Module] = (),
) -> list[HeadGradient]:
    """Head outputs of every layer with the gradient of a number that depends on the logits.

    Args:
        model: as `lens.load` returns it.
        ids: [rows, tokens], or all inputs.
        objective: logits [rows, tokens, vocab] -> [rows]; their sum is differentiated.
        blocked: sub-layers whose outputs no gradient passes (GradDrop).

    Raises:
        LensError: as in `read_heads`, or a number that has no gradient here.
    """
    differentiated = _Differentiated()
    with torch.enable_grad(), _blocking(blocked):
        logits = _run(model, ids, differentiated.on_layer)
        values = objective(logits)
        if not values.requires_grad:
            raise LensError("the metric has no gradient; use 'loss' or 'logit_difference'")
        (slope,) = torch.autograd.grad(values.sum(), logits, retain_graph=True)
        if slope.norm() < _FLAT:
            raise LensError(
                f"the metric is flat here (its gradient at the logits has the norm {slope.norm():.1e}),"
                " so a gradient says nothing about its heads; use method='ablation'"
            )
        results = differentiated.results
        targets = [*differentiated.starts, *(result.output for result in results)]
        found = torch.autograd.grad(values.sum(), targets, allow_unused=True)
    gradients = []
    for result, slope, call in zip(
        results, found[len(differentiated.starts) :], differentiated.calls, strict=True
    ):
        z = result.output.detach()
        slope = torch.zeros_like(z) if slope is None else slope
        # behind a blocked layer the kernel's backward pass has nothing to pass on and does not run
        per_token = (slope * z).sum(-1) if blocked else result.statistics.row_attribution
        gradients.append(HeadGradient(z, slope, per_token, call))
    return gradients


@contextmanager
def _blocking(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No gradient passes what these modules return."""

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        return with_first(output, first_of(output).detach())

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(cut).remove)
        yield


_FLAT = 1e-8


def _editing(groups: Sequence[Sequence[HeadId]], sources: Sequence[Source]) -> OnLayer:
    """Replaces the heads of each group on that group's copy of the rows."""

    def on_layer(call: LayerCall) -> Tensor:
        output = attend(call, statistics=()).output
        chosen = torch.zeros(len(groups), output.shape[1], dtype=torch.bool)
        for number, group in enumerate(groups):
            for layer, head in group:
                if layer == call.layer:
                    chosen[number, head] = True
        if not chosen.any():
            return output
        copies = output.unflatten(0, (len(groups), -1)).clone()
        for number in chosen.any(1).nonzero().flatten().tolist():
            mine = copies[number]  # [rows, heads, queries, value_dim]
            instead = sources[number](call.layer, mine).expand_as(mine).to(mine.dtype)
            mine[:, chosen[number]] = instead[:, chosen[number]]
        return copies.flatten(0, 1)

    return on_layer


class _Differentiated:
    """Keeps what each layer's attention is given and returns, with its autograd graph."""

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []
        self.results: list[AttentionResult] = []
        self.starts: list[Tensor] = []

    def on_layer(self, call: LayerCall) -> Tensor:
        """z [rows, heads, queries, value_dim] that the model goes on with."""
        self.calls.append(_detached(call))
        if not self.starts or not call.query.requires_grad:
            # the graph begins here: weights before it need no gradient
            self.starts.append(call.query.detach().requires_grad_())
            call = replace(call, query=self.starts[-1])
        result = attend(call, statistics=("row_attribution",))
        self.results.append(result)
        return result.output


def _run(
    model: LoadedModel,
    inputs: Any,
    on_layer: OnLayer,
    forward: Callable[[LoadedModel, Any], Any] = logits_of,
) -> Any:
    """What `forward` returns (logits of token ids), with the attention of `on_layer`."""
    seen = 0

    def counted(call: LayerCall) -> Tensor:
        nonlocal seen
        seen += 1
        return on_layer(call)

    with listening(model, counted):
        result = forward(model, inputs)
    if seen != len(model.info.attending):
        raise LensError(
            f"{model.info.class_name} ran {seen} attention layers through the registry, "
            f"{len(model.info.attending)} were expected; its heads cannot be edited"
        )
    return result


def _detached(call: LayerCall) -> LayerCall:
    tensors = {name: getattr(call, name).detach() for name in ("query", "key", "value")}
    return replace(call, **tensors)
