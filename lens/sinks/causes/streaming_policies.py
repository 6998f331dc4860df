"""StreamingLLM's policy without its cache: mass kept and output error of (first n, last w) keys, exactly.

A row keeps the first `n_sink` keys and the last `window` ones, itself included. The groups "first",
"recent" and the rest are states of one another, so with `m` the mass kept, `o` the whole output and
`o_K` the one of the keys kept, `o - o_K = (1 - m) (o_D - o_K)`: both run, the cache does not.
Positions stay what they were; StreamingLLM re-indexes them inside its cache, which matters only beyond
the length that a model was trained at.

Reference: Xiao et al., arXiv 2309.17453.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from lens_kernels import AttentionState, attention, merge

from lens.common.errors import LensError
from lens.common.results import Result, described
from lens.edits.losses import bos_policy, changes, log_probabilities, two_tokens
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.inputs import read_prompts
from lens.stats import over_units


@dataclass(frozen=True, eq=False)
class StreamingPolicies(Result):
    """What each (n_sink, window) keeps, and what it costs.

    Attributes:
        policies: (n_sink, window) of each.
        kept: [policies, prompts, layers, heads], mean mass kept over the rows that lose a key.
        error: the same shape, rms(o - o_K) / rms(o) over those rows, at inputs of the full model.
        delta_loss: [policies, prompts], loss of the windowed run minus that of the full one, nats per
            token: here every layer is windowed at once and errors add up.
        loss: [prompts], of the full model.
        tokens: [prompts], T of each.
        bos: "added", "absent" or "mixed".
        seed: of the bootstrap.
    """

    policies: tuple[tuple[int, int], ...]
    kept: np.ndarray = field(repr=False)
    error: np.ndarray = field(repr=False)
    delta_loss: np.ndarray = field(repr=False)
    loss: np.ndarray = field(repr=False)
    tokens: tuple[int, ...]
    bos: str
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per policy: means over heads and prompts, 95 % intervals of delta_loss over prompts."""
        rows = []
        for place, (n_sink, window) in enumerate(self.policies):
            delta = self.delta_loss[place]
            low, high = over_units(delta, np.ones(len(delta)), self.seed)
            rows.append(
                {
                    "n_sink": n_sink,
                    "window": window,
                    "kept": self.kept[place].mean(),
                    "least_kept": self.kept[place].mean(0).min(),
                    "error": self.error[place].mean(),
                    "largest_error": self.error[place].mean(0).max(),
                    "delta_loss": delta.mean(),
                    "delta_loss_low": float(low),
                    "delta_loss_high": float(high),
                }
            )
        return pd.DataFrame(rows).assign(bos=self.bos, n=len(self.tokens))

    def by_head(self) -> pd.DataFrame:
        """One row per policy, layer and head: `kept` and `error`, means over prompts."""
        count, _, layers, heads = self.kept.shape
        policy = np.array(self.policies)
        return pd.DataFrame(
            {
                "n_sink": policy[:, 0].repeat(layers * heads),
                "window": policy[:, 1].repeat(layers * heads),
                "layer": np.tile(np.arange(layers).repeat(heads), count),
                "head": np.tile(np.arange(heads), count * layers),
                "kept": self.kept.mean(1).ravel(),
                "error": self.error.mean(1).ravel(),
            }
        )

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> list[str]:
        """One sentence per policy, and what limits them."""
        found = [
            f"With the first {row['n_sink']} and the last {row['window']} keys rows keep "
            f"{row['kept']:.1%} of their attention (the poorest head {row['least_kept']:.1%}), head "
            f"outputs are off by {row['error']:.1%}, and the loss changes by {row['delta_loss']:.4f} "
            f"[{row['delta_loss_low']:.4f}, {row['delta_loss_high']:.4f}] nats per token."
            for row in self.table().to_dict("records")
        ]
        lengths = f"{min(self.tokens)} to {max(self.tokens)}"
        return [
            *found,
            f"Measured on {len(self.tokens)} prompts of {lengths} tokens, BOS {self.bos}, loss "
            f"{self.loss.mean():.3f} without a policy; positions are not re-indexed, so nothing is said "
            "about texts longer than the model's context.",
        ]


def streaming(
    model: LoadedModel,
    prompts: Any,
    *,
    n_sink: Sequence[int] = (0, 1, 4),
    window: Sequence[int] = (32,),
    seed: int = 0,
) -> StreamingPolicies:
    """Kept mass and exact output error of keeping the first n and last w keys, and the real run.

    Args:
        model: a causal language model, as `lens.load` returns it.
        prompts: as for `lens.capture`, token prompts, longer than every n_sink + window.
        n_sink: numbers of first keys, 0 or more.
        window: numbers of last keys, the row's own included, 1 or more.
        seed: of the bootstrap.

    Raises:
        LensError: numbers that are none, prompts that are too short for a policy to drop anything, a
            model that looks ahead or gives no logits, learned sinks (they hold mass of their own), or
            a layer with a window or a bias of its own.

    Example:
        >>> lens.sinks.streaming(model, texts, n_sink=(0, 4), window=(4, 8)).table()
    """
    for name, numbers, least in (("n_sink", n_sink, 0), ("window", window, 1)):
        if not len(numbers) or not all(
            isinstance(number, int) and not isinstance(number, bool) and number >= least
            for number in numbers
        ):
            raise LensError(f"{name} must be integers from {least}, got {list(numbers)}")
    policies = [(first, last) for last in window for first in n_sink]
    most = max(first + last for first, last in policies)
    kept, error, delta, loss, read = [], [], [], [], []
    for prompt in read_prompts(model, prompts)[0]:
        ids = two_tokens(prompt.ids)
        if len(ids) <= most:
            raise LensError(
                f"a prompt of {len(ids)} tokens loses nothing to {most} kept keys; give longer ones"
            )
        watcher = _Policies(policies)
        base = log_probabilities(model, ids, watcher.on_layer)
        kept.append(torch.stack(watcher.kept, 1).numpy())
        error.append(torch.stack(watcher.error, 1).numpy())
        target = torch.tensor(ids[1:], device=base.device)[:, None]
        loss.append(-float(base.gather(1, target).mean()))
        delta.append(
            [
                changes(base, log_probabilities(model, ids, _Windowed(*policy).on_layer), ids)[0]
                for policy in policies
            ]
        )
        read.append(ids)
    return StreamingPolicies(
        tuple(policies),
        np.stack(kept, 1),
        np.stack(error, 1),
        np.array(delta).T,
        np.array(loss),
        tuple(len(ids) for ids in read),
        bos_policy(model, read),
        seed,
    )


class _Policies:
    """Runs the model as it is; per layer [policies, heads] mass kept and relative output error."""

    def __init__(self, policies: Sequence[tuple[int, int]]) -> None:
        self.kept: list[torch.Tensor] = []
        self.error: list[torch.Tensor] = []
        self._policies = policies

    def on_layer(self, call: LayerCall) -> torch.Tensor:
        """See `lens.passes.sessions.listening`."""
        _check(call)
        whole = attend(call)
        lse = whole.statistics["lse"]
        kept, error = [], []
        for n_sink, window in self._policies:
            state = _kept_state(call, n_sink, window)
            rows = slice(n_sink + window, None)  # those that lose a key
            output, change = whole.output[0, :, rows], (state.output - whole.output)[0, :, rows]
            kept.append((state.lse - lse).exp()[0, :, rows].mean(-1))
            size = output.double().square().mean((1, 2)).sqrt()
            error.append(change.double().square().mean((1, 2)).sqrt() / size)
        self.kept.append(torch.stack(kept).cpu())
        self.error.append(torch.stack(error).cpu())
        return whole.output


class _Windowed:
    """Every layer sees the first `n_sink` and the last `window` keys only."""

    def __init__(self, n_sink: int, window: int) -> None:
        self._n_sink, self._window = n_sink, window

    def on_layer(self, call: LayerCall) -> torch.Tensor:
        """See `lens.passes.sessions.listening`."""
        _check(call)
        return _kept_state(call, self._n_sink, self._window).output


def _kept_state(call: LayerCall, n_sink: int, window: int) -> AttentionState:
    """Attention of each row to the keys kept: the window merged with those first keys that it has not."""
    mask = call.mask.for_kernel(call.query.shape[2])
    options: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap}
    recent = attention(
        call.query, call.key, call.value, mask=replace(mask, window=window), **options
    )
    near = AttentionState(recent.output, recent.statistics["lse"])
    if not n_sink or call.query.shape[2] <= window:
        return near
    # rows from `window` on have left key 0 behind; they see again what first keys their window lacks
    far = attention(
        call.query[:, :, window:],
        call.key[:, :, :n_sink],
        call.value[:, :, :n_sink],
        mask=replace(mask, causal=False, allowed=_behind(call, n_sink, window)),
        **options,
    )
    late = AttentionState(near.output[:, :, window:], near.lse[:, :, window:])
    both = merge(late, AttentionState(far.output, far.statistics["lse"]))
    return AttentionState(
        torch.cat([near.output[:, :, :window], both.output], 2),
        torch.cat([near.lse[:, :, :window], both.lse], 2),
    )


def _behind(call: LayerCall, n_sink: int, window: int) -> torch.Tensor:
    """bool [1, 1, rows from `window` on, n_sink]: the key is behind the row's window."""
    rows = torch.arange(window, call.query.shape[2], device=call.query.device)[:, None]
    return (rows - torch.arange(n_sink, device=rows.device) >= window)[None, None]


def _check(call: LayerCall) -> None:
    if not call.mask.causal:
        raise LensError(
            f"layer {call.layer} sees later tokens; streaming needs a causal language model"
        )
    if call.sink_logits is not None:
        raise LensError(f"layer {call.layer} has learned sinks, for which streaming is not defined")
    if call.mask.window is not None or call.position_bias is not None:
        raise LensError(
            f"layer {call.layer} has a window or a position bias of its own, for which streaming is not "
            "defined"
        )
