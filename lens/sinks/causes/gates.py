"""All sinks on one scale: the effective gate, what they leave of a row's attention or of its output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.head_ids import HeadId, head_columns
from lens.common.progress import advancing
from lens.common.results import Result, Sentence
from lens.edits.base import grouped
from lens.edits.losses import bos_policy, two_tokens
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, evened
from lens.passes.inputs import read_prompts
from lens.passes.keys import Keys, KeysAt, check_fixed_keys, members
from lens.passes.sessions import OnLayer, base, listening
from lens.stats import over_units
from lens.stats.intervals import known_mean
from lens.stats.verdicts import mean_told, of_many_told

OFF_BY_ONE = 0.0
"""Logit of softmax-off-by-one, `exp(s) / (1 + sum exp(s))`: a learned sink with this logit."""
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""Last part of the names under which models keep the projection of their heads' outputs."""
_SAME = 1e-5

_NAMES = {
    "keys": "Beside what lies on the sources the heads keep {} of their attention",
    "learned": "Beside the model's learned sinks the heads keep {} of their attention",
    "off_by_one": "With softmax-off-by-one, which the model does not have, the heads would keep {} of their "
    "attention",
    "output": "The gates behind the attention let {} of the heads' output through",
}


@dataclass(frozen=True, repr=False, eq=False)
class EffectiveGates(Result):
    """`g = 1 - mass of a sink` of every head, means over the rows and prompts.

    Attributes:
        rows: one per mechanism, layer and head: `gate`, with `low` and `high` (95 % over prompts), and `gate_baseline`, the
            same with even attention (logits of 0; NaN of "output", which it does not change). Mechanisms: "keys" (the sources, as BOS, registers or persistent memory), "learned" (the
            model's own sink logits), "off_by_one" (what softmax-off-by-one would leave; the model
            does not have it) and "output" (gates between a head's output and its projection).
        means: mechanism -> [prompts], mean gate of all heads.
        tokens: [prompts], T of each.
        bos: "added", "absent" or "mixed".
        seed: of the bootstrap.
        projections: "found", or which projections were not, so that output gates would not be seen.
    """

    rows: pd.DataFrame = field(repr=False)
    means: Mapping[str, np.ndarray] = field(repr=False)
    tokens: tuple[int, ...]
    bos: str
    projections: str
    seed: int

    def table(self) -> pd.DataFrame:
        """The rows with BOS policy and number of prompts."""
        return self.rows.assign(bos=self.bos, n=len(self.tokens))

    def findings(self) -> tuple[Sentence, ...]:
        """How far each mechanism closes its heads, as the kind of its name, and the `limit`."""
        found = []
        for mechanism, rows in self.rows.groupby("mechanism", sort=False):
            lowest = rows.sort_values("gate").iloc[0]
            mean = mean_told(self.means[str(mechanism)], self.seed, ".0%")
            even = rows["gate_baseline"].mean()
            beside = "" if np.isnan(even) else f"; {even:.0%} with even attention"
            least = of_many_told(
                lowest, "gate", ".1%", len(rows), len(self.tokens), plain=True, least=0, most=1
            )
            text = (
                f"{_NAMES[str(mechanism)].format(mean)} on average (effective gate{beside}); "
                f"{lowest['name']} least, {least}."
            )
            found.append(Sentence(text, kind=str(mechanism)))
        hidden = "" if self.projections == "found" else f" {self.projections}"
        limit = f"{len(self.tokens)} prompts, BOS {self.bos}; what lies on the sources is that of the rows behind them.{hidden}"
        return (*found, Sentence(limit, kind="limit"))


def gates(
    model: LoadedModel,
    prompts: Any,
    *,
    sources: Keys = "first",
    seed: Seed = 0,
    progress: bool = True,
) -> EffectiveGates:
    """`g_i = 1 - m_i(S)` for keys that act as sinks, for learned sinks, and for gates on the output.

    With b the logit of a learned sink and L the log-sum-exp of the real keys, `g = sigmoid(L - b)`,
    and the head's output is g times the one without it. Rows that see no key
    but sources, and those before the last source, are left out of "keys". With o a head's output and o' what enters its projection, an
    output gate is `sum(o' . o) / sum(o . o)`: the gate itself where there is one a head, for gates by
    element (Qwen's gated attention, AFMoE: `o' = sigmoid(x W_g) * o`) their mean weighted by o². Such
    gates do a sink's work without a sink: with them the first token keeps 4.8 % of the attention
    instead of 46.7 % (Qiu et al. 2025, arXiv 2505.06708).

    Args:
        model: as `lens.load` returns it; causal.
        prompts: as for `lens.capture`, token prompts.
        sources: "first", positions or a bool mask.
        seed: of the bootstrap.
        progress: show a bar.

    Raises:
        LensError: prompts of one token, sources that are not there or leave no row, or a model that
            looks ahead.

    Example:
        >>> lens.sinks.gates(model, texts).table().sort_values("gate").head()
    """
    check_fixed_keys("sources", sources, "gates")
    asked = read_prompts(model, prompts)[0]
    read = [two_tokens(prompt.ids) for prompt in asked]
    found: dict[str, list[torch.Tensor]] = {}
    with advancing("gates", len(asked), progress) as advance:
        for prompt in asked:
            run, outputs = _Gates(sources), Outputs(model)
            with torch.no_grad(), listening(model, outputs.of(run.on_layer)), outputs.hooked():
                base(model)(**prompt.inputs)
            kept = [torch.stack([gate, torch.full_like(gate, torch.nan)]) for gate in outputs.kept]
            for mechanism, layers in (*run.layers.items(), ("output", kept)):
                found.setdefault(mechanism, []).append(torch.stack(layers or run.missing, 1))
            advance(1)
    rows, means = [], {}
    for mechanism, of_prompts in found.items():
        # [prompts, layers, heads], NaN: not there
        values, even = torch.stack(of_prompts, 1).double().numpy()
        if mechanism == "output" and (np.abs(values - 1) < _SAME).all():
            continue
        low, high = over_units(values, (values == values).astype(float), seed)
        columns = {"gate": values.mean(0), "low": low, "high": high, "gate_baseline": even.mean(0)}
        table = pd.DataFrame(
            {"mechanism": mechanism}
            | head_columns(model.info.every_head)
            | {name: column.ravel() for name, column in columns.items()}
        )
        rows.append(table[table["gate"].notna()])
        means[mechanism] = known_mean(values.reshape(len(values), -1))
    table = pd.concat(rows, ignore_index=True)
    lengths = tuple(len(ids) for ids in read)
    return EffectiveGates(table, means, lengths, bos_policy(model, read), outputs.words(), seed)


class _Gates:
    """Runs the model as it is; mechanism -> per layer [2, heads], mean gate, and the same with even attention."""

    def __init__(self, sources: Keys) -> None:
        self.layers: dict[str, list[torch.Tensor]] = {"keys": [], "learned": [], "off_by_one": []}
        self._sources = sources

    @property
    def missing(self) -> list[torch.Tensor]:
        """Per layer [2, heads] of NaN."""
        return [torch.full_like(gate, torch.nan) for gate in self.layers["keys"]]

    def on_layer(self, call: LayerCall) -> torch.Tensor:
        """See `lens.passes.sessions.listening`."""
        if not call.mask.causal:
            raise LensError(f"layer {call.layer} sees later tokens; gates is for causal models")
        at = KeysAt(
            call.layer, 0, torch.arange(call.key.shape[2], device=call.key.device)[None], None
        )
        source = members("sources", self._sources, at)
        output, own = _gates(call, source)
        _, even = _gates(evened(call), source)
        for mechanism, gate in own.items():
            self.layers[mechanism].append(torch.stack([gate, even[mechanism]]).cpu())
        return output


def _gates(call: LayerCall, source: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output of a layer, and mechanism -> [heads], mean gate; NaN of one that it has not."""
    result = grouped(call, source.int(), "auto")
    assert result.groups is not None
    whole = result.statistics["lse"][0]  # the learned sink included
    if len(result.groups.lse) < 2 or not bool(source.any()):
        raise LensError(f"none of the sources is in a prompt of {source.shape[1]} tokens")
    rest, sinks = result.groups.lse[0][0], result.groups.lse[1][0]
    real = torch.logaddexp(rest, sinks)
    behind = torch.arange(rest.shape[-1], device=rest.device) > int(source[0].nonzero()[-1])
    counted = (rest > -torch.inf) & behind
    if not bool(counted.any()):
        raise LensError("no row behind the sources sees another key; give fewer sources")
    keys = _mean(-torch.expm1(sinks - whole), counted)
    nothing = torch.full_like(keys, torch.nan)
    learned, off_by_one = nothing, nothing
    if call.sink_logits is None:
        off_by_one = _mean((real - OFF_BY_ONE).sigmoid(), real > -torch.inf)
    else:
        learned = _mean((real - whole).exp(), real > -torch.inf)
    return result.output, {"keys": keys, "learned": learned, "off_by_one": off_by_one}


class Outputs:
    """Compares each head's output with what enters the projection; `kept`: [heads] each, if all are seen.

    Of `opened` heads the output itself enters it, as if their gate let all through. `projections`: those that were met.
    """

    def __init__(self, model: LoadedModel, opened: Sequence[HeadId] = ()) -> None:
        self._model, self._opened = model, opened
        self._layers, self._layer = 0, 0
        self.projections: list[nn.Module] = []
        self._output: torch.Tensor | None = None  # [rows, queries, heads, dim] of the last call
        self._seen: list[torch.Tensor] = []

    def of(self, run: OnLayer) -> OnLayer:
        """Listens to a run's layers."""

        def on_layer(call: LayerCall) -> torch.Tensor:
            output = run(call).to(call.value.dtype)
            self._output = output.transpose(1, 2)
            self._layers, self._layer = self._layers + 1, call.layer
            return output

        return on_layer

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Looks at what enters each output projection."""
        with ExitStack() as stack:
            for name, part in base(self._model).named_modules():
                if name.rpartition(".")[2] in PROJECTIONS and not list(part.children()):
                    stack.enter_context(part.register_forward_pre_hook(self._meet))
            yield

    def _meet(self, part: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        output, entering = self._output, inputs[0]
        if output is None or entering.shape[-1] != output.shape[-1] * output.shape[-2]:
            return None
        self._output = None
        self.projections.append(part)
        gated, plain = entering.reshape(output.shape).double(), output.double()
        norms = (plain * plain).sum(-1)
        shares = ((gated * plain).sum(-1) / norms.clamp_min(1e-30)).where(norms > 0, torch.nan)
        self._seen.append(shares[0].nanmean(0).cpu())
        heads = [head for layer, head in self._opened if layer == self._layer]
        if not heads:
            return None
        changed = entering.reshape(output.shape).clone()
        changed[:, :, heads] = output[:, :, heads].to(changed)
        return changed.reshape(entering.shape), *inputs[1:]

    @property
    def kept(self) -> list[torch.Tensor]:
        return self._seen if len(self._seen) == self._layers else []

    def words(self) -> str:
        """ "found", or what was not."""
        if self.kept:
            return "found"
        return (
            f"Gates on the output were not looked for: a projection was found behind {len(self._seen)} of "
            f"{self._layers} attention layers."
        )


def _mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[heads]: mean over the rows that count."""
    return ((values * counted).sum(-1) / counted.sum(-1)).cpu()
