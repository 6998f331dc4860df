"""Streaming or retrieval: which heads lose something when they see only the first and the last keys.

StreamingLLM's policy without its cache: with `m` the mass on the keys kept, `o` the whole output of a head
and `o'` that over those keys alone, renormalised, both are exact at the inputs of the model as it is. What
the model loses when all heads stream at once, so that errors add up, is measured too.

Two errors of `o'`, over the rows that see a key which is not kept:

    row_error   mean over rows of |o - o'| / |o|: every row counts alike, however small its output
    rms_error   rms(o - o') / rms(o) over all those rows: rows with large outputs count most

They differ where the size of a head's output differs between rows, as that of a head with a sink does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.common.head_ids import HeadId, all_heads, head_columns
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, counted, ends
from lens.edits.losses import bos_policy, changes, log_probabilities, two_tokens
from lens.heads.behaviour.near_keys import Streamer, read_long_prompts
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall
from lens.passes.logits import check_predicts_tokens
from lens.passes.sessions import base, listening
from lens.stats.intervals import columns
from lens.stats.verdicts import mean_told, of_many_told


@dataclass(frozen=True, repr=False, eq=False)
class StreamingScores(Result):
    """What each head loses when it sees only the first `first` and the last `last` keys.

    Attributes:
        kept: [layer, head, prompt], mean over the rows that see more than that of their mass on
            those keys.
        row_error, rms_error: of the same shape, over the same rows, as the module defines them; 0 for a
            head that needs no others.
        delta_loss: [prompt], loss with all heads streaming less that of the model as it is, nats per
            token; NaN where it was not measured.
        tokens: [prompt], length of each.
        bos: "added", "absent" or "mixed".
        first, last: numbers of keys, the query's own among the last.
        model: its name.
    """

    kept: np.ndarray
    row_error: np.ndarray
    rms_error: np.ndarray
    delta_loss: np.ndarray
    tokens: tuple[int, ...]
    bos: str
    first: int
    last: int
    model: str

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.kept.shape[-1]

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per head: `name`, `layer`, `head`, `n`, and `kept`, `row_error`, `rms_error` with their
        95 % bootstrap intervals over prompts (`_low`, `_high`; NaN for one prompt); `delta_loss` is that
        of all heads together, the same in every row."""
        found = head_columns(all_heads(range(len(self.kept)), self.kept.shape[1])) | {"n": self.n}
        for name in ("kept", "row_error", "rms_error"):
            found |= columns(name, getattr(self, name), seed)
        return pd.DataFrame(found | dict(self._loss(seed)))

    def summary(self, *, seed: int = 0) -> pd.DataFrame:
        """One row: `first`, `last`, means over heads and prompts of `kept`, `row_error` and `rms_error`, the
        head that keeps least and the largest `rms_error`, `delta_loss` with its 95 % interval, `bos`, `n`."""
        found = {
            "first": self.first,
            "last": self.last,
            "kept": self.kept.mean(),
            "least_kept": self.kept.mean(-1).min(),
            "row_error": self.row_error.mean(),
            "rms_error": self.rms_error.mean(),
            "largest_rms_error": self.rms_error.mean(-1).max(),
        }
        return pd.DataFrame([found | dict(self._loss(seed)) | {"bos": self.bos, "n": self.n}])

    def findings(self, *, seed: int = 0) -> tuple[Sentence, ...]:
        """What is kept ("kept"), whose outputs change most ("error"), what the loss says ("loss"), and what that rests on
        ("limit")."""
        row, table = self.summary(seed=seed).iloc[0], self.table(seed=seed)
        many = len(table)
        poorest = table.iloc[int(table["kept"].to_numpy().argmin())]
        furthest = table.iloc[int(table["row_error"].to_numpy().argmax())]
        said = [
            Sentence(
                f"With the first {self.first} and the last {self.last} keys rows keep "
                f"{mean_told(self.kept.mean((0, 1)), seed, '.1%')} of their attention (the poorest head, {poorest['name']}, "
                f"{of_many_told(poorest, 'kept', '.1%', many, self.n, least=0, most=1)}), and head outputs are off by "
                f"{mean_told(self.rms_error.mean((0, 1)), seed, '.1%')}.",
                kind="kept",
            ),
            Sentence(
                f"The outputs of {furthest['name']} change most: by "
                f"{of_many_told(furthest, 'row_error', '.2f', many, self.n, least=0)} of their size, mean over rows, those of "
                f"the median head by {table['row_error'].median():.2f}.",
                kind="error",
            ),
        ]
        if not np.isnan(self.delta_loss).any():
            interval = ends(row["delta_loss_low"], row["delta_loss_high"], ".4f")
            said.append(
                Sentence(
                    f"With all heads seeing only the first {self.first} and the last {self.last} keys the "
                    f"loss changes by {row['delta_loss']:.4f}{interval} nats per token.",
                    kind="loss",
                )
            )
        lengths = sorted({min(self.tokens), max(self.tokens)})
        limit = (
            f"Measured on {counted(self.n, 'prompt')} of {' to '.join(map(str, lengths))} tokens, BOS "
            f"{self.bos}; positions are not re-indexed, so nothing is said about texts longer than the "
            "model's context."
        )
        return (*said, Sentence(limit, kind="limit"))

    def _loss(self, seed: int) -> Mapping[str, float]:
        found = columns("delta_loss", self.delta_loss, seed, shares=False)
        return {name: value.item() for name, value in found.items()}

    def __repr__(self) -> str:
        error = self.row_error.mean(-1)
        worst = HeadId(*(int(at) for at in np.unravel_index(error.argmax(), error.shape)))
        return (
            f"StreamingScores({self.model}: {self.first} first + {self.last} last keys, {self.n} "
            f"prompts; largest row error {worst} {error.max():.2f})"
        )


def streaming(
    model: LoadedModel,
    prompts: Any,
    *,
    first: int = 4,
    last: int = 32,
    loss: bool = True,
    progress: bool = True,
) -> StreamingScores:
    """What each head loses when it sees only the first and the last keys: cheap, and no training.

    Args:
        model: as `lens.load` returns it; causal.
        prompts: as those of `lens.capture`, token prompts.
        first: first keys that are seen.
        last: last keys that are seen, the query's own among them.
        loss: also run the model with all heads streaming; it must be a language model.
        progress: show a bar, on stderr, if that is a terminal.

    Reference: Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023,
        arXiv 2309.17453.

    Raises:
        LensError: numbers that are none, a prompt that is not longer than first + last, attention that is
            neither causal nor a window, or, for the loss, a model without logits.

    Example:
        >>> found = lens.heads.streaming(model, texts[0], first=1, last=8)
        >>> found.table().nlargest(3, "row_error")
    """
    if loss:
        check_predicts_tokens(model)
    read = read_long_prompts(model, prompts, first, last)
    watched: list[_Watcher] = []
    delta = np.full(len(read), np.nan)
    with advancing(f"{model.name}: prompts", len(read), progress) as advance:
        for place, prompt in enumerate(read):
            watcher = _Watcher(first, last)
            if loss:
                ids = two_tokens(prompt.ids)
                whole = log_probabilities(model, ids, watcher.on_layer)
                near = log_probabilities(model, ids, _Streaming(first, last).on_layer)
                delta[place] = changes(whole, near, ids)[0]
            else:
                with torch.no_grad(), listening(model, watcher.on_layer):
                    base(model)(**prompt.inputs)
            watched.append(watcher)
            advance(1)
    kept, row_error, rms_error = (
        np.stack([torch.stack(getattr(one, name)).numpy() for one in watched], -1)
        for name in ("kept", "row_error", "rms_error")
    )
    ids_of = [prompt.ids or [] for prompt in read]
    return StreamingScores(
        kept=kept,
        row_error=row_error,
        rms_error=rms_error,
        delta_loss=delta,
        tokens=tuple(map(len, ids_of)),
        bos=bos_policy(model, ids_of),
        first=first,
        last=last,
        model=model.name,
    )


class _Watcher(Streamer):
    """Notes what the near keys hold and miss, [heads] of each layer; the model runs as it is."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(first, last)
        self.kept: list[Tensor] = []
        self.row_error: list[Tensor] = []
        self.rms_error: list[Tensor] = []

    def on_layer(self, call: LayerCall) -> Tensor:
        """See `lens.passes.sessions.listening`."""
        full, near, near_lse = self.states(call)
        far = slice(self.first + self.last, None)  # rows that see more than those keys
        self.kept.append((near_lse - full.lse)[0, :, far].exp().mean(-1).double().cpu())
        output = full.output[0, :, far].double().cpu()
        missing = output - near.output[0, :, far].double().cpu()
        sizes = output.norm(dim=-1).clamp(min=1e-30)  # [heads, rows]
        self.row_error.append((missing.norm(dim=-1) / sizes).mean(-1))
        whole = output.square().mean((1, 2)).sqrt().clamp(min=1e-30)
        self.rms_error.append(missing.square().mean((1, 2)).sqrt() / whole)
        return full.output


class _Streaming(Streamer):
    """Every head sees the near keys only."""

    def on_layer(self, call: LayerCall) -> Tensor:
        """See `lens.passes.sessions.listening`."""
        return self.states(call)[1].output
