"""Greater-than: "The war lasted from the year 1732 to the year 17" -> a year after 32."""

from random import Random

from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.logits import check_predicts_tokens
from lens.tasks.candidates import Candidate, Misfit, following_one, make_task
from lens.tasks.task import Task
from lens.tasks.words import NOUNS

CENTURIES = tuple(range(11, 18))
_YEARS = tuple(f"{year:02}" for year in range(100))
_DIGITS = tuple("0123456789")


def greater_than(model: LoadedModel, n: int = 32, seed: Seed = 0) -> Task:
    """Years in order; the metric is the probability of a later year minus that of one not later.

    The corrupt prompt begins in the year 01 of the century, which nearly every year is after. How it is
    scored depends on the tokenizer in use, and the task's name says it:

    * the two last digits of a year are one token (GPT-2): `sum of p(yy), yy > start, - sum of p(yy),
      yy <= start`; starts 02 to 98;
    * each digit is a token: the tens of the end year, `sum of p(d), d >= tens of the start, - sum of
      p(d), d < tens`. The same tens count as right, though the last digit may turn out too small;
      starts 10 to 98, so that both sides have a digit.

    Asserted: the answers are single tokens that do not change how the text is split, clean and corrupt
    prompts have one length, and the answer is read after the century.

    Args:
        model: whose tokenizer reads the texts.
        n: number of prompts, all different.
        seed: of the draws of noun, century (11 to 17) and start year.

    `task.marks` has the positions of the `start` year's digits that decide, and of the `end`.

    Reference: Hanna, Liu, Variengien, How does GPT-2 compute greater-than?, 2023, arXiv 2305.00586;
        nouns as in hannamw/EAP-IG (MIT).

    Raises:
        LensError: a tokenizer that reads years in neither way, or too few prompts that fit.

    Example:
        >>> lens.tasks.greater_than(lens.load("smollm2-135m"), n=2).name
        'greater-than (tens digit)'
    """
    check_predicts_tokens(model)
    by_digit = _by_digit(model)
    starts = range(10, 99) if by_digit else range(2, 99)

    def draw(random: Random) -> Candidate:
        noun, century, start = random.choice(NOUNS), random.choice(CENTURIES), random.choice(starts)
        if by_digit:
            tens = start // 10
            right, wrong = _DIGITS[tens:], _DIGITS[:tens]
        else:
            right, wrong = _YEARS[start + 1 :], _YEARS[: start + 1]
        clean = _text(noun, century, start)
        return Candidate(
            clean=clean,
            corrupt=_text(noun, century, 1),
            right=right,
            wrong=wrong,
            marked={"start": clean.split(" to ")[0][: -1 if by_digit else None], "end": clean},
        )

    how = "tens digit" if by_digit else "two digits"
    return make_task(model, f"greater-than ({how})", n, seed, draw, metric="probability_difference")


def _text(noun: str, century: int, start: int) -> str:
    return f"The {noun} lasted from the year {century}{start:02} to the year {century}"


def _by_digit(model: LoadedModel) -> bool:
    """Whether years are scored by their tens digit and not by two digits.

    Raises:
        LensError: neither two digits nor one are a single token after the century.
    """
    text = _text(NOUNS[0], CENTURIES[-1], 32)
    problems = []
    for is_digit, answers in ((False, _YEARS), (True, _DIGITS)):
        try:
            for answer in answers:
                following_one(model, text, answer)
        except Misfit as reason:
            problems.append(str(reason))
        else:
            return is_digit
    raise LensError(
        f"{model.name} reads years neither as two digits nor digit by digit ({'; '.join(problems)}), so "
        "greater-than cannot be scored with it"
    )
