"""`Spans`: which tokens of every prompt are one place, by the template of a task or by the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.tasks.task import Task

Given: TypeAlias = Mapping[str, Any] | Literal["each"]
"""Name -> positions, or every token by itself."""
EACH = "each"
REST = "rest"


@dataclass(frozen=True, eq=False)
class Spans:
    """Places of the prompts of a task; every token is in one of them.

    Attributes:
        names: of the places.
        where: bool [spans, prompts, tokens].
    """

    names: tuple[str, ...]
    where: Tensor


def find_spans(task: Task, spans: Given | None) -> Spans:
    """The places that are asked for.

    Args:
        task: prompts of one length.
        spans: name -> position, or (first, past the last), one for all prompts or one row for each; None: the marks of
            the task; "each": every token is a place of its own. Tokens in none are "rest".

    Raises:
        LensError: no marks, positions that are not in the prompts, spans that share a token, or a task of pictures.
    """
    if task.clean.dim() != 2 or task.targets is not None:
        raise LensError(
            f"places are of prompts of tokens, and {task.name!r} is of pictures or of pairs; lens.circuits.score_edges "
            "takes it without places"
        )
    if isinstance(spans, str) and spans == EACH:
        task.refuse_lengths("a place for each token")
        where = torch.eye(task.length, dtype=torch.bool)[:, None].expand(-1, task.n, -1)
        return Spans(tuple(map(str, range(task.length))), where)
    if spans is None:
        spans = task.marks
        if not spans:
            raise LensError(
                f"the task {task.name!r} has no marks; give spans such as {{'subject': (1, 3)}}, or 'each'"
            )
    if not isinstance(spans, Mapping) or not spans or REST in spans:
        raise LensError(
            "spans must be None, 'each' or a mapping from names (not 'rest') to positions, got "
            f"{spans!r}"
        )
    found = {name: _where(task, name, places) for name, places in spans.items()}
    where = torch.stack(list(found.values()))
    if bool((where.sum(0) > 1).any()):
        prompt = int((where.sum(0) > 1).any(-1).nonzero()[0])
        both = [
            name for name, one in found.items() if bool((one & (where.sum(0) > 1))[prompt].any())
        ]
        raise LensError(f"spans must not share a token; {' and '.join(both)} do in prompt {prompt}")
    rest = ~where.any(0)
    if bool(rest.any()):
        return Spans((*found, REST), torch.cat([where, rest[None]]))
    return Spans(tuple(found), where)


def _where(task: Task, name: str, places: Any) -> Tensor:
    """[prompts, tokens] of one span."""
    try:
        given = torch.as_tensor(places)
    except (TypeError, ValueError, RuntimeError):
        given = torch.empty(0)
    if given.is_floating_point() or given.dtype == torch.bool:
        raise LensError(f"the span {name!r} must be positions, got {places!r}")
    if given.shape in ((), (task.n,)) and not (given.shape == (2,) and not torch.is_tensor(places)):
        given = torch.stack([given, given + 1], -1)
    if given.shape not in ((2,), (task.n, 2)):
        raise LensError(
            f"the span {name!r} must be a position or (first, past the last), for all prompts or for each of "
            f"{task.n}; got the shape {list(given.shape)}"
        )
    first, last = given.expand(task.n, 2).unbind(-1)
    if int(first.min()) < 0 or int(last.max()) > task.length or bool((first >= last).any()):
        raise LensError(
            f"the span {name!r} must lie within the {task.length} tokens and have one, got {places!r}"
        )
    at = torch.arange(task.length)
    return (at >= first[:, None]) & (at < last[:, None])
