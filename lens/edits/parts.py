"""Edits of parts of the model: heads and sub-layers taken out, coordinates of the residual stream set."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lens.common.choices import check_choice, is_whole
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, one_or_more
from lens.edits._parts import (
    HeadsOut,
    Means,
    SubLayersOut,
    setting,
)
from lens.edits.base import selected_heads
from lens.edits.language import Edit, Hooked, Running, check_number
from lens.models.loaded import LoadedModel
from lens.passes.sublayers import named_sublayers

if TYPE_CHECKING:
    from jaxtyping import Bool


@dataclass(frozen=True)
class Ablate(Edit):
    """Heads or sub-layers are taken out: what they give is replaced by a constant.

    Of a head that is its output `z = P v`, before the output projection; of a sub-layer ("L2.mlp",
    "L0.attention") what it adds to the residual stream.

    Attributes:
        what: heads and sub-layers, such as `["L1H3", "L2.mlp"]`; one alone may be a string.
        baseline: "zero"; "mean" over the prompts `over` at each position (heads alone; a position that
            fewer than two of them reach is refused); "pooled_mean" over their positions too.
        over: prompts as for `lens.capture`, for the means; `lens.effect` takes its own where none are
            given.

    Raises:
        LensError: nothing to take out, an unknown baseline, prompts without a mean; when it starts, a
            mean without prompts, heads or sub-layers that the model has not got.

    Reference: Michel, Levy, Neubig 2019, arXiv 1905.10650.

    Example:
        >>> with lens.edit(model, lens.edits.Ablate(["L1H3", "L2.mlp"], "pooled_mean", over=texts)):
        ...     model.logits("It was the best of times")
    """

    what: AnyHead | Sequence[AnyHead]
    baseline: Literal["zero", "mean", "pooled_mean"] = "zero"
    over: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("baseline of Ablate", self.baseline, ("zero", "mean", "pooled_mean"))
        what = one_or_more("what", self.what)
        if not what:
            raise LensError("Ablate takes out at least one head or sub-layer; none was given")
        object.__setattr__(self, "what", what)
        if self.baseline == "zero" and self.over is not None:
            raise LensError("over belongs to a mean; Ablate(..., 'zero') needs no prompts")
        if self.baseline == "mean" and self.sublayers:
            raise LensError(
                f"the mean at each position is defined for heads; use 'pooled_mean' for "
                f"{', '.join(self.sublayers)}"
            )

    @property
    def heads(self) -> tuple[AnyHead, ...]:
        """Those of `what` that are heads."""
        return tuple(one for one in self.what if not _is_sublayer(one))  # type: ignore[union-attr]

    @property
    def sublayers(self) -> tuple[str, ...]:
        """Those of `what` that are sub-layers."""
        return tuple(one for one in self.what if _is_sublayer(one))  # type: ignore[union-attr]

    @property
    def words(self) -> str:
        """See `Edit`."""
        return f"Ablate to {self.baseline}"

    def chosen(self, model: LoadedModel) -> Bool[Tensor, "layers heads"]:
        """Those that it takes out. Errors as in `start`."""
        return selected_heads(model, None, self.heads)

    def ready(self, model: LoadedModel, prompts: Any) -> Ablate:
        """The same with its means taken, over `prompts` where it names none; copies share them."""
        if self.baseline == "zero" or isinstance(self.over, Means):
            return self
        over, modules = prompts if self.over is None else self.over, self.modules(model)
        if modules:  # those of controls, too
            modules = named_sublayers(model)
        means = Means.of(model, over, self.baseline, bool(self.heads), modules)
        return replace(self, over=means)

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        if self.baseline != "zero" and self.over is None:
            raise LensError(
                f"Ablate(..., {self.baseline!r}) needs the prompts that the mean is taken over: over=texts; 'zero' "
                "needs none, and lens.effect takes its own"
            )
        heads = hooked = None
        chosen, modules = self.chosen(model), self.modules(model)
        over = self.over
        if over is not None and not isinstance(over, Means):
            over = Means.of(model, over, self.baseline, bool(self.heads), modules)
        if self.heads:
            heads = HeadsOut(None if over is None else over.heads, chosen, backend)
        if modules:
            hooked = SubLayersOut(modules, {} if over is None else over.sublayers)
        done = heads if hooked is None else hooked if heads is None else (heads, hooked)
        return Running(done, heads, ExitStack() if hooked is None else hooked.open())

    def modules(self, model: LoadedModel) -> dict[str, nn.Module]:
        """Its sub-layers. Errors as in `start`."""
        known = named_sublayers(model) if self.sublayers else {}
        if unknown := [name for name in self.sublayers if name not in known]:
            raise LensError(
                f"{model.name} has no sub-layer {', '.join(unknown)}; it has {', '.join(known)}"
            )
        return {name: known[name] for name in self.sublayers}


@dataclass(frozen=True)
class Activation(Edit):
    """A coordinate of the residual stream is set to a number: massive activations, for one.

        h[position, dim] = value in what leaves `layer`

    Attributes:
        layer: whose output it is; -1 is what enters layer 0.
        position: from the first real token; or several.
        dim: of the residual stream; or several.
        value: what they become.

    Raises:
        LensError: numbers that make no sense; when it starts, a layer or dim that the model has not got.

    Reference: Sun et al., Massive Activations in Large Language Models, arXiv 2402.17762.

    Example:
        >>> with lens.edit(model, lens.edits.Activation(0, 0, [3, 8], 0.0)):
        ...     model.logits("It was the best of times")
    """

    layer: int
    position: int | Sequence[int]
    dim: int | Sequence[int]
    value: float = 0.0

    def __post_init__(self) -> None:
        for name in ("position", "dim"):
            given = getattr(self, name)
            numbers = (given,) if is_whole(given) or not isinstance(given, Sequence) else given
            if not numbers or not all(is_whole(one) and one >= 0 for one in numbers):
                raise LensError(
                    f"{name} of Activation must be one or more numbers from 0, got {given!r}"
                )
            object.__setattr__(self, name, tuple(numbers))
        if not is_whole(self.layer):
            raise LensError(f"layer of Activation must be a whole number, got {self.layer!r}")
        check_number("value of Activation", self.value)

    @property
    def places(self) -> tuple[int, ...]:
        """Its positions."""
        return self.position  # type: ignore[return-value] - made a tuple above

    @property
    def dims(self) -> tuple[int, ...]:
        """Its dimensions."""
        return self.dim  # type: ignore[return-value]

    @property
    def words(self) -> str:
        """See `Edit`."""
        return f"Activation to {self.value:g}"

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        done = Hooked()
        places = torch.tensor(self.places, device=model.device)
        hooks = setting(model, self.layer, places, list(self.dims), self.value, done)
        return Running(done, hooks=hooks)


def _is_sublayer(one: AnyHead) -> bool:
    return isinstance(one, str) and one.endswith((".attention", ".mlp"))
