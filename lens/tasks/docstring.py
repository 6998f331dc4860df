"""Docstring: after two documented arguments of a Python function, which one comes next."""

from random import Random

from lens.common.choices import Seed
from lens.models.loaded import LoadedModel
from lens.passes.logits import check_predicts_tokens
from lens.tasks.candidates import Candidate, make_task, usable
from lens.tasks.task import Task
from lens.tasks.words import VARIABLES, WORDS

_PREFIX, _MATCHING, _SUFFIX = 2, 3, 1
_DESCRIPTION, _ARGUMENT = 3, 2  # words


def docstring(model: LoadedModel, n: int = 32, seed: Seed = 0) -> Task:
    """Docstring; the metric is the logit of the next argument minus the largest of any other name's.

    A method with six arguments documents its third and fourth in reST style; the fifth comes next. In
    the corrupt prompt the three arguments that matter are replaced in the definition, and the two
    documented ones independently ("random_random"). Wrong are all other names of both prompts. Asserted
    for the tokenizer in use: names are single tokens with their space before them, in "def name(self,
    name" and after ":param"; prompts have one length.

    Args:
        model: whose tokenizer reads the texts.
        n: number of prompts, all different.
        seed: of the draws of names and description words.

    Reference: Heimersheim, Janiak, A circuit for Python docstrings in a 4-layer attention-only
        transformer, 2023 (LessWrong); the prompt's form as in Conmy et al., Towards Automated Circuit
        Discovery, 2023, arXiv 2304.14997. The word lists are our own.

    Raises:
        LensError: a tokenizer that splits the names, or too few prompts that fit.

    Example:
        >>> lens.tasks.docstring(lens.load("smollm2-135m"), n=8).metric
        'max_logit_difference'
    """
    check_predicts_tokens(model)
    documented = _MATCHING - 1
    needed = 1 + _PREFIX + _MATCHING + _SUFFIX + _MATCHING + documented
    names, dropped = usable(model, "names", VARIABLES, "    :param", needed)

    def draw(random: Random) -> Candidate:
        drawn = random.sample(names, needed)
        method, *drawn = drawn
        prefix, drawn = drawn[:_PREFIX], drawn[_PREFIX:]
        suffix, drawn = drawn[:_SUFFIX], drawn[_SUFFIX:]
        matching, drawn = drawn[:_MATCHING], drawn[_MATCHING:]
        other_defined, other_documented = drawn[:_MATCHING], drawn[_MATCHING:]
        words = random.sample(WORDS, _DESCRIPTION)
        about = [" ".join(random.sample(WORDS, _ARGUMENT)) for _ in range(documented)]

        def text(defined: list[str], arguments: list[str]) -> str:
            return _text(method, [*prefix, *defined, *suffix], " ".join(words), arguments, about)

        *first, answer = matching
        others = (*prefix, *first, *suffix, *other_defined, *other_documented)
        return Candidate(
            clean=text(matching, first),
            corrupt=text(other_defined, other_documented),
            right=(f" {answer}",),
            wrong=tuple(f" {name}" for name in others),
        )

    return make_task(
        model, "docstring", n, seed, draw, metric="max_logit_difference", dropped=dropped
    )


def _text(
    method: str, defined: list[str], description: str, arguments: list[str], about: list[str]
) -> str:
    """The function up to the `:param` that is to be filled in."""
    lines = "".join(
        f"    :param {argument}: {words}\n"
        for argument, words in zip(arguments, about, strict=True)
    )
    return f'\ndef {method}(self, {", ".join(defined)}):\n    """{description}\n\n{lines}    :param'
