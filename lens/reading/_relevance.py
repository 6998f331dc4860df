"""Relevance of each token by gradients and by layerwise relevance propagation (LRP).

LRP's rules are put into the captured model as changes of its gradient, so that relevance is gradient × input:

    norms       the size that they divide by is held
    activations the gradient is f(x) / x
    products    of a gated MLP, AttnLRP: half of the gradient to each side. CP-LRP: the gate is held
    attention   AttnLRP: half to the attention and half to the values; of the first, half to queries and half to
                keys, behind the softmax's own gradient. CP-LRP: attention is held, all goes to the values.

These are the rules of the published code (lxt). CP-LRP makes the model linear: the score of a token is its
logit with all attention, gates and sizes held and every other token at 0. What decides where attention lies has
no part in it: of an induction head the copied token gets all, and the tokens that are matched get nothing.

With held attention and without biases relevance sums to the logit. The softmax of AttnLRP passes
`sum s A (g - mean g)` on of `sum A g`: what it keeps is counted here. `lens.reading.faithfulness` tells what sums lack with
what biases take.

Reference: Achtibat et al., AttnLRP, 2024, arXiv 2402.05602.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.models.parts import Block, Norm
from lens.passes.calls import LayerCall, of_heads
from lens.reading._answers import Answer
from lens.reading._rows import dense, with_values

Rule = Literal["plain", "attnlrp", "cp_lrp"]
_EPSILON = 1e-10
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


class Gradients:
    """What a backward pass from the answer's logit finds.

    Attributes:
        logit: of the answer.
        hidden: [tokens, d_model], gradient by what enters the first block.
        attention: of each layer, [heads, queries, keys]; and its gradient.
        values: of each layer, [heads, keys, value_dim].
        seen: of each layer, bool [queries, keys], the logits that the answer can hang on: those of keys that are seen,
            in the last layer by the query that answers.
        scores: of each layer, gradient by the logits of its attention; with `of_loss` that of the answer's
            log probability.
        kept_by_softmax: relevance that softmaxes did not pass on (AttnLRP), in units of the logit.
    """

    def __init__(
        self,
        answer: Answer,
        rule: Rule = "plain",
        hidden: Tensor | None = None,
        *,
        of_loss: bool = False,
    ) -> None:
        entering = (answer.own if hidden is None else hidden).detach().clone().requires_grad_()
        self._maps: list[tuple[Tensor, Tensor]] = []
        self.values: list[Tensor] = []
        self.seen: list[Tensor] = []
        self._rule = rule

        with ExitStack() as stack, torch.enable_grad():
            if rule != "plain":
                stack.enter_context(rules(answer, rule))
            logits = answer.logits(entering[None], self._on_layer)
            logits = logits.log_softmax(-1) if of_loss else logits
            value = logits[0, answer.answer]
            wanted = [entering, *(tensor for pair in self._maps for tensor in pair)]
            found = torch.autograd.grad(value, wanted, allow_unused=True)
        self.logit = float(value.detach())
        if self.seen:
            self.seen[-1] = self.seen[-1] & (torch.arange(answer.tokens) == answer.row)[:, None].to(
                self.seen[-1].device
            )
        self.hidden = found[0].detach().double()
        self.attention: list[tuple[Tensor, Tensor]] = []
        self.scores: list[Tensor] = []
        self.kept_by_softmax = 0.0
        for number, (scores, attention) in enumerate(self._maps):
            by_scores, by_attention = (
                torch.zeros_like(tensor) if slope is None else slope
                for tensor, slope in zip((scores, attention), found[1 + 2 * number :], strict=False)
            )
            self.scores.append(by_scores[0].detach().double())
            if rule == "attnlrp":
                passed = float((scores * by_scores).detach().double().sum())
                given = float((attention * by_attention).detach().double().sum())
                self.kept_by_softmax += given - passed
            self.attention.append(
                (attention[0].detach().double(), by_attention[0].detach().double())
            )

    def _on_layer(self, call: LayerCall) -> Tensor:
        if self._rule == "cp_lrp":
            scores, attention = (part.detach() for part in dense(call))
            return with_values(call, attention)
        lrp = self._rule == "attnlrp"
        if lrp:
            call = replace(call, query=scaled(call.query, 2), key=scaled(call.key, 2))
        scores, attention = dense(call)
        self._maps.append((scores, attention))
        rows, keys = attention.shape[-2:]
        self.seen.append(call.mask.seen_by(torch.arange(rows, device=call.query.device), keys))
        self.values.append(of_heads(call, call.value)[0].detach().double())
        if not lrp:
            return with_values(call, attention)
        return with_values(replace(call, value=scaled(call.value, 2)), scaled(attention, 2))


def scaled(x: Tensor, by: int) -> Tensor:
    """x, whose gradient is divided."""
    return x / by + (x - x / by).detach()


@contextmanager
def rules(answer: Answer, rule: Rule) -> Iterator[None]:
    """Norms, activations and products of the model with the gradients of LRP.

    Raises:
        LensError: an MLP whose products are not known.
    """
    layout = answer.layout
    with ExitStack() as stack:

        def after(module: nn.Module, function: Callable[..., Any]) -> None:
            stack.callback(module.register_forward_hook(function).remove)

        norms: dict[nn.Module, Norm] = {}
        for block in layout.blocks:
            for norm in (
                block.norm,
                block.mlp_norm,
                block.after,
                block.mlp_after,
                *block.head_norms,
            ):
                if norm.module is not None and norm.changes:
                    norms[norm.module] = norm
            gates = _gates(block, layout.kind)
            for module in _activations(block, layout.kind):
                after(module, _held if gates and rule == "cp_lrp" else _held_slope)
            for module in gates if rule == "attnlrp" else ():
                after(module, lambda _, __, output: scaled(output, 2))
        if layout.final_norm.module is not None and layout.final_norm.changes:
            norms[layout.final_norm.module] = layout.final_norm
        for module, norm in norms.items():
            after(module, lambda _, args, __, norm=norm: _held_norm(norm, args[0]))
        yield


def _held_norm(norm: Norm, x: Tensor) -> Tensor:
    if norm.scale is not None and norm.scale.dim() > 1:
        raise LensError("norms with a scale for each head are not known to LRP here")
    found = norm.frozen(x, norm.size(x).detach().to(x.dtype))
    return found if norm.shift is None else found + norm.shift


def _held(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.detach()


def _held_slope(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = args[0]
    return x * (output / (x + _EPSILON)).detach()


def _activations(block: Block, kind: str) -> list[nn.Module]:
    found = [
        part
        for module in block.mlp
        for part in module.modules()
        if type(part).__module__ in _ACTIVATIONS
    ]
    if block.mlp and len(found) != 1:
        raise LensError(
            f"the MLP of {kind} has {len(found)} activations; the rules of LRP are known for MLPs with one, gated by "
            "up_proj or not"
        )
    return found


def _gates(block: Block, kind: str) -> list[nn.Module]:
    """Of a gated MLP, both sides of its product; they run once each."""
    names = {
        name.rpartition(".")[2]: part for mlp in block.mlp for name, part in mlp.named_modules()
    }
    if "gate_up_proj" in names or "experts" in names:
        raise LensError(f"the product in the MLP of {kind} is not known to LRP here")
    if "gate_proj" in names and "up_proj" in names:
        return [*_activations(block, kind), names["up_proj"]]
    return []
