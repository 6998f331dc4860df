"""What `lens.policies.search` found: a policy for each head, the curve of loss against density, a promise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.results import Result, Sentence, with_ends
from lens.policies.a_shape import AShape
from lens.policies.per_head import PerHead
from lens.policies.scores import PolicyScores
from lens.stats import over_units
from lens.stats.prediction import prediction
from lens.stats.verdicts import verdict

TOLERANCES = (0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
"""Errors of a head, as shares of what its layer writes, up to which a policy may serve it: one level each."""


@dataclass(frozen=True, repr=False, eq=False)
class PolicySearch(Result):
    """A policy for each head.

    Attributes:
        policy: `PerHead`; `lens.edits.Sparse(found.policy, found.block_size)` runs it.
        tolerance: the error of a head, as a share of what its layer writes, up to which it got a policy.
        scores: every candidate in every head, on the prompts that chose; the last one is `Full`.
        choices: [layers, heads], number of the candidate.
        calibration_change: of the loss on the prompts that chose, nats per token.
        asked: what it was allowed to be.
        curve_points: (kind, tolerance, density, [prompts][tokens] changes of loss) on the held-out prompts.
        dense_loss: on the held-out prompts.
        block_size: (query_block, key_block).
        tokens: length of each held-out prompt.
        seed: of the intervals.
        model: its name.
    """

    policy: Any
    tolerance: float
    scores: PolicyScores
    choices: np.ndarray
    calibration_change: float
    asked: float
    curve_points: tuple[tuple[str, float, float, list[np.ndarray]], ...]
    dense_loss: float
    block_size: tuple[int, int]
    tokens: tuple[int, ...]
    seed: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per head: `layer`, `head`, `name`, `policy`, and of that policy `density`, `recall`,
        `output_error`, `layer_error` with intervals over the prompts that chose."""
        whole = self.scores.table()
        names = np.array(self.scores.policies)[self.choices].ravel()
        heads = self.choices.size
        rows = [int(choice) * heads + at for at, choice in enumerate(self.choices.ravel())]
        kept = ["layer", "head", "name", "policy", "n"]
        for column in ("density", "recall", "output_error", "layer_error"):
            kept += [column, f"{column}_low", f"{column}_high"]
        found = whole.iloc[rows][kept].reset_index(drop=True)
        assert (found["policy"] == names).all()
        return found

    def curve(self) -> pd.DataFrame:
        """One row per kind and level, on the held-out prompts: `kind` ("chosen", "oracle", "random": as many
        blocks), `tolerance`, `density`, `loss_change` with its 95 % interval over blocks of tokens of a prompt; several
        random draws are one row."""
        rows = []
        for kind, tolerance in dict.fromkeys(one[:2] for one in self.curve_points):
            by_prompt = self._by_prompt(kind, tolerance)
            changes = np.concatenate(by_prompt)
            low, high = _of_blocks(by_prompt, self.seed)
            rows.append(
                {
                    "kind": kind,
                    "tolerance": tolerance,
                    "density": next(one[2] for one in self.curve_points if one[1] == tolerance),
                    "loss_change": float(changes.mean()),
                    "loss_change_low": float(low),
                    "loss_change_high": float(high),
                }
            )
        return pd.DataFrame(rows)

    def promise(self, more: int | None = None) -> tuple[float, float]:
        """Between which the mean change of loss of other prompts lies that are drawn as the held-out ones are,
        nats per token, with a probability of 0.95 (`lens.stats.prediction`, over prompts).

        Args:
            more: how many others; None: as many.

        Returns:
            NaN where a single prompt was held out: it tells nothing of others.
        """
        low, high = prediction(
            [one.mean() for one in self._by_prompt("chosen", self.tolerance)], more
        )
        return low, high

    def findings(self) -> tuple[Sentence, ...]:
        """What was chosen ("policy"), what it costs ("loss"), beside what ("controls"), and limits ("limit")."""
        table = self.table()
        sparse = table[table["density"] < 1]
        row = {kind: self.row(kind) for kind in ("chosen", "oracle", "random")}
        low, high = self.promise()
        said = [
            Sentence(
                f"{len(sparse)} of {len(table)} heads run sparse; over all heads {table['density'].mean():.1%} of "
                f"the blocks are kept, and the loss on the prompts that chose changes by "
                f"{self.calibration_change:+z.4f} nats; it may grow by {self.asked:g}."
                if len(sparse)
                else f"{self._why_full()}: every head stays full.",
                kind="policy",
            )
        ]
        if len(sparse):
            chosen = row["chosen"]
            said += [
                Sentence(
                    f"On held-out prompts the loss changes by "
                    f"{with_ends(chosen, 'loss_change', '+.4f')} nats per token from "
                    f"{self.dense_loss:.4f} (interval over blocks of their tokens)"
                    + (
                        "; one prompt tells nothing of others."
                        if math.isnan(low)
                        else f"; the mean of {len(self.tokens)} others like them should lie in [{low:.4f}, {high:.4f}]."
                    ),
                    kind="loss",
                ),
                Sentence(
                    "With as many blocks, the first and the query's own and the rest drawn at random, it changes by "
                    f"{with_ends(row['random'], 'loss_change', '+.4f')}, with the "
                    f"best ones by the exact masses by {with_ends(row['oracle'], 'loss_change', '+.4f')}.",
                    kind="controls",
                ),
            ]
            told = verdict(chosen["loss_change_low"], chosen["loss_change_high"], self.asked)
            if told != "below":
                grows = "grows by more than" if told == "above" else "is not told to stay within"
                said.append(
                    Sentence(
                        f"On held-out prompts the loss {grows} the {self.asked:g} nats asked for: "
                        "choose on more prompts.",
                        kind="limit",
                    )
                )
        said.append(
            Sentence(
                f"Chosen on {self.scores.n} and promised on {len(self.tokens)} other prompts of up to "
                f"{max(self.tokens)} tokens, blocks of {self.block_size[0]} x {self.block_size[1]}; longer "
                "prompts keep other shares.",
                kind="limit",
            )
        )
        return tuple(said)

    def _why_full(self) -> str:
        """Why no candidate was taken."""
        cheaper = self.scores.price[:-1] < self.scores.price[-1]
        if not cheaper.any():
            return "No candidate is cheaper than full in any head, its choosing counted"
        if not (cheaper & (self.scores.error[:-1] <= TOLERANCES[0])).any():
            known = not np.isnan(self.scores.of("layer_error")).any()
            of = "a layer writes" if known else "a head gives"
            return f"No candidate that is cheaper than full errs by at most {TOLERANCES[0]:.0%} of what {of}"
        return f"No choice keeps the loss within {self.asked:g} nats"

    def beside(self, published: Any) -> pd.DataFrame:
        """Where a published table of heads and this search agree that a head streams, and where not.

        One row per head: `layer`, `head`, `name`, `published`, `policy` (ours), `streams` ("both", "published", "here",
        "neither": who gives it an A-shape), and of the widest A-shape that was tried here `a_shape`, `recall`,
        `layer_error`: why it does, or does not (NaN where none was tried).

        Args:
            published: `PerHead`, as `lens.policies.read` gives it, of a model with these heads.

        Raises:
            LensError: what is no `PerHead`.
        """
        if not isinstance(published, PerHead):
            raise LensError(
                f"published must be what lens.policies.read returns, got {type(published).__name__}"
            )
        rows = self.table()
        theirs = [published.of(head) for head in self.scores.heads]
        there = np.array([isinstance(one, AShape) for one in theirs])
        here = rows["policy"].str.startswith("AShape(").to_numpy()
        words = np.array([["neither", "here"], ["published", "both"]])
        found = rows[["layer", "head", "name"]].copy()
        found["published"] = list(map(str, theirs))
        found["policy"] = rows["policy"]
        found["streams"] = words[there.astype(int), here.astype(int)]
        wide = [at for at, one in enumerate(self.scores.policies) if one.startswith("AShape(")]
        density = self.scores.of("density").mean((1, 2, 3))
        widest = max(wide, key=density.__getitem__, default=None)
        found["a_shape"] = "" if widest is None else self.scores.policies[widest]
        for column in ("recall", "layer_error"):
            values = self.scores.of(column).mean(-1)
            found[column] = np.nan if widest is None else values[widest].ravel()
        return found

    def _by_prompt(self, kind: str, tolerance: float) -> list[np.ndarray]:
        """[tokens] of each held-out prompt, the mean of several draws."""
        points = [one for one in self.curve_points if one[:2] == (kind, tolerance)]
        return [np.stack(values).mean(0) for values in zip(*(p[3] for p in points), strict=True)]

    def row(self, kind: str) -> Mapping[Any, Any]:
        """Of the curve, that of the level that was taken."""
        curve = self.curve()
        return (
            curve[(curve["kind"] == kind) & (curve["tolerance"] == self.tolerance)]
            .iloc[0]
            .to_dict()
        )

    def __repr__(self) -> str:
        table = self.table()
        return (
            f"PolicySearch({self.model}: {int((table['density'] < 1).sum())} of {len(table)} heads sparse, "
            f"{table['density'].mean():.1%} of the blocks)"
        )


def _of_blocks(by_prompt: list[np.ndarray], seed: int) -> tuple[Any, Any]:
    """Interval of the mean of all values, contiguous blocks of about sqrt(n) of one prompt drawn again (Künsch 1989)."""
    step = max(1, int(np.sqrt(sum(map(len, by_prompt)))))
    blocks = [one[at : at + step] for one in by_prompt for at in range(0, len(one), step)]
    sums, counts = (np.array(list(map(of, blocks))) for of in (np.sum, len))
    return over_units(sums, counts, seed)
