"""Scores of blocks of tokens without a map of all queries and keys: gradients by kernel calls, maps block by block.

What sums over tokens is exact: gradients times inputs, relevance, one row of attention, and attention times its gradient,
which over all queries is the value times its own gradient (`sum_i A_ij dO_i·v_j = v_j·dV_j`). What multiplies maps
of layers is not: the product of block means is the mean of the product only where attention is even inside of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from lens.passes.calls import LayerCall, attend, of_heads
from lens.reading import _maps
from lens.reading._answers import Answer
from lens.reading._relevance import Rule, rules, scaled
from lens.reading._rows import row_at


class BlockGradients:
    """What a backward pass from the answer's logit finds, no map written out.

    Attributes:
        hidden: [tokens, d_model], gradient by what enters the first block.
        calls: what each layer was given.
        values, outputs: of each layer the gradients by its values and by what its heads give.
    """

    def __init__(self, answer: Answer, rule: Rule = "plain", hidden: Tensor | None = None) -> None:
        entering = (answer.own if hidden is None else hidden).detach().clone().requires_grad_()
        self._rule: Rule = rule
        self.calls: list[LayerCall] = []
        self._given: list[tuple[Tensor, Tensor]] = []
        with ExitStack() as stack, torch.enable_grad():
            if rule != "plain":
                stack.enter_context(rules(answer, rule))
            logit = answer.logits(entering[None], self._on_layer)[0, answer.answer]
            wanted = [entering, *(tensor for pair in self._given for tensor in pair)]
            found = torch.autograd.grad(logit, wanted, allow_unused=True)
        slopes = [
            torch.zeros_like(tensor) if slope is None else slope.detach()
            for tensor, slope in zip(wanted, found, strict=True)
        ]
        self.hidden = slopes[0].double()
        self.values, self.outputs = slopes[1::2], slopes[2::2]
        self.calls = [
            replace(
                call, **{name: getattr(call, name).detach() for name in ("query", "key", "value")}
            )
            for call in self.calls
        ]

    def _on_layer(self, call: LayerCall) -> Tensor:
        if self._rule == "cp_lrp":
            call = replace(call, query=call.query.detach(), key=call.key.detach())
        if self._rule == "attnlrp":
            call = replace(
                call,
                query=scaled(call.query, 4),
                key=scaled(call.key, 4),
                value=scaled(call.value, 2),
            )
        output = attend(call, statistics=()).output
        self.calls.append(call)
        self._given.append((call.value, output))
        return output


def summed(scores: Tensor, block: int) -> Tensor:
    """[blocks], of a score for each token."""
    return torch.stack([part.sum() for part in scores.split(block)])


def raw(answer: Answer, found: BlockGradients) -> Tensor:
    """[tokens], mean over the heads of the last layer's answering row."""
    return _row(answer, found)[:, 0].mean(0)


def effective(answer: Answer, found: BlockGradients) -> Tensor:
    """The same without what each head's values cannot tell from nothing."""
    rows, values = _row(answer, found)[:, 0], _values(found.calls[-1])
    seen = rows[0] > 0
    pairs = zip(rows, values, strict=True)
    return torch.stack([_maps.effective(row, value, seen) for row, value in pairs]).mean(0)


def norm(answer: Answer, found: BlockGradients) -> Tensor:
    """Size of what the last layer's heads bring the answering query from each token."""
    values = _values(found.calls[-1])
    return _maps.norms(_row(answer, found), values, answer.layout.blocks[-1].output, 0)


def gradient_attention(_: Answer, found: BlockGradients) -> Tensor:
    """Attention × its gradient, over all layers, heads and queries: values × their gradients."""
    parts = zip(found.calls, found.values, strict=True)
    return torch.stack([(call.value * slope)[0].double().sum((0, 2)) for call, slope in parts]).sum(
        0
    )


def rollout(answer: Answer, found: BlockGradients, block: int) -> Tensor:
    """[blocks], maps of blocks multiplied through all layers; the answering row of the last is its own."""
    *maps, last = (_map(answer, found, layer, block, _plain) for layer in range(len(found.calls)))
    whole = (
        _maps.rollout([one[None] for one in maps]) if maps else torch.eye(last.shape[-1]).to(last)
    )
    own = torch.zeros_like(last[0])
    own[answer.row // block] = 1
    return (last[0] + own) / 2 @ whole


def gradient_rollout(answer: Answer, found: BlockGradients, block: int) -> Tensor:
    """The same of the positive part of attention × its gradient (Chefer)."""
    *maps, last = (
        _map(answer, found, layer, block, _positive) for layer in range(len(found.calls))
    )
    eye = torch.eye(last.shape[-1]).to(last)
    whole = eye
    for one in maps:
        whole = whole + one @ whole
    at = answer.row // block
    return whole[at] - eye[at] + last[0] @ whole


def flow(answer: Answer, found: BlockGradients, block: int) -> Tensor:
    """[blocks], largest flow from the block of the answering query, its row for the block in the last layer."""
    maps = [_map(answer, found, layer, block, _plain) for layer in range(len(found.calls))]
    at = answer.row // block
    whole = torch.eye(maps[-1].shape[-1]).to(maps[-1])
    whole[at] = maps[-1][0]
    return _maps.flow([one[None] for one in (*maps[:-1], whole)], at)


_Weigh = Callable[[Tensor, LayerCall, Tensor, Tensor], Tensor]
"""From rows of attention [heads, queries, keys], the call, the gradient by outputs and the places of the rows."""


def _plain(rows: Tensor, _: LayerCall, __: Tensor, ___: Tensor) -> Tensor:
    return rows


def _positive(rows: Tensor, call: LayerCall, slope: Tensor, at: Tensor) -> Tensor:
    return (rows * (slope[0, :, at].double() @ _values(call).mT)).clamp(min=0)


def _map(answer: Answer, found: BlockGradients, layer: int, block: int, weigh: _Weigh) -> Tensor:
    """[query blocks, key blocks]: mean over heads and the block's rows of the sum over a block's keys.

    Of the last layer [1, key blocks], the answering row alone.
    """
    call, slope = found.calls[layer], found.outputs[layer]
    every = torch.arange(answer.tokens, device=call.query.device)
    is_last = layer == len(found.calls) - 1
    parts = [every[answer.row : answer.row + 1]] if is_last else every.split(block)
    lines = []
    for at in parts:
        mean = weigh(row_at(call, at).double(), call, slope, at).mean((0, 1))
        lines.append(summed(mean, block))
    return torch.stack(lines)


def _row(answer: Answer, found: BlockGradients) -> Tensor:
    """[heads, 1, tokens], attention of the answering query in the last layer."""
    call = found.calls[-1]
    return row_at(call, torch.tensor([answer.row], device=call.query.device)).double()


def _values(call: LayerCall) -> Tensor:
    """[heads, keys, dim]"""
    return of_heads(call, call.value)[0].double()
