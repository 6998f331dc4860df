"""Whether scores of tokens, attention among them, say what an answer rests on: judged by deleting tokens.

Hard: the tokens that score highest are deleted (comprehensiveness) or kept alone (sufficiency), at given shares.
Soft: every token is kept with a probability that rises with the rank of its score, sigmoid(z + c) of its normal
score z, and c is chosen so that each method keeps the same expected share: a method that keeps more is not
rewarded. All methods share their random numbers, and random scores stand beside them.

Reference: DeYoung et al., ERASER, 2020, arXiv 1911.03429; Zhao and Aletras, Incorporating Attribution Importance for
    Improving Faithfulness Metrics, 2023, arXiv 2305.10496, with equal retention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit, ndtri
from scipy.stats import rankdata

from lens.common.choices import Count, Seed, check_between, check_counts
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts
from lens.reading._answers import Answer, check_tokens
from lens.reading.attributing import Method, check_methods, scored, whole
from lens.reading.attributing_blocks import scored_blocks
from lens.reading.judged import RANDOM, Faithfulness
from lens.stats.controls import drawing
from lens.stats.orders import spearman

_LEAST = 1e-6  # of the answer's probability that depends on the tokens
_SOFT = 2  # random orders of which soft curves are drawn, each as long as those of a method
_REFERENCES = ("leave_one_out", "integrated_gradients")


def faithfulness(
    model: LoadedModel,
    prompts: Any,
    methods: Sequence[Method] | None = None,
    *,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
    draws: Count = 20,
    block: int | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> Faithfulness:
    """How well each method's scores say what the model's answer rests on, beside random scores and leave-one-out.

    Args:
        model: as in `lens.reading.attribute`.
        prompts: one or several, of tokens; the answer to each is the model's likeliest.
        methods: of `attribute`; None: all that this model has rules for.
        shares: of the tokens, that are deleted or kept.
        draws: random orders; and random sets of kept tokens for each share.
        block: score, delete and keep so many tokens together, in prompts of any length (`attribute_blocks` says which methods
            are approximate then); None: single tokens.
        seed: of the draws and of the bootstrap.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: as `attribute`, shares outside of 0 to 1, or no draws.

    Example:
        >>> found = lens.reading.faithfulness(small, lens.tasks.copied(small, 8), ["raw", "leave_one_out"], draws=2)
        >>> found.table()["method"].tolist()
        ['raw', 'leave_one_out', 'random']
    """
    check_counts(block=1 if block is None else block)
    asked = check_methods(methods)
    check_between(0, 1, shares=shares)
    read, _ = read_prompts(model, prompts)
    check_tokens(read)
    left_out: dict[str, str] = {}
    every: list[dict[str, list[np.ndarray]]] = []
    sums: list[dict[Method, tuple[float, float]]] = []
    with advancing(f"{model.name}: faithfulness", len(read), progress) as advance:
        for prompt in read:
            answer = Answer(model, torch.tensor(prompt.ids), block=block)
            scores: dict[str, np.ndarray] = {}
            for method in dict.fromkeys((*asked, *_REFERENCES)):
                if method in left_out:
                    continue
                try:
                    own = scored(answer, method) if block is None else scored_blocks(answer, method)
                    scores[method] = own.numpy()
                except LensError as error:
                    if methods is not None:
                        raise
                    left_out[method] = str(error)
            drawn = drawing(seed, prompt.inputs_sha256)
            every.append(_judged(answer, scores, tuple(shares), draws, drawn))
            sums.append({m: (scores[m].sum(), w) for m, w in whole(answer).items() if m in scores})
            advance(1)
    kept = [method for method in asked if method not in left_out]
    names = [*kept, RANDOM]

    def together(part: int) -> np.ndarray:
        return np.stack([[one[name][part] for one in every] for name in names])

    return Faithfulness(
        methods=tuple(names),
        shares=tuple(shares),
        comprehensiveness=together(0),
        sufficiency=together(1),
        soft_comprehensiveness=together(2),
        soft_sufficiency=together(3),
        agreement=together(4),
        drawn=np.stack([one["drawn"][0] for one in every], 1),
        block=block,
        left_out=left_out,
        sums={m: np.array([one[m] for one in sums]) for m in sums[0] if m in kept},
        seed=seed,
        model=model.name,
    )


def _judged(
    answer: Answer,
    scores: dict[str, np.ndarray],
    shares: tuple[float, ...],
    draws: int,
    random: np.random.Generator,
) -> dict[str, list[np.ndarray]]:
    """Of each method: comprehensiveness, sufficiency, both soft [share], agreement [reference]."""
    uniform = random.random((len(shares), draws, answer.units))
    none = torch.zeros(1, answer.units, dtype=torch.bool)
    empty = float(answer.kept(none)[0])
    ties = np.random.default_rng(answer.units).random(answer.units)
    found = {}
    for name, score in scores.items():
        agreement = [spearman(score, scores[other]) for other in _REFERENCES]
        hard = hard_curves(answer, score, shares, ties)
        soft = soft_curves(answer, score, shares, uniform, empty)
        found[name] = [*hard, *soft, np.array(agreement)]
    orders = [random.random(answer.units) for _ in range(draws)]
    hard = [hard_curves(answer, order, shares) for order in orders]
    soft = [soft_curves(answer, order, shares, uniform, empty) for order in orders[:_SOFT]]
    agreement = [
        np.mean([spearman(order, scores[other]) for order in orders]) for other in _REFERENCES
    ]
    means = [np.mean([one[part] for one in hard], 0) for part in range(2)]
    means += [np.mean([one[part] for one in soft], 0) for part in range(2)]
    found[RANDOM] = [*means, np.array(agreement)]
    found["drawn"] = [np.array(hard)]
    return found


def hard_curves(
    answer: Answer, score: np.ndarray, shares: tuple[float, ...], ties: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """[share] each: probability lost without the tokens that score highest, and with them alone; equal scores in the order of
    `ties`, random numbers that all methods have in common: by place, a constant would be the first tokens."""
    order = np.lexsort((np.arange(len(score)) if ties is None else ties, -score))
    first = np.zeros((len(shares), answer.units), bool)
    for row, share in enumerate(shares):
        first[row, order[: max(1, round(share * answer.units))]] = True
    keep = torch.from_numpy(np.concatenate([~first, first]))
    lost = answer.probability - answer.kept(keep).numpy()
    return lost[: len(shares)], lost[len(shares) :]


def soft_curves(
    answer: Answer,
    score: np.ndarray,
    shares: tuple[float, ...],
    uniform: np.ndarray,
    empty: float,
) -> tuple[np.ndarray, np.ndarray]:
    """[share] each, 0 to 1: normalised comprehensiveness and sufficiency at expected shares of kept tokens.

    Args:
        answer: with its prompt.
        score: [tokens].
        shares: of tokens that are kept.
        uniform: [share, draw, tokens], random numbers that all methods have in common.
        empty: probability of the answer with every token deleted.
    """
    base = max(0.0, answer.probability - empty)
    if base < _LEAST:
        nothing = np.full(len(shares), np.nan)
        return nothing, nothing
    keep = np.stack(
        [
            uniform[row] < kept_share(sign * score, share)
            for sign in (-1, 1)
            for row, share in enumerate(shares)
        ]
    )
    rows = torch.from_numpy(keep.reshape(-1, answer.units))
    found = answer.kept(rows).numpy().reshape(2, len(shares), -1).mean(-1)
    lost = np.clip(answer.probability - found, 0, None) / base
    return np.clip(lost[0], 0, 1), np.clip(1 - lost[1], 0, 1)


def kept_share(score: np.ndarray, share: float) -> np.ndarray:
    """[tokens], the probability with which each is kept: sigmoid(z + c), z normal scores of the ranks, its mean `share`."""
    z = ndtri(rankdata(score) / (len(score) + 1))
    low, high = -50.0, 50.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if expit(z + middle).mean() < share else (low, middle)
    return expit(z + (low + high) / 2)
