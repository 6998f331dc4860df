"""All sinks on one scale: the effective gate, what they leave of a row's attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from lens.common.errors import LensError
from lens.common.results import Result, described
from lens.edits.base import grouped
from lens.edits.losses import bos_policy, two_tokens
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall
from lens.passes.inputs import read_prompts
from lens.passes.keys import Keys, KeysAt, check_keys, members
from lens.passes.sessions import base, listening
from lens.stats import over_units

OFF_BY_ONE = 0.0
"""Logit of softmax-off-by-one, `exp(s) / (1 + sum exp(s))`: a learned sink with this logit."""


_NAMES = {
    "keys": "Beside what lies on the sources",
    "learned": "Beside the model's learned sinks",
    "off_by_one": "With softmax-off-by-one, which the model does not have,",
}


@dataclass(frozen=True, eq=False)
class EffectiveGates(Result):
    """`g = 1 - mass of a sink` of every head, means over the rows and prompts.

    Attributes:
        rows: one per mechanism, layer and head: `gate`, with `low` and `high` (95 % over prompts).
            Mechanisms: "keys" (the sources, as BOS, registers or persistent memory), "learned" (the
            model's own sink logits) and "off_by_one" (what softmax-off-by-one would leave; the model
            does not have it).
        tokens: [prompts], T of each.
        bos: "added", "absent" or "mixed".
    """

    rows: pd.DataFrame = field(repr=False)
    tokens: tuple[int, ...]
    bos: str

    def table(self) -> pd.DataFrame:
        """The rows with BOS policy and number of prompts."""
        return self.rows.assign(bos=self.bos, n=len(self.tokens))

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> list[str]:
        """How far each mechanism closes its heads."""
        found = []
        for mechanism, rows in self.rows.groupby("mechanism", sort=False):
            lowest = rows.sort_values("gate").iloc[0]
            found.append(
                f"{_NAMES[str(mechanism)]} the heads keep {rows['gate'].mean():.0%} of their attention on "
                f"average (effective gate); L{lowest['layer']}H{lowest['head']} least, {lowest['gate']:.1%} "
                f"[{lowest['low']:.1%}, {lowest['high']:.1%}]."
            )
        return [
            *found,
            f"{len(self.tokens)} prompts, BOS {self.bos}; rows that see only sinks excepted.",
        ]


def effective_gate(
    model: LoadedModel, prompts: Any, *, sources: Keys = "first", seed: int = 0
) -> EffectiveGates:
    """`g_i = 1 - m_i(S)` for keys that act as sinks and, where the model has them, learned sinks.

    With b the logit of a learned sink and L the log-sum-exp of the real keys, `g = sigmoid(L - b)`,
    and the head's output is g times the one without it (METHODS-ATTENTION 1.8). Rows that see no key
    but sources are left out of "keys".

    Args:
        model: as `lens.load` returns it; causal.
        prompts: as for `lens.capture`, token prompts.
        sources: "first", positions or a bool mask.
        seed: of the bootstrap.

    Raises:
        LensError: prompts of one token, sources that are not there or leave no row, or a model that
            looks ahead.

    Example:
        >>> lens.sinks.effective_gate(model, texts).table().sort_values("gate").head()
    """
    check_keys("sources", sources)
    if callable(sources) and not isinstance(sources, torch.Tensor):
        raise LensError("sources of effective_gate are the same in every layer; give positions")
    found: dict[str, list[torch.Tensor]] = {}
    read = []
    for prompt in read_prompts(model, prompts)[0]:
        ids = two_tokens(prompt.ids)
        gates = _Gates(sources)
        with torch.no_grad(), listening(model, gates.on_layer):
            base(model)(**prompt.inputs)
        for mechanism, layers in gates.layers.items():
            found.setdefault(mechanism, []).append(torch.stack(layers))
        read.append(ids)
    rows = []
    for mechanism, gates in found.items():
        values = torch.stack(gates).double().numpy()  # [prompts, layers, heads], NaN: not there
        low, high = over_units(values, (values == values).astype(float), seed)
        for layer in range(values.shape[1]):
            for head in range(values.shape[2]):
                if (values[:, layer, head] == values[:, layer, head]).all():
                    ends = {"low": low[layer, head], "high": high[layer, head]}
                    gate = {"gate": values[:, layer, head].mean(), **ends}
                    place = {"layer": model.info.attending[layer], "head": head}
                    rows.append({"mechanism": mechanism} | place | gate)
    lengths = tuple(len(ids) for ids in read)
    return EffectiveGates(pd.DataFrame(rows), lengths, bos_policy(model, read))


class _Gates:
    """Runs the model as it is; mechanism -> per layer [heads], mean gate."""

    def __init__(self, sources: Keys) -> None:
        self.layers: dict[str, list[torch.Tensor]] = {"keys": [], "learned": [], "off_by_one": []}
        self._sources = sources

    def on_layer(self, call: LayerCall) -> torch.Tensor:
        """See `lens.passes.sessions.listening`."""
        if not call.mask.causal:
            raise LensError(
                f"layer {call.layer} sees later tokens; effective_gate is for causal models"
            )
        at = KeysAt(
            call.layer, 0, torch.arange(call.key.shape[2], device=call.key.device)[None], None
        )
        source = members("sources", self._sources, at)
        result = grouped(call, source.int(), "auto")
        assert result.groups is not None
        whole = result.statistics["lse"][0]  # the learned sink included
        if len(result.groups.lse) < 2 or not bool(source.any()):
            raise LensError(f"none of the sources is in a prompt of {source.shape[1]} tokens")
        rest, sinks = result.groups.lse[0][0], result.groups.lse[1][0]
        real = torch.logaddexp(rest, sinks)
        has_rest = rest > -torch.inf
        if not bool(has_rest.any()):
            raise LensError("no row sees a key that is no source; give fewer sources")
        kept = -torch.expm1(sinks - whole)
        self.layers["keys"].append(_mean(kept, has_rest))
        learned = (real - whole).exp()
        nothing = torch.full_like(learned[:, 0], torch.nan)
        own = nothing if call.sink_logits is None else _mean(learned, real > -torch.inf)
        self.layers["learned"].append(own.cpu())
        if call.sink_logits is None:
            nothing = _mean((real - OFF_BY_ONE).sigmoid(), real > -torch.inf)
        self.layers["off_by_one"].append(nothing.cpu())
        return result.output


def _mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[heads]: mean over the rows that count."""
    return ((values * counted).sum(-1) / counted.sum(-1)).cpu()
