"""Settings that are several words with commas, such as `ablation/mean,gradient`: which words there are."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, get_args

from lens.common.errors import LensError
from lens.common.head_ids import head_id
from lens.heads.measures import methods

MEASURES: tuple[str, ...] = get_args(methods.Method)
BASELINES: tuple[str, ...] = get_args(methods.Baseline)
POLICY_SECTIONS = ("policies", "running", "stability", "search")
EXPLAIN_SECTIONS = (
    "explain",
    "groups",
    "removal",
    "subspace",
    "retrieval_kinds",
    "faithfulness",
    "mixing",
    "adversary",
    "perturbation",
)
GROUPS = ("offset", "class")
MOVES = ("var", "act", "pasta")
STREAMS = ("residual", "attention", "mlp", "heads")
EDITS = ("mask", "drop", "mean_value", "zero_value", "move", "transfer")


def check_measures(words: str) -> str:
    """The words, if each is a measure, with a baseline that it knows.

    Raises:
        ValueError: one is not.
    """
    for word in listed(words):
        by, slash, baseline = word.partition("/")
        if by not in MEASURES or (slash and baseline not in BASELINES):
            raise ValueError(
                f"unknown measure {word!r}; give {', '.join(MEASURES)}, with a baseline after a slash "
                f"where one is chosen ({', '.join(BASELINES)}), e.g. ablation/mean"
            )
        allowed = methods.BASELINES[by]
        if slash and baseline not in allowed:
            raise ValueError(
                f"the measure {word!r} does not exist: {by} goes with {' or '.join(allowed)}"
            )
    return _once(words, listed(words))


def check_edits(words: str) -> str:
    """The words, if each is an edit of a sink.

    Raises:
        ValueError: one is not.
    """
    return _known(words, EDITS)


def check_moves(words: str) -> str:
    """The words, if each is an edit of a vision-language model's attention; errors as in `check_edits`."""
    return _known(words, MOVES)


def _known(words: str, edits: tuple[str, ...]) -> str:
    for word in listed(words):
        if word not in edits:
            raise ValueError(f"unknown edit {word!r}; known: {', '.join(edits)}")
    return _once(words, listed(words))


def check_sections(words: str) -> str:
    """The words, if each is a section of `lens policies`, and there is one.

    Raises:
        ValueError: otherwise.
    """
    return _some_of(words, POLICY_SECTIONS)


def check_explained(words: str) -> str:
    """The words, if each is a section of `lens explain`; errors as in `check_sections`."""
    found = _some_of(words, EXPLAIN_SECTIONS)
    if "removal" in listed(words) and "explain" not in listed(words):
        raise ValueError(f"removal needs the section explain; got {words!r}")
    return found


def check_groups(words: str) -> str:
    """The words, if each is what pairs are told apart by; errors as in `check_sections`."""
    return _some_of(words, GROUPS)


def check_sizes(words: str) -> str:
    """The words, if all are numbers above 0.

    Raises:
        ValueError: otherwise.
    """
    try:
        sizes = [float(word) for word in listed(words)]
    except ValueError:
        sizes = [math.nan]
    if not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"must be numbers above 0 with commas, e.g. 0.5,1,2; got {words!r}")
    return _once(words, (f"{size:g}" for size in sizes))


def check_streams(words: str) -> str:
    """The words, if each is something that `lens patch` patches; errors as in `check_sections`."""
    return _some_of(words, STREAMS)


def _some_of(words: str, known: tuple[str, ...]) -> str:
    found = listed(words)
    if not found or set(found) - set(known):
        raise ValueError(f"must be some of {', '.join(known)}, with commas; got {words!r}")
    return _once(words, found)


def check_amounts(words: str) -> str:
    """The words, if all are finite numbers and one is an edit.

    Raises:
        ValueError: otherwise.
    """
    try:
        amounts = [float(word) for word in listed(words)]
    except ValueError:
        amounts = [math.nan]
    if not all(map(math.isfinite, amounts)):
        raise ValueError(f"must be numbers with commas, e.g. 0,0.5,1; got {words!r}")
    if not any(amounts):
        raise ValueError(f"has no amount other than 0, which is no edit; got {words!r}")
    return _once(words, (f"{amount:g}" for amount in amounts))


def check_loss(word: str) -> str:
    """The word, if it is a number of nats from 0 on.

    Raises:
        ValueError: otherwise.
    """
    return _from_zero(word, "a number of nats from 0 on, e.g. 0.01")


def check_ratio(word: str) -> str:
    """The word, if it is a number from 0 on.

    Raises:
        ValueError: otherwise.
    """
    return _from_zero(word, "a number from 0 on, e.g. 20")


def check_noise(word: str) -> str:
    """The word, if it is a number above 0.

    Raises:
        ValueError: otherwise.
    """
    if float(_from_zero(word, expected := "a number above 0, e.g. 3")) == 0:
        raise ValueError(f"must be {expected}; got {word!r}")
    return word


def check_temperature(word: str) -> str:
    """The word, if it is a temperature.

    Raises:
        ValueError: otherwise.
    """
    return _from_zero(word, "0 (the likeliest token) or more, e.g. 0.8")


def _from_zero(word: str, expected: str) -> str:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"must be {expected}; got {word!r}")
    return word


def check_spans(words: str | None) -> str | None:
    """The words, if they say places (`spans_of`).

    Raises:
        ValueError: otherwise.
    """
    spans_of(words)
    return words


def spans_of(words: str | None) -> Any:
    """What `lens.circuits.scores.positions` takes for "marks", "each" or names with the first token and that past the last.

    Raises:
        ValueError: other words.
    """
    if words in (None, "marks"):
        return None
    if words == "each":
        return words
    found = {}
    for word in listed(words):
        if (span := _SPAN.fullmatch(word)) is None:
            raise ValueError(
                "must be marks, each, or names with a token or with the first and that past the last, e.g. "
                f"first=1:26,last=50; got {words!r}"
            )
        first, last = int(span["first"]), span["last"]
        found[span["name"]] = first if last is None else (first, int(last))
    _once(words, [word.partition("=")[0] for word in listed(words)])
    return found


def check_heads(words: str) -> str:
    """The words, if each is written as a head is.

    Raises:
        ValueError: one is not.
    """
    try:
        return _once(words, [head_id(word) for word in listed(words)])
    except LensError as error:
        raise ValueError(str(error)) from error


def check_overlays(words: str | None) -> str | None:
    """The words, if each is "mean", a layer ("L3") or a head ("L3H5").

    Raises:
        ValueError: one is not.
    """
    if words is not None:
        heads = [one for one in listed(words) if one != "mean" and not _LAYER.fullmatch(one)]
        if heads:
            check_heads(",".join(heads))
        _once(words, listed(words))
    return words


def layer_of(word: str) -> int | None:
    """The layer that a word is; None of another word."""
    return int(word[1:]) if _LAYER.fullmatch(word) else None


_LAYER = re.compile(r"L\d+")
_SPAN = re.compile(r"(?P<name>[A-Za-z]\w*)=(?P<first>\d{1,7})(:(?P<last>\d{1,7}))?")


def listed(words: str) -> list[str]:
    """The words one by one."""
    return [word.strip() for word in words.split(",")]


def _once(words: str, found: Iterable[object]) -> str:
    """The words, if what they mean comes once: twice it would be measured twice.

    Raises:
        ValueError: otherwise.
    """
    for word, times in Counter(found).items():
        if times > 1:
            raise ValueError(f"names {word} {times} times; leave out all but one; got {words!r}")
    return words
