"""What pairs are told apart by: how far apart they are, or the class of the two tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

from lens.common.choices import check_lists, words
from lens.common.errors import LensError
from lens.traces.token_rows import token_classes

By: TypeAlias = Literal["offset", "class"]
"""Query less key, or the classes that `token_classes` tells apart."""


def check_by(by: Any, prompts: int) -> None:
    """Raises: LensError: another word, no lists of classes, or those of another number of prompts."""
    if by is None or (isinstance(by, str) and by in words(By)):
        return
    if isinstance(by, str):
        raise LensError(
            f"by must be 'offset', 'class', or the class of each token of each prompt; got {by!r}"
        )
    check_lists(by=by)
    check_lists(**{f"by[{number}]": own for number, own in enumerate(by)})
    if len(by) != prompts:
        raise LensError(
            f"by must hold the classes of each of {prompts} prompts, got {len(by)} lists"
        )


def groups_of(by: Any, pairs: Tensor, number: int, tokens: Sequence[str]) -> list[str]:
    """The group of each pair [pairs, 2] of one prompt, whose tokens these are.

    Raises:
        LensError: classes of another number of tokens.
    """
    if by is None:
        return ["all"] * len(pairs)
    if isinstance(by, str) and by == "offset":
        return [str(query - key) for query, key in pairs.tolist()]
    if isinstance(by, str):
        classes: Sequence[str] = token_classes(tokens)
    else:
        classes = by[number]
    if len(classes) != len(tokens):
        raise LensError(
            f"by has {len(classes) or 'no'} classes for prompt {number}, which has {len(tokens)} tokens"
        )
    return [f"{classes[query]} → {classes[key]}" for query, key in pairs.tolist()]


def rank(group: str) -> tuple[int, str]:
    """Offsets in their order, classes in theirs."""
    return (int(group), "") if is_offset(group) else (0, group)


def is_offset(group: str) -> bool:
    """Whether a group is a number of tokens, below 0 where keys come after the query."""
    return group.removeprefix("-").isdigit()
