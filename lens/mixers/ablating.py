"""`lens.mixers.Ablate`: heads of linear and recurrent mixers taken out, in the language of `lens.edits`.

Of a head of a mixer that is what its scan gives, before the gate, the norm and the projection behind it; the channel of a
mixer whose every channel has a matrix of its own (Mamba, RG-LRU, RWKV-4, short convolutions).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId, head_id, one_or_more
from lens.edits.controls import Case, Control, Kind, Trial
from lens.edits.language import Edit, Hooked, Running
from lens.mixers.reading import mixers_of, recorded, standing_in
from lens.models.loaded import LoadedModel
from lens.models.recurrent import scan_function
from lens.passes.calls import first_of, with_first
from lens.passes.computed import put_over
from lens.passes.inputs import read_prompts
from lens.passes.sessions import base
from lens.stats.controls import others

_AXES = {
    "mamba2_chunk_scan": 2,
    "mamba_selective_scan": 1,
    "torch_chunk_gated_delta_rule": 2,
    "chunk_kimi_delta_attention": 2,
    "rwkv_linear_attention": 2,
}
"""Function of a scan -> the axis of its heads in what it gives, [rows, ...]."""
_READERS = {"ShortConv": "out_proj", "LightningAttention": "norm"}
"""Ending of a class -> the module that reads [rows, tokens, heads * dim]."""
Change = Callable[[int, Tensor, int], Tensor]
"""(layer, what the scan gives, axis of the heads) -> what the model goes on with."""


@dataclass(frozen=True)
class Ablate(Edit):
    """Heads of mixers are taken out: what their scan gives is replaced by a constant.

    Attributes:
        heads: such as `["L0H3"]`, of layers with a mixer; one alone may be a string.
        baseline: "zero", or "pooled_mean" over the prompts `over` and their positions.
        over: prompts of tokens; `lens.effect` takes its own where none are given.

    Raises:
        LensError: no head, an unknown baseline; when it starts, heads that the mixers have not got, a mean without
            prompts; while it runs, a pass on a cached state, whose scan is another function.

    Example:
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 97}
        >>> kinds = ["conv", "full_attention"]
        >>> config = transformers.Lfm2Config(**sizes, num_hidden_layers=2, layer_types=kinds)
        >>> hybrid = lens.load(transformers.Lfm2ForCausalLM(config).eval())
        >>> with lens.edit(hybrid, lens.mixers.Ablate(["L0H1"])) as (done,):
        ...     logits = hybrid.logits([3, 1, 4, 1, 5])
        >>> done.calls
        1
    """

    heads: AnyHead | Sequence[AnyHead]
    baseline: Literal["zero", "pooled_mean"] = "zero"
    over: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("baseline of Ablate", self.baseline, ("zero", "pooled_mean"))
        given = one_or_more("heads", self.heads)
        if not given:
            raise LensError("Ablate takes out at least one head; none was given")
        object.__setattr__(self, "heads", given)

    @property
    def words(self) -> str:
        """See `Edit`."""
        return f"Ablate mixer heads to {self.baseline}"

    def ready(self, model: LoadedModel, prompts: Any) -> Ablate:
        """The same with its means taken, over `prompts` where it names none; copies share them."""
        if self.baseline == "zero" or isinstance(self.over, _Means):
            return self
        return replace(self, over=_means(model, prompts if self.over is None else self.over))

    def chosen(self, model: LoadedModel) -> list[HeadId]:
        """Its heads. Errors as in `start`."""
        known = heads_of(model)
        found = [head_id(head) for head in self.heads]  # type: ignore[arg-type]
        for head in found:
            if head not in known:
                raise LensError(
                    f"no mixer of {model.name} has a head {head}; layers with mixers have "
                    + ", ".join(
                        f"L{n}: {count}" for n, count in Counter(one.layer for one in known).items()
                    )
                )
        return found

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        chosen = self.chosen(model)
        if self.baseline != "zero" and self.over is None:
            raise LensError(
                f"Ablate(..., {self.baseline!r}) needs the prompts that the mean is taken over: over=texts"
            )
        means = self.ready(model, None).over if self.baseline != "zero" else None
        done = Hooked()

        def change(layer: int, output: Tensor, axis: int) -> Tensor:
            mine = [head.head for head in chosen if head.layer == layer]
            if not mine:
                return output
            done.calls += 1
            found = output.clone().movedim(axis, 0)
            for head in mine:
                found[head] = 0 if means is None else means.of(layer, head, found[head])
            return found.movedim(0, axis)

        return Running(done, hooks=scanning(model.transformer, change))

    def kind(self, model: LoadedModel) -> Kind:
        """What stands in for it in `lens.effect`."""
        return _OfMixerHeads(model, self)


@dataclass(frozen=True, eq=False)
class _Means:
    """Layer -> [heads, dim or 1], the mean of what each head gives."""

    by_layer: dict[int, Tensor]

    def of(self, layer: int, head: int, output: Tensor) -> Tensor:
        """What is put in place of a head's output, broadcastable to it."""
        return self.by_layer[layer][head].to(output).expand_as(output)


def heads_of(model: LoadedModel) -> list[HeadId]:
    """Every head of every mixer, of layers in order.

    Raises:
        LensError: no mixer that is known, or a layer whose heads are scanned one by one.
    """
    root = model.transformer
    with torch.no_grad(), recorded(root) as scans:
        base(model)(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    counts: dict[int, int] = {}
    for scan in scans:
        if scan.layer in counts:
            raise LensError(
                f"layer {scan.layer} of {model.info.class_name} scans its heads in several calls, which Ablate does not "
                "tell apart"
            )
        counts[scan.layer] = scan.phi.heads
    return [HeadId(layer, head) for layer, count in counts.items() for head in range(count)]


def _means(model: LoadedModel, prompts: Any) -> _Means:
    sums: dict[int, Tensor] = {}
    tokens = 0

    def add(layer: int, output: Tensor, axis: int) -> Tensor:
        z = output[0].double().movedim(axis - 1, 0)  # [heads, tokens, dim], or [channels, tokens]
        total = (z[..., None] if z.dim() == 2 else z).sum(1)
        sums[layer] = sums.get(layer, 0) + total
        return output

    with torch.no_grad(), scanning(model.transformer, add):
        for prompt in read_prompts(model, prompts)[0]:
            base(model)(**prompt.inputs, use_cache=False)
            tokens += len(prompt.ids or ())
    return _Means({layer: total / tokens for layer, total in sums.items()})


@contextmanager
def scanning(root: nn.Module, change: Change) -> Iterator[None]:
    """What every scan gives goes through `change` inside the block.

    Raises:
        LensError: in the block, a mixer that ran without its scan (one token on a cached state).
    """
    with ExitStack() as stack:
        for layer, module in mixers_of(root):
            ran: list[bool] = []

            def use(output: Tensor, axis: int, layer: int = layer, ran: list[bool] = ran) -> Tensor:
                ran.append(True)
                return change(layer, output, axis)

            def check(*_: Any, layer: int = layer, ran: list[bool] = ran) -> None:
                if not ran:
                    raise LensError(
                        f"the mixer of layer {layer} went on from a cached state, where its scan is another function; "
                        "run prompts whole: generate(use_cache=False)"
                    )
                ran.clear()

            _stand(stack, module, use)
            stack.callback(module.register_forward_hook(check).remove)
        yield


def _stand(stack: ExitStack, module: Any, use: Callable[[Tensor, int], Tensor]) -> None:
    """`use` in the place of what the scan of one module gives."""
    kind = type(module).__name__
    for ending, reader in _READERS.items():
        if kind.endswith(ending):
            heads = getattr(module, "num_attention_heads", None) if reader == "norm" else None

            def read(_: nn.Module, args: tuple, heads: int | None = heads) -> tuple:
                z = args[0] if heads is None else args[0].unflatten(-1, (heads, -1))
                return (use(z, 2).reshape(args[0].shape), *args[1:])

            stack.callback(getattr(module, reader).register_forward_pre_hook(read).remove)
            return
    if kind.endswith("xLSTMBackend"):

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            return with_first(output, use(first_of(output), 1))

        stack.callback(module.register_forward_hook(after).remove)
        return
    if kind.endswith("Rglru"):
        put_over(stack, module, "_rnn_scan", _changed(module._rnn_scan, use, 2))
        return
    function = scan_function(module)
    if function not in _AXES:
        raise LensError(
            f"where {kind} gives what its heads give is not known here; softmax heads are for lens.edits.Ablate"
        )
    standing_in(stack, module, function, lambda own: _changed(own, use, _AXES[function]))


def _changed(own: Any, use: Callable[[Tensor, int], Tensor], axis: int) -> Any:
    """A function whose first result goes through `use`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        return with_first(found, use(first_of(found), axis))

    return call


class _OfMixerHeads(Kind):
    """Mixer heads beside as many random others, of all layers or of the same."""

    usual: tuple[Control, ...] = ("size", "layer")

    def __init__(self, model: LoadedModel, edit: Ablate) -> None:
        self._edit, heads, mine = edit, heads_of(model), edit.chosen(model)
        self.chosen = torch.zeros(model.info.layers, model.info.heads, dtype=torch.bool)
        self.scope = f"mixer heads {', '.join(map(str, mine))}"
        size = model.info.layers, 1 + max(one.head for one in heads)
        self._free, self._mine = np.zeros(size, bool), np.zeros(size, bool)
        for chosen, ones in ((self._free, heads), (self._mine, mine)):
            for one in ones:
                chosen[one.layer, one.head] = True
        self._free &= ~self._mine
        self.why = dict.fromkeys(
            ("mass", "position", "self", "norm"),
            "heads of mixers are edited, which have no softmax",
        )
        if len(mine) > self._free.sum():
            self.why["size"] = (
                f"{len(mine)} of {len(heads)} mixer heads are edited, so that as many others are not left"
            )
        if (self._mine.sum(1) > self._free.sum(1)).any():
            self.why["layer"] = "more than half of the heads of a layer are edited"

    def trial(self, condition: str, case: Case) -> Trial:
        """See `Kind`."""
        edit = self._edit
        if condition != "edit":
            drawn = others(self._mine, case.random, self._free, within=condition == "layer")
            edit = replace(edit, heads=tuple(HeadId(*head) for head in np.argwhere(drawn).tolist()))
        return Trial((edit,), int(self._mine.sum()), float("nan"))
