"""One edit of the attention to chosen keys by its rule, for the causal tests that watch it."""

from __future__ import annotations

import torch

from lens.common.errors import LensError
from lens.edits.base import AttentionEdit, grouped, part_of
from lens.edits.rules import REST, SOURCES, TARGETS, WHOLE_ROWS, apply
from lens.passes.calls import LayerCall, attend
from lens.passes.keys import Keys, KeysAt, members


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
