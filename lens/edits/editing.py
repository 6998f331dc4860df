"""`lens.redistribute`: edits the attention of whatever runs inside the block, in one kernel pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.edits.base import AttentionEdit, grouped, part_of, selected_heads
from lens.edits.recipes import RECIPES, recipe
from lens.edits.rules import REST, SOURCES, TARGETS, WHOLE_ROWS, apply, check_rule
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.keys import Keys, KeysAt, check_keys, members
from lens.passes.sessions import listening


@contextmanager
def redistribute(
    model: LoadedModel,
    *,
    sources: Keys | None = None,
    targets: Keys | None = None,
    amount: float | None = None,
    rule: str = "transfer",
    layers: Sequence[int] | None = None,
    heads: Sequence[AnyHead] | None = None,
    backend: str = "auto",
) -> Iterator[AttentionEdit]:
    """Edit the attention of every forward pass inside the block, generation included.

    Prefill and each decoding step are edited alike, from the states of key groups that one kernel
    pass returns (METHODS 2.4); no probability is stored. An `amount` of 0 gives the bits of the
    captured model. Doing it twice moves more, so blocks do not nest.

    Args:
        model: as `lens.load` returns it; run `model.model` inside the block as you like.
        sources: keys that lose attention: "first", positions counted from the first real token, a
            bool tensor over the positions, or a function of `KeysAt`, called at each layer and
            step, that returns bool [keys] or [batch, keys]. Not for "learned_sink", "off_by_one",
            "act" and "pasta"; the sinks for "var", None where it shall look for them.
        targets: keys that receive it, for "transfer" (None: all others that the row sees), "var" (the
            image) and "pasta" (positions to emphasise).
        amount: fraction 0..1 for "mask" (and renormalise), "drop", "transfer" and "off_by_one" (1, all
            of it, where none is given); number added to the logits for "logit_bias"; exp(logit) for
            "learned_sink"; of the recipes see `lens.edits.recipes`, which have defaults.
        rule: one of `lens.edits.rules.RULES`, or a published recipe in its paper's reading:
            "var", "act" or "pasta"; `lens.edits.var` and its like take all their numbers.
        layers: those to edit; None: all.
        heads: such as "L3H5", those to edit (instead of `layers`); None: all of the layers.
        backend: of `lens_kernels`.

    Yields:
        `AttentionEdit`, which counts what was done.

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
    if rule in RECIPES:
        places = {"layers": layers, "heads": heads, "backend": backend}
        with recipe(rule, model, sources, targets, amount, **places) as edit:
            yield edit
        return
    if amount is None and rule == "off_by_one":
        amount = 1.0
    check_rule(rule, amount, sources is not None, targets is not None)
    assert amount is not None
    for name, keys in (("sources", sources), ("targets", targets)):
        if keys is not None:
            check_keys(name, keys)
    chosen = selected_heads(model, layers, heads)
    edit = Edit(sources, targets, float(amount), rule, chosen, backend)
    with listening(model, edit.on_layer, exclusive=True):
        yield edit


class Edit(AttentionEdit):
    """An edit between chosen keys by one of `RULES`; see `AttentionEdit` for what it counts."""

    def __init__(
        self,
        sources: Keys | None,
        targets: Keys | None,
        amount: float,
        rule: str,
        heads: torch.Tensor,
        backend: str,
    ) -> None:
        super().__init__(heads, backend)
        self._sources, self._targets = sources, targets
        self._amount, self._rule = amount, rule

    def _edit(self, call: LayerCall, at: KeysAt, heads: torch.Tensor) -> torch.Tensor | None:
        groups = self._groups(at) if self._amount else None
        if groups is None:
            return None
        if bool(heads.all()):
            return self._edited(call, groups)
        # heads that are left alone keep their bits: a pass with groups rounds differently
        output = attend(call, backend=self._backend).output.clone()
        chosen = heads.nonzero()[:, 0]
        output[:, chosen] = self._edited(part_of(call, chosen), groups)
        return output

    def _edited(self, call: LayerCall, groups: torch.Tensor) -> torch.Tensor:
        """The edited output [batch, heads, queries, value_dim] of a call; all its heads are edited."""
        result = grouped(call, groups, self._backend)
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
        moved = REST if self._rule in WHOLE_ROWS else SOURCES
        before, after = edited.mass_before[moved], edited.mass[moved]
        self._count(before, after, edited.skipped, lse > -torch.inf)
        return edited.output

    def _groups(self, at: KeysAt) -> torch.Tensor | None:
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
