"""The proof that a model is made of its parts: the whole forward pass, computed again from them.

    x = embedding
    per block: q, k, v of norm(x); z of the captured attention; x += after(z W_O + b); x += after(MLP(norm(x)))
    logits = unembedding of the last norm

with every weight as the analyses read it. If the logits are not the model's own, an analysis that rests on
these parts would give numbers of another model, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.models.layout import layout
from lens.models.loaded import LoadedModel
from lens.models.parts import Layout
from lens.passes.calls import LayerCall, first_of
from lens.passes.check import relative_error
from lens.passes.padding import state_of
from lens.passes.sessions import base
from lens.passes.tiny_inputs import tiny_inputs
from lens.passes.visit import Visitor, visiting

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_proved: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def proved(model: LoadedModel) -> Layout:
    """The parts of a model, proved by replay; once per model, and again after hooks or modules changed.

    Raises:
        LensError: parts that are not known, or do not make this model: what differs, and a reason.
    """
    found = layout(model)
    root: nn.Module = model.model
    state = state_of(root)
    if _proved.get(root) != state:
        error = replay_error(found)
        if math.isnan(error):
            raise LensError(
                f"{model.info.class_name} gives values that are not numbers on a prompt of a few tokens; "
                "its weights are damaged, or too large for their type"
            )
        if not error <= _TOLERANCE[model.precision]:
            raise LensError(
                f"{model.info.class_name} does not compute what its parts say: its output differs by "
                f"{error:.1e} of its largest from the one computed again from its embedding, norms, "
                f"heads, MLPs and unembedding (allowed {_TOLERANCE[model.precision]:.0e}), so numbers about "
                f"its heads would be wrong. {_reason(root)}"
            )
        _proved[root] = state
    return found


def replay_error(layout: Layout, inputs: Mapping[str, Tensor] | None = None) -> float:
    """Largest difference of the replayed from the model's own logits, over the largest of these.

    So are values, and lengths of queries and keys, of every head. Of a model without an unembedding it is
    that of what its last norm gives. NaN where a number is none.
    """
    inputs = tiny_inputs(layout.model) if inputs is None else inputs
    # With a head that is none of tokens (of classes, pixels) the stream is what can be compared.
    run: Any = base(layout.model) if layout.unembedding is None else layout.model.model
    with torch.no_grad():
        own = _output(run(**inputs))
        replay = _Replay(layout, inputs)
        with visiting(layout, len(own), replay):
            run(**inputs)
        found = layout.final_norm.recomputed(replay.stream)
        found = found if layout.unembedding is None else layout.logits(found)
    found = found[:, 0] if own.dim() == 2 else found  # of images: the class token's
    return float(torch.tensor([_difference(found, own), *replay.errors]).max())  # NaN if one is


class _Replay(Visitor):
    """Computes the stream from the parts while the model runs; queries and keys come from this stream."""

    def __init__(self, layout: Layout, inputs: Mapping[str, Tensor]) -> None:
        self._layout = layout
        self.stream = layout.embed(inputs)
        self.errors: list[float] = []  # of what each head's attention gets
        self._made: tuple[Tensor, ...] = ()

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self._layout.blocks[layer]
        normed = block.norm.recomputed(self.stream)
        if self._layout.normed:
            self.stream = normed
        q, k, v = block.projected(normed)
        norm, other = block.head_norms
        self._made = norm.of_heads(q), other.of_heads(k), v
        return q, k, v

    def attention(self, layer: int, call: LayerCall) -> None:
        """See `Visitor`; heads in another order would cancel where they are put together again.

        Rotary embedding leaves lengths of queries and keys as they are, but for one factor.
        """
        q, k, v = (part.transpose(1, 2) for part in self._made)
        self.errors.append(_difference(v, call.value))
        for found, own in ((q, call.query), (k, call.key)):
            found, own = found.double().norm(dim=-1), own.double().norm(dim=-1)
            self.errors.append(_difference(found * own.mean(), own * found.mean()))

    def heads(self, layer: int, z: Tensor) -> Tensor:
        block, before = self._layout.blocks[layer], self.stream
        self.stream = before + block.after.recomputed(block.attended(z))
        if block.mlp:
            read = block.mlp_norm.recomputed(before if self._layout.parallel else self.stream)
            if self._layout.normed:
                self.stream = read
            written: Any = read
            for module in block.mlp:
                written = module.forward(written)
            written = first_of(written) * block.multiplier
            self.stream = self.stream + block.mlp_after.recomputed(written)
        return z


def _output(result: Any) -> Tensor:
    """Logits, or what the last layer gives."""
    logits = getattr(result, "logits", None)
    return logits if isinstance(logits, Tensor) else result[0]


def _difference(found: Tensor, own: Tensor) -> float:
    return relative_error(found.double(), own.double())


def _reason(root: nn.Module) -> str:
    """What is known to make a model another than its weights say."""
    hooked = [
        name or type(part).__name__
        for name, part in root.named_modules()
        if part._forward_hooks or part._forward_pre_hooks
    ]
    if hooked:
        shown = ", ".join(hooked[:3])
        return f"It has hooks on {shown}{' and others' * (len(hooked) > 3)}: remove them first"
    return (
        "Adapters that are not merged, quantised or split weights, and changed modules do this; load the "
        "plain model"
    )
