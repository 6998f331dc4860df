"""What each head does, in one table: every role score with its interval and its baseline.

A score says little alone: a head that looks at all keys alike has a sink mass, a locality and a
same-sentence share too, and so has a model before training. Both are there to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from lens.common.checked import checked
from lens.common.choices import Count, Seed
from lens.common.errors import LensError
from lens.common.head_ids import HeadId, head_columns
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, counted, ends
from lens.heads.behaviour.role_metrics import COLUMNS
from lens.heads.behaviour.role_scores import STATISTICS, RoleRecorder, role_scores
from lens.models.loaded import LoadedModel
from lens.models.random_weights import random_weights
from lens.passes.inputs import Prompt, read_prompts
from lens.stats.verdicts import APART, of_many, verdict
from lens.traces.captures import capture
from lens.traces.profiles import pooled_table, prompt_table, scores_table, wide
from lens.traces.trace import AttentionTrace, TraceWriter

Baseline = Literal["uniform", "random_weights"]
_KEYS = ["metric", "variant", "layer"]
_SHOWN = ("previous_token", "induction", "first_token")  # in a line
_POSITIONS = ("top_key", "positional_distance")  # a place has no baseline


@dataclass(frozen=True, repr=False, eq=False)
class HeadRoles(Result):
    """Role scores of every head of a model on some prompts.

    Attributes:
        rows: long, with the columns of `heads.parquet`: every score of every head on every prompt.
        baseline_rows: the same of the baseline, whose `head` says nothing.
        baseline: "uniform", one head that looks at all keys that it sees alike, through the very same
            definitions (NaN for what an output is worth); or "random_weights", the mean over the heads
            of the layer in the model before training.
        prompts: their number.
        model: its name.
        seed: of the bootstrap and of the random weights.
    """

    rows: pd.DataFrame = field(repr=False)
    baseline_rows: pd.DataFrame = field(repr=False)
    baseline: str
    prompts: int
    model: str
    seed: int

    @property
    def columns(self) -> dict[str, str]:
        """Definition of each column of `table()` that holds a score."""
        return {
            f"{name}{suffix}": metric.definition + what
            for name, metric in COLUMNS.items()
            for suffix, what in (
                ("", ""),
                ("_sink_excluded", " Keys from 1 on, renormalised."),
            )[: 1 + metric.sink_excluded]
        }

    @property
    def reasons(self) -> dict[str, str]:
        """Why a column has NaN, for those that have."""
        return dict(self._wide.attrs["reasons"])

    def table(self) -> pd.DataFrame:
        """One row per head.

        Columns: `name` (`L1H0`), `layer`, `head`, `prompts`, and for each of `columns` the mean over
        prompts, its 95 % interval `<column>_low` and `<column>_high` (bootstrap over prompts, over
        blocks of rows where there is one prompt), and `<column>_baseline`. NaN means "not scored".
        """
        result = self._wide
        base = self.baseline_rows.groupby(_KEYS, sort=False)["value"].mean()
        added: dict[str, list[float]] = {}
        for column in self.columns:
            metric = column.removesuffix("_sink_excluded")
            variant = "raw" if metric == column else "sink_excluded"
            if metric not in _POSITIONS:
                added[f"{column}_baseline"] = [
                    float(base.get((metric, variant, layer), np.nan)) for layer in result["layer"]
                ]
        names = head_columns(result[["layer", "head"]].to_numpy().tolist())["name"]
        parts = [pd.DataFrame({"name": names}), result, pd.DataFrame(added)]
        return pd.concat(parts, axis=1)

    @checked
    def top(self, column: str, count: Count = 5) -> pd.DataFrame:
        """The heads with the largest score: `name`, `value`, `low`, `high`, `baseline`.

        Raises:
            LensError: no such column.
        """
        if column not in self.columns:
            raise LensError(f"unknown column {column!r}; known: {', '.join(self.columns)}")
        table = self.table().sort_values(column, ascending=False, kind="stable").head(count)
        found = table[["name", column, f"{column}_low", f"{column}_high"]].copy()
        found.columns = ["name", "value", "low", "high"]
        found["baseline"] = table.get(f"{column}_baseline", np.nan)
        return found.reset_index(drop=True)

    @checked
    def sink_heads(self, *, rows_below: float, column_above: float) -> list[HeadId]:
        """Heads that all rows send to the first key: Guo et al.'s rule with its two thresholds.

        `normalized_entropy < rows_below` and `first_column_entropy > column_above`; the authors
        give no defaults, and take the largest column where this takes the first.
        """
        table = self._wide
        chosen = (table["normalized_entropy"] < rows_below) & (
            table["first_column_entropy"] > column_above
        )
        return [HeadId(*at) for at in table.loc[chosen, ["layer", "head"]].to_numpy().tolist()]

    @cached_property
    def _wide(self) -> pd.DataFrame:
        """Pooled once: the bootstrap of every head takes longer than all that is read from it."""
        tables = [rows for _, rows in self.rows.groupby("prompt_id", sort=False)]
        pooled = tables[0] if len(tables) == 1 else pooled_table(tables, "all", seed=self.seed)
        return wide(pooled, prompts=self.prompts)

    @checked
    def findings(
        self,
        *,
        columns: Sequence[str] = _SHOWN,
        most: Count = 1,
        random_weights: Mapping[str, float] | None = None,
    ) -> tuple[Sentence, ...]:
        """The heads with the largest score of each role, and where they lie beside the baseline; the kind is the column.

        Args:
            columns: that are told.
            most: heads of each.
            random_weights: column -> score of the highest head of the model with random weights, which stands beside the
                baseline where it is known.

        Raises:
            LensError: no such column.
        """
        said, heads = [], len(self.table())
        units, over = self.prompts, counted(self.prompts, "prompt")
        if units == 1:
            units, over = 0, "one prompt, intervals over its rows"
        for column in columns:
            every = self.top(column, heads).dropna(subset="value")
            highest = (random_weights or {}).get(column, np.nan)
            bounds = {"least": 0 if (every["low"] >= 0).all() else -np.inf}
            bounds["most"] = 1 if COLUMNS[column].unit == "probability" else np.inf
            shown = []
            for row in every.head(most).to_dict("records"):
                found = row["value"], row["low"], row["high"]
                low, high = of_many(*found, len(every), units, **bounds)
                shown.append(self._beside(row | {"low": low, "high": high}, highest))
            if shown:
                text = f"Most {COLUMNS[column].label.lower()} of {len(every)} heads on {over}: {', '.join(shown)}."
                said.append(Sentence(text, kind=column))
        return tuple(said)

    def _beside(self, row: Mapping[Any, Any], highest: float) -> str:
        """A head with its interval, as of the highest of all, and where this lies beside each number that is known by chance."""
        low, high = row["low"], row["high"]
        named = {
            self.baseline.replace("_", " "): row["baseline"],
            "the highest of random weights": highest,
        }
        told = f"{row['name']} {row['value']:.2f}{ends(low, high, '.2f')}"
        sides: dict[str, list[str]] = {}
        for name, value in named.items():
            if not np.isnan(value):
                sides.setdefault(verdict(low, high, value), []).append(f"{name} {value:.2f}")
        said = [
            f"{side}{' from' * (side not in APART)} {' and '.join(chance)}"
            for side, chance in sides.items()
        ]
        return f"{told} ({', '.join(said)})" if said else told

    def __repr__(self) -> str:
        table, shown = self._wide, []
        for column in _SHOWN:
            for row in self.top(column, 1).dropna(subset="value").to_dict("records"):
                shown.append(f"{column} {row['name']} {row['value']:.2f}")
        return (
            f"HeadRoles({self.model}: {len(table)} heads, {self.prompts} prompts, baseline "
            f"{self.baseline}; most: {', '.join(shown)})"
        )


def roles(
    model: LoadedModel,
    prompts: Any,
    *,
    baseline: Baseline = "uniform",
    seed: Seed = 0,
    progress: bool = True,
) -> HeadRoles:
    """Every role score of every head: the profile of `lens.profile`, and what needs the model itself.

    Beside previous, current, duplicate and first token, induction, fixed distance, locality and
    delimiters these are the query's own sentence, confidence, entropies as Guo et al. define them,
    activity, output norm, no-op score and value drain (`HeadRoles.columns` defines each).

    Args:
        model: as `lens.load` returns it.
        prompts: as those of `lens.capture`; they must be token prompts. Induction and duplicate
            scores are best seen on `lens.tasks.copied`.
        baseline: "uniform" or "random_weights" (`HeadRoles.baseline`).
        seed: of the bootstrap and of the random weights.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: an unknown baseline, a prompt without tokens, and as `lens.capture`.

    Example:
        >>> lens.heads.roles(model, lens.tasks.copied(model, 25)).top("induction", 1)["name"].tolist()
        ['L1H3']
    """
    read, _ = read_prompts(model, prompts)
    if any(prompt.ids is None for prompt in read):
        raise LensError("roles needs prompts of tokens; use lens.profile for images")
    found, uniform = [], []
    of_rows = seed if len(read) == 1 else None  # with several, the intervals are over prompts
    with advancing(f"{model.name}: prompts", len(read), progress) as advance:
        for number, prompt in enumerate(read):
            rows, of_uniform = _of_prompt(model, prompt, f"p{number:03d}", of_rows)
            found.append(rows)
            uniform.append(of_uniform)
            advance(1)
    if baseline == "random_weights":
        other = roles(random_weights(model, seed), prompts, seed=seed, progress=progress).rows
    else:
        other = pd.concat(uniform, ignore_index=True)
    return HeadRoles(
        rows=pd.concat(found, ignore_index=True),
        baseline_rows=other,
        baseline=baseline,
        prompts=len(read),
        model=model.name,
        seed=seed,
    )


def _of_prompt(
    model: LoadedModel, prompt: Prompt, prompt_id: str, seed: int | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    trace = capture(model, prompt.ids, statistics=STATISTICS, progress=False)
    assert isinstance(trace, AttentionTrace)
    recorder = role_scores(model, prompt, trace.tokens, seed)
    parts = []
    for of, scores, rows in (
        (trace, recorder.scores, seed),
        (_uniform_trace(trace, recorder), recorder.uniform, None),
    ):
        tables = [
            prompt_table(of, prompt_id, seed=rows, uniform=False),
            scores_table(scores, of.layers, prompt_id),
        ]
        parts.append(pd.concat(tables, ignore_index=True))
    return parts[0], parts[1]


def _uniform_trace(trace: AttentionTrace, recorder: RoleRecorder) -> AttentionTrace:
    """The trace of a model with one head per layer that looks at all keys alike."""
    writer = TraceWriter()
    for layer, variables in zip(trace.layers, recorder.uniform_layers, strict=True):
        writer.add_layer(layer, variables)
    return writer.finish(
        token_ids=trace.dataset["token_id"].values.tolist(),
        tokens=trace.tokens,
        attributes=trace.attrs | {"learned_sinks": False},
    )
