"""`PatchEffects`: what patching moves, and where patches are put."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.circuits.graph.spans import EACH
from lens.common.errors import LensError
from lens.common.results import Result, Sentence, by_size, ends
from lens.models.loaded import LoadedModel
from lens.stats.intervals import columns
from lens.stats.verdicts import clear_told, leave_out_0, of_many
from lens.tasks.task import Task

Direction = Literal["noising", "denoising"]

ROUNDING = 1e-5  # of the metric: what single precision makes of nothing


@dataclass(frozen=True, repr=False, eq=False)
class PatchEffects(Result):
    """What patching each node does to the metric.

    Attributes:
        nodes: writers that were patched; of path patching, senders.
        positions: where: "all", the name of a mark, or the number of a token.
        patched: [nodes, positions, prompts] metric.
        base: [prompts] of the run that is patched.
        source: [prompts] of the run that the patches come from.
        direction: "noising" or "denoising".
        receivers: of path patching, else empty.
        metric, task, model: names.
        seed: of the bootstrap.
        sign: of the metric, -1 where less is better.
    """

    nodes: tuple[str, ...]
    positions: tuple[str, ...]
    patched: np.ndarray
    base: np.ndarray
    source: np.ndarray
    direction: Direction
    receivers: tuple[str, ...]
    metric: str
    task: str
    model: str
    seed: int = 0
    sign: int = 1

    @property
    def effects(self) -> np.ndarray:
        """[nodes, positions], (patched - base) / (source - base), ratio of means: 1 moves all of it.

        NaN where both runs have the same metric, to rounding.
        """
        whole = self.whole or np.nan
        return (self.patched - self.base).mean(2) / whole

    @property
    def whole(self) -> float:
        """source - base, mean over the prompts; 0 where it is no more than rounding."""
        whole = float((self.source - self.base).mean())
        largest = max(np.abs(self.base).max(), np.abs(self.source).max())
        return whole if abs(whole) > ROUNDING * largest else 0.0

    @property
    def relative(self) -> np.ndarray:
        """[nodes, positions], patched / base - 1, ratio of means, as in Wang et al.

        NaN where the base is not positive: it would be turned round.
        """
        base = self.base.mean()
        return self.patched.mean(2) / (base if base > 0 else np.nan) - 1

    def table(self) -> pd.DataFrame:
        """One row per node and position, largest effect by size first.

        Columns: `node`, `position`, `change` (patched - base, in units of the metric: of a loss, up is worse) with `low` and
        `high` (95 % bootstrap interval over prompts), `effect`, `relative`, `n`.
        """
        rows = pd.DataFrame(
            {
                "node": np.repeat(self.nodes, len(self.positions)),
                "position": list(self.positions) * len(self.nodes),
                **columns("change", self.patched - self.base, self.seed, plain=True, shares=False),
                "effect": self.effects.ravel(),
                "relative": self.relative.ravel(),
                "n": len(self.base),
            }
        )
        return by_size(rows, "effect")

    def findings(self) -> tuple[Sentence, ...]:
        """The place that moves most by size (its interval is that of the largest of all), beside the median place, and how
        many are told apart from nothing."""
        largest = max(np.abs(self.base).max(), np.abs(self.source).max())
        if not self.whole:
            apart = np.abs(self.source - self.base).max()
            why = "the corrupt prompts do not change what is measured"
            if apart > ROUNDING * largest:
                why += f" on average, though of single prompts by up to {apart:.3g}"
            text = (
                f"Both runs have the same {self.metric} ({self.base.mean():.3g}, mean of {len(self.base)} prompts), so "
                f"there is nothing for a patch to move: {why}."
            )
            return (Sentence(text, kind="nothing"),)
        rows = self.table()
        best = rows.iloc[0]
        moved = rows["change"].abs() > ROUNDING * largest
        clear = int((moved & leave_out_0(rows["low"], rows["high"])).sum())
        away = bool(best["effect"] < 0)
        worse = " (up is worse)" if self.sign < 0 else ""
        text = (
            f"Of {len(rows)} places {_place(best)} moves most{', away from the other run' * away}: "
            f"{_change(best, len(rows), len(self.base))} of the {self.whole:+.3g} {self.metric} between both runs{worse}, "
            f"the median place {rows['change'].median():+z.3g}"
        )
        most = int(np.argmax(rows["effect"]))
        towards = rows.iloc[most]
        if away and towards["effect"] > 0 and moved.iloc[most]:
            text += f"; towards it {_place(towards)} most, {_change(towards, len(rows), len(self.base))}"
        many = f"{clear_told(clear, len(rows), 'places')}."
        said = Sentence(f"{text}.", kind="most")
        return (said, Sentence(many, kind="chance")) if len(self.base) > 1 else (said,)

    @property
    def strongest(self) -> str:
        """The place that moves most by size, with its interval as of the largest of all: "a0.h0 at 7, -0.5 [-0.7, -0.3]"."""
        rows = self.table()
        return f"{_place(rows.iloc[0])}, {_change(rows.iloc[0], len(rows), len(self.base))}"

    def __repr__(self) -> str:
        best = "" if self.whole else "none, both runs have the same metric"
        best = best or ", ".join(
            f"{row['node']}{'' if row['position'] == 'all' else '@' + row['position']} {row['effect']:.2f}"
            for row in self.table().head(3).to_dict("records")
        )
        to = f" to {', '.join(self.receivers)}" if self.receivers else ""
        return (
            f"PatchEffects({self.direction}{to} on {self.task!r}, {self.model}: {len(self.nodes)} nodes, "
            f"{len(self.base)} prompts; largest {best})"
        )


def _change(row: pd.Series, many: int, prompts: int) -> str:
    """With its interval as of the largest of so many."""
    found = of_many(row["change"], row["low"], row["high"], many, prompts)
    return f"{row['change']:+z.3g}{ends(*found, '+.3g')}"


def _place(row: pd.Series) -> str:
    return row["node"] + ("" if row["position"] == "all" else f" at {row['position']}")


def places_of(task: Task, positions: str | None) -> list[tuple[str, Tensor]]:
    """Name of a place, and [prompts, tokens] bool where it is.

    Raises:
        LensError: a mark that the task has not.
    """
    tokens = torch.arange(task.length)
    if positions is None:
        return [("all", torch.ones(task.n, task.length, dtype=torch.bool))]
    if positions == EACH:
        return [(str(int(at)), (tokens == at).expand(task.n, -1)) for at in tokens]
    if positions not in [*task.marks]:
        raise LensError(
            f"positions must be None, 'each' or a mark of the task ({', '.join(task.marks) or 'it has none'}), "
            f"got {positions!r}"
        )
    return [(positions, tokens == task.marks[positions][:, None])]


def measured(task: Task, logits: Tensor, rows: Tensor) -> Tensor:
    """[rows] of the metric.

    Raises:
        LensError: one that is no finite number.
    """
    found = task.measure(logits, rows).double().cpu()
    if not bool(found.isfinite().all()):
        raise LensError(
            f"a run that is patched has no finite {task.metric}: numbers overflow; take less noise, or a wider dtype"
        )
    return found


def effects_of(
    model: LoadedModel,
    task: Task,
    names: tuple[str, ...],
    places: Sequence[tuple[str, Tensor]],
    values: Sequence[np.ndarray],
    both: list[Tensor],
    direction: Direction,
    receivers: tuple[str, ...],
    seed: int,
) -> PatchEffects:
    """Of the metric of some prompts at a time: `values` [nodes, positions, rows] of the patched runs, `both` [2, rows] of the others."""
    base, source = torch.cat(both, 1).numpy()
    where, patched = tuple(name for name, _ in places), np.concatenate(values, 2)
    return PatchEffects(
        names, where, patched, base, source, direction, receivers, task.metric, task.name, model.name, seed, task.sign
    )  # fmt: skip
