"""The profile of a model's heads: every score of `lens.traces.metrics`, one row per head.

Scores come from the statistics that a trace holds, so they are exact at any length. Each is a mean
over the rows (queries) of a prompt that can show it; a batch averages the prompts' means. Intervals
are 95 % bootstraps (`lens.stats.over_units`): over prompts where there are several, else over contiguous blocks of
about sqrt(rows) rows of the one prompt, because neighbouring rows depend on each other.

A score says little alone: a head that looks at all keys alike has one too, and so has a model before
training. Both stand beside it: `uniform` in closed form from mask and labels, `random_weights` from one
more pass over the same prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.given import given_traces
from lens.common.head_ids import head_columns
from lens.stats import over_units
from lens.stats.intervals import known_mean, of_share
from lens.traces.metrics import HEADLINES, MAIN, METRICS
from lens.traces.parts import TraceParts
from lens.traces.scores import SINK_EPSILON, Score, layer_scores, uniform_scores
from lens.traces.trace import AttentionTrace

__all__ = [
    "COLUMNS",
    "SINK_EPSILON",
    "beside_random",
    "pooled_table",
    "profile",
    "prompt_table",
    "wide",
]

COLUMNS = (
    "prompt_id",
    "layer",
    "head",
    "metric",
    "variant",
    "value",
    "low",
    "high",
    "n",
    "detail",
    "uniform",
    "random_weights",
)

_HEAD = ("name", "layer", "head")
_ENDS = [
    f"{variant}{end}"
    for variant in ("", "_sink_excluded")
    for end in ("", "_low", "_high", "_uniform")
] + ["_sink_excluded_random_weights"]
POSITIONS = ("top_key", "positional_distance")  # their mean says nothing


def _by_part(given: Any) -> dict[str, list[AttentionTrace]]:
    """The traces of each part of an encoder-decoder; nothing of other traces."""
    several = [given] if isinstance(given, TraceParts) else given
    if isinstance(several, AttentionTrace) or not isinstance(several, Sequence):
        return {}
    if not any(isinstance(one, TraceParts) for one in several):
        return {}
    if not all(isinstance(one, TraceParts) and one.keys() == several[0].keys() for one in several):
        raise LensError("give traces of whole encoder-decoders with the same parts, or of one part")
    return {part: [one[part] for one in several] for part in several[0]}


def profile(
    traces: AttentionTrace | TraceParts | Sequence[AttentionTrace | TraceParts],
    *,
    all: bool = False,
    random_weights: AttentionTrace | Sequence[AttentionTrace] = (),
    seed: Seed = 0,
) -> pd.DataFrame:
    """The scores of every head, one row per head: the main ones, or all with intervals and baselines.

    Args:
        traces: one trace, or several of the same model. Of an encoder-decoder the parts stand one under the other, and
            the column `part` names them.
        all: every score with its interval and baseline, about a hundred columns.
        random_weights: traces of `lens.models.random_weights(model)` on the same prompts.
        seed: of the bootstrap.

    Returns:
        The twelve columns `name`, `layer`, `head` and those of `lens.traces.metrics.MAIN`; the user's own labels and
        the share of a generation's prompt with all that is known of them; and `<metric>_random_weights`, where those
        were given.
        With `all=True` for each metric of `lens.traces.metrics.METRICS` the value, its 95 %
        interval `<metric>_low` and `<metric>_high`, what uniform attention scores `<metric>_uniform`,
        and the same for `<metric>_sink_excluded` where that exists; for those of
        `lens.traces.metrics.HEADLINES` the highest score with random weights
        `<metric>_random_weights`; `top_key_token`; `prompts`.
        NaN means not scored; `.attrs["reasons"]` says why.

    Raises:
        LensError: no trace, or traces of several models.

    Example:
        >>> table = lens.profile(trace)
        >>> table.nlargest(3, "induction")
        >>> lens.profile(trace, all=True)[["name", "induction", "induction_low", "induction_high"]]
    """
    if parts := _by_part(traces):
        if random_weights:
            raise LensError(
                "give random_weights of one part: lens.profile(traces.cross, random_weights=...)"
            )
        tables = {part: profile(own, all=all, seed=seed) for part, own in parts.items()}
        found = pd.concat(
            [one.assign(part=part) for part, one in tables.items()], ignore_index=True
        )
        found.attrs["reasons"] = {part: one.attrs["reasons"] for part, one in tables.items()}
        return found
    several = given_traces(traces)
    beside = given_traces(random_weights) if random_weights != () else []
    if beside and [_prompt_of(one) for one in beside] != [_prompt_of(one) for one in several]:
        raise LensError(
            "random_weights must be traces of the same prompts in the same order; capture "
            "lens.models.random_weights(model) on them"
        )
    sizes = {(trace.part, trace.layers, trace.heads) for trace in [*several, *beside]}
    if len(sizes) > 1:
        raise LensError(
            f"traces must come from one model and part; got (part, layers, heads) {sorted(sizes)}: profile them apart"
        )
    if len(models := {trace.model for trace in several}) > 1:
        raise LensError(
            f"traces must come from one model, got {sorted(models)}: profile them apart"
        )
    if len(names := {trace.labels for trace in several}) > 1:
        raise LensError(
            f"traces must have the same labels, got {sorted(names)}: profile them apart"
        )
    drawn = seed if all or several[0].labels else None  # intervals, which take much of the time
    of_rows = drawn if len(several) == 1 else None  # with several, they are over prompts
    tables = [
        prompt_table(trace, f"p{number:03d}", seed=of_rows) for number, trace in enumerate(several)
    ]
    table = tables[0] if len(tables) == 1 else pooled_table(tables, "all", seed=drawn)
    if beside:
        metrics = (*HEADLINES, *several[0].labels)
        scored = [prompt_table(one, "all", seed=None, metrics=metrics) for one in beside]
        random = pooled_table(scored, str(table["prompt_id"].iloc[0]), seed=None)
        table = beside_random(table, random)
    found = wide(table, prompts=len(several))
    found.insert(0, "name", head_columns(zip(found["layer"], found["head"], strict=True))["name"])
    return found if all else found[_main(found)]


def _prompt_of(trace: AttentionTrace) -> tuple[Any, ...]:
    """What was read: token ids and the picture, as far as a trace holds them."""
    return trace.dataset["token_id"].values.tolist(), trace.attrs.get("picture")


def _main(table: pd.DataFrame) -> list[str]:
    """The columns that are shown where not all are asked for; `.attrs` stay with the table."""
    known = {f"{name}{end}" for name in METRICS for end in _ENDS}
    own = [
        name
        for name in map(str, table)
        if name not in known and name not in ("prompts", *_HEAD, *MAIN)
    ]
    return [*_HEAD, *(name for name in MAIN if name in table), *own]


def wide(table: pd.DataFrame, *, prompts: int) -> pd.DataFrame:
    """The long table of one `prompt_id` with one row per head."""
    suffix = np.where(table["variant"] == "sink_excluded", "_sink_excluded", "")
    base = table.assign(column=table["metric"] + suffix)
    heads = pd.MultiIndex.from_frame(table[["layer", "head"]].drop_duplicates())
    columns: dict[str, pd.Series] = {}
    for name, rows in base.groupby("column", sort=False):
        rows = rows.set_index(["layer", "head"]).reindex(heads)
        columns[str(name)] = rows["value"]
        columns[f"{name}_low"] = rows["low"]
        columns[f"{name}_high"] = rows["high"]
        for baseline in ("uniform", "random_weights"):
            if rows[baseline].notna().any():
                columns[f"{name}_{baseline}"] = rows[baseline]
        if name == "top_key":
            columns["top_key_token"] = rows["detail"].where(rows["value"].notna(), "")
    result = pd.DataFrame(columns, index=heads).reset_index().assign(prompts=prompts)
    missing = base[base["value"].isna() & (base["detail"] != "")]
    result.attrs["reasons"] = dict(zip(missing["column"], missing["detail"], strict=True))
    return result


def prompt_table(
    trace: AttentionTrace,
    prompt_id: str,
    *,
    seed: int | None = 0,
    metrics: Collection[str] | None = None,
    uniform: bool = True,
) -> pd.DataFrame:
    """The long table of one prompt: columns of `heads.parquet` (docs/schema/run-folder.md).

    The trace is read one layer at a time. No intervals over rows for the seed None; `random_weights` is
    NaN (`beside_random`), and so is `uniform` where it is not asked for.
    """
    layers = trace.layers
    by_layer = [layer_scores(trace, layer, seed=seed, metrics=metrics) for layer in layers]
    table = scores_table(by_layer, layers, prompt_id)
    if uniform:
        found = np.array([uniform_scores(trace, layer, metrics) for layer in layers])
        table["uniform"] = np.repeat(found.T.ravel(), trace.heads)
    return table


def beside_random(table: pd.DataFrame, random: pd.DataFrame) -> pd.DataFrame:
    """The long table with the highest score of any head of a model with random weights beside it.

    Args:
        table: of some `prompt_id`s.
        random: the same prompts through random weights; metrics that it lacks stay NaN.
    """
    keys = ["prompt_id", "metric", "variant"]
    highest = random.groupby(keys)["value"].max().rename("random_weights").reset_index()
    merged = table.drop(columns="random_weights").merge(highest, "left", on=keys)
    return merged[list(COLUMNS)]


def scores_table(
    by_layer: Sequence[Sequence[Score]], layers: Sequence[int], prompt_id: str
) -> pd.DataFrame:
    """The long table of the scores of each layer, which are the same ones in the same order."""
    metrics, heads = len(by_layer[0]), len(by_layer[0][0].value)
    scores = [score for of_metric in zip(*by_layer, strict=True) for score in of_metric]

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(score, name) for score in scores])

    return pd.DataFrame(
        {
            "prompt_id": prompt_id,
            "layer": np.tile(np.repeat(layers, heads), metrics),
            "head": np.tile(np.arange(heads), metrics * len(layers)),
            "metric": np.repeat([score.metric for score in scores], heads),
            "variant": np.repeat([score.variant for score in scores], heads),
            **{name: column(name) for name in ("value", "low", "high", "n", "detail")},
            "uniform": np.nan,
            "random_weights": np.nan,
        },
        columns=list(COLUMNS),
    )


def pooled_table(
    tables: Sequence[pd.DataFrame], prompt_id: str, *, seed: int | None = 0
) -> pd.DataFrame:
    """Mean over prompts of their long tables, with a bootstrap over prompts (of the share of prompts with a sink Wilson's
    interval); no intervals for the seed None.

    `top_key` and `positional_distance` are the most frequent one, the key named where its token is the same in all prompts that have
    it; it has no interval. `uniform` is the mean over the same prompts; `random_weights` is left to
    `beside_random`.
    """
    keys = ["metric", "variant", "layer", "head"]
    first = tables[0].set_index(keys)
    aligned = [table.set_index(keys).reindex(first.index) for table in tables]
    values = np.stack([table["value"].to_numpy(float) for table in aligned])
    scored = ~np.isnan(values)
    n = scored.sum(0)
    mean = known_mean(values, 0)
    low, high = np.full((2, *mean.shape), np.nan)
    if seed is not None:
        low, high = over_units(np.where(scored, values, 0), scored, seed)
        shares = first.index.get_level_values("metric") == "sink_rate"  # prompts with a sink
        for row in np.flatnonzero(shares & (n > 1)):
            low[row], high[row] = of_share(float(mean[row]), int(n[row]))
    result = first.reset_index()
    detail = np.where(n == 0, result["detail"], "").astype(object)
    even = np.stack([table["uniform"].to_numpy(float) for table in aligned])
    known = (scored & ~np.isnan(even)).sum(0)
    even = known_mean(np.where(scored, even, np.nan), 0)
    result["uniform"], result["random_weights"] = np.where(known == n, even, np.nan), np.nan
    result["prompt_id"] = prompt_id
    details = np.stack([table["detail"].to_numpy(object) for table in aligned])
    for row in np.flatnonzero(result["metric"].isin(POSITIONS) & (n > 0)):
        positions, counts = np.unique(values[scored[:, row], row], return_counts=True)
        mean[row], low[row], high[row] = positions[counts.argmax()], np.nan, np.nan
        tokens = set(details[values[:, row] == mean[row], row])
        detail[row] = tokens.pop() if len(tokens) == 1 else ""
    result["value"], result["low"], result["high"], result["n"] = mean, low, high, n
    result["detail"] = detail
    return result[list(COLUMNS)]
