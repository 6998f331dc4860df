"""The heads of a circuit beside their attention: role, sink, what they look at, pattern and value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.head_sets import heads_in
from lens.circuits.known.circuit import KnownCircuit
from lens.circuits.patches.head_patching import PARTS, split_effects
from lens.common.choices import Count, Seed
from lens.common.head_ids import AnyHead, HeadId, head_columns
from lens.common.results import Result, Sentence, by_size, with_ends
from lens.edits.base import part_of
from lens.heads.behaviour.roles import roles
from lens.models.loaded import LoadedModel
from lens.passes.calls import attend
from lens.passes.head_outputs import read_calls
from lens.stats import over_units
from lens.stats.intervals import columns
from lens.stats.verdicts import verdict
from lens.tasks.task import Task

ROLES = ("previous_token", "duplicate_token", "induction", "current_token", "sink_mass")


@dataclass(frozen=True, repr=False, eq=False)
class JoinedHeads(Result):
    """What each head of a circuit does for a task, and what it looks at.

    Attributes:
        heads: those that were asked for, in the order of the model.
        effects: [head, part, prompt] of `PARTS` (`lens.circuits.patches.head_patching`), in units of the
            metric, positive = the corrupt run's part makes the task worse; float64.
        roles: one row per head, by `name`: mean over the clean prompts of `ROLES`, defined in
            `lens.heads.roles`; NaN = not scored.
        attended: one row per head, prompt and rank: `name`, `prompt`, `rank` (from 0), `position`,
            `token`, `mass` that the row of the last answer puts on the key, most first.
        first_key: [head, prompt], mass that this row puts on the first key.
        clean: [prompt], the metric of the model as it is.
        metric, task, model: their names; corrupt prompts stand for what is put in ("counterfactual",
            noising, all positions, each head alone).
        seed: of the bootstrap.
    """

    heads: tuple[HeadId, ...]
    effects: np.ndarray
    roles: pd.DataFrame
    attended: pd.DataFrame
    first_key: np.ndarray
    clean: np.ndarray
    metric: str
    task: str
    model: str
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per head.

        Columns: `name`, `layer`, `head`; each of `PARTS` with `_low` and `_high` (95 % bootstrap interval over prompts,
        NaN for one); each of `ROLES`; `attends_to`, the token that the last answer's row looks at most in more prompts
        than any other, `attends_prompts`, in how many, and `attends_mass`, its mean mass there; `first_key`, the mean
        mass of that row on the first key; `n`.
        """
        found = head_columns(self.heads)
        for number, part in enumerate(PARTS):
            found |= columns(part, self.effects[:, number], self.seed, shares=False)
        table = pd.DataFrame(found).merge(self.roles, on="name", sort=False)
        most = [self._most(str(head)) for head in self.heads]
        for number, name in enumerate(("attends_to", "attends_prompts", "attends_mass")):
            table[name] = [one[number] for one in most]
        return table.assign(first_key=self.first_key.mean(1), n=len(self.clean))

    def findings(self, most: int | None = None) -> tuple[Sentence, ...]:
        """One sentence per head: its effect, through what, where it looks, and what the sink changes ("effect"),
        or that its interval holds 0 ("none").

        Args:
            most: only so many heads, those with the largest effects, first the largest; None: all, in the
                order of the model.
        """
        rows = self.table()
        if most is not None:
            rows = by_size(rows, "full").head(most)
        return tuple(self._finding(row) for row in rows.to_dict("records"))

    def _most(self, head: str) -> tuple[str, int, float]:
        first = self.attended[(self.attended["name"] == head) & (self.attended["rank"] == 0)]
        token = first["token"].mode().iloc[0]
        masses = first.loc[first["token"] == token, "mass"]
        return token, len(masses), float(masses.mean())

    def _through(self, row: dict) -> str:
        """Which of pattern, values and both together does more of it, prompt by prompt; nothing of a single prompt."""
        if len(self.clean) < 2:
            return ""
        place = [str(head) for head in self.heads].index(row["name"])
        pattern, value, both = (
            np.sign(row["full"]) * self.effects[place, PARTS.index(part)]
            for part in ("pattern", "value", "interaction")
        )
        more = np.stack([pattern - value, both - pattern, both - value], 1)
        lows, highs = over_units(more, np.ones_like(more), self.seed)
        if (lows[1:] > 0).all():
            return ", more by both together than by either alone"
        return {
            "above": ", more through its pattern than its values",
            "below": ", more through its values than its pattern",
            "not told apart": ", through its pattern or its values, which are not told apart",
        }[verdict(lows[0], highs[0])]

    def _finding(self, row: dict) -> Sentence:
        effect = f"{row['name']}: effect {with_ends(row, 'full', '+.3g')}"
        looks = (
            f"its last answer's row looks most at {row['attends_to']!r} in {row['attends_prompts']} of {row['n']} prompts "
            f"(with {row['attends_mass']:.0%} of it) and has {row['first_key']:.0%} on the first key, mean of all"
        )
        if row["full_low"] <= 0 <= row["full_high"]:
            return Sentence(f"{effect}, the interval holds 0; {looks}.", kind="none")
        if np.isnan(row["full_low"]):
            effect += " (one prompt, no interval)"
        through = self._through(row)
        text = (
            f"{effect} {self.metric}"
            f"{through} (pattern {with_ends(row, 'pattern', '+.3g')}, value {with_ends(row, 'value', '+.3g')}, interaction "
            f"{with_ends(row, 'interaction', '+.3g')}); {looks}; without the first key the effect is "
            f"{with_ends(row, 'without_sink', '+.3g')}."
        )
        return Sentence(text, kind="effect")

    def __repr__(self) -> str:
        full = self.effects[:, 0].mean(-1)
        shown = ", ".join(f"{self.heads[i]} {full[i]:.3g}" for i in np.argsort(-np.abs(full))[:3])
        return (
            f"JoinedHeads({len(self.heads)} heads on {self.task!r}, {self.model}: "
            f"{len(self.clean)} prompts, {self.metric}; largest effects {shown})"
        )


def head_parts(
    model: LoadedModel,
    task: Task,
    heads: Iterable[AnyHead] | Circuit | KnownCircuit,
    *,
    keys: Count = 3,
    seed: Seed = 0,
    progress: bool = True,
) -> JoinedHeads:
    """Join the heads of a circuit with what they look at, and split their effects.

    `pattern + value + interaction = full` for every prompt: pattern puts in the queries and keys of
    the corrupt run and keeps the values, value does the opposite. `without_sink` is the full effect
    with the first key taken out of both patterns: where it is far from `full`, the sink is part of
    the story.

    Args:
        model: as `lens.load` returns it.
        task: with corrupt prompts.
        heads: names such as "L3H5", or a circuit.
        keys: how many keys per prompt `attended` has.
        seed: of the bootstrap.
        progress: show bars with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: no heads, heads that the model has not got, no corrupt prompts, or a number of keys
            that is none.

    Example:
        >>> lens.circuits.head_parts(small, copying, ["L0H1", "L1H0"]).table()
    """
    chosen = heads_in(model, heads)
    effects = split_effects(model, task, chosen, progress=progress)
    attended, first = _attended(model, task, chosen, min(keys, task.length))
    table = roles(model, task.prompts, seed=seed, progress=progress).table()
    names = [str(head) for head in chosen]
    found = table.set_index("name").loc[names, list(ROLES)].reset_index()
    clean = task.evaluate(model).double().numpy()
    return JoinedHeads(
        chosen, effects, found, attended, first, clean, task.metric, task.name, model.name, seed
    )


def _attended(
    model: LoadedModel, task: Task, heads: tuple[HeadId, ...], count: int
) -> tuple[pd.DataFrame, np.ndarray]:
    """The keys with most mass in the row of each prompt's last answer, and the mass on the first one; see `JoinedHeads`."""
    rows, on_first = [], np.zeros((len(heads), task.n))
    for prompt in range(task.n):
        ids = task.clean[prompt]
        calls = {call.layer: call for call in read_calls(model, ids[None])}
        at = int(task.positions[prompt].max())
        for number, head in enumerate(heads):
            call = part_of(calls[head.layer], torch.tensor([head.head]), at)
            with torch.no_grad():
                result = attend(call, statistics=("block_mass",), block_size=(1, 1))
            mass = result.statistics["block_mass"][0, 0, 0].double().cpu()
            on_first[number, prompt] = mass[0]
            best = mass.topk(min(count, at + 1))
            for rank, (value, key) in enumerate(
                zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ):
                token = model.token_strings([int(ids[key])])[0]
                rows.append((str(head), prompt, rank, key, token, value))
    names = ["name", "prompt", "rank", "position", "token", "mass"]
    return pd.DataFrame(rows, columns=names), on_first
