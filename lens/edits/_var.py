"""Visual attention redistribution (VAR): image-centric heads stop staring at sinks and look at the image.

In each row `i` of a text token, with the visible image keys V, the sinks S (text and image tokens
whose `phi >= tau` in what enters the layer) and the receivers R = V without S:

    m(V) >= least_visual  and  m(R) / m(V) >= rho      the row of this head is image-centric
    P_S' = P_S (1 - p)     P_R' = P_R (1 + p m(S) / m(R))     and nothing else changes

The paper and its released code differ; `PRESETS` has both, and they differ exactly here:

    ==================  ==========================  ================================================
    item                paper                       released
    ==================  ==========================  ================================================
    p                   sinks keep 1 - p            sinks keep p: `amount` 0.6 moves 0.4
    rho                 m(R) / m(V) >= rho          m(S in V) / (m(V) + 1e-6 |V|) <= rho
    tau                 phi >= tau                  phi > tau
    layers              all but the last            2 to the last
    sinks of a step     looked for at every step    those of the prompt only
    ==================  ==========================  ================================================

Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv
2503.03321; released code seilk/VisAttnSink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lens_kernels.redistribution import SMALLEST_TARGET

from lens.common.errors import LensError
from lens.edits._gathered import gathered_states
from lens.edits._phi import phi
from lens.edits.base import AttentionEdit, grouped, part_of
from lens.edits.selection import HeadSelection
from lens.passes.calls import LayerCall, attend
from lens.passes.keys import Keys, KeysAt, members

_REST, _TEXT_SINKS, _IMAGE_SINKS, _RECEIVERS = range(4)


@dataclass(frozen=True)
class VarSettings:
    """The numbers of VAR, and which reading of it.

    Attributes:
        amount: p of the paper, or what the released code calls p; see `moved`.
        rho: bound of the selection of heads.
        tau: bound of phi.
        least_visual: rows with less mass on the image are left alone.
        released: the released code's reading of each item in the module's table.
    """

    amount: float
    rho: float
    tau: float = 20.0
    least_visual: float = 0.2
    released: bool = False

    def __post_init__(self) -> None:
        for name in ("amount", "rho", "least_visual"):
            if not 0 <= getattr(self, name) <= 1:
                raise LensError(f"{name} of VAR is a fraction 0..1, got {getattr(self, name)}")
        if not self.tau > 0:
            raise LensError(f"tau of VAR must be above 0, got {self.tau}")

    @property
    def moved(self) -> float:
        """Fraction of the sinks' mass that moves."""
        return 1 - self.amount if self.released else self.amount

    def layers(self, total: int) -> range:
        """The layers that are edited where none are named."""
        return range(2, total) if self.released else range(total - 1)

    def is_sink(self, hidden: torch.Tensor, dims: Sequence[int] | None) -> torch.Tensor:
        """bool [batch, queries] of what enters a layer."""
        size = phi(hidden, dims)
        return size > self.tau if self.released else size >= self.tau

    def is_centric(
        self, visual: torch.Tensor, receivers: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """Which rows [batch, heads, queries] are image-centric.

        Args:
            visual, receivers: m(V) and m(R) of each row.
            keys: [batch, 1, 1], number of image keys.
        """
        if self.released:
            portion = (visual - receivers) / (visual + 1e-6 * keys)
            return (visual >= self.least_visual) & (portion <= self.rho)
        return (visual >= self.least_visual) & (receivers >= self.rho * visual)


PRESETS = {
    "paper": VarSettings(amount=0.6, rho=0.8),
    "released": VarSettings(amount=0.6, rho=0.5, released=True),
}
"""rho is 0.8 for general tasks, 0.5 for hallucination, 0.9 for vision-centric ones in the paper; 0.5 is
shipped. p = 0.6 is shipped; which p the paper's tables used is not known."""


class VarEdit(AttentionEdit):
    """See `AttentionEdit`; rows that it looks at are those of text tokens that see the image."""

    name = ""
    word = "Var"

    def __init__(
        self,
        image: Keys,
        settings: VarSettings,
        dims: Sequence[int] | None,
        sinks: Keys | None,
        heads: torch.Tensor,
        backend: str,
    ) -> None:
        super().__init__(heads, backend)
        self.settings = settings
        self._image, self._dims, self._sinks = image, dims, sinks
        self._flags: dict[int, torch.Tensor] = {}  # layer -> bool [batch, keys]
        self._ends: dict[int, torch.Tensor] = {}  # layer -> last key seen [batch, kv_heads, dim]
        self._found: dict[int, torch.Tensor] = {}  # layer -> bool [batch, queries] of this pass
        self._rows = torch.zeros(3, *heads.shape, dtype=torch.int64)  # text, visual, selected

    def take(self, layer: int, hidden: torch.Tensor) -> None:
        """What enters a layer, right before it attends."""
        if bool(self._heads[layer].any()):
            self._found[layer] = self.settings.is_sink(hidden.detach(), self._dims)

    def selection(self) -> HeadSelection:
        """Which heads were image-centric so far."""
        text, visual, selected = self._rows.numpy().copy()
        return HeadSelection(text, visual, selected, self._heads.numpy().copy(), self.name)

    def _edit(self, call: LayerCall, at: KeysAt, heads: torch.Tensor) -> torch.Tensor | None:
        if not call.mask.causal and call.mask.allowed is None:  # an encoder, not a prefix
            raise LensError(f"layer {at.layer} sees later tokens; VAR is defined for causal models")
        image = members("image", self._image, at)
        is_real = at.positions >= 0
        if call.mask.padding is not None:
            is_real = is_real & call.mask.padding
        image, sink = image & is_real, self._sink_keys(call, at) & is_real
        receives = image & ~sink
        if not self.settings.moved:
            return None
        if not bool(receives.any()) or not bool(sink.any()):
            self.empty_calls += 1
            return None
        queries = call.query.shape[2]
        is_text = (image.cumsum(-1) > 0) & ~image & is_real  # behind the first image token
        rows = is_text[:, -queries:]
        if not bool(rows.any()):
            return None
        start = int(rows.any(0).int().argmax())
        groups = torch.where(sink, _TEXT_SINKS, _REST)
        groups = torch.where(sink & image, _IMAGE_SINKS, groups)
        groups = torch.where(receives, _RECEIVERS, groups).int()
        whole = attend(call, backend=self._backend)
        output, chosen = whole.output.clone(), heads.nonzero()[:, 0]
        output[:, chosen, start:] = self._moved(
            part_of(call, chosen, start),
            at.layer,
            chosen.cpu(),
            groups,
            (output[:, chosen, start:], whole.statistics["lse"][:, chosen, start:]),
            rows[:, None, start:],
        )
        return output

    def _moved(
        self,
        call: LayerCall,
        layer: int,
        heads: torch.Tensor,
        groups: torch.Tensor,
        plain: tuple[torch.Tensor, torch.Tensor],
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Output [batch, heads, queries, value_dim] of heads and queries that may be edited.

        `o + p m(S) (o_R - o_S)`, which keeps the row's mass and so is well conditioned in float32; only
        sinks and receivers are looked at again. From an output that was rounded to half precision it
        would not be, so the row is merged from all groups there.

        Args:
            call, layer, heads: the heads and queries.
            groups: [batch, keys].
            plain: their output and LSE without the edit.
            rows: bool [batch, 1, queries], those of text tokens.
        """
        output, lse = plain
        is_exact = output.dtype in (torch.float32, torch.float64)
        states = self._states(call, groups, rows[:, 0], is_exact)
        mass = [torch.where(lse > -torch.inf, (part - lse).exp(), 0.0) for part, _ in states]
        receivers = mass[_RECEIVERS]
        visual = mass[_IMAGE_SINKS] + receivers
        count = (groups >= _IMAGE_SINKS).sum(-1)[:, None, None]
        selected = rows & self.settings.is_centric(visual, receivers, count)
        visual_rows = rows & (visual >= self.settings.least_visual)
        self._rows[0, layer, heads] += int(rows.sum())
        for place, found in ((1, visual_rows), (2, selected)):
            self._rows[place, layer, heads] += found.sum((0, 2)).cpu()
        skipped = selected & (receivers < SMALLEST_TARGET)
        gives = mass[_TEXT_SINKS] + mass[_IMAGE_SINKS]
        moved = torch.where(selected & ~skipped, self.settings.moved, 0.0) * gives
        self._count(gives, gives - moved, skipped, selected)
        parts = [part for _, part in states]
        base = output
        if not is_exact:
            base = (torch.stack(mass)[..., None] * torch.stack(parts)).sum(0)
        share = torch.where(gives > 0, moved / gives, 0.0)  # of each sink key's contribution
        edited = torch.addcmul(base, moved[..., None], parts[_RECEIVERS])
        for group in (_TEXT_SINKS, _IMAGE_SINKS):
            edited.addcmul_((share * mass[group])[..., None], parts[group], value=-1)
        return torch.where(moved[..., None] > 0, edited.to(output.dtype), output)

    def _states(
        self, call: LayerCall, groups: torch.Tensor, rows: torch.Tensor, is_exact: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """LSE [batch, heads, queries] and output of each group; that of `_REST` is whole unless exact."""
        if is_exact:
            found = gathered_states(call, groups - 1, _RECEIVERS, rows, self._backend)
            if found is not None:
                return found[:1] + found  # of the rest nothing is read
        only = groups > _REST if is_exact else None
        states = grouped(call, groups, self._backend, only=only).groups
        assert states is not None
        return list(zip(states.lse, states.output, strict=True))

    def _sink_keys(self, call: LayerCall, at: KeysAt) -> torch.Tensor:
        """bool [batch, keys]; remembered for cached keys.

        Raises:
            LensError: a cache that the block has not seen grow, key by key.
        """
        if self._sinks is not None:
            return members("sinks", self._sinks, at)
        keys, queries, layer = call.key.shape[2], call.query.shape[2], at.layer
        found, end = self._found.pop(layer), self._ends.get(layer)
        if keys > queries:
            last = call.key[:, :, keys - queries - 1]
            if end is None or end.shape != last.shape or not torch.equal(end, last):
                raise LensError(
                    f"the cache of layer {layer} began outside the block, or was cut or put into "
                    "another order since the last step (beam search, assisted generation): which of "
                    "its keys are sinks is not known; use num_beams=1 and start inside"
                )
            if self.settings.released:  # sinks are looked for in the prompt alone
                found = torch.zeros_like(found)
            found = torch.cat([self._flags[layer], found], 1)[:, -keys:]
        self._flags[layer] = found
        self._ends[layer] = call.key[:, :, -1].clone()
        return found
