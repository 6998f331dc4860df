"""Scores of two runs on the same prompts, their differences, and how far the order of heads agrees.

A prompt of A and one of B are a pair when they have the same kind and the same token strings; the
n-th of several alike belongs to the n-th. Scores are differences B - A, means over the pairs.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pandas as pd

from lens import stats
from lens.common.head_ids import HeadId, head_columns
from lens.runs.folders import Run
from lens.runs.schema import PROMPT_KINDS
from lens.stats import over_units
from lens.stats.intervals import known_mean
from lens.traces.metrics import METRICS
from lens.traces.profiles import POSITIONS

SEEN = 0.005  # a share of attention that two decimals show
SHARES = tuple(
    name for name, one in METRICS.items() if one.unit == "probability" and name != "sink_rate"
)
"""Scores that are shares of attention; a sink rate counts keys above a threshold, and jumps with it."""
HEAD_COLUMNS = (
    "prompts",
    "metric",
    "variant",
    "name",
    "layer",
    "head",
    "a",
    "b",
    "difference",
    "low",
    "high",
    "n",
)
METRIC_COLUMNS = (
    "prompts",
    "metric",
    "variant",
    "a",
    "b",
    "difference",
    "low",
    "high",
    "n",
    "rank_correlation",
    "largest",
    "largest_difference",
)


def paired_prompts(a: Run, b: Run) -> dict[str, list[tuple[str, str]]]:
    """Kind of prompt -> pairs (prompt of A, prompt of B) of the same tokens, in A's order."""
    waiting: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for row in b.prompts.to_dict("records"):
        waiting[row["kind"], tuple(row["token_strings"])].append(row["prompt_id"])
    pairs: dict[str, list[tuple[str, str]]] = {kind: [] for kind in PROMPT_KINDS}
    for row in a.prompts.to_dict("records"):
        found = waiting[row["kind"], tuple(row["token_strings"])]
        if found and row["kind"] in pairs:
            pairs[row["kind"]].append((row["prompt_id"], found.pop(0)))
    return pairs


def compare_scores(
    a: Run, b: Run, *, aligned: bool, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every score of every head in both runs, and one row per score over all heads.

    Args:
        aligned: whether head (l, h) of A is compared with head (l, h) of B; else the first table is
            empty and the second compares means over all heads.
        seed: of the bootstrap.

    Returns:
        Tables with `HEAD_COLUMNS` and `METRIC_COLUMNS`.
    """
    heads: list[pd.DataFrame] = []
    metrics: list[tuple[object, ...]] = []
    pairs = paired_prompts(a, b)
    for kind in PROMPT_KINDS:
        first = _values(a, kind, [pair[0] for pair in pairs[kind]])
        second = _values(b, kind, [pair[1] for pair in pairs[kind]])
        n = len(pairs[kind])
        for metric, variant in [name for name in first if name in second]:
            x, y = first[metric, variant], second[metric, variant]
            if aligned:
                y = y.reindex(columns=x.columns)
            row = _over_heads(x.to_numpy(float), y.to_numpy(float), n, seed, aligned=aligned)
            rank, largest, largest_difference = float("nan"), "", float("nan")
            if aligned:
                table = _by_head(x, y, n, seed)
                heads.append(table.assign(prompts=kind, metric=metric, variant=variant))
                rank = stats.spearman(table["a"].to_numpy(), table["b"].to_numpy())
                size = np.abs(table["difference"].to_numpy())
                if np.nan_to_num(size).any():
                    top = int(np.nanargmax(size))
                    largest = str(HeadId(*map(int, x.columns[top])))
                    largest_difference = float(table["difference"].iloc[top])
            metrics.append((kind, metric, variant, *row, n, rank, largest, largest_difference))
    empty = pd.DataFrame(columns=list(HEAD_COLUMNS))
    joined = pd.concat(heads, ignore_index=True) if heads else empty
    return joined[list(HEAD_COLUMNS)], pd.DataFrame(metrics, columns=list(METRIC_COLUMNS))


def compare_losses(a: Run, b: Run, *, seed: int) -> pd.DataFrame:
    """Losses on the prompts of the same tokens: `prompts`, `what`, `a`, `b`, `difference`, `low`, `high`, `n`.

    Only such prompts: a loss per token says nothing across different tokens.
    """
    rows: list[tuple[object, ...]] = []
    losses = [run.prompts.set_index("prompt_id")[["loss", "loss_repeat"]] for run in (a, b)]
    for kind, pairs in paired_prompts(a, b).items():
        what = "loss_repeat" if kind == "copied" else "loss"
        x, y = (
            side.loc[[pair[number] for pair in pairs], what].to_numpy(float)[:, None]
            for number, side in enumerate(losses)
        )
        n = int((np.isfinite(x) & np.isfinite(y)).sum())
        if n:
            rows.append((kind, what, *(float(one[0]) for one in _paired(x, y, n, seed)), n))
    columns = ["prompts", "what", "a", "b", "difference", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def _values(run: Run, kind: str, prompts: list[str]) -> dict[tuple[str, str], pd.DataFrame]:
    """(metric, variant) -> [prompt, (layer, head)]; the run's own mean over `kind` without prompts."""
    chosen = prompts or [kind]
    rows = run.heads[run.heads["prompt_id"].isin(chosen) & ~run.heads["metric"].isin(POSITIONS)]
    found = {}
    for (metric, variant), part in rows.groupby(["metric", "variant"], sort=False):
        table = part.pivot(index="prompt_id", columns=["layer", "head"], values="value")
        found[str(metric), str(variant)] = table.reindex(index=chosen)
    return found


def _by_head(x: pd.DataFrame, y: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    a, b, difference, low, high = _paired(x.to_numpy(float), y.to_numpy(float), n, seed)
    columns = {"a": a, "b": b, "difference": difference, "low": low, "high": high}
    own = head_columns(x.columns.to_frame().to_numpy())
    return pd.DataFrame({**own, **columns, "n": n})


def _over_heads(
    x: np.ndarray, y: np.ndarray, n: int, seed: int, *, aligned: bool
) -> tuple[float, ...]:
    """Means over the heads that were scored, and their difference with its interval over prompts."""
    if aligned:  # the same heads on both sides
        both = np.isfinite(x) & np.isfinite(y)
        x, y = np.where(both, x, np.nan), np.where(both, y, np.nan)
    means = [known_mean(values, axis=1)[:, None] for values in (x, y)]
    return tuple(float(values[0]) for values in _paired(means[0], means[1], n, seed))


def _paired(
    x: np.ndarray, y: np.ndarray, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means over the prompts scored in both of [prompt, ...], difference, and its 95 % interval."""
    both = np.isfinite(x) & np.isfinite(y)
    a, b = (known_mean(np.where(both, values, np.nan), axis=0) for values in (x, y))
    if n < 2:
        unknown = np.full(a.shape, np.nan)
        return a, b, b - a, unknown, unknown
    low, high = over_units(np.where(both, y - x, 0.0), both, seed, shares=False)
    return a, b, b - a, low, high
