"""`compare_series`: heads over the checkpoints of a training, or over a list of variants of one model.

Each run is compared with the first and with the one before it, on the prompts that both have, head by head.
What cannot be compared is said, and has no row: it is not a difference of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.common.choices import Seed, check_lists
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.head_ids import head_columns
from lens.common.results import Result, Sentence, by_size, few, with_ends
from lens.runs.comparison.first_token import emerged, first_token
from lens.runs.comparison.pairing import SEEN, SHARES
from lens.runs.comparison.two_runs import compare_runs
from lens.runs.folders import Run
from lens.runs.schema import KIND_WORDS
from lens.stats.verdicts import leave_out_0
from lens.traces.findings import findings
from lens.traces.metrics import METRICS
from lens.traces.profiles import POSITIONS

_NAMED = 3


@dataclass(frozen=True, eq=False, repr=False)
class RunSeries(Result):
    """Runs in the order of training, each beside the first and beside the one before.

    Attributes:
        runs: in their order.
        names: of them, such as the revision of each checkpoint.
        heads: one row per run, kind of prompt, score and head, as `table` says.
        sinks: one row per run and kind of prompt, what the first token gets (`lens.runs.comparison.first_token`).
        losses: as `Comparison.losses`, of each run and the one before it, with the run's `place`.
        refused: (run, run compared with) -> why heads of the same number are not compared.
        seed: of the bootstrap.
    """

    runs: tuple[Run, ...]
    names: tuple[str, ...]
    heads: pd.DataFrame
    sinks: pd.DataFrame
    losses: pd.DataFrame
    refused: dict[tuple[str, str], str]
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per run, kind of prompt, score and head: `run`, `place` from 0, `prompts`, `metric`, `variant`, `name`,
        `layer`, `head`, `value` (mean over the run's own prompts, with `value_low` and `value_high`), and `since_first` and `since_last`, the change on shared prompts, each with `_low`,
        `_high` (95 % bootstrap over prompts) and `_n`; NaN where two runs share no prompt or have other heads."""
        return self.heads

    def findings(self) -> tuple[Sentence, ...]:
        """How many heads of each kind each run has ("heads"), from which run on the first token gets more than by chance
        ("sinks"), the largest jumps between neighbours ("jump"), what could not be compared ("limit")."""
        return (*self._counts(), *emerged(self.sinks), *self._jumps(), *self._limits())

    def _counts(self) -> list[Sentence]:
        found = [{one.kind: one for one in findings(run.heads)} for run in self.runs]
        said = []
        for kind in dict.fromkeys(kind for side in found for kind in side):
            counts = [
                f"{len(one.heads) if one.found else 0} at {name}"
                if (one := side.get(kind))
                else f"not measured at {name}"
                for name, side in zip(self.names, found, strict=True)
            ]
            words = f"{kind.replace('_', '-').capitalize()} heads: {', '.join(counts)}."
            said.append(Sentence(words, kind="heads"))
        return said

    def _jumps(self) -> list[Sentence]:
        """The largest changes of a share of attention between neighbours that lie beyond their interval, one a head."""
        if self.heads.empty:
            return []
        rows = self.heads[self.heads["metric"].isin(SHARES) & (self.heads["variant"] == "raw")]
        rows = rows.dropna(subset=["since_last"])
        if rows.empty:
            return []
        sure = rows[leave_out_0(rows["since_last_low"], rows["since_last_high"])]
        sure = sure[sure["since_last"].abs() >= SEEN]
        if sure.empty:
            words = f"No head's share of attention changes by {SEEN:g} and beyond its interval between neighbours"
            if rows["since_last_low"].isna().all():
                words = "Whether a head changes cannot be said: neighbours share fewer than two prompts of a kind"
            return [Sentence(f"{words}.", kind="jump")]
        chosen = by_size(sure, "since_last").drop_duplicates("name").head(_NAMED)
        return [
            Sentence(
                f"{row['name']} {METRICS[row['metric']].label.lower()} on {KIND_WORDS[row['prompts']]} changes by "
                f"{with_ends(row, 'since_last', '+.2f')} from "
                f"{self.names[row['place'] - 1]} to {row['run']}, where it is {row['value']:.2f} ({row['since_last_n']} shared "
                "prompts).",
                kind="jump",
            )
            for row in chosen.to_dict("records")
        ]

    def _limits(self) -> list[Sentence]:
        said = [
            Sentence(f"{a} and {b} are not compared head by head: {why}", kind="limit")
            for (a, b), why in self.refused.items()
        ]
        if not self.heads.empty:
            missing = (self.heads["since_last_n"] == 0) & self.heads["value"].notna()
            alone = self.heads[(self.heads["place"] > 0) & missing]
            if names := list(dict.fromkeys(alone["run"])):
                said.append(
                    Sentence(
                        f"{few(names)}: some scores have no prompt in common with the run before, and no change is "
                        "given for them.",
                        kind="limit",
                    )
                )
        return said

    def __repr__(self) -> str:
        said = "\n  ".join(self.findings())
        return f"RunSeries({len(self.runs)} runs: {few(self.names)})\n  {said}"


def compare_series(runs: Sequence[Run], *, seed: Seed = 0) -> RunSeries:
    """Every head over several runs: checkpoints of a training in their order, or variants of one model.

    Args:
        runs: at least two, in the order in which they are to stand.
        seed: of the bootstrap.

    Raises:
        LensError: fewer than two runs, one twice, or as `compare_runs`.

    Example:
        >>> lens.runs.compare_series([run, other]).table()["place"].nunique()
        2
    """
    check_lists(runs=runs)
    runs = tuple(given_as("Run", runs=run) for run in runs)
    if len(runs) < 2 or len({run.path for run in runs}) < len(runs):
        raise LensError(f"a series is two runs or more, each once; got {[run.id for run in runs]}")
    names, tables, losses, refused = _names(runs), [], [], {}
    tables.append(_alone(runs[0], names[0], 0))
    for place in range(1, len(runs)):
        found: dict[str, pd.DataFrame] = {}
        for other in {0, place - 1}:
            compared = compare_runs(runs[other], runs[place], seed=seed)
            if other == place - 1:
                losses.append(compared.losses.assign(place=place))
            columns = [*["since_first"] * (other == 0), *["since_last"] * (other == place - 1)]
            if compared.refusal:
                refused[names[other], names[place]] = compared.refusal
            else:
                found |= dict.fromkeys(columns, compared.heads)
        tables.append(_joined(_alone(runs[place], names[place], place), found))
    heads, losses = (pd.concat(some, ignore_index=True) for some in (tables, losses))
    sinks = first_token(runs, names, seed)
    return RunSeries(runs, names, heads, sinks, losses, refused, seed)


_KEYS = ["prompts", "metric", "variant", "layer", "head"]


def _alone(run: Run, name: str, place: int) -> pd.DataFrame:
    """The scores of one run: means over its own prompts of each kind."""
    rows = run.heads[run.heads["prompt_id"].isin(list(KIND_WORDS))]
    rows = rows[~rows["metric"].isin(POSITIONS)]
    named = {"prompt_id": "prompts", "low": "value_low", "high": "value_high"}
    rows = rows.rename(columns=named)[[*_KEYS, "value", "value_low", "value_high"]]
    rows = rows.reset_index(drop=True)
    own = head_columns(zip(rows["layer"], rows["head"], strict=True))
    rows = rows.assign(run=name, place=place, name=own["name"])
    for column in ("since_first", "since_last"):
        for end in ("", "_low", "_high", "_n"):
            rows[column + end] = 0 if end == "_n" else np.nan
    return rows


def _joined(rows: pd.DataFrame, found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The scores of a run with their changes on shared prompts."""
    for column, heads in found.items():
        shared = heads[heads["n"] > 0].set_index(_KEYS)
        places = pd.MultiIndex.from_frame(rows[_KEYS])
        taken = shared.reindex(places)
        for source, end in (("difference", ""), ("low", "_low"), ("high", "_high")):
            rows[column + end] = taken[source].to_numpy(float)
        rows[f"{column}_n"] = taken["n"].fillna(0).to_numpy(int)
    return rows


def _names(runs: Sequence[Run]) -> tuple[str, ...]:
    """Of the runs: revision or model where these tell them apart, else the run's own."""
    models = [run.meta["model"] for run in runs]
    for key in ("revision", "name", "dtype"):
        words = [str(one.get(key) or "") for one in models]
        if all(words) and len(set(words)) == len(words):
            return tuple(words)
    short = [run.id[-8:] for run in runs]  # the hash of its configuration
    return tuple(short if len(set(short)) == len(short) else [run.id for run in runs])
