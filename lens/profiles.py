"""The profile of a model's heads: every score of `lens.metrics`, one row per head.

Scores come from the statistics that a trace holds, so they are exact at any length. Each is a mean
over the rows (queries) of a prompt that can show it; a batch averages the prompts' means. Intervals
are 95 % percentile bootstraps: over prompts where there are several, else over contiguous blocks of
about sqrt(rows) rows of the one prompt, because neighbouring rows depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.errors import LensError
from lens.metrics import METRICS

if TYPE_CHECKING:
    from lens.trace import AttentionTrace

SINK_EPSILON = 0.3
FEWEST_VIEWERS = 16
LOCAL = 8
_RESAMPLES = 1000
_SMALLEST_REST = 1e-6

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
)


@dataclass(frozen=True)
class _Score:
    """One metric of all heads on one prompt; every array is [layers, heads]."""

    metric: str
    variant: str
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray
    detail: np.ndarray


def profile(traces: AttentionTrace | Sequence[AttentionTrace], *, seed: int = 0) -> pd.DataFrame:
    """Every score of every head: one row per head.

    Args:
        traces: one trace, or several of the same model.
        seed: of the bootstrap.

    Returns:
        Columns `layer`, `head`, and for each metric of `lens.metrics.METRICS` the value, its 95 %
        interval `<metric>_low` and `<metric>_high`, and the same for `<metric>_sink_excluded` where
        that exists; `top_key_token`; `prompts`. NaN means not scored; `.attrs["reasons"]` says why.

    Raises:
        LensError: no trace, or traces of models of different sizes.

    Example:
        >>> table = lens.profile(trace)
        >>> table.sort_values("induction", ascending=False).head(3)
    """
    several = [traces] if not isinstance(traces, Sequence) else list(traces)
    if not several:
        raise LensError("profile needs at least one trace, got an empty list")
    sizes = {(trace.layers, trace.heads) for trace in several}
    if len(sizes) > 1:
        raise LensError(
            f"traces must come from one model; got layers × heads {sorted(sizes)}: profile them apart"
        )
    tables = [
        prompt_table(trace, f"p{number:03d}", seed=seed) for number, trace in enumerate(several)
    ]
    table = tables[0] if len(tables) == 1 else pooled_table(tables, "all", seed=seed)
    return wide(table, prompts=len(several))


def wide(table: pd.DataFrame, *, prompts: int) -> pd.DataFrame:
    """The long table of one `prompt_id` with one row per head."""
    base = table.assign(
        column=table["metric"] + np.where(table["variant"] == "sink_excluded", "_sink_excluded", "")
    )
    order = list(dict.fromkeys(base["column"]))
    index = ["layer", "head"]
    values = base.pivot(index=index, columns="column", values=["value", "low", "high"])
    columns = {}
    for name in order:
        columns[name] = values["value", name]
        columns[f"{name}_low"] = values["low", name]
        columns[f"{name}_high"] = values["high", name]
        if name == "top_key":
            tokens = base[base["metric"] == "top_key"].set_index(index)["detail"]
            columns["top_key_token"] = tokens
    result = pd.DataFrame(columns).reset_index()
    result["prompts"] = prompts
    missing = base[base["value"].isna() & (base["detail"] != "")]
    result.attrs["reasons"] = dict(zip(missing["column"], missing["detail"], strict=True))
    return result


def prompt_table(trace: AttentionTrace, prompt_id: str, *, seed: int = 0) -> pd.DataFrame:
    """The long table of one prompt: columns of `heads.parquet` (docs/schema/run-folder.md)."""
    layers, heads = np.meshgrid(
        trace.dataset["layer"].values, trace.dataset["head"].values, indexing="ij"
    )
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "prompt_id": prompt_id,
                    "layer": layers.ravel(),
                    "head": heads.ravel(),
                    "metric": score.metric,
                    "variant": score.variant,
                    "value": score.value.ravel(),
                    "low": score.low.ravel(),
                    "high": score.high.ravel(),
                    "n": score.n.ravel(),
                    "detail": score.detail.ravel(),
                },
                columns=list(COLUMNS),
            )
            for score in _scores(trace, seed)
        ],
        ignore_index=True,
    )


def pooled_table(tables: Sequence[pd.DataFrame], prompt_id: str, *, seed: int = 0) -> pd.DataFrame:
    """Mean over prompts of their long tables, with a bootstrap over prompts.

    `top_key` is the most frequent position; its interval is not defined.
    """
    keys = ["metric", "variant", "layer", "head"]
    first = tables[0].set_index(keys)
    values = np.stack([table.set_index(keys)["value"].reindex(first.index) for table in tables])
    scored = ~np.isnan(values)
    n = scored.sum(0)
    with np.errstate(invalid="ignore"):
        mean = np.where(scored, values, 0).sum(0) / np.where(n == 0, np.nan, n)
    low, high = _bootstrap(np.where(scored, values, 0), scored.astype(float), seed)
    result = first.reset_index()
    result["value"], result["low"], result["high"], result["n"] = mean, low, high, n
    result["detail"] = np.where(n == 0, result["detail"], "")
    result["prompt_id"] = prompt_id
    for row in np.flatnonzero((result["metric"] == "top_key") & (n > 0)):
        found = values[scored[:, row], row]
        positions, counts = np.unique(found, return_counts=True)
        most = int(counts.argmax())
        result.loc[row, "value"] = positions[most]
        result.loc[row, ["low", "high"]] = np.nan
        which = int(np.flatnonzero(values[:, row] == positions[most])[0])
        token = tables[which].set_index(keys)["detail"].reindex(first.index).iloc[row]
        result.loc[row, "detail"] = token if counts[most] == len(found) else ""
    return result[list(COLUMNS)]


def _scores(trace: AttentionTrace, seed: int) -> Iterator[_Score]:
    """All scores of one prompt, in the order of `METRICS`, raw before sink-excluded."""
    rows = _Rows(trace)
    for metric in METRICS.values():
        if metric.name in _WHOLE:
            value, reason = _WHOLE[metric.name](trace)
            detail = _tokens(trace, value) if metric.name == "top_key" else _reason(value, reason)
            unknown = np.full(value.shape, np.nan)
            n = np.where(np.isnan(value), 0, trace.length)
            yield _Score(metric.name, "raw", value, unknown, unknown, n, detail)
            continue
        for variant in ("raw", "sink_excluded") if metric.sink_excluded else ("raw",):
            values, reason = rows.values(metric.name, variant)
            scored = ~np.isnan(values)
            n = scored.sum(-1)
            filled = np.where(scored, values, 0)
            value = filled.sum(-1) / np.where(n == 0, np.nan, n)
            low, high = _row_interval(filled, scored, seed)
            detail = _reason(value, reason)
            yield _Score(metric.name, variant, value, low, high, n, detail)


class _Rows:
    """Scores of every row of a trace, [layers, heads, queries], NaN where a row cannot show them."""

    def __init__(self, trace: AttentionTrace) -> None:
        self._data = trace.dataset
        self._length = trace.length
        position = np.arange(trace.length)
        ids = self._data["token_id"].values
        self._later = position >= 1
        self._repeats = _has_earlier(ids)
        self._as_first = (ids == ids[0]) & self._later
        self._causal = bool(trace.attrs["causal"])

    def values(self, metric: str, variant: str) -> tuple[np.ndarray, str]:
        """Row scores and the reason for NaN where no row has one."""
        excluded = variant == "sink_excluded"
        match metric:
            case "previous_token" | "current_token":
                rule = "current_token_position" if metric == "current_token" else metric
                own_key_is_first = np.arange(self._length) == 1
                rows = self._later & ~(excluded & own_key_is_first & (metric == "previous_token"))
                return self._mass(self._match(rule), rows, excluded), "the prompt is too short"
            case "duplicate_token":
                mass = self._match("same_token") - self._match("current_token_position")
                if excluded:
                    mass = mass - self._variable("first_mass") * self._as_first
                why = "no token of the prompt occurs twice"
                return self._mass(np.maximum(mass, 0), self._repeats, excluded), why
            case "induction":
                why = (
                    "no token of the prompt occurs twice"
                    if self._causal
                    else "induction looks back only; this model also looks ahead"
                )
                return self._mass(self._match("induction"), self._repeats, excluded), why
            case "first_token":
                return self._keep(self._variable("first_mass"), self._later), "too short"
            case "sink_mass":
                every = np.ones(self._length, dtype=bool)
                return self._keep(self._seen_first(), every), "the first token is not seen"
            case "prefix_mass":
                rows = np.arange(self._length) >= self._data.attrs["prefix"]
                why = f"the prompt has no more than {self._data.attrs['prefix']} tokens"
                return self._keep(self._variable("prefix_mass"), rows), why
            case "effective_keys":
                concentration = self._variable("concentration")
                with np.errstate(divide="ignore"):
                    effective = np.where(concentration > 0, 1 / concentration, np.nan)
                return self._keep(effective, self._later), "the prompt is too short"
            case _:
                name = f"{metric}_sink_excluded" if excluded else metric
                return self._keep(self._variable(name), self._later), "the prompt is too short"

    def _variable(self, name: str) -> np.ndarray:
        if name not in self._data:
            raise LensError(f"the profile needs {name}, which this trace lacks; capture it again")
        return self._data[name].values.astype(np.float64)

    def _match(self, rule: str) -> np.ndarray:
        if "match_mass" not in self._data:
            raise LensError(
                "the profile needs match_mass, which this trace lacks; capture it again"
            )
        return self._data["match_mass"].sel(match=rule).values.astype(np.float64)

    def _mass(self, mass: np.ndarray, rows: np.ndarray, excluded: bool) -> np.ndarray:
        if excluded:
            rest = self._variable("rest_mass")
            with np.errstate(divide="ignore", invalid="ignore"):
                mass = np.where(rest > _SMALLEST_REST, mass / rest, np.nan)
        return self._keep(mass, rows)

    def _keep(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.where(rows, values, np.nan)

    def _seen_first(self) -> np.ndarray:
        """First-token mass over the rows that see the first token (a window hides it from others)."""
        first = self._variable("first_mass")
        windows = self._data.attrs["windows"]
        position = np.arange(self._length)
        sees = np.stack([position < (self._length if w is None else w) for w in windows])
        return np.where(sees[:, None], first, np.nan)


def _has_earlier(ids: np.ndarray) -> np.ndarray:
    """[tokens] bool: the token occurred before."""
    _, first = np.unique(ids, return_index=True)
    earlier = np.ones(len(ids), dtype=bool)
    earlier[first] = False
    return earlier


def _alpha(trace: AttentionTrace) -> np.ndarray:
    """alpha_k = received[k] / visible[k], [layers, heads, keys] (Gu et al., arXiv 2410.10781)."""
    visible = trace.dataset["visible"].values[:, None].astype(np.float64)
    return trace.dataset["received"].values / visible


def _sink_rate(trace: AttentionTrace) -> tuple[np.ndarray, str]:
    return (_alpha(trace)[..., 0] > SINK_EPSILON).astype(np.float64), ""


def _strongest(trace: AttentionTrace) -> tuple[np.ndarray, np.ndarray]:
    """Position and alpha of the strongest key; the last keys have too few viewers to count."""
    alpha = np.where(
        trace.dataset["visible"].values[:, None] >= FEWEST_VIEWERS, _alpha(trace), -np.inf
    )
    position, mass = alpha.argmax(-1).astype(np.float64), alpha.max(-1)
    none = np.isneginf(mass)
    return np.where(none, np.nan, position), np.where(none, np.nan, mass)


def _locality(trace: AttentionTrace) -> tuple[np.ndarray, str]:
    diagonal = trace.dataset["diagonal"].values.astype(np.float64)
    near = np.abs(trace.dataset["offset"].values) <= LOCAL
    total = diagonal.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(total > 0, diagonal[..., near].sum(-1) / total, np.nan)
    return share, "no attention at all"


_FEW = f"no key is seen by {FEWEST_VIEWERS} queries"
_WHOLE = {
    "sink_rate": _sink_rate,
    "locality": _locality,
    "top_key": lambda trace: (_strongest(trace)[0], _FEW),
    "top_key_mass": lambda trace: (_strongest(trace)[1], _FEW),
}


def _tokens(trace: AttentionTrace, position: np.ndarray) -> np.ndarray:
    tokens = np.array([*trace.tokens, _FEW], dtype=object)
    return tokens[np.where(np.isnan(position), len(tokens) - 1, position).astype(int)]


def _reason(value: np.ndarray, reason: str) -> np.ndarray:
    return np.where(np.isnan(value), reason, "").astype(object)


def _row_interval(
    filled: np.ndarray, scored: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap over contiguous blocks of about sqrt(rows) rows; [..., rows] -> two of [...]."""
    rows = filled.shape[-1]
    starts = np.arange(0, rows, max(1, int(np.sqrt(rows))))
    shape = filled.shape[:-1]
    sums = np.add.reduceat(filled, starts, axis=-1).reshape(-1, len(starts)).T
    counts = np.add.reduceat(scored.astype(float), starts, axis=-1).reshape(-1, len(starts)).T
    low, high = _bootstrap(sums, counts, seed)
    return low.reshape(shape), high.reshape(shape)


def _bootstrap(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of sum(sums) / sum(counts) over resampled units: [units, heads] -> [heads] each.

    NaN where fewer than two units have a count.
    """
    units = len(sums)
    draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), _RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (draws @ sums) / (draws @ counts)
    few = (counts > 0).sum(0) < 2
    means[:, few] = 0
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return np.where(few, np.nan, low), np.where(few, np.nan, high)
