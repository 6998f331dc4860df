"""Streaming or retrieval: which heads lose something when they see only the first and the nearest keys.

`streaming` measures the loss head by head in one pass. `streaming_gate` learns it for the model as a
whole, as DuoAttention does: each key-value head mixes its full and its streaming output by a gate in
[0, 1], and what the model's own last hidden states do not need is closed. Both take the streaming
output from the union of two attention states (first keys, nearest keys), so N×N is never built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from lens_kernels import AttentionMask, AttentionState, merge
from torch import Tensor

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.progress import advancing
from lens.common.results import Result
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.sessions import base, listening
from lens.stats import over_units


@dataclass(frozen=True, repr=False, eq=False)
class StreamingScores(Result):
    """What each head loses when it sees only the first `sink` and the nearest `recent` keys.

    Attributes:
        kept: [layer, head, prompt], mean over the rows that see more than that of their mass on
            those keys.
        error: of the same shape, mean over the same rows of `|o - o'| / |o|`, o' the output over
            those keys alone, renormalised; 0 for a head that needs no others.
        sink, recent: numbers of keys, the query's own among the recent.
        model: its name.
    """

    kept: np.ndarray
    error: np.ndarray
    sink: int
    recent: int
    model: str

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.kept.shape[-1]

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per head: `name`, `layer`, `head`, `n`, and `kept` and `error` with their 95 % bootstrap
        intervals over prompts (`_low`, `_high`; NaN for one prompt)."""
        layers, heads = self.kept.shape[:2]
        columns: dict[str, Any] = _heads(layers, heads) | {"n": self.n}
        for name, values in (("kept", self.kept), ("error", self.error)):
            units = np.moveaxis(values, -1, 0)
            low, high = over_units(units, np.ones_like(units), seed)
            ends = {f"{name}_low": low.ravel(), f"{name}_high": high.ravel()}
            columns |= {name: values.mean(-1).ravel(), **ends}
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        error = self.error.mean(-1)
        worst = HeadId(*(int(at) for at in np.unravel_index(error.argmax(), error.shape)))
        return (
            f"StreamingScores({self.model}: {self.sink} first + {self.recent} recent keys, {self.n} "
            f"prompts; largest error {worst} {error.max():.2f})"
        )


@dataclass(frozen=True, repr=False, eq=False)
class StreamingGate(Result):
    """The trained gate of each key-value head: 1 needs all keys, 0 streams.

    Attributes:
        alpha: [layer, kv_head].
        losses: [step], of the training: distance of the last hidden states + penalty × mean gate.
        heads: query heads of a layer.
        sink, recent: keys that a streaming head sees.
        penalty, rate, seed: of the training.
        n: number of prompts.
        model: its name.
    """

    alpha: np.ndarray
    losses: np.ndarray
    heads: int
    sink: int
    recent: int
    penalty: float
    rate: float
    seed: int
    n: int
    model: str

    @property
    def values(self) -> np.ndarray:
        """[layer, head]: the gate of the key-value head that each head reads."""
        return self.alpha.repeat(self.heads // self.alpha.shape[1], 1)

    def retrieval_heads(self, threshold: float = 0.5) -> list[HeadId]:
        """Heads whose gate lies above the threshold, in order of layer and head."""
        return [HeadId(int(a), int(b)) for a, b in np.argwhere(self.values > threshold)]

    def table(self) -> pd.DataFrame:
        """One row per head: `name`, `layer`, `head`, `alpha`, `n`."""
        found: dict[str, Any] = _heads(*self.values.shape)
        return pd.DataFrame(found | {"alpha": self.values.ravel(), "n": self.n})

    def __repr__(self) -> str:
        return (
            f"StreamingGate({self.model}: {len(self.retrieval_heads())} of {self.values.size} heads above "
            f"0.5 with {self.sink} first + {self.recent} recent keys; {len(self.losses)} steps, loss "
            f"{self.losses[0]:.3g} to {self.losses[-1]:.3g})"
        )


def streaming(
    model: LoadedModel,
    texts: Any,
    *,
    sink: int = 4,
    recent: int = 32,
    progress: bool = True,
) -> StreamingScores:
    """What each head loses when it sees only the first and the nearest keys: cheap, and no training.

    Args:
        model: as `lens.load` returns it; causal.
        texts: as the prompts of `lens.capture`.
        sink: first keys that are seen.
        recent: nearest keys that are seen, the query's own among them.
        progress: show a bar, on stderr, if that is a terminal.

    Reference: Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023,
        arXiv 2309.17453.

    Raises:
        LensError: a prompt that is not longer than sink + recent, or attention that is neither causal
            nor a window.

    Example:
        >>> lens.heads.streaming(model, texts[0], sink=1, recent=8).table().sort_values("error").tail()
    """
    prompts = _prompts(model, texts, sink, recent)
    kept, error = [], []
    with advancing(f"{model.name}: prompts", len(prompts), progress) as advance:
        for prompt in prompts:
            watcher = _Watcher(sink, recent)
            with torch.no_grad(), listening(model, watcher.on_layer):
                base(model)(**prompt.inputs)
            kept.append(torch.stack(watcher.kept).numpy())
            error.append(torch.stack(watcher.error).numpy())
            advance(1)
    return StreamingScores(np.stack(kept, -1), np.stack(error, -1), sink, recent, model.name)


def streaming_gate(
    model: LoadedModel,
    texts: Any,
    *,
    sink: int = 4,
    recent: int = 32,
    steps: int = 100,
    rate: float = 0.02,
    penalty: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> StreamingGate:
    """Learn which key-value heads the model needs in full, with its weights as they are.

        z = alpha z_full + (1 - alpha) z_streaming;  loss = mean (h - h')^2 / mean h^2 + penalty mean alpha

    over the last hidden states h of the model as it is and h' with the gates. alpha starts at 1, is
    trained by Adam on one prompt a step, and stays in [0, 1]. The authors do not divide by the size
    of h; it makes `penalty` mean the same for all models.

    Args:
        model, texts, sink, recent, progress: as in `streaming`; texts must hold something to
            retrieve, such as `lens.tasks.copied`.
        steps, rate: of Adam.
        penalty: what an open gate costs.
        seed: of the order of the prompts.

    Reference: Xiao et al., DuoAttention, 2024, arXiv 2410.10819.

    Raises:
        LensError: as in `streaming`, or fewer than one step.

    Example:
        >>> lens.heads.streaming_gate(model, texts, sink=1, recent=8).retrieval_heads()
    """
    if steps < 1:
        raise LensError(f"steps must be at least 1, got {steps}")
    prompts = _prompts(model, texts, sink, recent)
    info = model.info
    alpha = torch.ones(info.layers, info.kv_heads, device=model.device, requires_grad=True)
    optimiser = torch.optim.Adam([alpha], lr=rate)
    order = np.random.default_rng(seed).integers(len(prompts), size=steps)
    clean: dict[int, Tensor] = {}
    losses = np.empty(steps)
    with advancing(f"{model.name}: gate", steps, progress) as advance:
        for step, number in enumerate(order.tolist()):
            if number not in clean:
                with torch.no_grad():
                    clean[number] = _last_hidden(model, prompts[number], None)
            wanted = clean[number]
            with torch.enable_grad():
                found = _last_hidden(model, prompts[number], _Gate(sink, recent, alpha))
                distance = (found - wanted).square().mean() / wanted.square().mean()
                loss = distance + penalty * alpha.mean()
                (alpha.grad,) = torch.autograd.grad(loss, [alpha])
            optimiser.step()
            with torch.no_grad():
                alpha.clamp_(0, 1)
            losses[step] = loss.item()
            advance(1)
    return StreamingGate(
        alpha=alpha.detach().cpu().numpy(),
        losses=losses,
        heads=info.heads,
        sink=sink,
        recent=recent,
        penalty=penalty,
        rate=rate,
        seed=seed,
        n=len(prompts),
        model=model.name,
    )


class _Streamer:
    """What each layer's attention is in full and over the first and nearest keys."""

    def __init__(self, sink: int, recent: int) -> None:
        self._sink, self._recent = sink, recent

    def _states(self, call: LayerCall) -> tuple[AttentionState, AttentionState, Tensor]:
        """Attention over all keys and over the first and nearest ones, and the LSE of these alone.

        Learned sinks are in both states and not in that LSE.
        """
        mask = call.mask
        if not mask.causal or mask.allowed is not None or call.position_bias is not None:
            raise LensError(
                f"layer {call.layer} has attention that is not plain causal or windowed; what it "
                "would be without its far keys is not known here"
            )
        reach = call.key.shape[2] if mask.window is None else mask.window
        is_first = torch.arange(call.key.shape[2], device=call.key.device) < self._sink
        parts = [(is_first, mask.window), (~is_first, min(reach, self._recent))]
        near = merge(*(self._state(call, keys, window) for keys, window in parts))
        whole = self._state(call, None, mask.window)
        if call.sink_logits is None:
            return whole, near, near.lse
        sinks = call.sink_logits
        return merge(whole, sink_logits=sinks), merge(near, sink_logits=sinks), near.lse

    def _state(self, call: LayerCall, keys: Tensor | None, window: int | None) -> AttentionState:
        padding = None if keys is None else keys[None].expand(len(call.key), -1)
        mask = AttentionMask(causal=True, window=window, key_padding=padding)
        return attend(call, mask=mask, sink_logits=None, statistics=("lse",)).state()


class _Watcher(_Streamer):
    """Notes what the near keys hold and miss, [heads] of each layer; the model runs as it is."""

    def __init__(self, sink: int, recent: int) -> None:
        super().__init__(sink, recent)
        self.kept: list[Tensor] = []
        self.error: list[Tensor] = []

    def on_layer(self, call: LayerCall) -> Tensor:
        """See `lens.passes.sessions.listening`."""
        full, near, near_lse = self._states(call)
        far = slice(self._sink + self._recent, None)  # rows that see more than those keys
        mass = (near_lse - full.lse)[0, :, far].exp()
        missing = (full.output - near.output)[0, :, far].norm(dim=-1)
        size = full.output[0, :, far].norm(dim=-1).clamp(min=1e-30)
        self.kept.append(mass.mean(-1).double().cpu())
        self.error.append((missing / size).mean(-1).double().cpu())
        return full.output


class _Gate(_Streamer):
    """Mixes both outputs by the gates."""

    def __init__(self, sink: int, recent: int, alpha: Tensor) -> None:
        super().__init__(sink, recent)
        self._alpha = alpha

    def on_layer(self, call: LayerCall) -> Tensor:
        """See `lens.passes.sessions.listening`."""
        full, near, _ = self._states(call)
        share = call.query.shape[1] // call.key.shape[1]
        alpha = self._alpha[call.layer].repeat_interleave(share)[:, None, None]
        return alpha * full.output + (1 - alpha) * near.output


def _last_hidden(model: LoadedModel, prompt: Prompt, gate: _Gate | None) -> Tensor:
    """[tokens, d_model] after the last norm (logits of a model that has nothing apart from its head)."""
    if gate is None:
        return base(model)(**prompt.inputs)[0][0].float()
    with listening(model, gate.on_layer):
        return base(model)(**prompt.inputs)[0][0].float()


def _prompts(model: LoadedModel, texts: Any, sink: int, recent: int) -> list[Prompt]:
    if sink < 0 or recent < 1:
        raise LensError(f"sink must be at least 0 and recent 1, got {sink} and {recent}")
    prompts, _ = read_prompts(model, texts)
    for prompt in prompts:
        if prompt.ids is None or len(prompt.ids) <= sink + recent:
            count = "no" if prompt.ids is None else len(prompt.ids)
            raise LensError(
                f"a prompt has {count} tokens; it takes more than sink + recent = {sink + recent} "
                "for a head to miss any: take longer prompts or fewer recent keys"
            )
    return prompts


def _heads(layers: int, heads: int) -> dict[str, Any]:
    return {
        "name": [str(HeadId(layer, head)) for layer in range(layers) for head in range(heads)],
        "layer": np.repeat(np.arange(layers), heads),
        "head": np.tile(np.arange(heads), layers),
    }
