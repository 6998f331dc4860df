"""Persistent memory: learned keys and values that every query sees, on the scale of the effective gate.

A KV bias is memory of one pair per head (Sun et al., arXiv 2402.17762); Titans prepends several (Behrouz
et al., arXiv 2501.00663). Neither has a position. With `m` the mass of the memory, `o_P` and `o` the
attention over the memory and over the tokens alone,

    output = (1 - m) o + m o_P,      effective gate = 1 - m,

which is softmax-off-by-one for one pair of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.choices import Seed, check_lists
from lens.common.errors import LensError
from lens.common.head_ids import all_heads, head_columns
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, counted, ends
from lens.edits.losses import bos_policy, two_tokens
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend, evened
from lens.passes.inputs import read_prompts
from lens.passes.sessions import base, listening
from lens.passes.structures import MaskStructure
from lens.stats import over_units
from lens.stats.verdicts import APART, of_many_told, verdict

Pair = tuple[torch.Tensor, torch.Tensor]
_MEASURES = ("gate", "contribution", "removal", "early_mass", "late_mass")
_EVEN = ("gate_baseline", "early_mass_baseline", "late_mass_baseline")


@dataclass(frozen=True, repr=False, eq=False)
class PersistentMemory(Result):
    """What memory does to every head of a model that runs with it, means over rows and prompts.

    Attributes:
        rows: one per layer and head that has memory: `gate`, `1 - m`, with `low` and `high` (95 % over
            prompts); `contribution`, the share `|m o_P| / (|m o_P| + |(1 - m) o|)` of the head's output;
            `removal`, `|o - output| / |output|`, what masking the memory changes; `early_mass` and
            `late_mass`, m in the first and the last quarter of the rows (drift with the context); `gate_baseline`,
            `early_mass_baseline`, `late_mass_baseline`, with even attention to memory and tokens, whose mass falls, too.
        gate: mean of `gate` over heads, with `low` and `high` over prompts.
        drift: what `late_mass` has more than `early_mass`, mean over heads, with `low` and `high` over prompts.
        removed: mean of `removal` over heads, with `low` and `high` over prompts.
        pairs: of memory in the layer that has most.
        tokens: [prompts], T of each.
        bos: "added", "absent" or "mixed".
    """

    rows: pd.DataFrame = field(repr=False)
    gate: tuple[float, float, float]
    drift: tuple[float, float, float]
    removed: tuple[float, float, float]
    pairs: int
    tokens: tuple[int, ...]
    bos: str

    def table(self) -> pd.DataFrame:
        """The rows with the mechanism "memory", as in `EffectiveGates`, BOS policy and prompts."""
        return self.rows.assign(mechanism="memory", bos=self.bos, n=len(self.tokens))

    def findings(self) -> tuple[Sentence, ...]:
        """How much the memory takes, whether that changes along the prompt, and the `limit`."""
        lowest = self.rows.sort_values("gate").iloc[0]
        least = of_many_told(
            lowest, "gate", ".1%", len(self.rows), len(self.tokens), plain=True, least=0, most=1
        )
        mean = self.rows.mean(numeric_only=True)
        change, low, high = self.drift
        beside = "" if verdict(low, high) in APART else ", not told apart from no change"
        if np.isnan(low):
            beside = ", of which one prompt tells nothing"
        found = {
            "gate": f"With {counted(self.pairs, 'pair')} of memory the heads keep {self.gate[0]:.0%}{ends(*self.gate[1:], '.0%')} of their attention "
            f"on average ({mean['gate_baseline']:.0%} with even attention); {lowest['name']} least, {least}.",
            "drift": f"The mass of the memory goes from {mean['early_mass']:.1%} in the first quarter of the rows to "
            f"{mean['late_mass']:.1%} in the last, {change:+.1%}{ends(low, high, '+.1%')}{beside}; with even attention from "
            f"{mean['early_mass_baseline']:.1%} to {mean['late_mass_baseline']:.1%}.",
            "removal": f"Masking the memory changes a head's output by {self.removed[0]:.0%}"
            f"{ends(self.removed[1], self.removed[2], '.0%')} of its size on average.",
            "limit": f"{len(self.tokens)} prompts, BOS {self.bos}.",
        }
        return tuple(Sentence(text, kind=kind) for kind, text in found.items())


def persistent_memory(
    model: LoadedModel,
    prompts: Any,
    pairs: Sequence[Pair | None],
    *,
    seed: Seed = 0,
    progress: bool = True,
) -> PersistentMemory:
    """Run a model with persistent memory in its attention, and measure what the memory takes and gives.

    Every query sees the memory, in windows too; it has no position, and scale, soft-cap and learned
    sinks are the layer's own.

    Args:
        model: as `lens.load` returns it; causal.
        prompts: as for `lens.capture`, token prompts.
        pairs: per layer (keys [kv_heads, P, head_dim], values [kv_heads, P, value_dim]) as the layer
            sees them (keys behind any rotation or norm), or None for a layer without.
        seed: of the bootstrap.
        progress: show a bar.

    Raises:
        LensError: a number of layers or shapes that the model has not, memory in no layer, prompts of
            one token, or a model that looks ahead.

    Example:
        >>> zeros = torch.zeros(model.info.kv_heads, 1, model.info.head_dim)
        >>> lens.sinks.persistent_memory(model, texts, [(zeros, zeros)] * model.info.layers).table()
    """
    model.info.check_all_attend("persistent_memory")
    check_lists(pairs=pairs)
    if len(pairs) != model.info.layers or all(pair is None for pair in pairs):
        raise LensError(
            f"pairs must have one entry for each of the {model.info.layers} layers, at least one of them "
            f"(keys, values); got {len(pairs)} entries"
        )
    asked, found = read_prompts(model, prompts)[0], []
    read = [two_tokens(prompt.ids) for prompt in asked]
    with advancing("memory", len(asked), progress) as advance:
        for prompt in asked:
            runner = WithMemory(pairs)
            with torch.no_grad(), listening(model, runner.on_layer):
                base(model)(**prompt.inputs)
            found.append(torch.stack(runner.measured))
            advance(1)
    values = torch.stack(found).double().numpy()  # [prompts, layers, heads, measures]
    low, high = over_units(values[..., 0], (values[..., 0] == values[..., 0]).astype(float), seed)
    having = [layer for layer, pair in enumerate(pairs) if pair is not None]
    places = all_heads(having, values.shape[2])
    columns = dict(zip((*_MEASURES, *_EVEN), np.moveaxis(values.mean(0), -1, 0), strict=True))
    columns |= {"low": low, "high": high}
    rows = pd.DataFrame(
        head_columns(places) | {name: column[having].ravel() for name, column in columns.items()}
    )
    most = max(pair[0].shape[1] for pair in pairs if pair is not None)
    lengths = tuple(len(ids) for ids in read)
    by_prompt = values[:, having].mean((1, 2))  # [prompts, measures]
    gate, removed = (_mean(by_prompt[:, place], seed) for place in (0, 2))
    drift = _mean(by_prompt[:, 4] - by_prompt[:, 3], seed)
    return PersistentMemory(rows, gate, drift, removed, most, lengths, bos_policy(model, read))


def _mean(values: np.ndarray, seed: Seed) -> tuple[float, float, float]:
    """Mean over prompts with its interval."""
    low, high = over_units(values, np.ones_like(values), seed)
    return float(values.mean()), float(low), float(high)


class WithMemory:
    """Joins the attention over the memory to that over the tokens; `measured`: [heads, measures] each."""

    def __init__(self, pairs: Sequence[Pair | None]) -> None:
        self.measured: list[torch.Tensor] = []
        self._pairs = pairs

    def on_layer(self, call: LayerCall) -> torch.Tensor:
        """See `lens.passes.sessions.listening`.

        Raises:
            LensError: the layer looks ahead, or its memory has another shape.
        """
        layer = call.layer
        if not call.mask.causal:
            raise LensError(
                f"layer {layer} sees later tokens; persistent_memory is for causal models"
            )
        tokens, pair = attend(call), self._pairs[layer]
        own, own_lse = tokens.output, tokens.statistics["lse"]
        if pair is None:
            count = len(_MEASURES) + len(_EVEN)
            self.measured.append(torch.full((own.shape[1], count), torch.nan))
            return own
        keys, values = (tensor.to(call.key)[None] for tensor in pair)
        self._check(layer, call, keys, values)
        batch = len(call.query)
        alone = replace(
            call,
            key=keys.expand(batch, -1, -1, -1),
            value=values.expand(batch, -1, -1, -1),
            mask=MaskStructure(causal=False),
            sink_logits=None,
            position_bias=None,
            tokens=None,
        )
        remembered = attend(alone)
        lse = torch.logaddexp(own_lse, remembered.statistics["lse"])
        mass, kept = (
            (part - lse).exp()[..., None] for part in (remembered.statistics["lse"], own_lse)
        )
        given, rest = mass * remembered.output.float(), kept * own.float()
        output = given + rest
        sizes = [part.norm(dim=-1) for part in (given, rest, output, own.float() - output)]
        quarter = max(1, mass.shape[2] // 4)
        both = [attend(evened(one)).statistics["lse"][0] for one in (call, alone)]
        even_kept, even = ((one - torch.logaddexp(*both)).exp() for one in both)  # [heads, rows]
        self.measured.append(
            torch.stack(
                [
                    kept[0, ..., 0].mean(-1),
                    (sizes[0] / (sizes[0] + sizes[1]))[0].mean(-1),
                    (sizes[3] / sizes[2])[0].mean(-1),
                    mass[0, :, :quarter, 0].mean(-1),
                    mass[0, :, -quarter:, 0].mean(-1),
                    even_kept.mean(-1),
                    even[:, :quarter].mean(-1),
                    even[:, -quarter:].mean(-1),
                ],
                -1,
            ).cpu()
        )
        return output

    def _check(self, layer: int, call: LayerCall, keys: torch.Tensor, values: torch.Tensor) -> None:
        heads, count = call.key.shape[1], keys.shape[2] if keys.dim() == 4 else 0
        wanted = [[heads, count, tensor.shape[-1]] for tensor in (call.key, call.value)]
        got = [list(tensor.shape[1:]) for tensor in (keys, values)]
        if count < 1 or got != wanted:
            raise LensError(
                f"memory of layer {layer} must be keys [{heads}, P, {call.key.shape[-1]}] and values "
                f"[{heads}, P, {call.value.shape[-1]}] with P of at least 1, got {got[0]} and {got[1]}"
            )
