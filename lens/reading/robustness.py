"""What `lens.reading.perturb` and `adversary` give back: how far attention can be changed, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.head_ids import HeadId, head_columns
from lens.common.results import Result, Sentence, few, with_ends
from lens.stats.intervals import columns

if TYPE_CHECKING:
    from jaxtyping import Float


_NAMED = 3  # heads that get a sentence
_NOTHING = 0.01  # nats: hardly another row


@dataclass(frozen=True, repr=False, eq=False)
class Robustness(Result):
    """Change of the loss of the model's own answer when the logits of one head's attention are changed.

    Attributes:
        heads: whose.
        sizes: of the change, L2 over all logits of the head that are seen (in the last layer by the query that answers), nats.
        worst: [head, size, prompt], along the gradient of the loss.
        random: [head, size, prompt], mean over random directions of the same size.
        seed: of the draws.
        model: its name.
        along: "logits", any change; "pairs", from one token to another in all rows.
    """

    heads: tuple[HeadId, ...]
    sizes: tuple[float, ...]
    worst: Float[np.ndarray, "heads sizes prompts"]
    random: Float[np.ndarray, "heads sizes prompts"]
    seed: int
    model: str
    along: str = "logits"

    def table(self) -> pd.DataFrame:
        """One row per head and size: `name`, `layer`, `head`, `size`; `worst` and `random`, change of loss (nats) with `_low` and
        `_high` (95 % bootstrap over prompts); `n` prompts."""
        tables = []
        for place, size in enumerate(self.sizes):
            found = head_columns(self.heads) | {"size": size}
            found |= columns("worst", self.worst[:, place], self.seed, shares=False)
            found |= columns("random", self.random[:, place], self.seed, shares=False)
            tables.append(pd.DataFrame(found))
        return pd.concat(tables, ignore_index=True).assign(n=self.worst.shape[-1])

    def findings(self) -> tuple[Sentence, ...]:
        """The heads whose attention the answer hangs on most ("head"), and those whose gradient costs no more than a random
        direction ("none"), at the largest size."""
        rows = self.table()
        last = int(np.argmax(self.sizes))
        rows = rows[rows["size"] == self.sizes[last]].reset_index(drop=True)
        more = columns("more", self.worst[:, last] - self.random[:, last], self.seed)
        alike = ~(more["more_low"] > 0) & np.isfinite(more["more_low"])
        way = ("along their gradient", "in random directions")
        if self.along == "pairs":
            way = ("from one token to another, the pair of the gradient,", "between random tokens")
        said = [
            Sentence(
                f"A change of size {self.sizes[last]:g} of the attention logits of {row['name']} {way[0]} costs the answer "
                f"{with_ends(row, 'worst', '+.3g')} nats, {way[1]} "
                f"{with_ends(row, 'random', '+.3g')}.",
                kind="head",
            )
            for row in _largest(rows[~alike], "worst")
        ]
        if alike.any():
            said.append(
                Sentence(
                    f"{way[0].capitalize()} no more than {way[1]}, as far as {self.worst.shape[-1]} prompts tell: "
                    f"{few(list(rows['name'][alike]))}.",
                    kind="none",
                )
            )
        return tuple(said)


@dataclass(frozen=True, repr=False, eq=False)
class Adversaries(Result):
    """Other rows of attention that write what a head's own row does, at the query that answers.

    Attributes:
        heads: whose.
        attention, other: of each head and prompt [keys]: its row, and the one that differs most of those that were found.
        divergence: [head, prompt], Jensen-Shannon of the two, nats, at most ln 2.
        uniform: [head, prompt], the same of the head's row and even attention to what it sees.
        free: [head, prompt], dimensions in which the row can be changed without changing what is written.
        error: [head, prompt], largest difference of what the two write, over the largest number written.
        change, uniform_change: [head, prompt], loss of the model's own answer with the other row, or with even attention, in
            the place of the head's, less that of the model as it is; nats.
        seed: of the draws.
        model: its name.
    """

    heads: tuple[HeadId, ...]
    attention: tuple[tuple[np.ndarray, ...], ...]
    other: tuple[tuple[np.ndarray, ...], ...]
    divergence: Float[np.ndarray, "heads prompts"]
    uniform: Float[np.ndarray, "heads prompts"]
    free: np.ndarray
    error: Float[np.ndarray, "heads prompts"]
    change: Float[np.ndarray, "heads prompts"]
    uniform_change: Float[np.ndarray, "heads prompts"]
    seed: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per head: `name`, `layer`, `head`; `divergence`, `uniform`, `change`, `uniform_change`, means over prompts with
        `_low` and `_high` (95 % bootstrap over prompts); the largest `free` and `error`; `n` prompts."""
        found: dict = head_columns(self.heads)
        for name in ("divergence", "uniform", "change", "uniform_change"):
            found |= columns(name, getattr(self, name), self.seed)
        found |= {"free": self.free.max(1), "error": self.error.max(1)}
        return pd.DataFrame(found).assign(n=self.divergence.shape[1])

    def findings(self) -> tuple[Sentence, ...]:
        """The heads whose row says least ("same"), and those for which no other row was found ("none")."""
        rows = self.table()
        alone = pd.Series(self.divergence.max(1)) < _NOTHING  # on every prompt, not on the mean
        said = [
            Sentence(
                f"{row['name']}: a row of attention that differs by "
                f"{with_ends(row, 'divergence', '.2g')} nats (at most {np.log(2):.2f}) writes the same, "
                f"and changes the answer's loss by {_rounded(row)}; even attention differs by {with_ends(row, 'uniform', '.2g')} and "
                f"changes it by {with_ends(row, 'uniform_change', '+.2g')}.",
                kind="same",
            )
            for row in _largest(rows[~alone], "divergence")
        ]
        if alone.any():
            names = few(list(rows["name"][alone]))
            why = (
                ": there are no more keys than values and the sum leave free"
                if not rows["free"][alone].any()
                else ""
            )
            said.append(
                Sentence(
                    f"No row that differs by {_NOTHING:g} nats and writes the same was found for {names}{why}.",
                    kind="none",
                )
            )
        return tuple(said)


def _largest(rows: pd.DataFrame, column: str) -> list[dict]:
    """The first few rows by a column."""
    return rows.sort_values(column, ascending=False, kind="stable").head(_NAMED).to_dict("records")


def _rounded(row: dict) -> str:
    """The change with its interval; a bare 0 where all of it is the rounding of single precision."""
    sizes = np.abs([row[name] for name in ("change", "change_low", "change_high")])
    return "0.0000" if np.nanmax(sizes) < 5e-5 else with_ends(row, "change", "+.4f")
