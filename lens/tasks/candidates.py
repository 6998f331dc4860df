"""Texts made into a task: every answer one token, every pair of prompts aligned, all of one length.

What does not fit the tokenizer in use is left out, and the task says what and why.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import multimode

import torch

from lens.common.choices import check_counts
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.tasks.metrics import PADDING, AnswerSets
from lens.tasks.task import Task

_LEAST, _DRAWS = 4, 12  # texts drawn for each prompt that is asked for, at least and at most


@dataclass(frozen=True)
class Candidate:
    """One prompt as text.

    Attributes:
        clean, corrupt: the two texts, up to where the answer is read.
        right, wrong: answers as they follow the clean text, with their leading space.
        marked: names of places, each with the clean text up to and with it: the mark is its last token.
    """

    clean: str
    corrupt: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    marked: Mapping[str, str] = field(default_factory=dict)


class Misfit(Exception):  # noqa: N818 (not an error: the prompt is left out and listed)
    """Why a text cannot be used with this tokenizer."""


def following(model: LoadedModel, text: str, answer: str) -> list[int]:
    """The tokens that make `text` into `text + answer`.

    Raises:
        Misfit: the answer changes how the text before it is split.
    """
    before, after = model.encode(text), model.encode(text + answer)
    if after[: len(before)] != before or len(after) <= len(before):
        raise Misfit(f"{answer!r} changes how the text before it is split into tokens")
    return after[len(before) :]


def following_one(model: LoadedModel, text: str, answer: str) -> int:
    """The single token of `following`.

    Raises:
        Misfit: as there, or the answer is several tokens.
    """
    found = following(model, text, answer)
    if len(found) > 1:
        raise Misfit(f"{answer!r} is {len(found)} tokens, one was expected")
    return found[0]


def usable(
    model: LoadedModel, kind: str, words: Sequence[str], before: str, least: int
) -> tuple[list[str], tuple[str, ...]]:
    """Words that are one token after `before` and a space, and what is to be said of the others.

    Raises:
        LensError: fewer than `least` are.
    """
    kept: list[str] = []
    split: list[str] = []
    for word in words:
        try:
            following_one(model, before, f" {word}")
            kept.append(word)
        except Misfit:
            split.append(word)
    if len(kept) < least:
        raise LensError(
            f"{model.name} has {len(kept)} of {len(words)} {kind} as single tokens, at least {least} "
            f"are needed (e.g. {split[0]!r} is several); this task is not for its tokenizer"
        )
    if not split:
        return kept, ()
    return kept, (f"{kind} of several tokens: {', '.join(split)}",)


def make_task(
    model: LoadedModel,
    name: str,
    n: int,
    seed: int,
    draw: Callable[[Random], Candidate],
    *,
    metric: str,
    dropped: Iterable[str] = (),
) -> Task:
    """Draw texts until there are n different prompts of one length, that of most of them.

    Args:
        model: whose tokenizer reads the texts.
        name: of the task.
        n: number of prompts.
        seed: of the draws.
        draw: makes one candidate.
        metric: "logit_difference" takes the first right and wrong answer; a metric of sets takes all.
        dropped: what was left out before.

    Raises:
        LensError: fewer than n prompts fit.
    """
    check_counts(n=n)
    random = Random(f"{name} {seed}")
    rows: dict[tuple[int, ...], _Row] = {}
    reasons: Counter[str] = Counter()
    counts: Counter[int] = Counter()  # different prompts by length
    drawn = 0
    while drawn < _DRAWS * n and (drawn < _LEAST * n or max(counts.values(), default=0) < n):
        drawn += 1
        try:
            row = _encode(model, draw(random))
        except Misfit as reason:
            reasons[str(reason)] += 1
            continue
        if tuple(row.clean) not in rows:
            rows[tuple(row.clean)] = row
            counts[len(row.clean)] += 1
    length = min(multimode(counts.elements()), default=0)
    kept = [row for row in rows.values() if len(row.clean) == length][:n]
    if len(kept) < n:
        most = reasons.most_common(1)
        why = f"; {most[0][1]} were left out because {most[0][0]}" if most else ""
        raise LensError(
            f"of {drawn} texts for {name!r} only {len(kept)} fit {model.name}, different and of "
            f"one length, and {n} were asked for{why}; ask for fewer or for another seed"
        )
    dropped = [*dropped, *(f"{count} texts: {reason}" for reason, count in reasons.most_common(5))]
    if len(counts) > 1:
        others = sum(counts.values()) - counts[length]
        dropped.append(f"{others} texts of other lengths: most have {length} tokens")
    return _task(name, kept, metric, tuple(dropped))


@dataclass(frozen=True)
class _Row:
    clean: list[int]
    corrupt: list[int]
    right: list[int]
    wrong: list[int]
    marks: dict[str, int]


def _encode(model: LoadedModel, candidate: Candidate) -> _Row:
    clean, corrupt = model.encode(candidate.clean), model.encode(candidate.corrupt)
    if len(corrupt) != len(clean):
        raise Misfit("clean and corrupt prompt differ in length")
    marks = {}
    for name, text in candidate.marked.items():
        ids = model.encode(text)
        if clean[: len(ids)] != ids:
            raise Misfit(f"the place of {name!r} is inside a token")
        marks[name] = len(ids) - 1
    right, wrong = (
        [following_one(model, candidate.clean, answer) for answer in answers]
        for answers in (candidate.right, candidate.wrong)
    )
    if set(right) & set(wrong):
        raise Misfit("a right and a wrong answer are the same token")
    return _Row(clean, corrupt, right, wrong, marks)


def _task(name: str, rows: Sequence[_Row], metric: str, dropped: tuple[str, ...]) -> Task:
    clean = torch.tensor([row.clean for row in rows])
    of_sets = metric != "logit_difference"
    right, wrong = (_padded([getattr(row, side) for row in rows]) for side in ("right", "wrong"))
    return Task(
        name=name,
        clean=clean,
        positions=torch.full((len(rows), 1), clean.shape[1] - 1),
        correct=right[:, :, 0],
        metric=metric,
        corrupt=torch.tensor([row.corrupt for row in rows]),
        wrong=None if of_sets else wrong[:, :, 0],
        dropped=dropped,
        sets=AnswerSets(right, wrong) if of_sets else None,
        marks={name: torch.tensor([row.marks[name] for row in rows]) for name in rows[0].marks},
    )


def _padded(ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """[rows, 1, tokens], short rows filled up."""
    width = max(map(len, ids))
    return torch.tensor([[[*row, *[PADDING] * (width - len(row))]] for row in ids])
