"""The singular components of a head's maps, and the share of each in what the head does.

Queries and keys meet in one bilinear map, `x_i W_Q R W_K^T x_j` with R the rotary embedding of their
distance; its singular vectors pair a direction that queries read with one that keys read. Values and output
make a second one, `x_j W_V W_O`. Both have the rank of a head, so small decompositions of the head's width give
them: `W_Q = Q_q T_q`, `W_K = Q_k T_k`, SVD of `T_q R T_k^T`. Scales of the norm before the head are folded in,
biases are one more coordinate, norms of queries and keys keep the sizes of the whole.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import Seed, check_counts
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.models.parts import Block, Norm
from lens.passes.inputs import read_prompts
from lens.passes.replay import proved
from lens.reading._head import Head, read_head
from lens.reading._pairs import Pairs, check_pairs, pairs_of, told
from lens.reading._writers import of_head
from lens.reading.shares import ComponentShares

_ROWS = 128


def components(
    model: LoadedModel,
    prompts: Any,
    head: AnyHead,
    pairs: Pairs = "induction",
    *,
    distance: int | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> ComponentShares:
    """Which singular components of a head carry its logits on pairs of a kind, and its output.

    With rotary embedding the map depends on the distance between query and key, so pairs of one distance
    are taken.

    Args:
        model: as in `lens.reading.explain`.
        prompts: one or several; intervals are over prompts.
        head: such as "L1H3".
        pairs: as in `explain_pairs`.
        distance: of the pairs, where the head has rotary embedding; None: the commonest.
        seed: of the bootstrap.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: as `explain_pairs`, or no pair of that distance.

    Example:
        >>> prompts = [lens.tasks.copied(small, 12, seed) for seed in range(3)]
        >>> found = lens.reading.components(small, prompts, "L1H0")
        >>> float(found.table()["share"].sum().round(6))
        2.0
    """
    read, _ = read_prompts(model, prompts, whole=True)
    check_pairs(pairs, len(read))
    if distance is not None:
        check_counts(0, distance=distance)
    layout, place = proved(model), model.info.head(head)
    heads, chosen = [], []
    with advancing(f"{model.name}: {place}", len(read), progress) as advance, torch.no_grad():
        for number, prompt in enumerate(read):
            heads.append(read_head(layout, prompt.inputs, place))
            chosen.append(pairs_of(heads[-1], pairs, number))
            advance(1)
        at = _distance(heads, chosen, distance)
        logits, outputs, count = [], [], 0
        singular: tuple[Tensor, Tensor] | None = None
        for one, some in zip(heads, chosen, strict=True):
            some = some if at is None else some[some[:, 0] - some[:, 1] == at]
            if not len(some):
                continue
            count += len(some)
            maps = _QueryMap(one, at or 0), _OutputMap(one)
            singular = maps[0].singular, maps[1].singular
            logits.append(maps[0].carried(some))
            outputs.append(maps[1].carried(some[:, 0].unique()))
    if singular is None:
        raise LensError(
            f"no prompt has such pairs{'' if distance is None else f' at a distance of {distance}'}; give other "
            "prompts, pairs or distances"
        )
    return ComponentShares(
        head=place,
        distance=at,
        pairs=told(pairs),
        values=(singular[0].cpu().numpy(), singular[1].cpu().numpy()),
        logits=np.stack(logits, 1),
        energy=np.stack(outputs, 1),
        count=count,
        seed=seed,
        model=model.name,
    )


def _distance(heads: list[Head], chosen: list[Tensor], asked: int | None) -> int | None:
    """Of the pairs, or None where it does not matter."""
    if not any(head.rotation.turns for head in heads):
        return None
    if asked is not None:
        return asked
    counts = Counter(int(gap) for pairs in chosen for gap in (pairs[:, 0] - pairs[:, 1]).tolist())
    return counts.most_common(1)[0][0] if counts else None


class _QueryMap:
    """The map of queries and keys at one distance.

    A query is `T_q^T a` with a its coordinates along what W_Q reads, so component r of any logit of its
    row is `(u_r·a) (u_r·T_q R^T k)`: at the chosen distance that is singular value × query × key.
    """

    def __init__(self, head: Head, distance: int) -> None:
        self._head = head
        block = head.layout.blocks[head.id.layer]
        places = (head.id.head, head.group)
        query, key = (
            _triangle(_read(block, part, places[part], of_head(norm, places[part], head)))
            * head.rotation.factors[part]
            for part, norm in enumerate(block.head_norms)
        )
        width = head.key.shape[-1]
        eye = torch.eye(width, dtype=torch.float64, device=head.key.device)
        first = torch.zeros(width, dtype=torch.long, device=head.key.device)
        at = first + min(abs(distance), head.tokens - 1)
        places = (at, first) if distance >= 0 else (first, at)  # behind its key, or before it
        turn = head.rotation.turned(eye, places[0]) @ head.rotation.turned(eye, places[1]).T
        # Rows are unit vectors: entry (a, b) is what query coordinate a at `distance` and key coordinate b give.
        found = torch.linalg.svd(query @ turn @ key.T, full_matrices=False)
        self.singular = found.S * head.call.scale
        self._left, self._query = found.U, query

    def carried(self, pairs: Tensor) -> np.ndarray:
        """[components]: mean over the pairs of each one's part of the logit, less its mean over the row's keys."""
        head, found = self._head, []
        for some in pairs.to(head.key.device).split(_ROWS):
            rows, keys = some[:, 0], some[:, 1]
            seen = head.call.mask.seen_by(rows, head.tokens).double()
            mean = (seen / seen.sum(-1, keepdim=True)) @ head.key
            away = head.key[keys] - mean
            turned = head.rotation.transposed().turned(away, rows)
            query = head.rotation.transposed(inverse=True).turned(head.query[rows], rows)
            coordinates = query @ torch.linalg.pinv(self._query)
            sides = coordinates @ self._left, turned @ self._query.T @ self._left
            found.append(head.call.scale * sides[0] * sides[1])
        return torch.cat(found).mean(0).cpu().numpy()


class _OutputMap:
    """The map of values and output."""

    def __init__(self, head: Head) -> None:
        self._head = head
        block = head.layout.blocks[head.id.layer]
        weight = block.norm.fold(block.weights[2][0][head.group].double())
        output = _triangle(block.output[head.id.head].double().T)  # [width, width]
        found = torch.linalg.svd(_triangle(weight) @ output.T, full_matrices=False)
        self.singular = found.S
        self._right, self._output = found.Vh.T, output
        bias, shift = block.weights[2][1], block.norm.shift
        self._bias = torch.zeros_like(weight[:1])
        if bias is not None:
            self._bias = self._bias + bias[head.group].double()
        if shift is not None:
            self._bias = self._bias + shift.double() @ block.weights[2][0][head.group].double()

    def carried(self, rows: Tensor) -> np.ndarray:
        """[components]: share of each in the square of what the head writes at these rows, less the value bias."""
        head, energy = self._head, 0.0
        value = head.call.value[0, head.group].double() - self._bias
        for some in rows.to(head.key.device).split(_ROWS):
            written = head.rows(some) @ value @ self._output.T @ self._right
            energy = energy + written.square().sum(0)
        assert isinstance(energy, Tensor)
        return (energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)).cpu().numpy()


def _read(block: Block, part: int, place: int, norm: Norm) -> Tensor:
    """[inputs, width]: what queries (part 0) or keys (1) are of the stream over its size, of 1 over the size of the
    norm of the head, and of 1."""
    weight, bias = block.weights[part]
    rows = [block.norm.fold(weight[place].double())]
    constant = torch.zeros_like(rows[0][:1])
    if block.norm.shift is not None:
        constant = constant + block.norm.shift.double() @ weight[place].double()
    if bias is not None:
        constant = constant + bias[place].double()
    rows.append(constant)
    found = torch.cat(rows)
    found = norm.frozen(found, torch.ones_like(found[:, :1]))
    return found if norm.shift is None else torch.cat([found, norm.shift.double()[None]])


def _triangle(matrix: Tensor) -> Tensor:
    """T of `matrix = Q T`, [min, width]: the same singular values and right directions in few rows."""
    return torch.linalg.qr(matrix, mode="r").R
