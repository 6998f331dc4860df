"""Prompts that ask for something said before: needles in haystacks of random tokens, or of real text.

>>> len(lens.tasks.needles.copied(small, n=2, length=30, needle=4))
2
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch

from lens.common.choices import check_counts, is_number
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.models.vocabulary import ordinary_ids
from lens.passes.logits import logits_of
from lens.tasks.prompts import LONGEST


@dataclass(frozen=True)
class Trial:
    """A prompt that asks for its needle.

    Attributes:
        prompt: token ids; the next tokens should be those of the needle.
        needle: (first, past the last) position of the tokens that should come back.
        depth: place of the needle in the prompt, 0 to 1.
    """

    prompt: tuple[int, ...]
    needle: tuple[int, int]
    depth: float

    def __post_init__(self) -> None:
        first, last = self.needle
        if not 0 <= first < last <= len(self.prompt):
            raise LensError(
                f"the needle must lie within the prompt of {len(self.prompt)} tokens, got {self.needle}"
            )

    def recall(self, answer: Sequence[int]) -> float:
        """Share of the needle's tokens that are in an answer (ROUGE-1 recall on tokens)."""
        wanted = self.prompt[slice(*self.needle)]
        return (Counter(wanted) & Counter(answer)).total() / len(wanted)


def answered(model: LoadedModel, trial: Trial) -> list[int]:
    """As many tokens as the needle has, each the most likely one; with cached keys where the model can.

    Example:
        >>> trial = lens.tasks.needles.copied(small, n=1, length=30, needle=4)[0]
        >>> trial.recall(lens.tasks.needles.answered(small, trial))
        1.0
    """
    first, last = trial.needle
    model.check_ids([*trial.prompt, *trial.prompt[first:last]])
    step = torch.tensor([list(trial.prompt)], device=model.device)
    cached = not model.is_bridge and model.model.can_generate()
    asked: dict[str, Any] = {"use_cache": True}
    if cached and "logits_to_keep" in signature(model.model.forward).parameters:
        asked["logits_to_keep"] = 1  # those of the other tokens are a third of the work
    past, answer = None, []
    with torch.no_grad():
        for _ in range(first, last):
            if cached:
                result = model.model(input_ids=step, past_key_values=past, **asked)
                logits, past = result.logits, result.past_key_values
            else:
                logits = logits_of(model, step)
            token = logits[:, -1].argmax(-1, keepdim=True)
            answer.append(int(token))
            step = token if cached else torch.cat([step, token], dim=1)
    return answer


def copied(
    model: LoadedModel, *, n: int = 16, length: int = 60, needle: int = 8, seed: int = 0
) -> list[Trial]:
    """Trials of random tokens: haystack, needle at depth 0.1 to 0.9, and its first token once more.

    For models that know no questions. Special tokens are never drawn; where the vocabulary allows, no
    token comes twice.

    Args:
        model: as `lens.load` returns it.
        n: number of trials.
        length: tokens of the haystack, the needle among them.
        needle: tokens to bring back, after the one that is repeated.
        seed: of the draws.

    Raises:
        LensError: no vocabulary, fewer than one trial or token, or more than the model takes.
    """
    check_counts(0, n=n, seed=seed)
    ordinary = np.array(ordinary_ids(model))
    context = model.info.context or LONGEST
    if n < 1 or needle < 1 or length < needle + 4 or length + needle + 2 > context:
        raise LensError(
            f"copied needs n and needle of at least 1 and a length of needle + 4 to "
            f"{context - needle - 2}; got n={n}, needle={needle}, length={length}"
        )
    start = [] if model.bos_id is None else [model.bos_id]
    random = np.random.default_rng(seed)
    trials = []
    for depth in np.linspace(0.1, 0.9, n) if n > 1 else [0.5]:
        drawn = random.choice(ordinary, length, replace=len(ordinary) < length).tolist()
        cue = len(start) + round(float(depth) * (length - needle - 2))
        prompt = [*start, *drawn]
        prompt.append(prompt[cue])
        trials.append(Trial(tuple(prompt), (cue + 1, cue + 1 + needle), float(depth)))
    return trials


def text(
    model: LoadedModel,
    haystack: str,
    *,
    needle: str,
    question: str,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
) -> list[Trial]:
    """Trials of real text: a sentence hidden in a haystack, and a question that it answers.

    Args:
        model: as `lens.load` returns it.
        haystack: text that is cut to each length.
        needle: what should come back, such as " eat a sandwich in Dolores Park"; what leads to it is
            in `question`.
        question: put before the needle in the haystack and at the end of the prompt, such as
            " The best thing to do in San Francisco is".
        lengths: tokens of the haystack.
        depths: places of the needle in it, 0 to 1.

    Raises:
        LensError: a haystack that is too short, a depth outside of 0 to 1, or a prompt longer than
            the model takes.
    """
    hay = model.encode(haystack)
    plain = [model.encode(text) for text in (question, needle)]
    lead, answer = (ids[1:] if ids[:1] == [model.bos_id] else ids for ids in plain)
    trials = []
    for length in lengths:
        check_counts(length=length)
        if length > len(hay):
            raise LensError(f"the haystack has {len(hay):,} tokens, {length:,} were asked for")
        for depth in depths:
            if not (is_number(depth) and 0 <= depth <= 1):
                raise LensError(f"depth must lie between 0 and 1, got {depth}")
            at = max(1, round(depth * length))
            before = [*hay[:at], *lead]
            prompt = [*before, *answer, *hay[at:length], *lead]
            model.check_ids([*prompt, *answer])
            needle_at = (len(before), len(before) + len(answer))
            trials.append(Trial(tuple(prompt), needle_at, float(depth)))
    return trials
