"""How much each token of a prompt matters to the answer, by attention, by gradients and by taking it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lens.common.choices import check_choice, check_lists, words
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.reading import _maps
from lens.reading._answers import Answer
from lens.reading._blocks import BlockGradients
from lens.reading._relevance import Gradients

Method: TypeAlias = Literal[
    "raw",
    "effective",
    "norm",
    "rollout",
    "flow",
    "gradient_attention",
    "gradient_rollout",
    "gradient_input",
    "integrated_gradients",
    "attnlrp",
    "cp_lrp",
    "leave_one_out",
]
"""Ways to score tokens; `attribute` says what each is."""
METHODS: tuple[Method, ...] = words(Method)  # pyright: ignore[reportAssignmentType]
STEPS = 32


def attribute(
    model: LoadedModel,
    prompt: Any,
    method: Method,
    *,
    answer: int | None = None,
    progress: bool = True,
) -> Tensor:
    """A score for each token of one prompt: how much it matters to the answer, by one method.

    * raw: attention of the answering query in the last layer, mean over heads
    * effective: the same without the part of each row that its values cannot tell from nothing
    * norm: size of what the heads of the last layer bring the answering query from each token
    * rollout, flow: attention multiplied, or sent as a flow, through all layers, with the residual stream as half
    * gradient_attention: attention × its gradient, over all layers, heads and queries
    * gradient_rollout: the positive part of that, multiplied through all layers
    * gradient_input: gradient × what enters the first block
    * integrated_gradients: the same from deleted tokens to the prompt; sums to the difference of the logits
    * attnlrp, cp_lrp: relevance by the rules of LRP inside the model
    * leave_one_out: probability of the answer less that without the token

    Args:
        model: as in `lens.reading.explain`; the last token answers, or the first in models that look ahead.
        prompt: one, of tokens.
        method: one of these.
        answer: the token (or label) whose logit is explained; None: the likeliest.
        progress: show a bar, on stderr, if that is a terminal.

    Returns:
        [tokens], float64, on the CPU.

    Raises:
        LensError: an unknown method, one that this model has no rules for, or a prompt that is too long.

    Example:
        >>> scores = lens.reading.attribute(small, lens.tasks.copied(small, 12), "leave_one_out")
        >>> scores.shape
        torch.Size([25])
    """
    with advancing(f"{model.name}: {method}", 1, progress) as advance:
        found = scored(Answer(model, prompt, answer), method)
        advance(1)
    return found


def scored(answer: Answer, method: Method) -> Tensor:
    """`attribute` of an answer."""
    if method == "leave_one_out":
        keep = ~torch.eye(answer.tokens, dtype=torch.bool)
        return answer.probability - answer.kept(keep)
    if method in ("attnlrp", "cp_lrp"):
        return times(Gradients(answer, method).hidden, answer.own)
    if method == "integrated_gradients":
        return along_path(answer, Gradients)
    found = Gradients(answer)
    if method == "gradient_input":
        return times(found.hidden, answer.own)
    return _SCORES[method](answer, found).cpu()


def along_path(
    answer: Answer, gradients: type[Gradients] | type[BlockGradients], steps: int = STEPS
) -> Tensor:
    """[tokens], integrated gradients from all tokens deleted to the prompt by one of these, midpoint rule, on the CPU.

    Reference: Sundararajan et al., Axiomatic Attribution for Deep Networks, 2017, arXiv 1703.01365.
    """
    away = answer.own - answer.deleted
    total = torch.zeros_like(away, dtype=torch.float64)
    for step in range(steps):
        total += gradients(answer, hidden=answer.deleted + (step + 0.5) / steps * away).hidden
    return times(total / steps, away)


def check_methods(methods: Sequence[Method] | None) -> tuple[Method, ...]:
    """Those that are asked for; all of them for None.

    Raises:
        LensError: one that is unknown, or none at all.
    """
    if methods is None:
        return METHODS
    check_lists(methods=methods)
    if not methods:
        raise LensError(f"methods must name at least one of {', '.join(METHODS)}")
    return tuple(check_choice("methods", method, Method) for method in dict.fromkeys(methods))


def whole(answer: Answer) -> dict[Method, float]:
    """What the scores of a method would sum to with nothing lost: by relevance the logit (softmaxes and biases take of it), by
    integrated gradients its difference from all tokens deleted (steps are finite)."""
    with torch.no_grad():
        own, deleted = answer.logits(torch.stack([answer.own, answer.deleted]))[:, answer.answer]
    return {
        "integrated_gradients": float(own - deleted),
        "attnlrp": float(own),
        "cp_lrp": float(own),
    }


def times(slope: Tensor, x: Tensor) -> Tensor:
    """[tokens], gradient × input of [tokens, d_model], on the CPU."""
    return (slope * x.double()).sum(-1).cpu()


def _raw(answer: Answer, found: Gradients) -> Tensor:
    return found.attention[-1][0][:, answer.row].mean(0)


def _effective(answer: Answer, found: Gradients) -> Tensor:
    attention, values = found.attention[-1][0], found.values[-1]
    seen = attention[0, answer.row] > 0
    rows = [
        _maps.effective(row, value, seen)
        for row, value in zip(attention[:, answer.row], values, strict=True)
    ]
    return torch.stack(rows).mean(0)


def _norm(answer: Answer, found: Gradients) -> Tensor:
    output = answer.layout.blocks[-1].output
    return _maps.norms(found.attention[-1][0], found.values[-1], output, answer.row)


_SCORES: dict[str, Callable[[Answer, Gradients], Tensor]] = {
    "raw": _raw,
    "effective": _effective,
    "norm": _norm,
    "rollout": lambda answer, found: _maps.rollout([one for one, _ in found.attention])[answer.row],
    "flow": lambda answer, found: _maps.flow([one for one, _ in found.attention], answer.row),
    "gradient_attention": lambda _, found: torch.stack(
        [(attention * slope).sum((0, 1)) for attention, slope in found.attention]
    ).sum(0),
    "gradient_rollout": lambda answer, found: _maps.gradient_rollout(found.attention)[answer.row],
}
