"""What a head would attend to without a part, and what it does attend to when the part is taken out.

Predicted: the part's products are taken off the logits of the row, norms held, and the softmax is taken
again. Measured: the model runs with the part taken out of what this head's queries or keys read, through the
norm as it then is. They differ by what the norm changes; where they agree, the explanation is what the model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import Seed, check_choice, check_lists
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall
from lens.passes.inputs import read_prompts
from lens.passes.replay import proved
from lens.passes.sessions import run
from lens.passes.visit import visiting
from lens.reading._head import Head, read_head
from lens.reading._pairs import Pairs, check_pairs, pairs_of, told
from lens.reading._rows import row_at
from lens.reading._writers import KEY_BIAS, NORM_BIAS, QUERY_BIAS, Make, Taking, take_apart
from lens.reading.explanations import Side
from lens.reading.removals import Removals


def removal(
    model: LoadedModel,
    prompts: Any,
    head: AnyHead,
    pairs: Pairs = "induction",
    *,
    side: Side = "key",
    parts: Sequence[str] | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> Removals:
    """Attention to keys of a kind without each part of one side: as the parts predict, and as the model does.

    Args:
        model: as in `lens.reading.explain`.
        prompts: one or several; intervals are over prompts.
        head: such as "L1H3".
        pairs: as in `explain_pairs`.
        side: whether parts are taken out of what its keys read, or of what its queries read.
        parts: names of writers; None: all that write to the stream before it.
        seed: of the bootstrap.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: as `explain_pairs`, no part, or one that does not write to the stream there.

    Example:
        >>> prompts = [lens.tasks.copied(small, 12, seed) for seed in range(3)]
        >>> found = lens.reading.removal(small, prompts, "L1H0", parts=["L0H1", "L0H3"])
        >>> found.table()["part"].tolist()
        ['L0H1', 'L0H3']
    """
    read, _ = read_prompts(model, prompts, whole=True)
    check_pairs(pairs, len(read))
    if parts is not None:
        check_lists(parts=parts)
        if not parts:
            raise LensError("parts names no writer; leave it out for all of them")
    layout, place = proved(model), model.info.head(head)
    clean: list[float] = []
    predicted: list[list[float]] = []
    measured: list[list[float]] = []
    names: tuple[str, ...] = ()
    with advancing(f"{model.name}: {place}", len(read), progress) as advance, torch.no_grad():
        for number, prompt in enumerate(read):
            one = read_head(layout, prompt.inputs, place)
            chosen = pairs_of(one, pairs, number).to(one.key.device)
            advance(1)
            if not len(chosen):
                continue
            rows, row_of = chosen[:, 0].unique(return_inverse=True)
            at = (row_of, chosen[:, 1])
            names = _names(one, rows, parts)
            predicted.append(_predicted(one, rows, at, names, side))
            measured.append([_measured(one, name, rows, at, side) for name in names])
            clean.append(float(one.rows(rows)[at].mean()))
    if not clean:
        raise LensError(
            "no prompt has any such pair; take prompts in which tokens come again, or give the pairs"
        )
    return Removals(
        head=place,
        side=side,
        parts=names,
        pairs=told(pairs),
        clean=np.array(clean),
        predicted=np.array(predicted).T,
        measured=np.array(measured).T,
        seed=seed,
        model=model.name,
    )


def _names(head: Head, rows: Tensor, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Writers that can be taken out.

    Raises:
        LensError: one that is not there.
    """
    weights = torch.zeros(1, head.tokens, dtype=torch.float64, device=rows.device)
    found = take_apart(head, rows[:1], rows[:1], weights).names[0]
    known = [name for name in found if name not in (QUERY_BIAS, KEY_BIAS, NORM_BIAS)]
    if asked is None:
        return tuple(known)
    return tuple(check_choice("parts", name, known) for name in dict.fromkeys(asked))


def _predicted(
    head: Head, rows: Tensor, at: tuple[Tensor, Tensor], names: tuple[str, ...], side: Side
) -> list[float]:
    """Mean attention to the keys of the pairs without each part, norms held."""
    weights = torch.zeros(len(rows), head.tokens, dtype=torch.float64, device=rows.device)
    parts = take_apart(head, rows, rows[:1], weights, whole=names if side == "key" else ())
    logits, found = head.logits(rows), []
    for name in names:
        if side == "key":
            part = head.query[rows] @ parts.whole[name].T
        else:
            part = parts.queries[parts.names[0].index(name)] @ head.key.T
        found.append(float(head.rows(rows, logits - head.call.scale * part)[at].mean()))
    return found


def _measured(head: Head, name: str, rows: Tensor, at: tuple[Tensor, Tensor], side: Side) -> float:
    """The same when the model runs without it."""
    taking = _Without(head, name, side, rows)
    with visiting(head.layout, 1, taking):
        run(head.layout.model, head.inputs)
    assert taking.found is not None
    return float(taking.found[head.id.head][at].mean())


class _Without(Taking):
    """The pass in which one head's queries or keys read the stream without what one writer wrote."""

    def __init__(self, head: Head, name: str, side: Side, rows: Tensor) -> None:
        super().__init__(head, None)
        self._name, self._side, self._at = name, side, rows
        self._written: Tensor | None = None
        self.found: Tensor | None = None  # [heads, rows, keys]

    def give(self, name: str, start: int, make: Make) -> None:
        """Keep what the writer added, as it stands in the stream before the norm of the head."""
        if name != self._name:
            return
        part = self.through(start, make, slice(0, self.head.tokens), stop=-1)
        self._written = part if self._written is None else self._written + part

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = super().project(layer, residual)
        if layer == self.head.id.layer:
            assert self._written is not None
            place, which = (0, self.head.id.head) if self._side == "query" else (1, self.head.group)
            less = (residual.double() - self._written).to(residual.dtype)
            instead = super().project(layer, less)[place]
            made[place][:, :, which] = instead[:, :, which]
        return made

    def attention(self, layer: int, call: LayerCall) -> None:
        if layer == self.head.id.layer:
            self.found = row_at(call, self._at)
