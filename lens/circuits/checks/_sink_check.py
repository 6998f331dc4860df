"""Whether a circuit's heads work through the attention sink: the task with the first key's mass gone or moved.

A head that keeps most of its attention on the first key moves little from elsewhere, and what looks like
its work may be the sink's. Two edits of chosen heads, each beside as many other heads of the same layers:

    excluded        the first key's part of the output is left out, nothing is put in its place
    redistributed   its mass goes to the other keys of the row, in proportion to what they have
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.head_sets import heads_in, heads_of
from lens.circuits.known.circuit import KnownCircuit
from lens.common.choices import Count, Seed
from lens.common.head_ids import AnyHead, HeadId
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, counted, with_ends
from lens.edits.attention import Drop, Move
from lens.edits.base import selected_heads
from lens.edits.running import edit
from lens.models.bare import bare
from lens.models.loaded import LoadedModel
from lens.stats import controls
from lens.stats.intervals import columns
from lens.tasks.task import Task

EDITS = {"excluded": Drop, "redistributed": Move}


@dataclass(frozen=True, repr=False, eq=False)
class SinkCheck(Result):
    """A task with the first key taken out of some heads.

    Attributes:
        heads: those that were edited.
        plain: [prompt], the metric of the model as it is, turned so that more is better.
        edited: edit (of `EDITS`) -> [prompt], the same with the heads edited.
        others: edit -> [draw, prompt], with other heads of the same layers edited; no draw where the heads
            are all that these layers have.
        drawn: how many heads one draw has: as many as were edited, or what is left of their layers.
        metric, task, model: their names.
        seed: of the draws and of the bootstrap.
        sign: of the metric, -1 where less is better.
    """

    heads: tuple[HeadId, ...]
    plain: np.ndarray
    edited: dict[str, np.ndarray]
    others: dict[str, np.ndarray]
    drawn: int
    metric: str
    task: str
    model: str
    seed: int
    sign: int = 1

    def table(self) -> pd.DataFrame:
        """One row per edit and set of heads.

        Columns: `edit`, `heads` ("circuit" or "others"), `value` (the metric), `gain` (how much better it got, whatever the
        metric's sign) with `gain_low` and `gain_high` (95 % bootstrap interval over prompts), `draws` (of heads, NaN for the
        circuit's own), `n`.
        """
        rows = []
        for name in EDITS:
            sets = {"circuit": self.edited[name][None], "others": self.others[name]}
            for heads, values in sets.items():
                if len(values):
                    row = pd.DataFrame(
                        columns("gain", values.mean(0) - self.plain, self.seed, shares=False)
                    )
                    row.insert(0, "value", self.sign * values.mean())
                    row["draws"] = len(values) if heads == "others" else np.nan
                    rows.append(row.assign(edit=name, heads=heads))
        table = pd.concat(rows, ignore_index=True)
        return table[["edit", "heads", *table.columns[:-2]]].assign(n=len(self.plain))

    def findings(self) -> tuple[Sentence, ...]:
        """One sentence per edit ("excluded", "redistributed"): what is gained, and what it does to other heads."""
        found = []
        for name, rows in self.table().groupby("edit", sort=False):
            row = rows.iloc[0]
            words = (
                f"With the first key {name} in {len(self.heads)} heads, {self.task} goes from "
                f"{self.sign * self.plain.mean():.3g} to {row['value']:.3g} in {self.metric}, a gain of "
                f"{with_ends(row, 'gain', '+.3g')} (below 0 it goes worse)"
            )
            if len(rows) > 1:
                other = with_ends(rows.iloc[1], "gain", "+.3g")
                words += f"; in {counted(self.drawn, 'other')} of the same layers of {other}"
            found.append(Sentence(f"{words}.", kind=str(name)))
        return tuple(found)

    def __repr__(self) -> str:
        changes = ", ".join(
            f"{name} {(values - self.plain).mean():+z.3g}" for name, values in self.edited.items()
        )
        return f"SinkCheck({len(self.heads)} heads on {self.task!r}, {self.model}: {changes})"


def sink_check(
    model: LoadedModel,
    task: Task,
    heads: Iterable[AnyHead] | Circuit | KnownCircuit,
    *,
    draws: Count = 5,
    seed: Seed = 0,
    progress: bool = True,
) -> SinkCheck:
    """Measure a task with the first key excluded from chosen heads, and with its mass moved to other keys.

    Where the task stands as it is, the heads do not work through the sink; where it falls, and with other
    heads does not, the sink is part of the circuit. A row that sees no other key stays as it is when
    mass is moved, and gives nothing when it is left out.

    Args:
        model: as `lens.load` returns it.
        task: what is measured.
        heads: names such as "L3H5", or a circuit.
        draws: of other heads of the same layers, as many as are left there at most.
        seed: of the draws and of the bootstrap.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: no heads, heads that the model has not got, or no draw.

    Example:
        >>> lens.circuits.checks.sink_check(model, lens.tasks.induction(model, 16), ["L0H1", "L1H0"]).table()
    """
    model = bare(model)
    task.check(model)
    chosen = heads_in(model, heads)
    marked, random = selected_heads(model, None, chosen).numpy(), np.random.default_rng(seed)
    drawn = [controls.others(marked, random, within=True) for _ in range(draws)]
    sets = [heads_of(np.argwhere(one).tolist()) for one in drawn if one.any()]
    plain = _measured(model, task)
    edited, others = {}, {}
    total = len(EDITS) * (1 + len(sets))
    with advancing(f"{model.name}: sink check", total, progress) as advance:
        for name in EDITS:
            runs = []
            for one in (chosen, *sets):
                runs.append(_measured(model, task, name, one))
                advance(1)
            edited[name], others[name] = runs[0], np.array(runs[1:]).reshape(-1, task.n)
    each = len(sets[0]) if sets else 0
    names = task.metric, task.name, model.name
    return SinkCheck(chosen, plain, edited, others, each, *names, seed, task.sign)


def _measured(
    model: LoadedModel, task: Task, name: str | None = None, heads: tuple[HeadId, ...] = ()
) -> np.ndarray:
    if name is None:
        return task.sign * task.evaluate(model).double().numpy()
    with edit(model, EDITS[name]("first", heads=heads)):
        return task.sign * task.evaluate(model).double().numpy()
