"""Edits of the attention to chosen keys carried out, one or several on the same heads, in the order given.

Keys that all edits of a call treat alike are one group; one kernel pass gives a state per group, and each
edit changes what the one before it left (`_rows`). No probability is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from lens_kernels import AttentionResult
from torch import Tensor

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.edits._rows import Rows, dropped, forced, log_of, moved, revalued, scaled, sunk
from lens.edits.base import AttentionEdit, grouped, part_of, queries_at
from lens.passes.calls import LayerCall, attend, of_heads
from lens.passes.keys import Keys, KeysAt, members

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

MOST_GROUPS = 4
Rule = Literal["mask", "drop", "bias", "move", "sink", "zero", "mean", "equal", "own"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What an edit does to the attention of its heads.

    Attributes:
        rule: see `KeyedEdit`.
        amount: of the rule; 0 changes nothing.
        keys: what it is done to; None: whole rows.
        to: who receives ("move"); None: all other keys.
        queries: which rows; None: all.
    """

    rule: Rule
    amount: float
    keys: Keys | None
    to: Keys | None = None
    queries: Keys | None = None


@dataclass(frozen=True, eq=False)
class _Asked:
    """One plan at one call: its keys and rows."""

    edit: KeyedEdit
    source: Bool[Tensor, "batch keys"]
    target: Bool[Tensor, "batch keys"] | None
    rows: Bool[Tensor, "batch queries"] | None
    heads: Bool[Tensor, "heads"]


class KeyedEdit(AttentionEdit):
    """One plan; see `AttentionEdit` for what it counts.

    Attributes:
        before: where it has chosen rows (`Force`, `Knockout`), of each head the mass [rows] that these
            gave to the keys before, in the last forward pass; also with an amount that changes nothing.
    """

    def __init__(
        self, plan: Plan, heads: Bool[Tensor, "layers heads"], backend: str, word: str = ""
    ) -> None:
        super().__init__(heads, backend)
        self.plan, self.word = plan, word or plan.rule
        self.before: dict[HeadId, Tensor] = {}

    def _edit(
        self, call: LayerCall, at: KeysAt, heads: Bool[Tensor, "heads"]
    ) -> Float[Tensor, "batch heads queries value_dim"] | None:
        return edited_together([self], call, at, self._backend)

    def asked(self, call: LayerCall, at: KeysAt) -> _Asked | None:
        """What is to be done at a call; None for nothing.

        Raises:
            LensError: a key that is source and target, or a rule that needs a causal model.
        """
        plan, heads = self.plan, self._heads[call.layer].to(call.query.device)
        idle = plan.amount == 0 and plan.queries is None
        if idle or not bool(heads.any()):
            return None
        if plan.keys is None:
            return _Asked(self, torch.zeros_like(at.positions, dtype=torch.bool), None, None, heads)
        source = members("keys", plan.keys, at)
        rows = target = None
        if plan.queries is not None:
            rows = _rows(plan.queries, call, at)
        if not bool(source.any()) or (rows is not None and not bool(rows.any())):
            self.empty_calls += 1
            return None
        if plan.to is not None:
            target = members("to", plan.to, at)
            if bool((both := source & target).any()):
                places = at.positions[both].unique().tolist()
                raise LensError(f"keys and to must differ; both hold the positions {places[:8]}")
        if rows is not None and plan.rule in ("equal", "own"):
            _check_seen(call, source, rows)
        return _Asked(self, source, target, rows, heads)

    def changed(
        self,
        rows: Rows,
        given: _Asked,
        where: _Groups,
        call: LayerCall,
        own: Bool[Tensor, "heads"],
    ) -> tuple[Rows, Bool[Tensor, "batch heads queries"]]:
        """The rows of a call after this edit, and which of them it changed.

        Args:
            rows: as the edit before left them.
            given, where: keys and rows of this edit, and their groups.
            call: of the heads and queries in `rows`.
            own: which of these are edited.
        """
        plan = self.plan
        new, stuck = _applied(plan, rows, given, where, call)
        chosen = (own[:, None] & rows.seen).clone()
        if given.rows is not None:
            chosen &= given.rows[:, None, -chosen.shape[-1] :]
        counted = list(range(len(rows.content))) if plan.keys is None else where.source
        before = rows.mass(counted)
        if given.rows is not None:
            mine = given.rows[:, -chosen.shape[-1] :]
            held = before.transpose(1, 2)[mine].double().cpu()  # [rows, heads]
            numbers = given.heads.nonzero()[:, 0].tolist()
            for number, mass in zip(numbers, held[:, own.cpu()].T, strict=True):
                self.before[HeadId(call.layer, number)] = mass
            if plan.amount == 0:
                return rows, torch.zeros_like(chosen)
        result = new.where(chosen & ~stuck, rows)
        after = result.mass(counted)
        self._count(before[:, own], after[:, own], stuck[:, own], chosen[:, own])
        takes = (before > 0) | (plan.rule in ("sink", "equal", "own"))
        return result, chosen & ~stuck & takes


def _rows(queries: Keys, call: LayerCall, at: KeysAt) -> Bool[Tensor, "batch queries"]:
    """The chosen ones; they are the last keys, or tokens of another sequence."""
    places = queries_at(call, at)
    if call.cross:
        return members("queries", queries, replace(at, positions=places, tokens=None))
    found = members("queries", queries, at)[:, -call.query.shape[2] :]
    return found & (places >= 0)


def edited_together(
    edits: Sequence[KeyedEdit], call: LayerCall, at: KeysAt, backend: str
) -> Float[Tensor, "batch heads queries value_dim"] | None:
    """Output with all edits done, in their order; None for nothing."""
    asked = [given for edit in edits if (given := edit.asked(call, at)) is not None]
    if not asked:
        return None
    codes, groups = _groups(asked)
    heads = torch.stack([given.heads for given in asked]).any(0)
    chosen, start = heads.nonzero()[:, 0], _first_row(asked)
    whole = bool(heads.all()) and not start
    # heads that are left alone keep their bits: a pass with groups rounds differently
    output = None if whole else attend(call, backend=backend).output.clone()
    part = call if whole else part_of(call, chosen, start)
    result, states = _states(part, codes, len(groups[0].member), backend)
    rows = Rows.of(*states, part.sink_logits)
    touched = torch.zeros_like(rows.seen)
    for given, where in zip(asked, groups, strict=True):
        own = given.heads[chosen]
        rows, found = given.edit.changed(rows, given, where, part, own)
        touched = touched | found
    if not bool(touched.any()):
        return output
    edited = torch.where(touched[..., None], rows.output().to(result.output.dtype), result.output)
    if output is None:
        return edited
    output[:, chosen, start:] = edited
    return output


def _states(
    call: LayerCall, codes: Int[Tensor, "batch keys"], count: int, backend: str
) -> tuple[
    AttentionResult,
    tuple[
        Float[Tensor, "groups batch heads queries"],
        Float[Tensor, "groups batch heads queries value_dim"],
    ],
]:
    """The attention of a call; LSE and output of each group.

    A pass takes `MOST_GROUPS`; where there are more, each pass after the first reads the blocks of its own.
    """
    if count <= MOST_GROUPS:
        result = grouped(call, codes, backend)
        assert result.groups is not None
        return result, (result.groups.lse, result.groups.output)
    first, lse, output = None, [], []
    step = MOST_GROUPS - 1
    for start in range(0, count, step):
        mine = (codes >= start) & (codes < start + step)
        groups = torch.where(mine, codes - start, step).int()
        result = grouped(call, groups, backend, only=mine if start else None)
        assert result.groups is not None
        first = first or result
        here = min(step, count - start)
        lse.append(result.groups.lse[:here])
        output.append(result.groups.output[:here])
    assert first is not None
    return first, (torch.cat(lse), torch.cat(output))


@dataclass(frozen=True, eq=False)
class _Groups:
    """Key groups of a call, as one edit sees them.

    Attributes:
        member: of each.
        source, target: numbers of groups.
    """

    member: Bool[Tensor, "groups batch keys"]
    source: list[int]
    target: list[int]


def _groups(asked: Sequence[_Asked]) -> tuple[Int[Tensor, "batch keys"], list[_Groups]]:
    """Group of each key: keys that all edits treat alike are one; and who means which."""
    sets = [
        tensor for given in asked for tensor in (given.source, given.target) if tensor is not None
    ]
    mixed = torch.zeros_like(sets[0], dtype=torch.long)
    for number, keys in enumerate(sets):
        mixed = mixed + keys.long() * 2**number
    kinds, codes = mixed.unique(return_inverse=True)
    member = torch.stack([codes == number for number in range(len(kinds))])
    meant = iter([((kinds >> number) & 1).bool() for number in range(len(sets))])
    found = []
    for given in asked:
        source = next(meant)
        target = ~source if given.target is None else next(meant)
        found.append(
            _Groups(member, source.nonzero()[:, 0].tolist(), target.nonzero()[:, 0].tolist())
        )
    return codes.int(), found


def _first_row(asked: Sequence[_Asked]) -> int:
    """The first query that any edit changes."""
    first = []
    for given in asked:
        if given.rows is None:
            return 0
        first.append(int(given.rows.any(0).int().argmax()))
    return min(first)


def _applied(
    plan: Plan, rows: Rows, given: _Asked, where: _Groups, call: LayerCall
) -> tuple[Rows, Bool[Tensor, "batch heads queries"]]:
    """All rows changed by a plan, and those that had nowhere to put the mass."""
    match plan.rule:
        case "mask":
            return scaled(rows, where.source, log_of(1 - plan.amount))
        case "bias":
            return scaled(rows, where.source, plan.amount)
        case "drop":
            return dropped(rows, where.source, plan.amount)
        case "move":
            return moved(rows, where.source, where.target, plan.amount)
        case "sink":
            return sunk(rows, plan.amount)
        case "own":
            return forced(rows, where.source, plan.amount, None)
        case "equal":
            return forced(rows, where.source, plan.amount, _means(call, where, given.source))
        case "zero":
            return revalued(rows, where.source, plan.amount, None)
        case "mean":
            mean, known = _running_mean(call, given.source)
            return revalued(rows, where.source, plan.amount, mean)[0], ~known


def _means(
    call: LayerCall, where: _Groups, target: Bool[Tensor, "batch keys"]
) -> tuple[Float[Tensor, "groups batch 1 1"], Float[Tensor, "groups batch heads 1 value_dim"]]:
    """Of each group: share of all targets, and mean value."""
    member = where.member.to(call.value.device)
    inside = (member & target).to(torch.promote_types(call.value.dtype, torch.float32))
    count = inside.sum(-1)  # [groups, batch]
    value = call.value.to(inside)
    mean = torch.einsum("gbk,bhkd->gbhd", inside, value) / count.clamp(min=1)[..., None, None]
    share = call.query.shape[1] // call.value.shape[1]
    return (count / target.sum(-1))[..., None, None], mean.repeat_interleave(share, 2)[..., None, :]


def _running_mean(
    call: LayerCall, source: Bool[Tensor, "batch keys"]
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Bool[Tensor, "batch heads queries"]]:
    """Mean value of the other keys that a row sees, and where there is one.

    Raises:
        LensError: a mask that is not causal: the mean would tell a row what comes later.
    """
    batch, _, queries, _ = call.query.shape
    if not call.mask.causal or call.mask.allowed is not None:
        raise LensError(
            f"layer {call.layer} has no plain causal mask, so the mean of the values before a row is not "
            "defined; use Value(keys, 'zero')"
        )
    other = ~source
    if call.mask.padding is not None:
        other = other & call.mask.padding
    weight = other.double()[:, None, :, None]
    sums, count = (call.value.double() * weight).cumsum(2), weight.cumsum(2)
    if (window := call.mask.window) is not None:
        sums, count = (
            now - torch.nn.functional.pad(now, (0, 0, window, 0))[:, :, : now.shape[2]]
            for now in (sums, count)
        )
    mean = (sums / count.clamp(min=1))[:, :, -queries:].to(call.value.dtype)
    known = (count[:, :, -queries:, 0] > 0).expand(batch, -1, -1)
    return of_heads(call, mean), known.expand(-1, call.query.shape[1], -1)


def _check_seen(
    call: LayerCall, target: Bool[Tensor, "batch keys"], rows: Bool[Tensor, "batch queries"]
) -> None:
    """Raises LensError unless each chosen row sees all of the keys that it is forced onto."""
    visible = call.mask.pairs(rows.shape[1], target.shape[1], target.device)
    if bool((target[:, None] & ~visible & rows[..., None]).any()):
        raise LensError(
            f"layer {call.layer} does not see all of the keys from the query (a window or a mask hides "
            "them), so its heads cannot look there; choose heads of other layers, or earlier keys"
        )
