"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> Mary."""

import re
from collections.abc import Sequence
from random import Random
from typing import Literal

from lens.common.choices import Seed, check_choice
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.logits import check_predicts_tokens
from lens.tasks.candidates import Candidate, make_task, usable
from lens.tasks.task import Task
from lens.tasks.words import GIFTS, NAMES, PLACES

TEMPLATES = (
    "Then, [B] and [A] went to the [PLACE]. [B] gave a [OBJECT] to [A]",
    "Then, [B] and [A] had a lot of fun at the [PLACE]. [B] gave a [OBJECT] to [A]",
    "Then, [B] and [A] were working at the [PLACE]. [B] decided to give a [OBJECT] to [A]",
    "Then, [B] and [A] were thinking about going to the [PLACE]. [B] wanted to give a [OBJECT] to [A]",
    "Then, [B] and [A] had a long argument, and afterwards [B] said to [A]",
    "After [B] and [A] went to the [PLACE], [B] gave a [OBJECT] to [A]",
    "When [B] and [A] got a [OBJECT] at the [PLACE], [B] decided to give it to [A]",
    "When [B] and [A] got a [OBJECT] at the [PLACE], [B] decided to give the [OBJECT] to [A]",
    "While [B] and [A] were working at the [PLACE], [B] gave a [OBJECT] to [A]",
    "While [B] and [A] were commuting to the [PLACE], [B] gave a [OBJECT] to [A]",
    "After the lunch, [B] and [A] went to the [PLACE]. [B] gave a [OBJECT] to [A]",
    "Afterwards, [B] and [A] went to the [PLACE]. [B] gave a [OBJECT] to [A]",
    "Then, [B] and [A] had a long argument. Afterwards [B] said to [A]",
    "The [PLACE] [B] and [A] went to had a [OBJECT]. [B] gave it to [A]",
    "Friends [B] and [A] found a [OBJECT] at the [PLACE]. [B] gave it to [A]",
)
"""With the subject [B] first; in half of the prompts the first [B] and [A] change places."""


Corruption = Literal["abc", "s2_io", "s2_random"]


def ioi(
    model: LoadedModel,
    n: int = 32,
    seed: Seed = 0,
    *,
    corruption: Corruption = "abc",
    templates: Sequence[str] = TEMPLATES,
) -> Task:
    """Indirect object identification; the metric is `logit[IO] - logit[S]` after the last "to".

    Two people are named and one of them, the subject S, again: the other one, the indirect object IO,
    is who gets it. Asserted for the tokenizer in use: each name is one token with its space before it,
    the answer does not change how the text is split, clean and corrupt prompts have one length.

    Args:
        model: whose tokenizer reads the texts.
        n: number of prompts, all different.
        seed: of the draws of template, names, things, and who is named first.
        corruption: "abc", three other names for IO, S and the second S, so nobody is named twice;
            "s2_io", the second S becomes IO, so the answer is turned round; "s2_random", it becomes a
            third name.
        templates: those of `TEMPLATES` to draw from: one of them for means by template (Wang et al.).

    `task.marks` has the positions of `io`, `s1`, `s2` and `end`.

    Reference: Wang et al., Interpretability in the Wild, 2022, arXiv 2211.00593; templates and names of
        redwoodresearch/Easy-Transformer (MIT).

    Raises:
        LensError: an unknown corruption or template, a tokenizer that splits the names, or too few prompts that fit.

    Example:
        >>> task = ioi(lens.load("smollm2-135m"), n=8, seed=1)
    """
    check_predicts_tokens(model)
    check_choice("corruption", corruption, Corruption)
    if not templates or not set(templates) <= set(TEMPLATES):
        raise LensError(
            "templates must be those of the module lens.tasks.ioi (TEMPLATES), at least one"
        )
    names, dropped = usable(model, "names", NAMES, "The drink was given to", 6)

    def draw(random: Random) -> Candidate:
        template, io_first = random.choice(templates), random.random() < 0.5
        things = {"PLACE": random.choice(PLACES), "OBJECT": random.choice(GIFTS)}
        io, s, first, second, third = random.sample(names, 5)
        people = {"abc": (first, second, third), "s2_io": (io, s, io), "s2_random": (io, s, first)}
        text = _fill(template, things, io, s, s, io_first)
        return Candidate(
            clean=text,
            corrupt=_fill(template, things, *people[corruption], io_first),
            right=(f" {io}",),
            wrong=(f" {s}",),
            marked={
                "io": _upto(text, io, 1),
                "s1": _upto(text, s, 1),
                "s2": _upto(text, s, 2),
                "end": text,
            },
        )

    return make_task(
        model, f"ioi ({corruption})", n, seed, draw, metric="logit_difference", dropped=dropped
    )


def _fill(template: str, things: dict[str, str], io: str, s1: str, s2: str, io_first: bool) -> str:
    """The prompt up to before the answer."""
    text = template.removesuffix(" [A]")
    for slot, thing in things.items():
        text = text.replace(f"[{slot}]", thing)
    first, second = (io, s1) if io_first else (s1, io)
    return text.replace("[B]", first, 1).replace("[A]", second, 1).replace("[B]", s2, 1)


def _upto(text: str, word: str, times: int) -> str:
    """The text up to and with the word, as often as it is to be there."""
    ends = [match.end() for match in re.finditer(rf"\b{word}\b", text)]
    return text[: ends[times - 1]]
