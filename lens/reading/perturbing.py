"""How far attention can be changed: with the same output, and with the loss that grows most.

A row of attention that differs by a part in the null space of the head's values (and of ones) writes the same, so
it explains nothing that another row would not. And a small change of attention logits along the gradient of the
loss, beside a random one of the same size, says how much the answer hangs on where one head looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from lens.common.choices import Count, Seed, check_between, check_counts, check_lists
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId
from lens.common.progress import advancing
from lens.heads.pruning.distances import jensen_shannon
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall
from lens.passes.inputs import read_prompts
from lens.reading._answers import Answer, check_tokens
from lens.reading._relevance import Gradients
from lens.reading._rows import dense, with_values
from lens.reading.robustness import Adversaries, Robustness
from lens.stats.controls import drawing


def adversary(
    model: LoadedModel,
    prompts: Any,
    heads: Sequence[AnyHead] | None = None,
    *,
    draws: int = 20,
    seed: Seed = 0,
    progress: bool = True,
) -> Adversaries:
    """Of each head the row of the answering query that differs most from its own and has the same output.

    Rows with the same output and sum, and no negative entry, are a polytope; a divergence that is convex is
    largest at one of its corners, of which `draws + 1` are found by linear programs: one that takes as much as it
    can from where the head looks, others in random directions. So it is a lower bound of the largest. The row is put into
    the model, and even attention beside it.

    Args:
        model: as in `attribute`.
        prompts: one or several, of tokens.
        heads: such as "L1H3"; None: all.
        draws: random directions.
        seed: of them; those of a head on a prompt are the same whatever else is asked for.
        progress: show a bar, on stderr, if that is a terminal.

    Reference: Jain and Wallace, Attention is not Explanation, 2019, arXiv 1902.10186; here in closed form.

    Raises:
        LensError: as `attribute`, a head that the model has not got, or draws below 0.

    Example:
        >>> found = lens.reading.adversary(model, texts[0], ["L0H1"], draws=2)
        >>> bool(found.error.max() < 1e-6)
        True
    """
    check_counts(0, draws=draws)
    chosen, (read, _) = _heads(model, heads), read_prompts(model, prompts)
    check_tokens(read)
    rows: list[list[np.ndarray]] = [[] for _ in chosen]
    others: list[list[np.ndarray]] = [[] for _ in chosen]
    numbers = np.zeros((6, len(chosen), len(read)))
    with advancing(f"{model.name}: other attention", len(chosen) * len(read), progress) as advance:
        for number, prompt in enumerate(read):
            answer = Answer(model, torch.tensor(prompt.ids))
            found = Gradients(answer)
            clean = _loss(answer, None)
            for place, head in enumerate(chosen):
                row = found.attention[head.layer][0][head.head, answer.row].cpu().numpy()
                values = found.values[head.layer][head.head].cpu().numpy()
                seen = row > 0
                drawn = drawing(seed, head.layer, head.head, prompt.inputs_sha256)
                free, other = _furthest(row, values, draws, drawn)
                even = seen * row.sum() / seen.sum()
                written = row @ values
                error = np.abs((other - row) @ values).max() / max(np.abs(written).max(), 1e-30)
                numbers[:, place, number] = [
                    _divergence(row, other),
                    _divergence(row, even),
                    free,
                    error,
                    *(_loss(answer, head, row=one) - clean for one in (other, even)),
                ]
                rows[place].append(row)
                others[place].append(other)
                advance(1)
    divergence, uniform, free, error, change, uniform_change = numbers
    return Adversaries(
        heads=tuple(chosen),
        attention=tuple(map(tuple, rows)),
        other=tuple(map(tuple, others)),
        divergence=divergence,
        uniform=uniform,
        free=free.astype(int),
        error=error,
        change=change,
        uniform_change=uniform_change,
        seed=seed,
        model=model.name,
    )


def _furthest(
    row: np.ndarray, values: np.ndarray, draws: int, random: np.random.Generator
) -> tuple[int, np.ndarray]:
    """Dimensions that are free, and the row [keys] with the same output that differs most of the corners that are found."""
    seen = np.flatnonzero(row > 0)
    fixed = np.concatenate([values[seen], np.ones((len(seen), 1))], 1).T
    free = len(seen) - int(np.linalg.matrix_rank(fixed))
    best, most = row, 0.0
    if free:
        for goal in (row[seen], *random.normal(size=(draws, len(seen)))):
            solved = linprog(goal, A_eq=fixed, b_eq=fixed @ row[seen], bounds=(0, None))
            if solved.x is None:
                continue
            other = np.zeros_like(row)
            other[seen] = solved.x.clip(min=0)  # the solver is off by its tolerance
            if (apart := _divergence(row, other)) > most:
                best, most = other, apart
    return free, best


def perturb(
    model: LoadedModel,
    prompts: Any,
    heads: Sequence[AnyHead] | None = None,
    *,
    along: Literal["logits", "pairs"] = "logits",
    sizes: Sequence[float] = (0.5, 1.0, 2.0),
    draws: Count = 3,
    seed: Seed = 0,
    progress: bool = True,
) -> Robustness:
    """Loss of the model's own answer when the attention logits of one head at a time are changed.

    Args:
        model: as in `attribute`.
        prompts: one or several, of tokens.
        heads: such as "L1H3"; None: all.
        along: "logits", any change (AT); "pairs", from one token to another alike in every row that sees them (iAT's word
            pairs): the pair that the gradient says costs most, beside random pairs.
        sizes: of the change, L2 over the logits of the head that are seen (in the last layer by the query that answers), nats.
        draws: random directions over the same logits.
        seed: of them; those of a head on a prompt are the same whatever else is asked for.
        progress: show a bar, on stderr, if that is a terminal.

    Reference: Kitada and Iyatomi, Attention Meets Perturbations, 2021, arXiv 2009.12064 (AT and iAT; their
        training is not done).

    Raises:
        LensError: as `attribute`, sizes that are not positive or named twice, or no draws.

    Example:
        >>> lens.reading.perturb(small, lens.tasks.copied(small, 8), ["L1H0"], sizes=[1.0], draws=1).table()
    """
    check_between(0, float("inf"), sizes=sizes)
    if len(set(sizes)) < len(sizes):
        raise LensError(f"sizes has one twice: {', '.join(f'{one:g}' for one in sizes)}")
    chosen, (read, _) = _heads(model, heads), read_prompts(model, prompts)
    check_tokens(read)
    worst = np.zeros((len(chosen), len(sizes), len(read)))
    random = np.zeros_like(worst)
    with advancing(f"{model.name}: perturbed", len(read), progress) as advance:
        for number, prompt in enumerate(read):
            answer = Answer(model, torch.tensor(prompt.ids))
            found = Gradients(answer, of_loss=True)
            clean = _loss(answer, None)
            for place, head in enumerate(chosen):
                slope, seen = found.scores[head.layer][head.head], found.seen[head.layer]
                drawn = drawing(seed, head.layer, head.head, prompt.inputs_sha256)
                if along == "pairs":
                    directions = _pairs(slope, seen, draws, drawn)
                else:
                    directions = [-slope]  # the loss grows where the logit falls
                    for _ in range(draws):
                        way = torch.from_numpy(drawn.normal(size=slope.shape))
                        directions.append(way.to(slope) * seen)
                for step, size in enumerate(sizes):
                    lost = [
                        _loss(answer, head, change=size * _unit(one)) - clean for one in directions
                    ]
                    worst[place, step, number] = lost[0]
                    random[place, step, number] = np.mean(lost[1:])
            advance(1)
    return Robustness(tuple(chosen), tuple(sizes), worst, random, seed, model.name, along)


def _pairs(slope: Tensor, seen: Tensor, draws: int, random: np.random.Generator) -> list[Tensor]:
    """Changes [queries, keys] that raise one key and lower another in all rows that see both: first the worst; no change
    where fewer than two keys are seen."""
    keys = seen.any(0).nonzero()[:, 0]
    if len(keys) < 2:
        return [torch.zeros_like(slope)] * (draws + 1)
    columns = slope.sum(0)[keys]
    chosen = [(int(columns.argmin()), int(columns.argmax()))]  # loss grows where the logit falls
    chosen += [tuple(random.permutation(len(keys))[:2].tolist()) for _ in range(draws)]
    found = []
    for one, other in chosen:
        up, down = int(keys[one]), int(keys[other])
        both = (seen[:, up] & seen[:, down]).to(slope)
        change = torch.zeros_like(slope)
        change[:, up] += both
        change[:, down] -= both
        found.append(change)
    return found


def _heads(model: LoadedModel, heads: Sequence[AnyHead] | None) -> list[HeadId]:
    """Those that are asked for, each once; all of them for None.

    Raises:
        LensError: none at all, or one that the model has not got.
    """
    if heads is None:
        return list(model.info.every_head)
    check_lists(heads=heads)
    chosen = list(dict.fromkeys(model.info.head(one) for one in heads))
    if not chosen:
        raise LensError("heads names none; leave it out for all of them")
    return chosen


def _loss(
    answer: Answer,
    head: HeadId | None,
    *,
    change: Tensor | None = None,
    row: np.ndarray | None = None,
) -> float:
    """Minus log probability of the answer; with the logits of one head changed, or another row of the query that answers."""

    def on_layer(call: LayerCall) -> Tensor:
        if head is None or call.layer != head.layer:
            return with_values(call, dense(call)[1])
        added = None
        if change is not None:
            added = torch.zeros_like(change).expand(call.query.shape[1], -1, -1).clone()
            added[head.head] = change
        attention = dense(call, added)[1]
        if row is not None:
            attention[:, head.head, answer.row] = torch.from_numpy(row).to(attention)
        return with_values(call, attention)

    with torch.no_grad():
        logits = answer.logits(answer.own[None], on_layer)[0]
    return -float(logits.log_softmax(-1)[answer.answer])


def _unit(direction: Tensor) -> Tensor:
    return direction / direction.norm().clamp(min=1e-30)


def _divergence(one: np.ndarray, other: np.ndarray) -> float:
    """Jensen-Shannon divergence, nats."""
    return float(jensen_shannon(*(torch.from_numpy(row).log() for row in (one, other))))
