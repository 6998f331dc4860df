"""Whether a run folder is whole and its numbers can be: files, schema, row sums, NaN, and tables against traces.

What was changed after the run is found by the manifest. What a wrong writer would have made is found by
identities that hold for every attention matrix, so no model is needed: rows sum to 1 (to less with a learned
sink), a map's columns add up to the received mass, its rows lie as far as the mean distance says, and the scores
of `heads.parquet` follow from the traces. Sections are held to each other where they hold the same numbers. Traces are
read one layer at a time.

Some lies need the model, once the digests are made anew: whole layers or heads exchanged in the traces and in every
table, q and k too; what one section alone holds; losses of prompts, which no trace holds; that a learned sink or a bias took part where it takes next to
nothing. Nothing in a folder says when, where and by which command it was made. `lens run --again` makes the run from its `config.toml`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.files import lies_in
from lens.runs.across_sections import section_agreement_problems
from lens.runs.agreement import (
    disagreements,
    interval_problems,
    kept_problems,
    model_problems,
    prompt_number_problems,
    section_number_problems,
)
from lens.runs.commands import CONFIG
from lens.runs.folders import CIRCUITS, IMPORTANCES
from lens.runs.manifest import GROWING, MANIFEST, changed_files
from lens.runs.writer import config_hash
from lens.traces.arrays import block_rows
from lens.traces.metrics import METRICS
from lens.traces.profiles import POSITIONS, pooled_table, prompt_table

if TYPE_CHECKING:
    import xarray as xr

    from lens.runs.folders import Run
    from lens.traces.trace import AttentionTrace

_WHOLE = (CONFIG, "prompts.parquet", "heads.parquet")
_TOLERANCE = 1e-3
_MAY_BE_INFINITE = ("lse", "max_logit")
_MAY_BE_NAN = ("entropy_sink_excluded", "distance_sink_excluded", "match_mass", "bias")
_KEYS = ["layer", "head", "metric", "variant"]


def validate(run: Run) -> list[str]:
    """Everything that is wrong with a run folder, one sentence each; empty when it is whole.

    A run that is not finished is not wrong: what it has not made yet is not missed.
    """
    problems = [*run.damage, *_files(run)]
    known: dict[str, Mapping[str, Any]] = {}  # of the first trace
    checks: list[tuple[str, Callable[[], Iterable[str]]]] = [
        (MANIFEST, lambda: _manifest(run)),
        ("run.json", lambda: model_problems(run)),
        (CONFIG, lambda: _config(run)),
        ("prompts.parquet", lambda: _prompts(run)),
        ("heads.parquet", lambda: _heads(run)),
        (IMPORTANCES, lambda: _read(run.importances)),
        *(
            (f"sections/{name}", lambda name=name: section_number_problems(run.section(name)))
            for name in run.sections
        ),
        ("sections", lambda: section_agreement_problems(run)),
        *(
            (f"{CIRCUITS}/{name}.json", lambda name=name: _read(run.circuit, name))
            for name in run.circuits
        ),
        *((f"trace/{name}", lambda name=name: _trace(run, name, known)) for name in run.traces),
    ]
    for name, check in checks:
        try:
            problems += check()
        except LensError as error:
            if run.door.has(name):  # `_files` says what is missing
                problems.append(str(error))
    return list(dict.fromkeys(problems))


def _read(read: Callable[..., object], *named: str) -> Iterable[str]:
    """What reading checks itself, and nothing more; raises what it raises."""
    read(*named)
    return ()


def _files(run: Run) -> Iterator[str]:
    files = run.meta["files"]
    if run.meta["manifest"] and run.meta["status"] != "started" and not run.door.has(MANIFEST):
        yield f"{MANIFEST} is missing although run.json names it; run it again"
    if run.status == "success":
        for name in _WHOLE:
            if name not in files:
                yield f"{name} is not entered in run.json although the run says success; run it again"
        prompts = run.meta["prompts"]
        if prompts["done"] != prompts["total"]:
            yield (
                f"run.json says success with {prompts['done']} of {prompts['total']} prompts "
                "done; run it again"
            )
    for name, size in files.items():
        path = run.path / name
        if not lies_in(path, run.path):
            yield f"run.json names {name[:60]!r}, which is outside of the run; do not trust this folder"
            continue
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            yield f"{name} is missing; run it again"
        elif found != size and name != GROWING and not run.door.has(MANIFEST):  # which knows more
            yield f"{name} has {found} bytes instead of {size}; run it again"


def _manifest(run: Run) -> Iterator[str]:
    written = run.door.manifest
    if written is None:
        return
    yield from changed_files(run.path, written)
    for name in sorted(set(run.meta["files"]) - set(written)):
        yield f"{name} is in run.json and not in {MANIFEST}; run it again"


def _config(run: Run) -> Iterator[str]:
    if config_hash(run.config) != run.meta["id"].rpartition("-")[2]:
        yield f"{CONFIG} is not the configuration of {run.meta['id']}, whose name ends in its hash"


def _prompts(run: Run) -> Iterator[str]:
    traces = run.traces
    for row in run.prompts[["prompt_id", "status"]].to_dict("records"):
        if row["status"] == "done" and row["prompt_id"] not in traces:
            yield f"{row['prompt_id']} is done but its trace is missing; run it again"
    if run.status == "success" and len(run.prompts) != run.meta["prompts"]["total"]:
        yield f"prompts.parquet has {len(run.prompts)} of {run.meta['prompts']['total']} prompts"
    said, tokens = run.meta["prompts"].get("tokens"), int(run.prompts["tokens"].sum())
    if said is not None and said != tokens:
        yield f"run.json says that the prompts have {said:,} tokens, prompts.parquet has {tokens:,}"
    yield from prompt_number_problems(run)


def _heads(run: Run) -> Iterator[str]:
    table = run.heads
    yield from _scores(table)
    yield from interval_problems(table, "heads.parquet")
    done = run.prompts[run.prompts["status"] == "done"]
    if lacking := sorted({*done["prompt_id"], *done["kind"]} - set(table["prompt_id"])):
        yield f"heads.parquet has no scores of {', '.join(lacking)}"
    with np.errstate(all="ignore"):  # what is infinite was said
        pooled = _pooled(run, table)
    yield from _differing(table, pooled, "the mean over the prompts")


def _pooled(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each kind of prompt, made anew from those of its prompts; intervals are drawn by the run's seed."""
    table = table[~table["metric"].isin(POSITIONS)]
    by_prompt = dict(iter(table.groupby("prompt_id", sort=False)))
    found = []
    for kind, rows in run.prompts.groupby("kind"):
        members = [by_prompt[name] for name in rows["prompt_id"] if name in by_prompt]
        if len(members) > 1:
            found.append(pooled_table(members, str(kind), seed=run.config.get("seed", 0)))
        elif members:
            found.append(members[0][[*_KEYS, "value"]].assign(prompt_id=kind))
    return pd.concat([table.iloc[:0], *found])


def _differing(table: pd.DataFrame, expected: pd.DataFrame, what: str) -> Iterator[str]:
    """The first score that is not what it follows from."""
    both = table.merge(expected, on=["prompt_id", *_KEYS], suffixes=("", "_expected"))
    pair = both["value"].to_numpy(float), both["value_expected"].to_numpy(float)
    off = ~np.isclose(*pair, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
    for end in ("low", "high"):
        pair = both[end].to_numpy(float), both[f"{end}_expected"].to_numpy(float)
        known = np.isfinite(pair[1])
        if (apart := known & ~np.isclose(*pair, rtol=_TOLERANCE, atol=_TOLERANCE)).any():
            row = both[apart].iloc[0]
            yield (
                f"heads.parquet: column {end}: {row['metric']} ({row['variant']}) of L{row['layer']}H{row['head']} on "
                f"{row['prompt_id']} is {row[end]:.4g}, {what} gives {row[f'{end}_expected']:.4g}"
            )
    more = (both["n"] != both["n_expected"]) & both["n_expected"].notna()
    if more.any():
        row = both[more].iloc[0]
        yield (
            f"heads.parquet: column n: {row['metric']} ({row['variant']}) of L{row['layer']}H{row['head']} on "
            f"{row['prompt_id']} has {row['n']}, {what} gives {row['n_expected']:.0f}"
        )
    if off.any():
        row = both[off].iloc[0]
        yield (
            f"heads.parquet: column value: {row['metric']} ({row['variant']}) of "
            f"L{row['layer']}H{row['head']} on {row['prompt_id']} is {row['value']:.4g}, {what} gives "
            f"{row['value_expected']:.4g}"
        )


def _scores(table: pd.DataFrame) -> Iterator[str]:
    value, low, high = (table[name].to_numpy(float) for name in ("value", "low", "high"))
    if np.isinf([value, low, high]).any():
        yield "heads.parquet has infinite scores"
    if (np.isnan(value) & (table["detail"] == "")).any():
        yield "heads.parquet has scores that are NaN without a reason"
    if (low > high + _TOLERANCE).any():
        yield "heads.parquet has intervals whose ends are swapped"
    if (table["n"].to_numpy(float) < 0).any():
        yield "heads.parquet has scores of fewer than 0 rows (column n)"
    shares = [name for name, metric in METRICS.items() if metric.unit == "probability"]
    ends = np.stack([value, low, high])
    outside = ((ends < -_TOLERANCE) | (ends > 1 + _TOLERANCE)).any(0)
    outside &= table["metric"].isin(shares).to_numpy()
    for metric in dict.fromkeys(table["metric"][outside]):
        yield f"heads.parquet has {metric} outside of 0 to 1"


def _trace(run: Run, prompt_id: str, known: dict[str, Mapping[str, Any]]) -> Iterator[str]:
    said = f"trace of {prompt_id}"
    try:
        trace = run.trace(prompt_id)
        yield from disagreements(run, prompt_id, trace, known)
        for layer in trace.layers:
            data = trace.dataset.sel(layer=layer).load()
            for problem in (*_layer(trace, data), *kept_problems(trace, layer)):
                yield f"{said}: layer {layer}: {problem}"
    except LensError as error:
        yield f"{said}: {error}"
        return
    try:
        table = run.heads[run.heads["prompt_id"] == prompt_id]
    except LensError:  # which is said where it is read
        return
    layers = sorted(trace.dataset["layer"].values.tolist())
    if len(table) and sorted(table["layer"].unique()) != layers:
        yield f"heads.parquet: column layer: {prompt_id} has other layers than its trace: {layers}"
    yield from _differing(table, prompt_table(trace, prompt_id, seed=None), "its trace")


def _layer(trace: AttentionTrace, data: xr.Dataset) -> Iterator[str]:
    for name in (str(name) for name in data.data_vars):
        values = data[name].values
        if name not in _MAY_BE_NAN and np.isnan(values).any():
            yield f"{name} has NaN"
        if name not in _MAY_BE_INFINITE and np.isinf(values).any():
            yield f"{name} has infinite values"
    yield from _bounds(data, trace.length)
    yield from _largest(data)
    if "lse" not in data or np.isfinite(data["lse"].values).all():  # else some rows see no key
        yield from _sums(data, trace.queries, bool(trace.attrs.get("learned_sinks")))
        yield from _map(data, trace.queries, trace.length)


def _sums(data: xr.Dataset, length: int, learned_sink: bool) -> Iterator[str]:
    """Totals over all rows, [heads], each of which must be the number of queries."""
    totals = {}
    if "block_mass" in data:
        rows = block_rows(data, length)
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
    yield from _same(data)
    expected = next(iter(totals.values()), 0.0) if learned_sink else float(length)
    for name, total in totals.items():
        wrong = np.abs(total - expected)
        if (wrong > _TOLERANCE * length).any():
            head = int(wrong.argmax())
            yield f"{name} of head {head} adds up to {total[head]:.4g} in {length} rows"


def _same(data: xr.Dataset) -> Iterator[str]:
    """What two variables both hold, summed over the rows, [heads]."""
    sums = {
        "first_mass and received": ("first_mass", "received", 1),
        "prefix_mass and received": ("prefix_mass", "received", int(data.attrs["prefix"])),
    }
    for words, (name, other, keys) in sums.items():
        if name in data and other in data:
            pair = (
                data[name].values.astype(float).sum(-1),
                data[other].values[:, :keys].astype(float).sum(-1),
            )
            if not np.allclose(*pair, rtol=_TOLERANCE, atol=_TOLERANCE * data.sizes["query"]):
                yield f"{words} of the first keys differ"
    if {"match_mass", "diagonal"} <= set(data):
        zero = data["offset"].values.tolist().index(0)
        for rule, name in enumerate(("current_token_position", "previous_token")):
            found = data["match_mass"].sel(match=name).values.astype(float).sum(-1)
            if zero + rule < data.sizes["offset"]:
                beside = data["diagonal"].values[:, zero + rule].astype(float)
                if not np.allclose(
                    found, beside, rtol=_TOLERANCE, atol=_TOLERANCE * data.sizes["query"]
                ):
                    yield f"match_mass of {name} and diagonal differ"


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


def _largest(data: xr.Dataset) -> Iterator[str]:
    """Largest probability of each row, `p = exp(max_logit - lse)`: `p^2 <= sum of squares <= p`."""
    if not {"lse", "max_logit", "concentration"} <= set(data):
        return
    lse, logit, squares = (
        data[name].values.astype(float) for name in ("lse", "max_logit", "concentration")
    )
    seen = np.isfinite(lse) & np.isfinite(logit)
    largest = np.exp(np.where(seen, logit - lse, 0.0))
    squares = np.where(seen, squares, 1.0)
    off = (squares > largest + _TOLERANCE) | (largest**2 > squares + _TOLERANCE)
    if off.any():
        head, query = np.argwhere(off)[0]
        yield (
            f"lse and max_logit give head {head} query {query} a largest probability of "
            f"{largest[head, query]:.4g}, concentration {squares[head, query]:.4g} cannot have it"
        )


def _map(data: xr.Dataset, queries: int, length: int) -> Iterator[str]:
    """The block map against what is stored beside it: column sums, distances, and the largest of each block."""
    if "block_mass" not in data:
        return
    mass = data["block_mass"].values.astype(np.float64)  # [head, query block, key block]
    starts, keys = data["query_block_start"].values, data["key_block_start"].values
    ends = np.append(starts[1:], queries)
    rows = block_rows(data, queries)
    slack = _TOLERANCE * queries
    if "received" in data:
        received = np.add.reduceat(data["received"].values.astype(np.float64), keys, axis=1)
        off = np.abs(np.einsum("hqk,q->hk", mass, rows) - received)
        if (off > slack).any():
            head, block = np.argwhere(off > slack)[0]
            yield f"block_mass of head {head} does not add up to received in the keys of block {block}"
    if "distance" in data:
        sums = np.add.reduceat(data["distance"].values.astype(np.float64), starts, axis=1)
        nearest = starts[:, None] - (np.append(keys[1:], length) - 1)[None]
        farthest = (ends - 1)[:, None] - keys[None]
        low, high = (mass * nearest).sum(-1), (mass * farthest).sum(-1)
        mean = sums / rows
        wrong = (mean < low - slack) | (mean > high + slack)
        if wrong.any():
            head, block = np.argwhere(wrong)[0]
            yield f"block_mass of head {head} lies elsewhere than distance says in the rows of block {block}"
    if "block_max" in data:
        largest = data["block_max"].values.astype(np.float64)
        columns = np.diff([*keys, length])
        low, high = largest / rows[:, None], largest * columns
        wrong = (low > mass + _TOLERANCE) | (mass > high + _TOLERANCE)
        if wrong.any():
            head, query, key = np.argwhere(wrong)[0]
            yield f"block_max of head {head} cannot be in block {query}, {key} of block_mass"
