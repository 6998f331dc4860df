"""`lens.policies.search`: for each head the cheapest policy, as far as the loss allows, and what that promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lens.common.choices import Seed, check_counts, is_number
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.blocks import check_block_size
from lens.passes.inputs import read_prompts
from lens.policies.a_shape import AShape
from lens.policies.base import Full, Policy, several
from lens.policies.block_sparse import BlockSparse
from lens.policies.evaluating import evaluate, losses_under
from lens.policies.oracle import Oracle, RandomBlocks
from lens.policies.per_head import PerHead
from lens.policies.policy_search import TOLERANCES, PolicySearch
from lens.policies.scores import PolicyScores
from lens.policies.vertical_slash import VerticalSlash


def search(
    model: LoadedModel,
    prompts: Any,
    *,
    loss: float = 0.01,
    held_out: Any = None,
    candidates: Policy | Sequence[Policy] | None = None,
    block_size: int | tuple[int, int] = 64,
    levels: int | None = None,
    draws: int = 2,
    seed: Seed = 0,
    progress: bool = True,
) -> PolicySearch:
    """A policy for each head, so cheap as a given loss allows.

    Each candidate is measured in each head (`evaluate`). At a tolerance t a head gets the cheapest
    candidate (density and cost of choosing together) that is cheaper than full and whose output error is at most t
    of what all heads of its layer write, or stays full. The most tolerant level whose loss on `prompts` grows by no more than
    `loss` is taken. What it promises is measured on the other prompts, beside as many blocks drawn at
    random (the first block and the query's own among them) and the best ones by the exact masses.

    Args:
        model: as `lens.load` returns it; a language model.
        prompts: those that choose.
        loss: what the mean next-token loss may grow by, nats per token.
        held_out: those that the promise is made on, several; None: the second half of `prompts`.
        candidates: policies; None: A-shape, vertical-slash and block-sparse of several sizes, those of
            MInference's search in shares of the longest prompt.
        block_size: of all of them, tokens.
        levels: most levels whose loss is measured on the held-out prompts: the one that is taken, those next
            to it, and full; None: all. Each takes 2 + `draws` passes over every held-out prompt.
        draws: of random blocks at each level.
        seed: of draws and intervals.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: a single prompt without `held_out`, numbers that are none, prompts without loss, or of one block.

    Reference: Jiang et al., MInference 1.0, arXiv 2407.02490, section 3.2, for the search over patterns.

    Example:
        >>> found = lens.policies.search(model, texts, loss=0.05, block_size=4, draws=1)
        >>> found.table()[["name", "policy", "density", "layer_error"]]
    """
    chooses, promises = _split(model, prompts, held_out)
    size = check_block_size(block_size)
    if not is_number(loss) or not loss >= 0:
        raise LensError(f"loss must be a number of nats from 0 on, got {loss!r}")
    check_counts(draws=draws, **({} if levels is None else {"levels": levels}))
    longest = max(map(len, chooses))
    if longest <= size[1]:
        raise LensError(
            f"the longest prompt that chooses has {longest} tokens, one block of {size[1]} keys: nothing can be left out "
            "of it; give longer prompts or a smaller block_size"
        )
    asked = _candidates(longest) if candidates is None else several("candidates", candidates)
    offered = [*(one for one in asked if one != Full()), Full()]
    scores = evaluate(model, chooses, offered, block_size=size, progress=progress)
    steps = _levels(scores, offered)
    with advancing(f"{model.name}: levels", len(steps) * (3 + draws), progress) as advance:
        dense = np.concatenate(losses_under(model, Full(), size, chooses)).mean()
        place, change = len(steps) - 1, 0.0  # every head full
        for at, level in enumerate(steps[:-1]):
            mine = np.concatenate(losses_under(model, level.policy, size, chooses)).mean()
            advance(1)
            if mine - dense <= loss:
                place, change = at, float(mine - dense)
                break
        taken, curve = steps[place], []
        before = losses_under(model, Full(), size, promises)
        for level in _near(steps, place, levels):
            runs = [("chosen", level.policy), ("oracle", Oracle(like=level.policy))]
            runs += [
                ("random", RandomBlocks(like=level.policy, ends=True, seed=seed * 1000 + number))
                for number in range(draws)
            ]
            for kind, policy in runs:
                whole = level is steps[-1]  # all of them keep every block: nothing changes
                after = before if whole else losses_under(model, policy, size, promises)
                differences = [b - a for a, b in zip(before, after, strict=True)]
                curve.append((kind, level.tolerance, level.density, differences))
                advance(1)
    return PolicySearch(
        policy=taken.policy,
        tolerance=taken.tolerance,
        scores=scores,
        choices=taken.choices,
        calibration_change=change,
        asked=float(loss),
        curve_points=tuple(curve),
        dense_loss=float(np.concatenate(before).mean()),
        block_size=size,
        tokens=tuple(map(len, promises)),
        seed=seed,
        model=model.name,
    )


class _Level:
    """The choice of each head at one tolerance."""

    def __init__(
        self, tolerance: float, choices: np.ndarray, offered: Sequence[Policy], scores: PolicyScores
    ) -> None:
        self.tolerance, self.choices = tolerance, choices
        chosen = choices.ravel()
        self.policy = PerHead(
            {head: offered[choice] for head, choice in zip(scores.heads, chosen, strict=True)}
        )
        mean = scores.of("density").mean(-1).reshape(len(offered), -1)
        self.density = float(mean[chosen, np.arange(len(chosen))].mean())


def _levels(scores: PolicyScores, offered: Sequence[Policy]) -> list[_Level]:
    """From the most tolerant to the least; those that choose alike are one."""
    error, price = scores.error, scores.price
    found: list[_Level] = []
    for tolerance in TOLERANCES:
        allowed = np.where((error <= tolerance) & (price < price[-1]), price, np.inf)
        allowed[-1] = price[-1]  # full
        choices = allowed.argmin(0)
        if not found or not np.array_equal(found[-1].choices, choices):
            found.append(_Level(tolerance, choices, offered, scores))
    full = np.full(error.shape[1:], len(offered) - 1)
    if not np.array_equal(found[-1].choices, full):
        found.append(_Level(0.0, full, offered, scores))
    return found


def _near(steps: Sequence[_Level], place: int, count: int | None) -> list[_Level]:
    """At most so many levels: the one at `place`, full, and the nearest to it, in order."""
    if count is None:
        return list(steps)
    last = len(steps) - 1
    order = sorted(range(len(steps)), key=lambda at: (at not in (place, last), abs(at - place), at))
    if count == 1:
        order = [place]
    return [steps[at] for at in sorted(order[:count])]


def _candidates(tokens: int) -> list[Policy]:
    """MInference's grid and what lies below it, in shares of the longest prompt."""
    first = max(1, min(64, tokens // 32))
    near = sorted({max(1, tokens // part) for part in (32, 16, 8, 4)})
    lines = sorted(
        {(max(1, tokens // a), max(1, tokens // b)) for a, b in ((64, 64), (32, 16), (16, 32))}
    )
    few = max(1, tokens // 128)
    return [
        *(AShape(first, last) for last in near),
        *(VerticalSlash(a, b, first=few, last=few) for a, b in lines),
        *(BlockSparse(share=share) for share in (1 / 16, 1 / 8, 1 / 4)),
    ]


def _split(
    model: LoadedModel, prompts: Any, held_out: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts that choose, and of those that promise."""

    def ids(given: Any) -> list[list[int]]:
        read, _ = read_prompts(model, given)
        if any(prompt.ids is None or len(prompt.ids) < 2 for prompt in read):
            raise LensError("search needs prompts of at least two tokens: it measures their loss")
        return [prompt.ids for prompt in read if prompt.ids is not None]

    first = ids(prompts)
    if held_out is not None:
        return first, ids(held_out)
    if len(first) < 2:
        raise LensError(
            "search needs prompts that choose and others that promise: give at least two, or held_out"
        )
    half = (len(first) + 1) // 2
    return first[:half], first[half:]
