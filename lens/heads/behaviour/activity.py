"""Active and dormant heads: a head may rest on the first key in one domain and work in another.

Activity alone says where a head looks; that it rests is shown by taking it out, which must cost
nothing. Both are measured on the same windows, domain by domain. A head that always adds the same
vector is missed under zero ablation, as the authors do it, and not under mean ablation.

Activity is a mean over queries i >= 1: query 0 sees key 0 alone, so its weight there is 1 in every head, no
choice of the head's, and would make activity fall with the shortness of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId, head_columns
from lens.common.results import Result, Sentence, counted
from lens.heads.measures.methods import Baseline
from lens.heads.pruning.groups import ablate_each
from lens.models.loaded import LoadedModel
from lens.stats.intervals import columns
from lens.tasks.language import language_modelling
from lens.traces.captures import capture
from lens.traces.trace import AttentionTrace


@dataclass(frozen=True, repr=False, eq=False)
class HeadActivity(Result):
    """Activity of every head, and what the loss loses without it, on each domain.

    Attributes:
        activity: domain -> [layer, head, window], `1 - mean over queries i >= 1 of P[i, 0]`.
        loss: domain -> [layer, head, window], loss without the head less the loss as it is, nats per
            token; positive = the head helps. NaN where the head was not taken out.
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

    @staticmethod
    def of_first_mass(mass: np.ndarray) -> np.ndarray:
        """[layer, head]: `1 - mean over queries i >= 1` of the mass on key 0 [layer, head, query]."""
        return 1 - mass[..., 1:].astype(np.float64).mean(-1)

    def dormant(self, domain: str) -> list[HeadId]:
        """Heads that rest on the first key in this domain, and are not missed.

        Raises:
            LensError: no such domain.
        """
        if domain not in self.activity:
            raise LensError(f"unknown domain {domain!r}; known: {', '.join(self.activity)}")
        quiet = self.activity[domain].mean(-1) < self.rest
        spared = np.abs(self.loss[domain].mean(-1)) < self.tolerance
        return [HeadId(*at) for at in np.argwhere(quiet & spared).tolist()]

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per domain and head: `domain`, `name`, `layer`, `head`, `n` windows, `activity` and
        `loss` with their 95 % bootstrap intervals over windows, and `dormant`."""
        parts = []
        for domain, activity in self.activity.items():
            places = np.argwhere(~np.isnan(activity).all(-1))
            heads = [HeadId(*place) for place in places.tolist()]
            dormant = set(self.dormant(domain))
            found = {"domain": domain, **head_columns(heads), "n": activity.shape[-1]}
            for name, values in (("activity", activity), ("loss", self.loss[domain])):
                found |= columns(name, values[tuple(places.T)], seed, shares=name == "activity")
            parts.append(pd.DataFrame(found | {"dormant": [head in dormant for head in heads]}))
        return pd.concat(parts, ignore_index=True)

    def switching(self) -> list[HeadId]:
        """Heads that are dormant on some domain and not on another."""
        found = [set(self.dormant(domain)) for domain in self.activity]
        return sorted(set.union(*found) - set.intersection(*found))

    def _by_intervals(self) -> tuple[dict[str, int], int]:
        """By whole intervals: how many heads are dormant on each domain, and how many on one and not on another."""
        rows = self.table()
        quiet = rows["activity_high"] < self.rest
        spared = (rows["loss_low"] > -self.tolerance) & (rows["loss_high"] < self.tolerance)
        missed = (rows["loss_low"] >= self.tolerance) | (rows["loss_high"] <= -self.tolerance)
        rests, works = rows[quiet & spared], rows[(rows["activity_low"] >= self.rest) | missed]
        counts = {domain: int((rests["domain"] == domain).sum()) for domain in self.activity}
        return counts, len({*rests["name"]} & {*works["name"]})

    def findings(self) -> tuple[Sentence, ...]:
        """Which heads are dormant where ("dormant"), which switch ("switching"), what that rests on ("limit")."""
        said, (surely, switch) = [], self._by_intervals()
        windows = max(loss.shape[-1] for loss in self.loss.values())
        for domain, loss in self.loss.items():
            names, many = [str(head) for head in self.dormant(domain)], loss.shape[-1] > 1
            taken = int((~np.isnan(loss).all(-1)).sum())
            named = f": {', '.join(names)}" if names else ""
            if names and many:
                named += f"; {surely[domain]} of them by their whole intervals"
            said.append(
                Sentence(
                    f"On {domain} {len(names)} of {taken} heads taken out are dormant{named} "
                    f"({counted(loss.shape[-1], 'window')}{', which has no interval' * (not many)}).",
                    kind="dormant",
                )
            )
        names = [str(head) for head in self.switching()]
        switching = ", ".join(names) or "No head"
        held = (
            f"; {switch} of {len(names)} by their whole intervals" if names and windows > 1 else ""
        )
        limit = (
            f"Dormant means activity below {self.rest} and a loss that changes by less than {self.tolerance} "
            f"nats per token with {self.baseline} in the head's place; heads were taken out one at a time, so "
            "heads that stand in for each other may all look dormant."
        )
        return (
            *said,
            Sentence(
                f"{switching}: dormant on one domain and not on another{held}.", kind="switching"
            ),
            Sentence(limit, kind="limit"),
        )

    def __repr__(self) -> str:
        shown = "; ".join(
            f"{domain}: {', '.join(map(str, self.dormant(domain))) or 'none'}"
            for domain in self.activity
        )
        return f"HeadActivity({self.model}, dormant on {shown})"


def activity(
    model: LoadedModel,
    domains: Mapping[str, str | Sequence[str] | Sequence[Sequence[int]]],
    *,
    heads: Sequence[AnyHead] | None = None,
    length: int | None = None,
    n: int | None = None,
    rest: float = 0.2,
    tolerance: float = 1e-3,
    baseline: Baseline = "zero",
    progress: bool = True,
) -> HeadActivity:
    """Which heads rest on the first key, and may, in each of several domains.

    Args:
        model: as `lens.load` returns it; causal.
        domains: name -> a text, several, or windows of token ids, as `lens.tasks.language_modelling`
            takes them.
        heads: those to take out, one at a time; None: all.
        length: tokens of a window of text; None: what the model takes.
        n: use only the first n windows of each domain; None: all.
        rest: activity below which a head may be dormant.
        tolerance: change of the loss, in nats per token, below which it is spared.
        baseline: of the ablation, as in `importance`.
        progress: show bars, on stderr, if that is a terminal.

    Reference: Guo et al., Active-Dormant Attention Heads, 2024, arXiv 2410.13835.

    Raises:
        LensError: no domains, no heads, or as `language_modelling` and `importance`.

    Example:
        >>> prose = [lens.tasks.text("moby-dick"), lens.tasks.text("lily")]
        >>> lens.heads.activity(model, {"prose": prose}, length=32, n=4).dormant("prose")
    """
    if not domains:
        raise LensError("activity needs at least one domain: a name with its texts")
    info = model.info
    chosen = info.every_head if heads is None else list(heads)
    if not chosen:
        raise LensError("activity takes out at least one head; heads is empty")
    activity, loss = {}, {}
    for domain, texts in domains.items():
        task = language_modelling(model, texts, length=length, n=n)
        found = []
        for ids in task.clean.tolist():
            trace = capture(model, ids, statistics=["first_mass"], progress=False)
            assert isinstance(trace, AttentionTrace)
            found.append(HeadActivity.of_first_mass(trace.first_mass.values))
        activity[domain] = info.by_layer(np.stack(found, -1))
        groups = ablate_each(
            model, task, groups=[[head] for head in chosen], baseline=baseline, progress=progress
        )
        loss[domain] = np.full(activity[domain].shape, np.nan)
        for one in groups:
            loss[domain][one.heads[0]] = one.per_prompt
    return HeadActivity(activity, loss, rest, tolerance, baseline, model.name)
