"""Why a query attends to a key: its logit taken apart exactly into writer × writer.

A logit is `c q·k`; query and key are sums over what earlier parts of the model wrote (embedding, position,
each earlier head and MLP, biases), each through the norms with the sizes of the whole, the projection, the
norm of the head and rotary embedding (`lens.reading._writers`). So `logit = sum over a, b of c q_a·k_b`, to
rounding. A softmax sees differences alone, so each product is also given less its average over the keys that
the query sees, or against one other key: a part that all keys share is nothing there. Only the chosen rows
and keys are held, at any length.

Limits: norms are held, so taking a part out for real changes more (`lens.reading.removal` measures it); parts
are writers, not features; large cells of opposite sign are usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import Seed, is_whole
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.replay import proved
from lens.reading._groups import By, check_by, groups_of, rank
from lens.reading._head import Head, read_head
from lens.reading._pairs import Pairs, check_pairs, pairs_of, told
from lens.reading._writers import Parts, take_apart
from lens.reading.explanations import Explanation, PairExplanation

_ROWS = 128  # taken apart together: their rows of attention are held
_PRODUCTS = 2**23  # of parts, held at a time
_KEPT = 2**28  # of all groups and prompts
LEARNED_SINK, POSITION_BIAS = "learned sink", "position bias"
_SUMMED = ("values", "contrast", "content", "size", "mass", "even", "above")
Against: TypeAlias = Literal["keys", "attention"] | int
"""What a logit is held against: the mean over the keys that the query sees, weighted or not, or one key."""


def explain(
    model: LoadedModel,
    prompt: Any,
    head: AnyHead,
    query: int,
    key: int | Literal["sink"],
    *,
    against: Against = "keys",
    progress: bool = True,
) -> Explanation:
    """The logit of one query and key, taken apart into what wrote them.

    Args:
        model: as `lens.load` returns it; its architecture must be in `lens.models.architectures`.
        prompt: one.
        head: such as "L1H3".
        query, key: places of the prompt, -1 is the last; key "sink" is the learned sink of models that have one.
        against: what `contrast` takes off: the mean over all keys that the query sees ("keys"), weighted by
            what it attends to them ("attention": the first-order change of the log attention), or another
            key, by its place.
        progress: show a bar, on stderr, if that is a terminal.

    Reference: Elhage et al., A Mathematical Framework for Transformer Circuits, 2021.

    Raises:
        LensError: several prompts, places that are not there or do not see each other, a head or a model that
            is not known, or parts that do not sum to what the model computes.

    Example:
        >>> why = lens.reading.explain(small, lens.tasks.copied(small, 12), "L1H0", query=18, key=7)
        >>> why.side("key").loc[0, "part"]
        'L0H1'
    """
    prompts, one = read_prompts(model, prompt, whole=True)
    if not one:
        raise LensError(
            f"explain takes one prompt, got {len(prompts)}; explain_pairs takes several"
        )
    layout, place = proved(model), model.info.head(head)
    with advancing(f"{model.name}: {place}", 2, progress) as advance:
        read = read_head(layout, prompts[0].inputs, place)
        advance(1)
        row = _place("query", query, read.tokens)
        if key == "sink" and read.sink is None:
            raise LensError(
                f"{model.info.class_name} has no learned sinks; give the place of a key"
            )
        column = 0 if key == "sink" else _place("key", key, read.tokens)
        rows, keys = (torch.tensor([one], device=read.key.device) for one in (row, column))
        if key != "sink" and not bool(read.call.mask.seen_by(rows, read.tokens)[0, column]):
            raise LensError(f"query {row} does not see key {column} in {place}")
        weights = _weights(read, rows, against)
        parts = take_apart(read, rows, keys, weights, look=torch.cat([rows, keys]))
        advance(1)
    at = torch.zeros(1, 2, dtype=torch.long)
    cells = _cells(parts, rows, keys, at, weights, sink=key == "sink")
    tokens = _tokens(model, prompts[0], read.tokens)
    return Explanation(
        head=place,
        query=row,
        key=None if key == "sink" else column,
        tokens=(tokens[row], "" if key == "sink" else tokens[column]),
        parts=cells.names,
        values=cells.values[0],
        contrast=cells.contrast[0],
        content=cells.content[0],
        logit=float(cells.logit[0]),
        average=float(cells.average[0]),
        against=against,
        mass=float(cells.mass[0]),
        even=float(cells.even[0]),
        slope=float(cells.slope[0]),
        sources=(_looks(parts, tokens, 0), _looks(parts, tokens, 1)),
        error=cells.error,
        model=model.name,
    )


def explain_pairs(
    model: LoadedModel,
    prompts: Any,
    head: AnyHead,
    pairs: Pairs = "induction",
    *,
    by: By | Sequence[Sequence[str]] | None = None,
    against: Literal["keys", "attention"] = "keys",
    seed: Seed = 0,
    progress: bool = True,
) -> PairExplanation:
    """The same over many pairs: what, on average, makes a head attend to keys of a kind.

    Args:
        model: as in `explain`.
        prompts: one or several; intervals are over prompts.
        head: such as "L1H3".
        pairs: "induction" (the keys after earlier copies of the query's token), "duplicate" (earlier copies),
            "previous" (the key before), "strongest" (each row's strongest key), or for each prompt its pairs.
        by: tell them apart by "offset" (query less key), by "class" of the two tokens (first, delimiter, number, word, piece of
            a word), or by your own: for each prompt the class of each token.
        against: as in `explain`.
        seed: of the bootstrap.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: as `explain`, no pair at all, classes of other lengths than the prompts, or so many groups that their
            products of parts do not fit into memory.

    Example:
        >>> prompts = [lens.tasks.copied(small, 12, seed) for seed in range(4)]
        >>> lens.reading.explain_pairs(small, prompts, "L1H0").side("key").loc[0, "part"]
        'L0H1'
    """
    read, _ = read_prompts(model, prompts, whole=True)
    check_pairs(pairs, len(read))
    check_by(by, len(read))
    layout, place = proved(model), model.info.head(head)
    gathered = _Gathered()
    with advancing(f"{model.name}: {place}", len(read), progress) as advance:
        for number, prompt in enumerate(read):
            one = read_head(layout, prompt.inputs, place)
            chosen = pairs_of(one, pairs, number)
            if by == "class" and prompt.ids is None:
                raise LensError(
                    f"by='class' tells tokens of text apart, and prompt {number} has none; use by='offset' or your own classes"
                )
            groups = groups_of(by, chosen, number, _tokens(model, prompt, one.tokens))
            for some in _by_rows(chosen[:, 0]):
                for own, cells in pair_cells(one, chosen[some], against):
                    gathered.add(number, [groups[i] for i in some[own].tolist()], cells)
            advance(1)
    return gathered.result(
        head=place,
        against=against,
        pairs=told(pairs),
        prompts=len(read),
        seed=seed,
        model=model.name,
        by="" if by is None else by if isinstance(by, str) else "classes",
    )


class Cells(NamedTuple):
    """Pairs taken apart; numpy, float64: [pairs, query parts, key parts] and [pairs]."""

    names: tuple[tuple[str, ...], tuple[str, ...]]
    values: np.ndarray
    contrast: np.ndarray
    content: np.ndarray
    logit: np.ndarray
    average: np.ndarray
    mass: np.ndarray
    even: np.ndarray
    slope: np.ndarray
    error: float


def pair_cells(
    head: Head, pairs: Tensor, against: Against = "keys"
) -> Iterator[tuple[Tensor, Cells]]:
    """Cells of pairs [pairs, 2] of one prompt, with few queries among them: numbers of some pairs, and theirs."""
    pairs = pairs.to(head.key.device)
    rows, row_of = pairs[:, 0].unique(return_inverse=True)
    keys, key_of = pairs[:, 1].unique(return_inverse=True)
    weights = _weights(head, rows, against)
    parts = take_apart(head, rows, keys, weights)
    at = torch.stack([row_of, key_of], 1)
    products = len(parts.names[0]) * len(parts.names[1])  # of a pair
    for own in torch.arange(len(pairs)).split(max(1, _PRODUCTS // products)):
        yield own, _cells(parts, rows, keys, at[own.to(at.device)], weights)


def _weights(head: Head, rows: Tensor, against: Against) -> Tensor:
    """[rows, tokens] of the keys that a row's pairs are held against; what is lacking to 1 is the learned sink's.

    Raises:
        LensError: a key that a row does not see, or an unknown word.
    """
    seen = head.call.mask.seen_by(rows, head.tokens).double()
    if isinstance(against, str):
        return head.rows(rows) if against == "attention" else seen / seen.sum(-1, keepdim=True)
    other = _place("against", against, head.tokens)
    if not bool(seen[:, other].all()):
        raise LensError(f"against must be a key that the query sees, got {against}")
    return torch.zeros_like(seen).index_fill(1, torch.tensor([other], device=seen.device), 1.0)


def _cells(
    parts: Parts, rows: Tensor, keys: Tensor, at: Tensor, weights: Tensor, *, sink: bool = False
) -> Cells:
    """Cells of pairs; `at` [pairs, 2] says which of the rows and of the keys; `sink`: the key is the learned sink."""
    head, scale = parts.head, parts.head.call.scale
    at = at.to(rows.device)
    row, column = at[:, 0], at[:, 1]
    attention, logits, bias = head.rows(rows), head.logits(rows), head.bias(rows)
    query = parts.queries.transpose(0, 1)[row] * scale  # [pairs, parts, width]
    # The key as it would be at the query's place: both turned alike, which is not turned at all.
    flat = parts.unturned.transpose(0, 1)[column]
    flat = head.rotation.turned(flat.transpose(0, 1), rows[row]).transpose(0, 1)
    values = query @ parts.keys.transpose(0, 1)[column].transpose(1, 2)
    content = query @ flat.transpose(1, 2)
    average = query @ parts.mean.transpose(0, 1)[row].transpose(1, 2)
    if sink:
        values, content = torch.zeros_like(values), torch.zeros_like(content)
    contrast = values - average
    own = logits[row, keys[column]]
    mass = attention[row, keys[column]]
    even = 1 / (head.call.mask.seen_by(rows, head.tokens).sum(-1)[row] + (head.sink is not None))
    mean = (weights * logits).sum(-1)[row]
    found = [values, contrast, content]
    names = parts.names
    if head.call.position_bias is not None:
        # As above, of the key at the query's own place.
        there, beside = (
            torch.zeros_like(own) if sink else bias[row, key] for key in (keys[column], rows[row])
        )
        found = _with_cell(found, (there, there - (weights * bias).sum(-1)[row], beside))
        names = ((*names[0], POSITION_BIAS), (*names[1], POSITION_BIAS))
    if head.sink is not None:
        rest = 1 - weights.sum(-1)[row]  # of the sink
        here = torch.full_like(own, head.sink) if sink else torch.zeros_like(own)
        found = _with_cell(found, (here, here - rest * head.sink, here))
        names = ((*names[0], LEARNED_SINK), (*names[1], LEARNED_SINK))
        mean = mean + rest * head.sink
        if sink:
            own, mass = here, 1 - attention.sum(-1)[row]
    sums = ((found[0].sum((1, 2)), own), (found[1].sum((1, 2)), own - mean))
    error = max(float((one - other).abs().max()) for one, other in sums)
    cap = head.call.softcap
    slope = torch.ones_like(own) if cap is None or sink else 1 - (own / cap).tanh() ** 2
    values, contrast, content = (one.cpu().numpy() for one in found)
    logit, average, mass, even, slope = (
        one.double().cpu().numpy() for one in (own, mean, mass, even, slope)
    )
    return Cells(names, values, contrast, content, logit, average, mass, even, slope, error)


def _with_cell(found: list[Tensor], cells: tuple[Tensor, ...]) -> list[Tensor]:
    """Each [pairs, a, b] with one more part on both sides, whose only product is its own."""
    more = []
    for one, cell in zip(found, cells, strict=True):
        one = torch.nn.functional.pad(one, (0, 1, 0, 1))
        one[:, -1, -1] = cell
        more.append(one)
    return more


class _Gathered:
    """Sums of cells by group and prompt."""

    def __init__(self) -> None:
        self._names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self._sums: dict[tuple[str, int], list[np.ndarray]] = {}
        self._error = 0.0

    def add(self, prompt: int, groups: Sequence[str], cells: Cells) -> None:
        """Pairs of one prompt, with the group of each.

        Raises:
            LensError: groups of more products than are kept.
        """
        self._names, self._error = cells.names, max(self._error, cells.error)
        for group in dict.fromkeys(groups):
            some = np.array([one == group for one in groups])
            arrays = (cells.values, cells.contrast, cells.content, np.abs(cells.contrast))
            sums = [array[some].sum(0) for array in arrays]
            above = cells.logit - cells.average
            sums += [one[some].sum() for one in (cells.mass, cells.even, above)] + [some.sum()]
            found = self._sums.setdefault((group, prompt), [np.zeros_like(one) for one in sums])
            self._sums[group, prompt] = [one + more for one, more in zip(found, sums, strict=True)]
        many = len({name for name, _ in self._sums})
        kept = many * (prompt + 1) * cells.values[0].size  # also of groups that a prompt has not
        if kept > _KEPT:
            raise LensError(
                f"{many} groups of {prompt + 1} prompts have {kept:,} products of parts, "
                f"more than the {_KEPT:,} that are kept; take fewer prompts, or fewer groups (by='class', or your own)"
            )

    def result(self, *, prompts: int, pairs: str, **said: Any) -> PairExplanation:
        """Means over the pairs of each group and prompt.

        Raises:
            LensError: there is no pair.
        """
        if not self._sums:
            raise LensError(
                f"no prompt has any of {pairs}; take prompts in which tokens come again, or give the pairs"
            )
        groups = sorted({group for group, _ in self._sums}, key=rank)
        count = np.zeros((len(groups), prompts), int)
        for (group, prompt), sums in self._sums.items():
            count[groups.index(group), prompt] = sums.pop()
        means = {name: self._last(groups, count) for name in reversed(_SUMMED)}
        return PairExplanation(
            groups=tuple(groups),
            pairs=pairs,
            parts=self._names,
            count=count,
            error=self._error,
            **means,
            **said,
        )

    def _last(self, groups: list[str], count: np.ndarray) -> np.ndarray:
        """[groups, prompts, ...], the last sum over its number of pairs; it is let go of, so that nothing is held twice."""
        found = np.empty(0)
        for (group, prompt), sums in self._sums.items():
            at, last = (groups.index(group), prompt), np.asarray(sums.pop())
            if not found.size:
                found = np.full((*count.shape, *last.shape), np.nan)
            found[at] = last / count[at]
        return found


def _by_rows(queries: Tensor) -> list[Tensor]:
    """Numbers of pairs, so many together that they have few queries; queries in their order."""
    row = queries.unique_consecutive(return_inverse=True)[1] if len(queries) else queries
    return [(row // _ROWS == part).nonzero()[:, 0] for part in (row // _ROWS).unique().tolist()]


def _looks(parts: Parts, tokens: Sequence[str], which: int) -> dict[str, str]:
    """Of each earlier head where it looks most, from the query (0) or from the key (1), in words."""
    found = {name: places[which] for name, places in parts.sources.items()}
    return {name: f"{tokens[key]!r} at {key}, {mass:.2f}" for name, (key, mass) in found.items()}


def _place(name: str, place: Any, tokens: int) -> int:
    if not is_whole(place) or not -tokens <= place < tokens:
        raise LensError(
            f"{name} must be a place from 0 to {tokens - 1}, or -1 for the last; got {place!r}"
        )
    return int(place) % tokens


def _tokens(model: LoadedModel, prompt: Prompt, count: int) -> list[str]:
    """Of each place, what stands there."""
    ids = prompt.ids if prompt.ids is not None and len(prompt.ids) == count else None
    return [str(place) for place in range(count)] if ids is None else model.token_strings(ids)
