"""Retrieval heads: which heads fetch the tokens of a needle while the model copies it out.

A trial is a prompt with a needle somewhere in it, which greedy decoding should bring back. At each
step a head scores when the key that it looks at most lies in the needle and holds the very token that
is generated. The tokens are generated first; then one pass over prompt and answer gives the strongest
key of the answer's rows alone, so that N×N is never built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from lens_kernels import AttentionMask
from torch import Tensor

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.progress import advancing
from lens.common.results import Result
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.inputs import check_ids
from lens.passes.logits import logits_of
from lens.passes.sessions import base, listening
from lens.stats import over_units


@dataclass(frozen=True)
class RetrievalTrial:
    """A prompt that asks for its needle.

    Attributes:
        prompt: token ids; the next tokens should be those of the needle.
        needle: (first, past the last) position of the tokens that should come back.
        depth: place of the needle in the prompt, 0 to 1.
    """

    prompt: tuple[int, ...]
    needle: tuple[int, int]
    depth: float

    def __post_init__(self) -> None:
        first, last = self.needle
        if not 0 <= first < last <= len(self.prompt):
            raise LensError(
                f"the needle must lie within the prompt of {len(self.prompt)} tokens, got {self.needle}"
            )


@dataclass(frozen=True, repr=False, eq=False)
class RetrievalScores(Result):
    """Retrieval score of every head.

    Attributes:
        per_trial: [layer, head, trial]: share of the needle's positions that the head looked at most
            while their token was generated; of the trials that succeeded.
        recall: [all trials]: share of the needle's tokens that were generated (ROUGE-1 on tokens).
        needed: recall above which a trial counts.
        model: its name.
    """

    per_trial: np.ndarray
    recall: np.ndarray
    needed: float
    model: str

    @property
    def n(self) -> int:
        """Number of trials that succeeded, and so count."""
        return self.per_trial.shape[-1]

    @property
    def values(self) -> np.ndarray:
        """[layer, head] mean over the trials that count."""
        return self.per_trial.mean(-1)

    def heads(self, threshold: float = 0.1) -> list[HeadId]:
        """Heads with a score above the threshold (Wu et al. take 0.1), the best first."""
        layers, heads = np.nonzero(self.values > threshold)
        found = [HeadId(int(layer), int(head)) for layer, head in zip(layers, heads, strict=True)]
        return sorted(found, key=lambda head: -self.values[head])

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per head: `name`, `layer`, `head`, `retrieval`, `retrieval_low`, `retrieval_high`
        (95 % bootstrap over trials), `n` trials that count of `trials`."""
        layers, heads = self.values.shape
        units = np.moveaxis(self.per_trial, -1, 0)
        low, high = over_units(units, np.ones_like(units), seed)
        return pd.DataFrame(
            {
                "name": [
                    str(HeadId(layer, head)) for layer in range(layers) for head in range(heads)
                ],
                "layer": np.repeat(np.arange(layers), heads),
                "head": np.tile(np.arange(heads), layers),
                "retrieval": self.values.ravel(),
                "retrieval_low": low.ravel(),
                "retrieval_high": high.ravel(),
                "n": self.n,
                "trials": len(self.recall),
            }
        )

    def __repr__(self) -> str:
        shown = ", ".join(f"{head} {self.values[head]:.2f}" for head in self.heads()[:3]) or "none"
        return (
            f"RetrievalScores({self.model}: {self.n} of {len(self.recall)} trials succeeded; "
            f"above 0.1: {shown})"
        )


def copied_needles(
    model: LoadedModel, *, n: int = 16, length: int = 60, needle: int = 8, seed: int = 0
) -> list[RetrievalTrial]:
    """Trials of random tokens: haystack, needle at depth 0.1 to 0.9, and its first token once more.

    For models that know no questions. Special tokens are never drawn; where the vocabulary allows, no
    token comes twice.

    Args:
        model: as `lens.load` returns it.
        n: number of trials.
        length: tokens of the haystack, the needle among them.
        needle: tokens to bring back, after the one that is repeated.
        seed: of the draws.

    Raises:
        LensError: no vocabulary, fewer than one trial or token, or more than the model takes.
    """
    if model.info.vocab is None:
        raise LensError(f"{model.name} has no vocabulary, so no tokens can be drawn")
    context = model.info.context or length + needle + 2
    if n < 1 or needle < 1 or length < needle + 4 or length + needle + 2 > context:
        raise LensError(
            f"copied_needles needs n and needle of at least 1 and a length of needle + 4 to "
            f"{context - needle - 2}; got n={n}, needle={needle}, length={length}"
        )
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    ordinary = np.array([index for index in range(model.info.vocab) if index not in special])
    start = [] if model.bos_id is None else [model.bos_id]
    random = np.random.default_rng(seed)
    trials = []
    for depth in np.linspace(0.1, 0.9, n) if n > 1 else [0.5]:
        drawn = random.choice(ordinary, length, replace=len(ordinary) < length).tolist()
        cue = len(start) + round(float(depth) * (length - needle - 2))
        prompt = [*start, *drawn]
        prompt.append(prompt[cue])
        trials.append(RetrievalTrial(tuple(prompt), (cue + 1, cue + 1 + needle), float(depth)))
    return trials


def text_needles(
    model: LoadedModel,
    haystack: str,
    *,
    needle: str,
    question: str,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
) -> list[RetrievalTrial]:
    """Trials of real text: a sentence hidden in a haystack, and a question that it answers.

    Args:
        model: as `lens.load` returns it.
        haystack: text that is cut to each length.
        needle: what should come back, such as " eat a sandwich in Dolores Park"; what leads to it is
            in `question`.
        question: put before the needle in the haystack and at the end of the prompt, such as
            " The best thing to do in San Francisco is".
        lengths: tokens of the haystack.
        depths: places of the needle in it, 0 to 1.

    Raises:
        LensError: a haystack that is too short, a depth outside of 0 to 1, or a prompt longer than
            the model takes.
    """
    hay = model.encode(haystack)
    plain = [model.encode(text) for text in (question, needle)]
    lead, answer = (ids[1:] if ids[:1] == [model.bos_id] else ids for ids in plain)
    trials = []
    for length in lengths:
        if length > len(hay):
            raise LensError(f"the haystack has {len(hay):,} tokens, {length:,} were asked for")
        for depth in depths:
            if not 0 <= depth <= 1:
                raise LensError(f"depth must lie between 0 and 1, got {depth}")
            at = max(1, round(depth * length))
            before = [*hay[:at], *lead]
            prompt = [*before, *answer, *hay[at:length], *lead]
            check_ids(model, [*prompt, *answer])
            needle_at = (len(before), len(before) + len(answer))
            trials.append(RetrievalTrial(tuple(prompt), needle_at, float(depth)))
    return trials


def retrieval(
    model: LoadedModel,
    trials: Sequence[RetrievalTrial],
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
        trials: of `copied_needles`, `text_needles`, or your own.
        needed: only trials with a larger recall of the needle's tokens count.
        progress: show a bar, on stderr, if that is a terminal.

    Reference: Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, 2024,
        arXiv 2404.15574.

    Raises:
        LensError: no trials, none that succeeded (a model that does not retrieve has no retrieval
            heads to score), or attention that is neither causal nor a window.

    Example:
        >>> retrieval(model, copied_needles(model)).heads()
    """
    if not trials:
        raise LensError("retrieval needs at least one trial")
    found, recalls = [], []
    with advancing(f"{model.name}: needles", len(trials), progress) as advance:
        for trial in trials:
            first, last = trial.needle
            wanted = trial.prompt[first:last]
            answer = _greedy(model, trial.prompt, len(wanted))
            recalls.append((Counter(wanted) & Counter(answer)).total() / len(wanted))
            if recalls[-1] > needed:
                keys = _strongest_keys(model, [*trial.prompt, *answer], len(answer))
                found.append(_fetched(keys, trial, answer))
            advance(1)
    if not found:
        raise LensError(
            f"{model.name} brought back more than {needed:.0%} of the needle in none of {len(trials)} "
            f"trials (at most {max(recalls):.0%}), so there is no retrieval to attribute to heads"
        )
    return RetrievalScores(np.stack(found, -1), np.array(recalls), needed, model.name)


def _fetched(keys: np.ndarray, trial: RetrievalTrial, answer: Sequence[int]) -> np.ndarray:
    """[layer, head]: share of the needle whose positions are among `keys` [layer, head, step] in time."""
    first, last = trial.needle
    hit = np.zeros((*keys.shape[:2], last - first))
    for step, token in enumerate(answer):
        for place in range(first, last):
            if trial.prompt[place] == token:
                hit[..., place - first] += keys[..., step] == place
    return (hit > 0).mean(-1)


def _greedy(model: LoadedModel, prompt: Sequence[int], count: int) -> list[int]:
    """The next tokens, each the most likely one; with cached keys where the model can."""
    check_ids(model, [*prompt, *prompt[:count]])
    step = torch.tensor([list(prompt)], device=model.device)
    cached = not model.is_bridge and model.model.can_generate()
    past, answer = None, []
    with torch.no_grad():
        for _ in range(count):
            if cached:
                result = model.model(input_ids=step, past_key_values=past, use_cache=True)
                logits, past = result.logits, result.past_key_values
            else:
                logits = logits_of(model, step)
            token = logits[:, -1].argmax(-1, keepdim=True)
            answer.append(int(token))
            step = token if cached else torch.cat([step, token], dim=1)
    return answer


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
