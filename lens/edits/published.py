"""Published recipes that find out for themselves which keys they edit: VAR, ACT and PASTA."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lens.common.choices import check_choice, check_lists, is_number, is_whole
from lens.common.errors import LensError
from lens.edits._act import ActEdit
from lens.edits._pasta import PastaEdit
from lens.edits._phi import check_dims
from lens.edits._var import PRESETS, VarEdit, VarSettings
from lens.edits.base import selected_heads
from lens.edits.language import OfHeads, Running, check_number, plain_keys
from lens.models.loaded import LoadedModel
from lens.passes.keys import Keys
from lens.passes.residual import layer_inputs

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

Preset = Literal["paper", "released"]


@dataclass(frozen=True)
class Var(OfHeads):
    """Visual attention redistribution: heads that look at the image give it their sinks' attention.

    With p the amount, S the sinks, V the image keys, R = V without S, in rows of text after the image:

        m(V) >= least_visual  and  m(R) / m(V) >= rho      the row of this head is image-centric
        P_S (1 - p),   P_R (1 + p m(S) / m(R))             and nothing else changes

    Rows of image tokens are never edited. A row without an image key or with nothing to give keeps
    its bits, and so does a head none of whose rows is image-centric.

    Attributes:
        image: the image keys, such as `lens.vision.segments(model, inputs).keys("image")`.
        preset: "paper", or "released" for what the released code does; `lens.edits._var` has a table of
            all that they differ in.
        amount, rho, tau, least_visual: instead of the preset's.
        dims: sink dimensions, from `lens.sinks.dims`; None: all are looked at.
        sinks: the sinks themselves, instead of looking for them.
        heads, layers: what may be edited, instead of the preset's layers.

    Raises:
        LensError: an unknown preset, numbers out of range; when it starts, dimensions that the model has
            not; while it runs, an encoder's layer, or a cache that began outside of the block.

    Reference: Kang et al., See What You Are Told, arXiv 2503.03321.

    Example:
        >>> image = lens.vision.segments(vlm, inputs).keys("image")
        >>> with lens.edit(vlm, lens.edits.Var(image, sinks=[0, 6], rho=0.0, least_visual=0.0)) as (done,):
        ...     vlm.model(**inputs).logits.shape
        torch.Size([1, 32, 97])
        >>> done.selection().findings()
    """

    image: Keys
    preset: Preset = "paper"
    amount: float | None = None
    rho: float | None = None
    tau: float | None = None
    least_visual: float | None = None
    dims: Sequence[int] | None = None
    sinks: Keys | None = None

    def __post_init__(self) -> None:
        check_choice("preset of VAR", self.preset, Preset)
        object.__setattr__(self, "image", plain_keys("image", self.image))
        if self.sinks is not None:
            object.__setattr__(self, "sinks", plain_keys("sinks", self.sinks))
            if self.dims is not None or self.tau is not None:
                raise LensError("give sinks, or dims and tau to look for them, not both")
        if self.dims is not None:
            object.__setattr__(self, "dims", tuple(self.dims))
        super().__post_init__()
        self.settings  # noqa: B018 - checks the numbers

    @property
    def settings(self) -> VarSettings:
        """The numbers of the preset with the given ones in their place."""
        numbers = {name: getattr(self, name) for name in ("amount", "rho", "tau", "least_visual")}
        given = {name: float(number) for name, number in numbers.items() if number is not None}
        return replace(PRESETS[self.preset], **given)

    @property
    def dose(self) -> float:
        """See `Edit`."""
        return self.settings.amount

    @property
    def idle(self) -> float:
        """See `Edit`: the released code keeps the share that the paper moves."""
        return 1.0 if self.settings.released else 0.0

    def chosen(self, model: LoadedModel) -> Bool[Tensor, "layers heads"]:
        """See `OfHeads`; of no heads and layers those of the preset."""
        layers = self.settings.layers(model.info.layers)
        named = self.heads is not None or self.layers is not None
        there = [layer for layer in layers if layer in model.info.attending]
        return super().chosen(model) if named else selected_heads(model, there, None)

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        chosen = self.chosen(model)
        edit = VarEdit(self.image, self.settings, self.dims, self.sinks, chosen, backend)
        edit.name = model.name
        if self.sinks is not None:
            return Running(edit, edit, nullcontext())
        check_dims(model, self.dims)
        return Running(edit, edit, layer_inputs(model, edit.take))


@dataclass(frozen=True)
class Act(OfHeads):
    """Attention calibration: sink tokens after the first give most of their mass to all other keys.

    A key is a sink of a head where it receives `alpha > threshold` of the attention of the rows that see
    it; its probabilities keep the fraction beta, the rest goes to all other visible keys pro rata.

        P_S beta,   P_R (1 + (1 - beta) m_S / m_R)

    Attributes:
        preset: "paper", or "released" for what the released code does; `lens.edits._act` has a table.
        beta: fraction of their mass that sinks keep.
        threshold: of alpha; None: 5 / N ("paper") or 0.1 ("released").
        heads, layers: what is edited, instead of the preset's layers.

    Raises:
        LensError: an unknown preset, numbers out of range; while it runs, an encoder's layer, or a
            cache that began outside of the block.

    Reference: Yu et al., Unveiling and Harnessing Hidden Attention Sinks, arXiv 2406.15765.

    Example:
        >>> with lens.edit(model, lens.edits.Act(heads=["L1H3"])):
        ...     model.logits("It was the best of times")
    """

    preset: Preset = "paper"
    beta: float = 0.4
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_choice("preset of ACT", self.preset, Preset)
        check_number("beta of ACT", self.beta, 0, 1)
        if self.threshold is not None:
            check_number("threshold of ACT", self.threshold, 0, 1)
        super().__post_init__()

    @property
    def dose(self) -> float:
        """See `Edit`: the share that sinks give away, 1 - beta."""
        return 1 - self.beta

    def at(self, amount: float) -> Act:
        """See `Edit`."""
        return replace(self, beta=1 - amount)

    def chosen(self, model: LoadedModel) -> Bool[Tensor, "layers heads"]:
        """See `OfHeads`; of no heads and layers those of the preset."""
        if self.preset == "paper" or self.heads is not None or self.layers is not None:
            return super().chosen(model)
        there = [at for at in model.info.attending if 2 <= at < model.info.layers - 1]
        return selected_heads(model, there, None)

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        edit = ActEdit(self.preset, self.beta, self.threshold, self.chosen(model), backend)
        return Running(edit, edit)


@dataclass(frozen=True)
class Pasta(OfHeads):
    """Post-hoc attention steering: the prompt outside the spans that matter is scaled down.

    `log alpha` is added to the logits of all keys of the prompt that are in no span, and rows are
    normalised again; generated tokens are left as they are. With n spans the released code adds
    `(n - 1) log alpha` to spans and `n log alpha` to the rest.

    Attributes:
        spans: (start, end) positions from the first real token, the end not included; the same in
            each prompt of a batch.
        preset: "paper" or "released"; they differ where there are several spans.
        alpha: factor, above 0, of what is not emphasised; 1 changes nothing.
        heads, layers: what is steered; the paper profiles heads first (`lens.edits.search_heads`).

    Raises:
        LensError: an unknown preset, an alpha or spans that make no sense; while it runs, a cache that
            began outside of the block.

    Reference: Zhang et al., Tell Your Model Where to Attend, arXiv 2311.02262.

    Example:
        >>> with lens.edit(model, lens.edits.Pasta([(2, 4)], heads=["L1H3", "L2H0"])):
        ...     model.generate("It was the best of times", max_new_tokens=5)
    """

    spans: Sequence[tuple[int, int]]
    preset: Preset = "paper"
    alpha: float = 0.01

    def __post_init__(self) -> None:
        check_choice("preset of PASTA", self.preset, Preset)
        if not (is_number(self.alpha) and 0 < self.alpha < math.inf):
            raise LensError(
                f"alpha of PASTA must be above 0, got {self.alpha}; hide keys with lens.edits.Mask"
            )
        check_lists(spans=self.spans)
        pairs = all(isinstance(one, Sequence) and len(one) == 2 for one in self.spans)
        ends = tuple(sorted(map(tuple, self.spans))) if pairs else ()
        if not ends or any(not (is_whole(a) and is_whole(b) and 0 <= a < b) for a, b in ends):
            raise LensError(f"spans must be (start, end) with 0 <= start < end, got {self.spans}")
        if any(start < end for (_, end), (start, _) in itertools.pairwise(ends)):
            raise LensError(f"spans must not overlap, got {self.spans}")
        object.__setattr__(self, "spans", ends)
        super().__post_init__()

    @property
    def dose(self) -> float:
        """See `Edit`: 1 - alpha, what the weights outside of the spans lose."""
        return 1 - self.alpha

    def at(self, amount: float) -> Pasta:
        """See `Edit`; below 1."""
        return replace(self, alpha=1 - amount)

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        count, log = (len(self.spans) if self.preset == "released" else 1), math.log(self.alpha)
        biases = (count * log, (count - 1) * log)
        edit = PastaEdit(self.spans, biases, self.chosen(model), backend)
        return Running(edit, edit)
