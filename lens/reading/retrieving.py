"""Retrieval heads by three definitions on the same trials, and what the model retrieves without them.

    literal  the key that the head looks at most is the needle's, and holds the token that is generated (Wu et al.)
    query    attention of the prompt's last tokens to the needle, less that of other tokens in their place (QRHead)
    output   what the head brings from the needle to the logit of the token that is generated, less what it brings
             from as many other tokens (LOCOS)

They disagree where a head looks and does not write, or writes without looking most. Which heads the task rests on
is what masking says: the same trials without the first k heads of each list, beside as many random ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import Count, Seed, check_counts, check_lists
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.progress import advancing
from lens.edits.parts import Ablate
from lens.edits.running import edit
from lens.heads.behaviour.retrieval import fetched, succeeded
from lens.models.loaded import LoadedModel
from lens.models.vocabulary import ordinary_ids
from lens.passes.calls import LayerCall, attend, of_heads
from lens.passes.replay import proved
from lens.passes.sessions import base, listening
from lens.reading._rows import row_at
from lens.reading.retrieved import KINDS, RetrievalKinds
from lens.stats.controls import drawing
from lens.tasks.needles import Trial, answered

_STEEP = 2.0  # standard deviations below the mean, under which a token of the needle does not count (QRHead)


def retrieval(
    model: LoadedModel,
    trials: Sequence[Trial],
    *,
    question: Count = 1,
    needed: float = 0.5,
    masked: Sequence[int] = (1, 2, 4),
    draws: Count = 5,
    seed: Seed = 0,
    progress: bool = True,
) -> RetrievalKinds:
    """Score every head as a retrieval head in three ways, and mask the best of each.

    Masked heads give nothing (their outputs are zero) at prefill and in every step; random heads are drawn from
    those that are in no list's first k, and where there are fewer than k of them there is no such control.

    Args:
        model: causal, with an unembedding that heads write into.
        trials: of `lens.tasks.needles`, or your own.
        question: how many of the prompt's last tokens, all behind the needle, ask for it; in their place stand random
            ones that the prompt has not got, where QRHead takes "N/A".
        needed: trials with a larger recall count.
        masked: how many heads are masked together.
        draws: of random heads.
        seed: of the draws and of the bootstrap.
        progress: show a bar, on stderr, if that is a terminal.

    Reference: Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, 2024, arXiv 2404.15574;
        Zhang et al., Query-Focused Retrieval Heads, 2025, arXiv 2506.09944; LOCOS, 2026, arXiv 2607.01002 (raw
        unembedding, final norm left out, as there).

    Raises:
        LensError: no trials, none that succeeded, attention that is not causal, a question that reaches into the
            needle, numbers that are none, or more heads than half the model's.

    Example:
        >>> trials = lens.tasks.needles.copied(small, n=2, length=30)
        >>> lens.reading.retrieval(small, trials, masked=[1], draws=1).table()["name"].iloc[0]
        'L0H0'
    """
    check_lists(masked=masked)
    check_counts(**{f"masked[{place}]": count for place, count in enumerate(masked)})
    layout = proved(model)
    if layout.bends:
        raise LensError(
            f"a norm comes between what heads of {layout.kind} write and the logits, so what they bring to a token "
            "is not known here; lens.heads.retrieval scores such models by where they look"
        )
    heads = model.info.every_head
    if masked and 2 * max(masked) > len(heads):
        raise LensError(f"masked must be at most half of the {len(heads)} heads, got {max(masked)}")
    least = min((len(trial.prompt) - trial.needle[1] for trial in trials), default=question)
    if question > least:
        raise LensError(
            f"question must be at most {least}, the tokens behind the needle of a trial, got {question}"
        )
    counted, recall = succeeded(model, trials, needed, progress)
    unembedding = layout.unembed_weight().T  # [vocab, d_model]
    outputs = [block.output.float() for block in layout.blocks]
    scores = []
    with advancing(f"{model.name}: retrieval heads", len(counted), progress) as advance:
        for trial, answer in counted:
            keys, asked, brought = _answering(model, trial, answer, question, unembedding, outputs)
            drawn = drawing(seed, *trial.prompt)
            other = [*trial.prompt[:-question], *_absent(model, trial.prompt, question, drawn)]
            by_query = _calibrated(asked, _asking(model, trial, other, question))
            scores.append([fetched(keys, trial, answer), by_query, brought])
            advance(1)
    values = np.moveaxis(np.array(scores), 0, -1)
    order = [np.argsort(-kind.mean(-1).ravel(), kind="stable") for kind in values]
    kept = [trial for trial, _ in counted]
    recalls = _masked(model, kept, heads, order, tuple(masked), draws, seed, progress)
    return RetrievalKinds(
        values=values,
        masked=tuple(masked),
        clean=recall[recall > needed],
        recalls=recalls[: len(KINDS)],
        random=recalls[-1],
        trials=len(trials),
        seed=seed,
        model=model.name,
    )


def _absent(
    model: LoadedModel, prompt: Sequence[int], count: int, random: np.random.Generator
) -> list[int]:
    """Ordinary tokens that the prompt has not got, where there are enough."""
    ordinary = np.array(ordinary_ids(model))
    others = np.setdiff1d(ordinary, np.array(prompt))
    return random.choice(others if len(others) >= count else ordinary, count).tolist()


def _calibrated(own: np.ndarray, null: np.ndarray) -> np.ndarray:
    """[layer, head]: attention to the needle [layer, head, token], less that of other tokens, flat tokens left out."""
    calibrated = own - null
    if calibrated.shape[-1] > 1:
        spread = calibrated.std(-1, keepdims=True, ddof=1)
        low = calibrated <= calibrated.mean(-1, keepdims=True) - _STEEP * spread
        calibrated = np.where(low & (spread > 0), 0, calibrated)
    return calibrated.sum(-1)


def _asking(model: LoadedModel, trial: Trial, ids: list[int], question: int) -> np.ndarray:
    """[layer, head, token of the needle]: attention of the last `question` tokens to it, mean."""
    asked = torch.arange(len(ids) - question, len(ids))
    needle = slice(*trial.needle)
    (found,) = _rows(model, ids, asked, lambda call, rows: (rows[..., needle].mean(1),))
    return found


def _answering(
    model: LoadedModel,
    trial: Trial,
    answer: Sequence[int],
    question: int,
    unembedding: Tensor,
    outputs: Sequence[Tensor],
) -> tuple[np.ndarray, ...]:
    """What one pass over prompt and answer says of every head.

    Returns:
        [layer, head, step], the key that it looks at most; [layer, head, token of the needle], attention of the asking
        tokens to it; [layer, head], logit of each generated token that the needle brings, less as many of the other
        tokens', mean.
    """
    ids = [*trial.prompt, *answer[:-1]]
    size = len(trial.prompt)
    rows = torch.arange(size - question, len(ids))
    steps = rows[question - 1 :]  # the last of the prompt predicts the answer's first
    directions = unembedding[torch.tensor(list(answer), device=unembedding.device)]
    first, last = trial.needle
    count = last - first

    def of_layer(call: LayerCall, rows: Tensor) -> tuple[Tensor, ...]:
        asked = rows[:, :question, first:last].mean(1)
        rows = rows[:, question - 1 :]
        written = torch.einsum("hkd,td->htk", outputs[call.layer], directions.to(rows))
        value = of_heads(call, call.value)[0].float()
        brought = rows * (written @ value.transpose(-1, -2))  # [heads, steps, keys]
        needle = brought[..., first:last].sum(-1)
        # A row sees the prompt and what was generated up to it.
        others = (steps.to(rows.device) + 1 - count).clamp(min=1)
        net = needle - count / others * (brought.sum(-1) - needle)
        return rows.argmax(-1), asked, net.mean(-1)

    return _rows(model, ids, rows, of_layer)


def _rows(
    model: LoadedModel,
    ids: list[int],
    rows: Tensor,
    read: Callable[[LayerCall, Tensor], tuple[Tensor, ...]],
) -> tuple[np.ndarray, ...]:
    """[layers, ...] each: what is read of these rows of every layer."""
    found: list[tuple[Tensor, ...]] = []

    def on_layer(call: LayerCall) -> Tensor:
        if not call.mask.causal:
            raise LensError("retrieval heads are scored in causal models")
        found.append(read(call, row_at(call, rows.to(call.query.device))))
        return attend(call, statistics=()).output

    with torch.no_grad(), listening(model, on_layer):
        base(model)(torch.tensor([ids], device=model.device))
    return tuple(torch.stack(one).double().cpu().numpy() for one in zip(*found, strict=True))


def _masked(
    model: LoadedModel,
    trials: Sequence[Trial],
    heads: Sequence[HeadId],
    orders: Sequence[np.ndarray],
    counts: tuple[int, ...],
    draws: int,
    seed: int,
    shown: bool,
) -> np.ndarray:
    """[kinds + 1, counts, trials]: recall without the first heads of each order, and without random ones (mean); NaN of these
    where fewer are in no list."""
    found = np.zeros((len(orders) + 1, len(counts), len(trials)))
    total = len(counts) * (len(orders) + draws)
    with advancing(f"{model.name}: masked", total, shown) as advance:
        for place, count in enumerate(counts):
            best = {int(head) for order in orders for head in order[:count]}
            rest = [head for head in range(len(heads)) if head not in best]
            sets, random = [order[:count] for order in orders], drawing(seed, count)
            if len(rest) < count:
                found[-1, place] = np.nan
                advance(draws)
            else:
                sets += [random.choice(rest, count, replace=False) for _ in range(draws)]
            for number, chosen in enumerate(sets):
                names = [str(heads[int(head)]) for head in chosen]
                with edit(model, Ablate(names, "zero")):
                    recalls = np.array([trial.recall(answered(model, trial)) for trial in trials])
                row = min(number, len(orders))
                found[row, place] += recalls / (draws if row == len(orders) else 1)
                advance(1)
    return found
