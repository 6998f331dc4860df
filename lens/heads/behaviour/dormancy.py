"""Active and dormant heads: a head may rest on the first key in one domain and work in another.

Activity alone says where a head looks; that it rests is shown by taking it out, which must cost
nothing. Both are measured on the same windows, domain by domain. A head that always adds the same
vector is missed under zero ablation, as the authors do it, and not under mean ablation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.results import Result
from lens.heads.measures.importances import importance
from lens.heads.measures.methods import Baseline
from lens.models.loaded import LoadedModel
from lens.stats import over_units
from lens.tasks.making import language_modelling
from lens.traces.captures import capture
from lens.traces.trace import AttentionTrace


@dataclass(frozen=True, repr=False, eq=False)
class Dormancy(Result):
    """Activity of every head, and what the loss loses without it, on each domain.

    Attributes:
        activity: domain -> [layer, head, window], `1 - mean over queries i >= 1 of P[i, 0]`.
        loss: domain -> [layer, head, window], loss without the head less the loss as it is, nats per
            token; positive = the head helps.
        baseline: what was put in the head's place (`Intervention`).
        rest: activity below which a head may be dormant.
        tolerance: |loss| below which it is spared.
        model: its name.
    """

    activity: Mapping[str, np.ndarray]
    loss: Mapping[str, np.ndarray]
    rest: float
    tolerance: float
    baseline: str
    model: str

    def dormant(self, domain: str) -> list[HeadId]:
        """Heads that rest on the first key in this domain, and are not missed.

        Raises:
            LensError: no such domain.
        """
        if domain not in self.activity:
            raise LensError(f"unknown domain {domain!r}; known: {', '.join(self.activity)}")
        quiet = self.activity[domain].mean(-1) < self.rest
        spared = np.abs(self.loss[domain].mean(-1)) < self.tolerance
        return [HeadId(int(a), int(b)) for a, b in np.argwhere(quiet & spared)]

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per domain and head: `domain`, `name`, `layer`, `head`, `n` windows, `activity` and
        `loss` with their 95 % bootstrap intervals over windows, and `dormant`."""
        parts = []
        for domain, activity in self.activity.items():
            layers, heads, n = activity.shape
            names = [HeadId(layer, head) for layer in range(layers) for head in range(heads)]
            dormant = set(self.dormant(domain))
            columns: dict[str, object] = {
                "domain": domain,
                "name": [str(head) for head in names],
                "layer": np.repeat(np.arange(layers), heads),
                "head": np.tile(np.arange(heads), layers),
                "n": n,
            }
            for name, values in (("activity", activity), ("loss", self.loss[domain])):
                units = np.moveaxis(values, -1, 0)
                low, high = over_units(units, np.ones_like(units), seed)
                columns |= {
                    name: values.mean(-1).ravel(),
                    f"{name}_low": low.ravel(),
                    f"{name}_high": high.ravel(),
                }
            parts.append(pd.DataFrame(columns | {"dormant": [head in dormant for head in names]}))
        return pd.concat(parts, ignore_index=True)

    def __repr__(self) -> str:
        shown = "; ".join(
            f"{domain}: {', '.join(map(str, self.dormant(domain))) or 'none'}"
            for domain in self.activity
        )
        return f"Dormancy({self.model}, dormant on {shown})"


def dormancy(
    model: LoadedModel,
    domains: Mapping[str, str | Sequence[str] | Sequence[Sequence[int]]],
    *,
    length: int | None = None,
    n: int | None = None,
    rest: float = 0.2,
    tolerance: float = 1e-3,
    baseline: Baseline = "zero",
    progress: bool = True,
) -> Dormancy:
    """Which heads rest on the first key, and may, in each of several domains.

    Args:
        model: as `lens.load` returns it; causal.
        domains: name -> a text, several, or windows of token ids, as `lens.tasks.language_modelling`
            takes them.
        length: tokens of a window of text; None: what the model takes.
        n: use only the first n windows of each domain; None: all.
        rest: activity below which a head may be dormant.
        tolerance: change of the loss, in nats per token, below which it is spared.
        baseline: of the ablation, as in `importance`.
        progress: show bars, on stderr, if that is a terminal.

    Reference: Guo et al., Active-Dormant Attention Heads, 2024, arXiv 2410.13835.

    Raises:
        LensError: no domains, or as `language_modelling` and `importance`.

    Example:
        >>> prose = [lens.tasks.text("moby-dick"), lens.tasks.text("lily")]
        >>> lens.heads.dormancy(model, {"prose": prose}, length=32, n=4).dormant("prose")
    """
    if not domains:
        raise LensError("dormancy needs at least one domain: a name with its texts")
    activity, loss = {}, {}
    for domain, texts in domains.items():
        task = language_modelling(model, texts, length=length, n=n)
        found = []
        for ids in task.clean.tolist():
            trace = capture(model, ids, statistics=["first_mass"], progress=False)
            assert isinstance(trace, AttentionTrace)
            found.append(1 - trace.first_mass.values[..., 1:].astype(np.float64).mean(-1))
        activity[domain] = np.stack(found, -1)
        scores = importance(model, task, method="ablation", baseline=baseline, progress=progress)
        loss[domain] = scores.per_prompt
    return Dormancy(activity, loss, rest, tolerance, baseline, model.name)
