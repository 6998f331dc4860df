"""What counts as right: each metric as a function of the logits where the answer is read.

All take logits [rows, answers, vocab] and give one number per row, the mean over its answers; all but
"accuracy" can be differentiated.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lens.common.errors import LensError

METRICS = {
    "loss": -1,
    "accuracy": 1,
    "logit_difference": 1,
    "max_logit_difference": 1,
    "probability_difference": 1,
    "kl": -1,
}
"""Each metric and its sign: -1 where less is better."""

OF_SETS = ("max_logit_difference", "probability_difference")
FLAT = ("kl",)
"""Metrics at their best, with the gradient 0, where the model is as it is."""

PADDING = -1


@dataclass(frozen=True, repr=False, eq=False)
class AnswerSets:
    """Several right and several wrong answers, as token ids; -1 fills up short sets.

    Attributes:
        right: [prompts, answers, tokens].
        wrong: [prompts, answers, tokens], as many prompts and answers.

    Raises:
        LensError: other shapes, an empty set, or a token that is right and wrong.
    """

    right: Tensor
    wrong: Tensor

    def __post_init__(self) -> None:
        for name, ids in (("right", self.right), ("wrong", self.wrong)):
            if ids.dim() != 3 or ids.shape[:2] != self.right.shape[:2]:
                raise LensError(
                    "right and wrong must be [prompts, answers, tokens] with as many prompts and "
                    f"answers; {name} has the shape {list(ids.shape)}"
                )
            if not bool((ids >= 0).any(-1).all()):
                raise LensError(f"every answer needs a {name} token; one has none")
        both = (self.right[..., :, None] == self.wrong[..., None, :]) & (self.right >= 0)[..., None]
        if bool(both.any()):
            raise LensError("a token is among the right and among the wrong answers of one prompt")

    def rows(self, rows: Tensor) -> "AnswerSets":
        """Those of some prompts."""
        return AnswerSets(self.right[rows], self.wrong[rows])


def loss(read: Tensor, correct: Tensor, sets: AnswerSets | None) -> Tensor:
    """`-log p(correct)` in nats; of a set, `-log` of its summed probability."""
    if sets is None:
        return cross_entropy(read.transpose(1, 2), correct, reduction="none").mean(1)
    return -_pick(read.log_softmax(-1), sets.right, -torch.inf).logsumexp(-1).mean(1)


def accuracy(read: Tensor, correct: Tensor, sets: AnswerSets | None) -> Tensor:
    """Share of answers whose most likely token is the correct one, or is in the right set."""
    best = read.argmax(-1)
    if sets is None:
        return (best == correct).float().mean(1)
    return (best[..., None] == sets.right.to(best.device)).any(-1).float().mean(1)


def logit_difference(read: Tensor, correct: Tensor, wrong: Tensor) -> Tensor:
    """`logit[correct] - logit[wrong]`."""
    right, other = read.gather(-1, torch.stack([correct, wrong], -1)).unbind(-1)
    return (right - other).mean(1)


def max_logit_difference(read: Tensor, sets: AnswerSets) -> Tensor:
    """The largest logit of the right set minus the largest of the wrong set."""
    right = _pick(read, sets.right, -torch.inf).amax(-1)
    return (right - _pick(read, sets.wrong, -torch.inf).amax(-1)).mean(1)


def probability_difference(read: Tensor, sets: AnswerSets) -> Tensor:
    """Summed probability of the right set minus that of the wrong set; softmax over all tokens."""
    probabilities = read.softmax(-1)
    right = _pick(probabilities, sets.right, 0.0).sum(-1)
    return (right - _pick(probabilities, sets.wrong, 0.0).sum(-1)).mean(1)


def kl(read: Tensor, reference: Tensor) -> Tensor:
    """`KL(P_reference || P)` in nats; `reference` holds log-probabilities [rows, answers, vocab]."""
    return (reference.exp() * (reference - read.log_softmax(-1))).sum(-1).mean(1)


def check_answers(
    answers: Iterable[Tensor | AnswerSets | None], task: str, vocab: int, model: str
) -> None:
    """Raises LensError: an answer of a task is none of the tokens of a model."""
    for one in answers:
        sets = isinstance(one, AnswerSets)
        for ids in (one.right, one.wrong) if sets else () if one is None else (one,):
            among = (ids >= 0) & (ids < vocab)
            if sets:
                among |= ids == PADDING
            if not bool(among.all()):
                raise LensError(
                    f"the task {task!r} has the answer {int(ids[~among][0])}, and token ids of {model} go from 0 to "
                    f"{vocab - 1}; make it with the model that it is for"
                )


def _pick(values: Tensor, ids: Tensor, filling: float) -> Tensor:
    """[rows, answers, tokens] of `values` [rows, answers, vocab] at the ids, `filling` at padding."""
    ids = ids.to(values.device)
    return values.gather(-1, ids.clamp(min=0)).masked_fill(ids == PADDING, filling)


def follow(clean: Tensor, positions: Tensor, correct: Tensor) -> bool:
    """Whether every answer inside of a prompt is the token behind the place where it is read, as those of programs are not.

    Args:
        clean: [prompts, tokens], or pictures.
        positions, correct: [prompts, answers].
    """
    if clean.is_floating_point():
        return False
    inside = positions + 1 < clean.shape[1]
    following = clean.roll(-1, 1).gather(1, positions)
    return bool(inside.any()) and bool((following == correct)[inside].all())
