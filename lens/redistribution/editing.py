"""`lens.redistribute`: edits the attention of whatever runs inside the block, in one kernel pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lens_kernels import AttentionResult, attention

from lens.captures import interface
from lens.captures.layer import LayerCall, make_settings
from lens.captures.recorder import Recorder, recording
from lens.errors import LensError
from lens.head_ids import AnyHead, head_id
from lens.models.loaded import LoadedModel
from lens.redistribution.keys import Keys, KeysAt, check_keys, members
from lens.redistribution.rules import REST, SOURCES, TARGETS, apply, check_rule


@contextmanager
def redistribute(
    model: LoadedModel,
    *,
    sources: Keys | None = None,
    targets: Keys | None = None,
    amount: float,
    rule: str = "transfer",
    layers: Sequence[int] | None = None,
    heads: Sequence[AnyHead] | None = None,
    backend: str = "auto",
) -> Iterator[Edit]:
    """Edit the attention of every forward pass inside the block, generation included.

    Prefill and each decoding step are edited alike, from the states of key groups that one kernel
    pass returns (METHODS 2.4); no probability is stored. An `amount` of 0 gives the bits of the
    captured model. Doing it twice moves more, so blocks do not nest.

    Args:
        model: as `lens.load` returns it; run `model.model` inside the block as you like.
        sources: keys that lose attention: "first", positions counted from the first real token, a
            bool tensor over the positions, or a function of `KeysAt`, called at each layer and
            step, that returns bool [keys] or [batch, keys]. Not for "learned_sink".
        targets: keys that receive it, for "transfer"; None: all others that the row sees.
        amount: fraction 0..1 for "mask" (and renormalise), "drop" and "transfer"; number added to
            the logits for "logit_bias"; exp(logit) for "learned_sink" (1: softmax-off-by-one).
        rule: one of `lens.redistribution.rules.RULES`.
        layers: those to edit; None: all.
        heads: such as "L3H5", those to edit (instead of `layers`); None: all of the layers.
        backend: of `lens_kernels`.

    Yields:
        `Edit`, which counts what was done.

    Raises:
        LensError: arguments that do not fit each other, layers or heads that the model has not, a
            key that is source and target, a cache that the block did not see grow, or another
            capture inside the block (it would take the edit's place).

    Reference:
        VAR, arXiv 2503.03321; ACT, arXiv 2406.15765; PASTA, arXiv 2311.02262.

    Example:
        >>> with lens.redistribute(model, sources="first", amount=0.6) as edit:
        ...     model.model.generate(ids, max_new_tokens=20)
        >>> edit.edited_rows, edit.skipped_rows
    """
    check_rule(rule, amount, sources is not None, targets is not None)
    for name, keys in (("sources", sources), ("targets", targets)):
        if keys is not None:
            check_keys(name, keys)
    chosen = selected_heads(model, layers, heads)
    edit = Edit(sources, targets, float(amount), rule, chosen, backend)
    with recording(model, edit):
        yield edit


def selected_heads(
    model: LoadedModel, layers: Sequence[int] | None, heads: Sequence[AnyHead] | None
) -> torch.Tensor:
    """bool [layers, heads] of the model.

    Raises:
        LensError: both are given, or the model has not got them.
    """
    info = model.info
    chosen = torch.zeros(info.layers, info.heads, dtype=torch.bool)
    if heads is not None:
        if layers is not None:
            raise LensError("give layers or heads, not both; heads name their layer: 'L3H5'")
        for head in heads:
            chosen[head_id(head, layers=info.layers, heads=info.heads)] = True
        return chosen
    for layer in range(info.layers) if layers is None else layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < info.layers:
            raise LensError(f"layers must be numbers 0 to {info.layers - 1}, got {layer!r}")
        chosen[layer] = True
    return chosen


class Edit(Recorder):
    """One edit of a model's attention, and what it has done so far.

    Attributes:
        calls: attention calls that were edited.
        empty_calls: those of selected layers without any source key; they were left as they are.
        edited_rows: rows (queries of a head) whose sources lost or gained something.
        skipped_rows: rows with nowhere to put the mass; they were left as they are.
        mass_before, mass_after: mean mass of the sources over the rows of selected heads, before
            and after, so far; NaN while there is none.
    """

    def __init__(
        self,
        sources: Keys | None,
        targets: Keys | None,
        amount: float,
        rule: str,
        heads: torch.Tensor,
        backend: str,
    ) -> None:
        super().__init__(
            make_settings(statistics=[], block_size=64, keep_qk=False, backend=backend)
        )
        self.calls = self.empty_calls = self.edited_rows = self.skipped_rows = 0
        self._sources, self._targets = sources, targets
        self._amount, self._rule, self._heads = amount, rule, heads
        self._backend = backend
        self._places: dict[int, tuple[int, torch.Tensor]] = {}
        self._masses = torch.zeros(3, dtype=torch.float64)  # rows, before, after

    @property
    def mass_before(self) -> float:
        """See the class."""
        return float(self._masses[1] / self._masses[0])

    @property
    def mass_after(self) -> float:
        """See the class."""
        return float(self._masses[2] / self._masses[0])

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `Recorder`.

        Raises:
            LensError: the pass will ask somebody else for its attention.
        """
        super().begin(args, kwargs)  # first: `end` follows in any case
        if interface._LISTENER.get(None) is not self:
            raise LensError(
                "the attention of this pass would not be edited: something inside the block "
                "(lens.capture, lens.capturing, another lens.redistribute) takes its place; run it "
                "outside"
            )

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See `interface.Listener`."""
        layer, self._layer = self._layer, self._layer + 1
        at = self._keys_at(call, layer)
        heads = self._heads[layer].to(call.query.device)
        groups = self._groups(call, at) if self._amount and bool(heads.any()) else None
        if groups is None:
            output = attend(call, None, self._backend).output
        elif bool(heads.all()):
            output = self._edited(call, groups)
        else:  # heads that are left alone keep their bits: a pass with groups rounds differently
            output = attend(call, None, self._backend).output.clone()
            chosen = heads.nonzero()[:, 0]
            output[:, chosen] = self._edited(_heads_of(call, chosen), groups)
        return output.to(call.value.dtype).transpose(1, 2).contiguous()

    def _edited(self, call: LayerCall, groups: torch.Tensor) -> torch.Tensor:
        """The edited output [batch, heads, queries, value_dim] of a call; all its heads are edited."""
        result = attend(call, groups, self._backend)
        assert result.groups is not None
        lse = result.statistics["lse"]
        edited = apply(
            self._rule,
            self._amount,
            result.groups,
            self._targets is not None,
            result.output,
            lse,
            call.sink_logits,
        )
        moved = SOURCES if self._rule != "learned_sink" else REST
        self.calls += 1
        self.skipped_rows += int(edited.skipped.sum())
        self.edited_rows += int(((edited.mass_before[moved] > 0) & ~edited.skipped).sum())
        self._masses += torch.stack(
            [
                (lse > -torch.inf).sum(dtype=torch.float64),
                edited.mass_before[moved].sum(dtype=torch.float64),
                edited.mass[moved].sum(dtype=torch.float64),
            ]
        ).cpu()
        return edited.output

    def _groups(self, call: LayerCall, at: KeysAt) -> torch.Tensor | None:
        """Group numbers [batch, keys]; None where there is nothing to edit."""
        if self._sources is None:
            return torch.full_like(at.positions, REST, dtype=torch.int32)
        source = members("sources", self._sources, at)
        if not bool(source.any()):
            self.empty_calls += 1
            return None
        groups = torch.where(source, SOURCES, REST)
        if self._targets is not None:
            target = members("targets", self._targets, at)
            if bool((both := source & target).any()):
                places = at.positions[both].unique().tolist()
                raise LensError(
                    f"sources and targets must differ; both hold the positions {places[:8]}"
                )
            groups = torch.where(target, TARGETS, groups)
        return groups.int()

    def _keys_at(self, call: LayerCall, layer: int) -> KeysAt:
        """Where each key stands in its prompt, also when a window has dropped older ones."""
        batch, _, queries, _ = call.query.shape
        keys = call.key.shape[2]
        device = call.key.device
        if queries == keys or (call.mask.window is None and layer not in self._places):
            total = keys
            before = call.mask.first_key(batch).to(device)  # padding before the first real token
        elif layer not in self._places or len(self._places[layer][1]) != batch:
            raise LensError(
                f"layer {layer} has a window and a cache that began outside of the block, so that the "
                "positions of its keys are not known; start the generation inside"
            )
        else:
            seen, before = self._places[layer]
            total = keys if call.mask.window is None else seen + queries
        self._places[layer] = (total, before)
        place = torch.arange(total - keys, total, device=device)
        return KeysAt(layer, max(self._step, 0), place - before[:, None], call.tokens)


def _heads_of(call: LayerCall, heads: torch.Tensor) -> LayerCall:
    """The call of some heads only, each with its own keys."""
    share = call.query.shape[1] // call.key.shape[1]
    bias, sinks = call.position_bias, call.sink_logits
    return replace(
        call,
        query=call.query[:, heads],
        key=call.key[:, heads // share],
        value=call.value[:, heads // share],
        sink_logits=None if sinks is None else sinks[heads],
        position_bias=bias if bias is None or bias.shape[1] == 1 else bias[:, heads],
    )


def attend(call: LayerCall, groups: torch.Tensor | None, backend: str) -> AttentionResult:
    """Attention of one call, with a state per key group."""
    mask = call.mask.for_kernel(call.query.shape[2])
    if call.position_bias is not None:
        mask = replace(mask, bias=call.position_bias)
    try:
        return attention(
            call.query,
            call.key,
            call.value,
            mask=mask,
            scale=call.scale,
            softcap=call.softcap,
            sink_logits=call.sink_logits,
            groups=groups,
            backend=backend,
        )
    except (TypeError, ValueError) as error:
        raise LensError(str(error)) from error
