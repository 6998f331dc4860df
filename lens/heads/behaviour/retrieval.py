"""Retrieval heads: which heads fetch the tokens of a needle while the model copies it out.

A trial is a prompt with a needle somewhere in it, which greedy decoding should bring back. At each
step a head scores when the key that it looks at most lies in the needle and holds the very token that
is generated. The tokens are generated first; then one pass over prompt and answer gives the strongest
key of the answer's rows alone, so that N×N is never built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from lens_kernels import AttentionMask
from torch import Tensor

from lens.common.errors import LensError
from lens.common.head_ids import HeadId, all_heads, head_columns
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, few
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.sessions import base, listening
from lens.stats.intervals import columns
from lens.stats.verdicts import of_many_told
from lens.tasks.needles import Trial, answered

_FETCHES = 0.1  # a score above this, as Wu et al. take it


@dataclass(frozen=True, repr=False, eq=False)
class RetrievalScores(Result):
    """Retrieval score of every head.

    Attributes:
        per_trial: [layer, head, trial]: share of the needle's positions that the head looked at most
            while their token was generated; of the trials that succeeded.
        recall: [all trials]: share of the needle's tokens that were generated (ROUGE-1 on tokens).
        needed: recall above which a trial counts.
        model: its name.
        random: score of a key drawn at random from those before each token, mean over the trials that count; NaN: not known.
    """

    per_trial: np.ndarray
    recall: np.ndarray
    needed: float
    model: str
    random: float = np.nan

    @property
    def n(self) -> int:
        """Number of trials that succeeded, and so count."""
        return self.per_trial.shape[-1]

    @property
    def values(self) -> np.ndarray:
        """[layer, head] mean over the trials that count."""
        return self.per_trial.mean(-1)

    def heads(self, threshold: float = _FETCHES) -> list[HeadId]:
        """Heads with a score above the threshold (Wu et al. take 0.1), the best first."""
        found = [HeadId(*at) for at in np.argwhere(self.values > threshold).tolist()]
        return sorted(found, key=lambda head: -self.values[head])

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per head: `name`, `layer`, `head`, `retrieval`, `retrieval_low`, `retrieval_high`
        (95 % bootstrap over trials), `n` trials that count of `trials`."""
        found = head_columns(all_heads(range(len(self.values)), self.values.shape[1]))
        found |= columns("retrieval", self.per_trial, seed, trials=True)
        return pd.DataFrame(found | {"n": self.n, "trials": len(self.recall)})

    def findings(self) -> tuple[Sentence, ...]:
        """Which heads fetch the needle, each with the interval of the highest of all, and how many needles came back."""
        table = self.table().sort_values("retrieval", ascending=False, kind="stable")
        many, found = len(table), table[table["retrieval"] > _FETCHES]
        shown = [
            f"{row['name']} {of_many_told(row, 'retrieval', '.2f', many, self.n, least=0, most=1)}"
            for row in (found if len(found) else table.head(1)).to_dict("records")
        ]
        chance = "" if np.isnan(self.random) else f"; a key at random scores {self.random:.2f}"
        text = (
            f"{len(found) or 'None'} of {many} heads score above {_FETCHES} in fetching the needle"
            f"{'' if len(found) else ', the highest'}: {few(shown)}{chance}; {self.n} of {len(self.recall)} needles came back."
        )
        return (Sentence(text, kind="fetching"),)

    def __repr__(self) -> str:
        shown = ", ".join(f"{head} {self.values[head]:.2f}" for head in self.heads()[:3]) or "none"
        return (
            f"RetrievalScores({self.model}: {self.n} of {len(self.recall)} trials succeeded; "
            f"above 0.1: {shown})"
        )


def retrieval(
    model: LoadedModel,
    trials: Sequence[Trial],
    *,
    needed: float = 0.5,
    progress: bool = True,
) -> RetrievalScores:
    """How much of the needle each head fetches while the model generates it.

    Of a trial: `|positions of the needle that were the head's strongest key while their token was
    generated| / |needle|`. A position counts once, unlike in the authors' code, so the score is at
    most 1. As many tokens are generated as the needle has.

    Args:
        model: as `lens.load` returns it; causal.
        trials: of `lens.tasks.needles`, or your own.
        needed: only trials with a larger recall of the needle's tokens count.
        progress: show a bar, on stderr, if that is a terminal.

    Reference: Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, 2024,
        arXiv 2404.15574.

    Raises:
        LensError: no trials, none that succeeded (a model that does not retrieve has no retrieval
            heads to score), or attention that is neither causal nor a window.

    Example:
        >>> lens.heads.retrieval(small, lens.tasks.needles.copied(small)).heads()[0].layer
        1
    """
    counted, recalls = succeeded(model, trials, needed, progress)
    found = []
    with advancing(f"{model.name}: retrieval heads", len(counted), progress) as advance:
        for trial, answer in counted:
            keys = _strongest_keys(model, [*trial.prompt, *answer], len(answer))
            found.append(fetched(keys, trial, answer))
            advance(1)
    random = float(np.mean([_at_random(*one) for one in counted]))
    return RetrievalScores(np.stack(found, -1), recalls, needed, model.name, random)


def succeeded(
    model: LoadedModel, trials: Sequence[Trial], needed: float, progress: bool
) -> tuple[list[tuple[Trial, list[int]]], np.ndarray]:
    """Trials that the model brings back more than `needed` of, each with its answer; and the recall of all.

    Raises:
        LensError: no trials, or none that succeeded.
    """
    model.info.check_all_attend("retrieval")
    if not trials:
        raise LensError("retrieval needs at least one trial")
    with advancing(f"{model.name}: needles", len(trials), progress) as advance:
        counted, recalls = [], np.zeros(len(trials))
        for place, trial in enumerate(trials):
            answer = answered(model, trial)
            recalls[place] = trial.recall(answer)
            if recalls[place] > needed:
                counted.append((trial, answer))
            advance(1)
    if not counted:
        raise LensError(
            f"{model.name} brought back more than {needed:.0%} of the needle in none of {len(trials)} "
            f"trials (at most {max(recalls):.0%}), so there is no retrieval to attribute to heads"
        )
    return counted, recalls


def fetched(keys: np.ndarray, trial: Trial, answer: Sequence[int]) -> np.ndarray:
    """[layer, head]: share of the needle whose positions are among `keys` [layer, head, step] in time."""
    first, last = trial.needle
    hit = np.zeros((*keys.shape[:2], last - first))
    for step, token in enumerate(answer):
        for place in range(first, last):
            if trial.prompt[place] == token:
                hit[..., place - first] += keys[..., step] == place
    return (hit > 0).mean(-1)


def _at_random(trial: Trial, answer: Sequence[int]) -> float:
    """The expected `fetched` of a head whose strongest key is any of those before, all as likely."""
    missed = np.ones(trial.needle[1] - trial.needle[0])
    needle = np.array(trial.prompt[slice(*trial.needle)])
    for step, token in enumerate(answer):
        missed[needle == token] *= 1 - 1 / (len(trial.prompt) + step)
    return float(1 - missed.mean())


def _strongest_keys(model: LoadedModel, ids: Sequence[int], count: int) -> np.ndarray:
    """[layer, head, count]: strongest key of the rows that predict the last `count` tokens."""
    watcher = _Strongest(count)
    with torch.no_grad(), listening(model, watcher.on_layer):
        base(model)(torch.tensor([list(ids[:-1])], device=model.device))
    return np.stack(watcher.keys)


class _Strongest:
    """Keeps the strongest key of the last rows of each layer, [heads, rows]."""

    def __init__(self, count: int) -> None:
        self.keys: list[np.ndarray] = []
        self._count = count

    def on_layer(self, call: LayerCall) -> Tensor:
        """See `lens.passes.sessions.listening`."""
        mask = call.mask
        if not mask.causal or mask.allowed is not None or call.position_bias is not None:
            raise LensError(
                f"layer {call.layer} has attention that is not plain causal or windowed; its "
                "strongest keys are not known here"
            )
        result = attend(
            replace(call, query=call.query[:, :, -self._count :]),
            mask=AttentionMask(causal=True, window=mask.window),
            block_size=(1, 1),
            statistics=("top_keys",),
            top_k=1,
        )
        self.keys.append(result.statistics.top_keys[0, :, :, 0].cpu().numpy())
        return attend(call, statistics=()).output
