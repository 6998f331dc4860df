"""How far the outputs of a cut model are from those of the whole one, by five measures.

    norm          |a - b|, Frobenius norm of the difference of all logits of a prompt
    angular       arccos of the cosine of the logits at a position, in radians
    kl            KL(P || Q) of the next-token distributions, P of the whole model, in nats
    js            (KL(P || M) + KL(Q || M)) / 2 with M = (P + Q) / 2: Jensen-Shannon, at most log 2
    js_finercut   (KL(M || P) + KL(M || Q)) / 2, as FinerCut's code has it; no Jensen-Shannon divergence

All but `norm` are means over the positions of a prompt.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lens.common.choices import check_choice

Distance = Literal["norm", "angular", "kl", "js", "js_finercut"]


def distance(name: Distance, whole: Tensor, cut: Tensor) -> Tensor:
    """[prompts] distance of two logits [prompts, positions, vocab].

    Raises:
        LensError: an unknown name.
    """
    check_choice("distance", name, Distance)
    return DISTANCES[name](whole.double(), cut.double())


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """[...] KL(A || B) of log-probabilities [..., vocab], in nats, never below 0."""
    terms = a.exp() * (a - b)
    return terms.masked_fill(a.exp() == 0, 0).sum(-1).clamp(min=0)


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """[...] Jensen-Shannon divergence of log-probabilities [..., vocab], in nats."""
    middle = _middle(a, b)
    return (divergence(a, middle) + divergence(b, middle)) / 2


def _middle(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, a, torch.logaddexp(a, b) - math.log(2))


def _norm(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).norm(dim=1)


def _angular(a: Tensor, b: Tensor) -> Tensor:
    cosine = torch.cosine_similarity(a, b, dim=-1).clamp(0, 1)
    same = (a == b).all(-1)  # rounding of the cosine of a vector with itself is no angle
    return cosine.arccos().masked_fill(same, 0).mean(1)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return divergence(a.log_softmax(-1), b.log_softmax(-1)).mean(1)


def _js(a: Tensor, b: Tensor) -> Tensor:
    return jensen_shannon(a.log_softmax(-1), b.log_softmax(-1)).mean(1)


def _js_finercut(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    middle = _middle(a, b)
    return ((divergence(middle, a) + divergence(middle, b)) / 2).mean(1)


DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": _norm,
    "angular": _angular,
    "kl": _kl,
    "js": _js,
    "js_finercut": _js_finercut,
}
