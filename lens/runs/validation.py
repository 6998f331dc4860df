"""Whether a run folder is whole and its numbers can be: schema, files, row sums, NaN.

Checked are identities that hold for every attention matrix, so no model is needed: rows sum to 1 (to
less with a learned sink), column sums and diagonals add up to the same total, entropy lies between 0
and the logarithm of the number of keys. Traces are read one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lens.common.errors import LensError
from lens.traces.metrics import METRICS, VARIANTS
from lens.traces.profiles import COLUMNS as HEAD_COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from lens.runs.folders import Run
    from lens.traces.trace import AttentionTrace

POOLED = ("text", "copied")
PROMPT_COLUMNS = (
    "prompt_id",
    "kind",
    "title",
    "text",
    "tokens",
    "token_ids",
    "token_strings",
    "loss",
    "loss_repeat",
    "status",
    "seconds",
)
_GROWING = ("log.txt",)
_WHOLE = ("config.toml", "prompts.parquet", "heads.parquet")
_TOLERANCE = 1e-3
_MAY_BE_INFINITE = ("lse", "max_logit")
_MAY_BE_NAN = ("entropy_sink_excluded", "distance_sink_excluded", "match_mass")


def validate(run: Run) -> list[str]:
    """Everything that is wrong with a run folder, one sentence each; empty when it is whole.

    A run that is not finished is not wrong: what it has not made yet is not missed.
    """
    problems = [*_files(run)]
    try:
        problems += _prompts(run)
    except LensError as error:
        problems += _unless_missing(run, "prompts.parquet", error)
    try:
        problems += _heads(run)
    except LensError as error:
        problems += _unless_missing(run, "heads.parquet", error)
    problems += _sections(run)
    for prompt_id in run.traces:
        problems += [f"trace of {prompt_id}: {problem}" for problem in _trace(run, prompt_id)]
    return list(dict.fromkeys(problems))


def _unless_missing(run: Run, name: str, error: LensError) -> list[str]:
    """The error, but not that a table is missing: `_files` says so where it should be there."""
    return [str(error)] if (run.path / name).exists() else []


def _files(run: Run) -> Iterator[str]:
    files = run.meta["files"]
    if run.status == "success":
        for name in _WHOLE:
            if name not in files:
                yield f"{name} is not entered in run.json although the run says success; run it again"
        prompts = run.meta["prompts"]
        if prompts.get("done") != prompts.get("total"):
            yield (
                f"run.json says success with {prompts.get('done')} of {prompts.get('total')} prompts "
                "done; run it again"
            )
    for name, size in files.items():
        path = run.path / name
        if not path.resolve().is_relative_to(run.path):
            yield f"run.json names {name!r}, which is outside of the run; do not trust this folder"
        elif not path.is_file():
            yield f"{name} is missing; run it again"
        elif name not in _GROWING and path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes instead of {size}; run it again"


def _prompts(run: Run) -> Iterator[str]:
    table = run.prompts
    if missing := [name for name in PROMPT_COLUMNS if name not in table]:
        yield f"prompts.parquet lacks the columns {', '.join(missing)}"
        return
    if table["prompt_id"].duplicated().any():
        yield "prompts.parquet has a prompt_id twice"
    if unknown := sorted(set(table["kind"]) - set(POOLED)):
        yield f"prompts.parquet has the kinds {unknown}; known: {', '.join(POOLED)}"
    traces = run.traces
    for row in table.to_dict("records"):
        counts = {row["tokens"], len(row["token_ids"]), len(row["token_strings"])}
        if len(counts) > 1:
            yield f"prompts.parquet: {row['prompt_id']} has differing token counts {sorted(counts)}"
        if row["status"] not in ("done", "pending"):
            yield f"prompts.parquet: {row['prompt_id']} has status {row['status']!r}"
        elif row["status"] == "done" and row["prompt_id"] not in traces:
            yield f"{row['prompt_id']} is done but its trace is missing; run it again"


def _heads(run: Run) -> Iterator[str]:
    table = run.heads
    if missing := [name for name in HEAD_COLUMNS if name not in table]:
        yield f"heads.parquet lacks the columns {', '.join(missing)}"
        return
    known = {"metric": METRICS, "variant": VARIANTS}
    for column, names in known.items():
        if unknown := sorted(set(table[column]) - set(names)):
            yield f"heads.parquet has the {column} {', '.join(unknown)}, which is not known"
    keys = ["prompt_id", "layer", "head", "metric", "variant"]
    if table.duplicated(keys).any():
        yield "heads.parquet has a score twice"
    sizes = {name: run.meta["model"].get(f"{name}s") for name in ("layer", "head")}
    for name, count in sizes.items():
        if isinstance(count, int) and not table[name].between(0, count - 1).all():
            yield f"heads.parquet has a {name} outside of 0 to {count - 1}"
    if unknown := sorted(set(table["prompt_id"]) - {*POOLED, *run.prompts["prompt_id"]}):
        yield f"heads.parquet scores {', '.join(unknown)}, which prompts.parquet does not have"
    heads = table[["layer", "head"]].drop_duplicates()
    whole = table.groupby(["prompt_id", "metric", "variant"]).size()
    if (whole.to_numpy() != len(heads)).any():
        yield f"heads.parquet lacks scores: not every metric has all {len(heads)} heads"
    yield from _scores(table)


def _sections(run: Run) -> Iterator[str]:
    for name in run.sections:
        try:
            run.section(name)
        except LensError as error:
            yield str(error)


def _scores(table: pd.DataFrame) -> Iterator[str]:
    value, low, high = (table[name].to_numpy(float) for name in ("value", "low", "high"))
    if np.isinf([value, low, high]).any():
        yield "heads.parquet has infinite scores"
    if (np.isnan(value) & (table["detail"] == "")).any():
        yield "heads.parquet has scores that are NaN without a reason"
    if (low > high + _TOLERANCE).any():
        yield "heads.parquet has intervals whose ends are swapped"
    shares = [name for name, metric in METRICS.items() if metric.unit == "probability"]
    outside = (value < -_TOLERANCE) | (value > 1 + _TOLERANCE)
    for metric in dict.fromkeys(table["metric"][table["metric"].isin(shares) & outside]):
        yield f"heads.parquet has {metric} outside of 0 to 1"


def _trace(run: Run, prompt_id: str) -> list[str]:
    try:
        trace = run.trace(prompt_id)
        problems = []
        for layer in trace.dataset["layer"].values:
            data = trace.dataset.sel(layer=layer).load()
            problems += [f"layer {layer}: {problem}" for problem in _layer(trace, data)]
        return problems
    except LensError as error:
        return [str(error)]


def _layer(trace: AttentionTrace, data: xr.Dataset) -> Iterator[str]:
    for name in (str(name) for name in data.data_vars):
        values = data[name].values
        if name not in _MAY_BE_NAN and np.isnan(values).any():
            yield f"{name} has NaN"
        if name not in _MAY_BE_INFINITE and np.isinf(values).any():
            yield f"{name} has infinite values"
    yield from _bounds(data, trace.length)
    if "lse" not in data or np.isfinite(data["lse"].values).all():  # else some rows see no key
        yield from _sums(data, trace.length, bool(trace.attrs.get("learned_sinks")))


def _sums(data: xr.Dataset, length: int, learned_sink: bool) -> Iterator[str]:
    """Totals over all rows, [heads], each of which must be the number of queries."""
    totals = {}
    if "block_mass" in data:
        start = data["query_block_start"].values
        rows = np.diff([*start, length])
        mass = data["block_mass"].values.astype(np.float64).sum(-1)
        totals["block_mass"] = mass @ rows
        off = np.abs(mass - 1) > _TOLERANCE if not learned_sink else mass > 1 + _TOLERANCE
        if off.any():
            head, block = np.argwhere(off)[0]
            yield f"block rows must sum to 1, head {head} block {block} to {mass[head, block]:.4f}"
    for name in ("received", "diagonal"):
        if name in data:
            totals[name] = data[name].values.astype(np.float64).sum(-1)
    if {"first_mass", "rest_mass"} <= set(data):
        parts = data["first_mass"] + data["rest_mass"]
        totals["first_mass and rest_mass"] = parts.values.astype(np.float64).sum(-1)
    expected = next(iter(totals.values()), 0.0) if learned_sink else float(length)
    for name, total in totals.items():
        wrong = np.abs(total - expected)
        if (wrong > _TOLERANCE * length).any():
            head = int(wrong.argmax())
            yield f"{name} of head {head} adds up to {total[head]:.4g} in {length} rows"


def _bounds(data: xr.Dataset, length: int) -> Iterator[str]:
    limits = {
        "entropy": (0, np.log(length)),
        "concentration": (0, 1),
        "prefix_mass": (0, 1),
        "first_mass": (0, 1),
        "rest_mass": (0, 1),
        "block_mass": (0, 1),
        "block_max": (0, 1),
        "match_mass": (0, 1),
        "distance": (1 - length, length - 1),
    }
    for name, (lowest, highest) in limits.items():
        if name not in data:
            continue
        values = data[name].values
        slack = _TOLERANCE * max(1.0, highest)
        if (values < lowest - slack).any() or (values > highest + slack).any():
            yield f"{name} lies outside of {lowest:.4g} to {highest:.4g}"
