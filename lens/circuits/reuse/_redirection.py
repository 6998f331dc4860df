"""Does a circuit do another task once its heads look at the right place? Heads redirected, accuracy measured.

Circuits of two tasks share most heads and differ in a few that point elsewhere. If that is all, forcing
the pattern of these few, and nothing else, must repair the other task; as many other heads of the same
layers, forced alike, must not (Merullo et al.). The rest of the model runs on by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.head_sets import heads_in, heads_of
from lens.circuits.known.circuit import KnownCircuit
from lens.common.choices import Seed, check_choice, check_counts, is_number
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, with_ends
from lens.edits.attention import Force
from lens.edits.base import selected_heads
from lens.edits.running import edit
from lens.models.loaded import LoadedModel
from lens.passes.logits import logits_of
from lens.stats.controls import others, p_value
from lens.stats.intervals import columns
from lens.stats.verdicts import verdict
from lens.tasks.task import Task

Split = Literal["equal", "own"]
Match = Literal["layers", "all"]
Place = str | Tensor


@dataclass(frozen=True, repr=False, eq=False)
class Redirection(Result):
    """A task with the attention of some heads forced onto chosen keys, and with other heads forced alike.

    Attributes:
        heads: those that were chosen.
        controls: [draws], the heads of each control.
        accuracy, metric: [runs, prompts] share of right answers, and the task's metric; run 0 is the
            model as it is, run 1 has the heads redirected, each further run one control.
        mass: [head, prompt] mass that the row of each chosen head has on the keys in the model as it is.
        keys: what the mass went to, in words.
        amount: share of the row that was moved.
        split: how the keys shared it.
        match: how controls were drawn.
        name: of the metric; sign: its sign, -1 where less is better.
        task, model: their names.
        seed: of the draws and of the bootstrap.
    """

    heads: tuple[HeadId, ...]
    controls: tuple[tuple[HeadId, ...], ...]
    accuracy: np.ndarray
    metric: np.ndarray
    mass: np.ndarray
    keys: str
    amount: float
    split: Split
    match: Match
    name: str
    sign: int
    task: str
    model: str
    seed: int

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.accuracy.shape[1]

    @property
    def gain(self) -> np.ndarray:
        """[prompts] accuracy with the heads redirected - as it is."""
        return self.accuracy[1] - self.accuracy[0]

    def p_value(self, measure: str = "accuracy") -> float:
        """(1 + controls that do as well) / (1 + controls): the least that so few can show.

        Args:
            measure: "accuracy" or "metric".
        """
        check_choice("measure", measure, ("accuracy", "metric"))
        values = self.accuracy if measure == "accuracy" else self.sign * self.metric
        _, redirected, *controls = values.mean(1)
        return p_value(redirected, controls)

    def table(self) -> pd.DataFrame:
        """Rows `as it is`, `redirected`, `other heads` and, pairwise by prompt, two differences.

        Columns: `run`; `accuracy` and, if it is another, the metric by its name, each with `_low` and `_high`: 95 %
        bootstrap interval over prompts (NaN for one), of `other heads` that of the mean over controls;
        `n`.
        """
        rows = []
        for name, values in self._runs().items():
            row: dict[str, object] = {"run": [name]}
            for column, units in zip(("accuracy", self.name), values, strict=True):
                row |= columns(column, units, self.seed, shares=column == "accuracy")
            rows.append(pd.DataFrame(row))
        return pd.concat(rows, ignore_index=True).assign(n=self.n)

    def _runs(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        runs = np.stack([self.accuracy, self.metric])  # [measure, runs, prompts]
        plain, edited, others = runs[:, 0], runs[:, 1], runs[:, 2:].mean(1)
        found = {
            "as it is": plain,
            "redirected": edited,
            "other heads": others,
            "redirected - as it is": edited - plain,
            "redirected - other heads": edited - others,
        }
        return {name: (both[0], both[1]) for name, both in found.items()}

    def findings(self) -> tuple[Sentence, ...]:
        """What redirecting does to accuracy ("effect"), to other heads ("controls") and to the metric ("metric")."""
        rows = {row["run"]: row for row in self.table().to_dict("records")}
        change, beside = rows["redirected - as it is"], rows["redirected - other heads"]
        judged = (
            "one prompt has no interval"
            if np.isnan(change["accuracy_low"])
            else "the interval holds 0"
            if change["accuracy_low"] <= 0 <= change["accuracy_high"]
            else _judged(change["accuracy"], beside["accuracy_low"], beside["accuracy_high"])
        )
        names = ", ".join(map(str, self.heads))
        effect = (
            f"With {self.amount:.0%} of the attention of {names} on {self.keys}, accuracy on {self.task} "
            f"goes from {self.accuracy[0].mean():.1%} to {self.accuracy[1].mean():.1%} "
            f"({with_ends(change, 'accuracy', '+.1%')}): {judged}."
        )
        beside_others = (
            f"As many heads {'of the same layers' if self.match == 'layers' else 'of any layer'} at random "
            f"({len(self.controls)} draws) give {self.accuracy[2:].mean():.1%}; the difference is "
            f"{with_ends(beside, 'accuracy', '+.1%')}, "
            f"p {self.p_value():.2g}. Before, the heads had {self.mass.mean():.1%} of their attention there."
        )
        found = [Sentence(effect, kind="effect"), Sentence(beside_others, kind="controls")]
        if self.name != "accuracy":
            metric = (
                f"The {self.name.replace('_', ' ')} goes from {self.metric[0].mean():.3g} to "
                f"{self.metric[1].mean():.3g} ({with_ends(change, self.name, '+.3g')}), with "
                f"other heads to {self.metric[2:].mean():.3g}, p {self.p_value('metric'):.2g}."
            )
            found.append(Sentence(metric, kind="metric"))
        return tuple(found)

    def __repr__(self) -> str:
        means = self.accuracy.mean(1)
        return (
            f"Redirection({len(self.heads)} heads onto {self.keys} on {self.task!r}, {self.model}: "
            f"{self.n} prompts, accuracy {means[0]:.3g} to {means[1]:.3g}, {len(self.controls)} controls "
            f"{means[2:].mean():.3g})"
        )


def _judged(change: float, low: float, high: float) -> str:
    """Of a change with an interval beside 0; low and high are of the difference to other heads."""
    told = verdict(low, high)
    if told == ("above" if change > 0 else "below"):
        return f"the heads {'repair' if change > 0 else 'harm'} the task"
    does = "rises" if change > 0 else "falls"
    if told == "not told apart":
        if np.isnan(low):
            return f"accuracy {does}, and one prompt tells nothing beside what it does with other heads"
        return f"accuracy {does}, not told apart from what it does with other heads"
    return f"accuracy {does}, but more with other heads"


def redirect(
    model: LoadedModel,
    task: Task,
    heads: Iterable[AnyHead] | Circuit | KnownCircuit,
    onto: Sequence[Place],
    *,
    at: Place | None = None,
    amount: float = 1.0,
    split: Split = "equal",
    controls: int = 20,
    match: Match = "layers",
    backend: str = "auto",
    seed: Seed = 0,
    progress: bool = True,
) -> Redirection:
    """Force one row of each chosen head onto chosen keys, and measure the task.

        o = (1 - amount) P v + amount sum_t w_t v_t,   w_t = 1 / |T| ("equal") or P_t / P(T) ("own")

    in the row of the query `at` and the keys T of `onto`; values v are those of this very run, so heads
    see what redirected heads below them write. Rows sum to 1 as before. Only that row is computed anew.

    Args:
        model: as `lens.load` returns it.
        task: what is measured, such as `lens.tasks.colored_objects`.
        heads: those to redirect, such as the heads of another task's circuit.
        onto: keys, each the name of one of `task.marks` or positions [prompts]; two that fall together
            in a prompt count once.
        at: query of each prompt, a mark or positions [prompts]; None: where its last answer is read.
        amount: share of the row that is moved, above 0 up to 1.
        split: "equal", all keys alike; "own", as the head itself would look with all other keys hidden.
        controls: draws of as many other heads, redirected alike.
        match: "layers" draws as many from each layer as were chosen there; "all" from the whole model.
        backend: of `lens_kernels`.
        seed: of the draws and of the bootstrap.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: heads that the model has not got, no key, a mark that the task has not got, keys that
            the query does not see, an amount or a split that does not exist, or too few other heads.

    Reference: Merullo, Eickhoff, Pavlick 2024, arXiv 2310.08744: four heads of GPT-2 medium, onto the two
        wrong colors, raise colored objects from 49.6 % to 93.7 %.

    Example:
        >>> third = torch.full((copying.n,), 2)
        >>> lens.circuits.reuse.redirect(small, copying, ["L1H0"], [third], controls=2).table()
    """
    chosen = heads_in(model, heads)
    _check(amount, controls)
    target = _keys(task, onto)
    query = task.positions.max(1).values if at is None else _positions(task, at)
    if bool((target & (torch.arange(task.length) > query[:, None])).any()):
        raise LensError(
            f"a key of {_words(onto)} comes after its query, which does not see it; give earlier keys"
        )
    draws = _draw_controls(model, chosen, controls, match, seed)
    numbers = task if task.metric == "accuracy" else task.with_metric("accuracy")
    accuracy, metric, mass = [], [], np.full((len(chosen), task.n), np.nan)
    with advancing(f"{model.name}: redirect", 2 + controls, progress) as advance:
        for number, some in enumerate((chosen, chosen, *draws)):
            found: list[tuple[Tensor, Tensor]] = []
            for rows in task.chunks(task.rows_at_once(model)):
                places = target[rows], query[rows]
                share = amount if number else 0.0  # of run 0 only the masses are read
                force = _force(*places, share, split, some)
                with torch.no_grad(), edit(model, force, backend=backend) as (done,):
                    logits = logits_of(model, task.clean[rows])
                found.append((numbers.measure(logits, rows), task.measure(logits, rows)))
                if number == 0:
                    mass[:, rows.numpy()] = [done.before[head].numpy() for head in chosen]
            for part, into in zip(zip(*found, strict=True), (accuracy, metric), strict=True):
                into.append(torch.cat(part).double().cpu().numpy())
            advance(1)
    return Redirection(
        chosen, draws, np.stack(accuracy), np.stack(metric), mass, _words(onto), float(amount), split,
        match, task.metric, task.sign, task.name, model.name, seed,
    )  # fmt: skip


def _force(
    keys: Tensor, query: Tensor, amount: float, split: Split, heads: Sequence[HeadId]
) -> Force:
    """Keys [prompts, tokens] and one query of each prompt."""
    return Force(
        queries=lambda at: at.positions == query[:, None].to(at.positions),
        keys=lambda at: keys.to(at.positions.device),
        amount=amount,
        split=split,
        heads=heads,
    )


def _keys(task: Task, onto: Sequence[Place]) -> Tensor:
    """bool [prompts, tokens], the keys of each prompt."""
    if isinstance(onto, str | Tensor) or not len(onto):
        raise LensError(f"onto must be a list of marks or positions, at least one; got {onto!r}")
    found = torch.zeros(task.n, task.length, dtype=torch.bool)
    for place in onto:
        found[torch.arange(task.n), _positions(task, place)] = True
    return found


def _positions(task: Task, place: Place) -> Tensor:
    """[prompts] of a mark or of positions."""
    if isinstance(place, str):
        if place not in task.marks:
            raise LensError(
                f"the task {task.name!r} has no mark {place!r}; it has "
                f"{', '.join(task.marks) or 'none, so give positions [prompts]'}"
            )
        return task.marks[place]
    if place.shape != (task.n,) or not 0 <= int(place.min()) <= int(place.max()) < task.length:
        raise LensError(
            f"positions must be one of 0 to {task.length - 1} for each of {task.n} prompts, got the "
            f"shape {list(place.shape)}, {int(place.min())} to {int(place.max())}"
        )
    return place


def _words(onto: Sequence[Place]) -> str:
    names = [place if isinstance(place, str) else "given positions" for place in onto]
    return " and ".join(dict.fromkeys(names))


def _draw_controls(
    model: LoadedModel, chosen: tuple[HeadId, ...], controls: int, match: Match, seed: int
) -> tuple[tuple[HeadId, ...], ...]:
    """As many other heads, `controls` times."""
    heads, random = selected_heads(model, None, chosen).numpy(), np.random.default_rng(seed)
    for layer, here in enumerate(heads if match == "layers" else heads.reshape(1, -1)):
        wanted, left = here.sum(), (~here).sum()
        if left < wanted:
            where = f"in layer {layer} " if match == "layers" else ""
            instead = "use match='all' or " if match == "layers" else ""
            raise LensError(
                f"{wanted} heads were chosen and {left} others are left {where}to compare with; "
                f"{instead}choose fewer"
            )
    drawn = [others(heads, random, within=match == "layers") for _ in range(controls)]
    return tuple(heads_of(np.argwhere(one).tolist()) for one in drawn)


def _check(amount: float, controls: int) -> None:
    if not is_number(amount) or not 0 < amount <= 1:
        raise LensError(
            f"amount is the share of the row that is moved, above 0 to 1; got {amount!r}"
        )
    check_counts(controls=controls)
