"""Which directions of its queries a head tells its keys by: found by contrast, judged by taking them out.

From pairs (query, key) of some prompts: `C = mean of q (k - mean of the other keys that q sees)^T`, queries and keys as
the attention gets them; the left singular vectors are directions in which queries meet these keys and not others.
On the other prompts the head's queries lose the first of them, and the model runs. A drop alone proves nothing:
beside it stand as many principal components of the queries, of the keys, random directions, those of another head,
and what the same removal does to other pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import Count, Seed, check_counts, check_lists
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId
from lens.common.progress import advancing
from lens.edits.running import edit
from lens.edits.subspaces import Subspace
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.logits import check_predicts_tokens, logits_of
from lens.passes.replay import proved
from lens.reading._head import Head, read_head
from lens.reading._pairs import Kind, Pairs, pairs_of
from lens.reading.directions import BASES, SubspaceRemovals

_ENERGY = 0.99  # of the squared contrast, that the directions hold where no rank is given


def subspace(
    model: LoadedModel,
    prompts: Any,
    head: AnyHead,
    pairs: Kind = "induction",
    *,
    labels: Sequence[Sequence[Any]] | None = None,
    beside: Kind = "previous",
    rank: int | None = None,
    draws: Count = 5,
    seed: Seed = 0,
    progress: bool = True,
) -> SubspaceRemovals:
    """Take the directions out that tell the keys of a kind from others, beside controls of the same rank.

    Directions come from every other prompt, numbers from the rest.

    Args:
        model: as in `lens.reading.explain`, predicting next tokens.
        prompts: at least two, of tokens.
        head: such as "L1H3".
        pairs: as in `explain_pairs`; "strongest" needs no labels.
        labels: instead of `pairs` your own: for each prompt one label per token; a query's keys are the earlier tokens
            that have its label (None: of no pair).
        beside: pairs of another kind, whose attention a specific removal leaves alone.
        rank: directions that are taken out; None: as many as hold 99 % of the squared contrast, at most half.
        draws: random bases.
        seed: of the draws and of the bootstrap.
        progress: show a bar, on stderr, if that is a terminal.

    Reference: contrastive covariance, 2026, arXiv 2602.04752 (uncentred, as there).

    Raises:
        LensError: one prompt, no such pairs in those that directions come from or in the rest, a rank that the head has not got, or as `explain_pairs`.

    Example:
        >>> prompts = [lens.tasks.copied(small, 12, seed) for seed in range(4)]
        >>> lens.reading.subspace(small, prompts, "L1H0", rank=4, draws=2).table()["basis"].tolist()
        ['contrast', 'queries', 'keys', 'other head', 'random']
    """
    check_predicts_tokens(model)
    if rank is not None:
        check_counts(rank=rank)
    read, _ = read_prompts(model, prompts)
    if len(read) < 2:
        raise LensError(
            "subspace needs at least two prompts: some to find directions, others to judge them"
        )
    chosen: Sequence[Pairs] = [pairs] * len(read)
    if labels is not None:
        chosen = [[one] for one in _labelled(labels, [len(prompt.ids or ()) for prompt in read])]
    layout, place = proved(model), model.info.head(head)
    other = HeadId(place.layer, (place.head + 1) % model.info.heads)
    width = model.info.head_dim
    judging = f"{model.name}: {place}", len(read) // 2, progress  # the others give the directions
    with advancing(*judging) as advance, torch.no_grad():
        found = {
            one: _found(
                [read_head(layout, prompt.inputs, one) for prompt in read[::2]], chosen[::2]
            )
            for one in dict.fromkeys((place, other))
        }
        contrast, queries, keys = found[place]
        left, sizes, _ = torch.linalg.svd(contrast)
        share = sizes.square().cumsum(0) / sizes.square().sum().clamp(min=1e-30)
        count = rank or min(int((share < _ENERGY).sum()) + 1, max(1, width // 2))
        if not 1 <= count < len(left):
            raise LensError(f"rank must be 1 to {len(left) - 1}, got {rank}")
        generator = torch.Generator().manual_seed(seed)
        bases: list[Tensor | None] = [
            left[:, :count],
            torch.linalg.eigh(queries).eigenvectors[:, -count:],
            torch.linalg.eigh(keys).eigenvectors[:, -count:],
            None if other == place else torch.linalg.svd(found[other][0]).U[:, :count],
        ]
        for _ in range(draws):
            drawn = torch.randn(len(left), count, generator=generator, dtype=left.dtype)
            bases.append(torch.linalg.qr(drawn.to(left.device)).Q)
        judged: list[np.ndarray] = []
        for prompt, asked in zip(read[1::2], chosen[1::2], strict=False):
            one = read_head(layout, prompt.inputs, place)
            judged.append(_judged(model, one, prompt, asked, beside, bases))
            advance(1)
    numbers = np.stack(judged, -1)  # [measure, basis, prompt]
    if np.isnan(numbers[0, 0]).all():
        raise LensError(
            f"none of the {len(judged)} prompts that directions are judged on (every other one) has such pairs"
        )
    named = len(BASES) - 1  # the random ones come behind
    chance = numbers[:, named:].mean(1, keepdims=True)
    means = np.concatenate([numbers[:, :named], chance], 1)
    return SubspaceRemovals(
        head=place,
        pairs=pairs if labels is None else "labelled",
        beside=beside,
        rank=count,
        width=len(left),
        mass=means[0],
        other=means[1],
        loss=means[2],
        spectrum=sizes.cpu().numpy(),
        basis=left[:, :count].cpu().numpy(),
        seed=seed,
        model=model.name,
    )


def _labelled(labels: Sequence[Sequence[Any]], lengths: Sequence[int]) -> list[list[list[int]]]:
    """Of each prompt the pairs (query, earlier key) with one label.

    Raises:
        LensError: labels for other prompts, or not one per token.
    """
    check_lists(labels=labels)
    if [len(own) for own in labels] != list(lengths):
        raise LensError(
            f"labels must be one per token of each of {len(lengths)} prompts of {list(lengths)} tokens, got "
            f"{[len(own) for own in labels]}"
        )
    return [
        [
            [query, key]
            for query, label in enumerate(own)
            for key in range(query)
            if label is not None and own[key] == label
        ]
        for own in labels
    ]


def _found(heads: Sequence[Head], pairs: Sequence[Pairs]) -> tuple[Tensor, Tensor, Tensor]:
    """Contrast [width, width], and second moments of the queries of the pairs and of all keys.

    Raises:
        LensError: no such pairs.
    """
    contrast, queries, keys, count = 0.0, 0.0, 0.0, 0
    for head, asked in zip(heads, pairs, strict=True):
        chosen = pairs_of(head, asked, 0).to(head.key.device)
        if not len(chosen):
            continue
        query, key = head.query[chosen[:, 0]], head.key[chosen[:, 1]]
        seen = head.call.mask.seen_by(chosen[:, 0], head.tokens).double()
        seen[torch.arange(len(chosen)), chosen[:, 1]] = 0
        some = seen.sum(-1) > 0  # a query that sees one key alone tells it from nothing
        rest = seen @ head.key / seen.sum(-1, keepdim=True).clamp(min=1)
        contrast = contrast + query[some].T @ (key - rest)[some]
        queries, keys = queries + query.T @ query, keys + head.key.T @ head.key
        count += len(chosen)
    if not count:
        raise LensError(
            f"no prompt has any {pairs[0]!r} pairs; take prompts in which tokens come again"
            if isinstance(pairs[0], str)
            else "no two tokens of the prompts that directions come from have one label"
        )
    assert isinstance(contrast, Tensor)
    assert isinstance(queries, Tensor)
    assert isinstance(keys, Tensor)
    return contrast / count, queries, keys


def _judged(
    model: LoadedModel,
    head: Head,
    prompt: Prompt,
    pairs: Pairs,
    beside: Kind,
    bases: Sequence[Tensor | None],
) -> np.ndarray:
    """[measure, basis]: attention to the pairs, to the others, and next-token loss at the queries of the pairs; NaN where
    there are none, or no basis."""
    chosen, others = (pairs_of(head, kind, 0).to(head.key.device) for kind in (pairs, beside))
    width = head.query.shape[1]
    found = np.full((3, len(bases) + 1), np.nan)
    nothing = torch.zeros(width, 1, dtype=head.query.dtype, device=head.query.device)
    for place, basis in enumerate([nothing, *bases]):
        if basis is None:
            continue
        for row, some in enumerate((chosen, others)):
            if len(some):
                found[row, place] = _mass(head, some, basis)
        rows = chosen[:, 0].unique()
        rows = rows[rows < head.tokens - 1]
        if len(rows):
            found[2, place] = _loss(model, head, prompt, rows, basis)
    return found


def _mass(head: Head, pairs: Tensor, basis: Tensor) -> float:
    rows, at = pairs[:, 0].unique(return_inverse=True)
    away = (head.query[rows] @ basis) @ basis.T @ head.key.T
    return float(
        head.rows(rows, head.logits(rows) - head.call.scale * away)[at, pairs[:, 1]].mean()
    )


def _loss(model: LoadedModel, head: Head, prompt: Prompt, rows: Tensor, basis: Tensor) -> float:
    """Mean next-token loss at these rows when the model runs without the directions in the head's queries."""

    ids = prompt.inputs["input_ids"]
    edits = [Subspace(basis, heads=[head.id])] if bool(basis.any()) else []
    with edit(head.layout.model, *edits):
        logits = logits_of(head.layout.model, ids)[0].float()
    correct = ids[0, rows + 1]
    return -float(logits[rows].log_softmax(-1)[torch.arange(len(rows)), correct].mean())
