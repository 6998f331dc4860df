"""Traces as a HeadVis tree: the JSON files that HeadVis and Neuronpedia's head browser read.

```
config.json  scatter_data.json  server_config.json  attributions/manifest.json  heads/L0H0.json ...
```

Attention stands in it sparsely, the strongest keys of each row; what is left out is small by
construction, and `pipeline_config` says where the line was drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lens.common.choices import Count, is_number
from lens.common.errors import LensError
from lens.common.files import as_path, write_json
from lens.common.given import given_traces
from lens.common.head_ids import HeadId
from lens.common.version import __version__
from lens.traces.metrics import METRICS
from lens.traces.trace import AttentionTrace

DISTANCE_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 1 << 31)
_ROWS = 256  # rows of a head that are in memory at a time
_TOP_TOKENS = 50
_BINS = 50


def to_headvis(
    traces: AttentionTrace | Iterable[AttentionTrace],
    folder: str | Path,
    *,
    dataset: str = "prompts",
    keys: Count = 8,
    least: float = 0.005,
    intervals: Count = 5,
) -> Path:
    """Write traces as a HeadVis tree.

    A head's sequences are sorted by `max_activation`, its largest probability off the diagonal and off
    position 0, into `intervals` of equal number; the last is the strongest. Scatter coordinates are the
    metrics of `lens.profile`, raw and sink-excluded.

    Args:
        traces: of one model, captured with `keep_qk=True`; each is a sequence.
        folder: a new one.
        dataset: name of the prompts, for people.
        keys: strongest keys of each row that are kept.
        least: probabilities below it are left out.
        intervals: at most so many; no more than sequences.

    Reference: Luger, Kamath et al., HeadVis, 2026; format as read by hijohnnylin/neuronpedia.

    Raises:
        LensError: no traces, of differing models, a folder that exists, heads without exact tiles, or
            limits that keep nothing.

    Example:
        >>> lens.runs.to_headvis(traces, "headvis", dataset="two beginnings").is_dir()
        True
    """
    from lens.traces.profiles import profile

    given = (
        traces
        if isinstance(traces, AttentionTrace) or not isinstance(traces, Iterable)
        else list(traces)
    )
    several = given_traces(given)
    folder = as_path("folder", folder)
    if folder.exists():
        raise LensError(f"{folder} exists already; choose a new folder or delete it")
    if not (is_number(least) and 0 <= least < 1):
        raise LensError(f"least must be from 0 to below 1, got {least!r}")
    first = several[0]
    heads = first.every_head
    for trace in several:
        for layer, head in heads:
            if why := trace.tile_refusal(layer, head):
                raise LensError(why)
    table = profile(several, all=True)  # refuses traces of differing models
    metrics = _metrics(table)
    count = min(intervals, len(several))
    for layer, head in heads:
        sequences = [
            _sequence(trace, number, layer, head, keys, least)
            for number, trace in enumerate(several)
        ]
        write_json(folder / "heads" / f"L{layer}H{head}.json", _head(sequences, count))
    write_json(folder / "server_config.json", {})
    write_json(folder / "attributions" / "manifest.json", {})
    write_json(folder / "scatter_data.json", _scatter(table, metrics))
    config = _config(several, heads, metrics, dataset, count)
    config["pipeline_config"] |= {"top_keys_per_row": keys, "least_probability": least}
    write_json(folder / "config.json", config)  # last: it makes the folder a tree
    return folder


def _config(
    traces: Sequence[AttentionTrace],
    heads: Sequence[HeadId],
    metrics: list[str],
    dataset: str,
    intervals: int,
) -> dict[str, Any]:
    first = traces[0]
    lengths = [trace.length for trace in traces]
    return {
        "model_name": first.model,
        "dataset_name": dataset,
        "heads": [list(head) for head in heads],
        "n_layers": max((*first.layers, *first.without_attention)) + 1,
        "n_heads": first.heads,
        "n_intervals": intervals,
        "metrics": metrics,
        "metric_descriptions": {name: _description(name) for name in metrics},
        "head_data_pattern": "L{layer}H{head}.json",
        "has_umap": False,
        "umap_heads": [],
        "custom_plots": [],
        "custom_tables": [],
        "statistics_display": {},
        "pipeline_config": {
            "tool": f"attention-lens {__version__}",
            "n_sequences": len(traces),
            "seq_len": max(lengths),
            "dtype": first.attrs["dtype"],
            "attn_implementation": f"attention-lens ({first.attrs['backend']})",
        },
    }


def _metrics(table: pd.DataFrame) -> list[str]:
    names = [f"{name}{suffix}" for name in METRICS for suffix in ("", "_sink_excluded")]
    return [name for name in names if name in table]


def _description(column: str) -> str:
    name = column.removesuffix("_sink_excluded")
    without = " On the row without key 0, renormalised." if name != column else ""
    return METRICS[name].definition + without


def _scatter(table: pd.DataFrame, metrics: list[str]) -> list[dict[str, Any]]:
    """One row per head; what was not scored is null."""
    return [
        {"layer": int(row["layer"]), "head": int(row["head"])}
        | {name: None if np.isnan(row[name]) else float(row[name]) for name in metrics}
        for row in table.to_dict("records")
    ]


def _sequence(
    trace: AttentionTrace, number: int, layer: int, head: int, keys: int, least: float
) -> dict[str, Any]:
    length = trace.length
    indices: list[int] = []
    values: list[float] = []
    strongest = 0.0
    for start, rows in _rows(trace, layer, head):
        query = np.arange(start, start + len(rows))
        order = np.argsort(-rows, axis=1, kind="stable")[:, :keys]
        kept = np.take_along_axis(rows, order, 1)
        flat = query[:, None] * length + order
        mask = kept >= max(least, np.finfo(np.float32).tiny)
        indices += flat[mask].tolist()
        values += np.round(kept[mask], 6).tolist()
        rows[np.arange(len(rows)), query] = 0
        strongest = max(strongest, float(rows[:, 1:].max(initial=0)))
    return {
        "sequence_id": number,
        "interval": 0,
        "tokens": trace.tokens,
        "attention_indices": indices,
        "attention_values": values,
        "seq_len": length,
        "max_activation": round(strongest, 6),
    }


def _rows(trace: AttentionTrace, layer: int, head: int) -> Iterator[tuple[int, np.ndarray]]:
    """First query and exact probabilities [rows, keys], a few rows at a time."""
    for start in range(0, trace.length, _ROWS):
        last = min(start + _ROWS, trace.length)
        yield start, trace.tile(layer, head, (start, last), (0, trace.length))


def _head(sequences: list[dict[str, Any]], intervals: int) -> dict[str, Any]:
    strength = np.array([sequence["max_activation"] for sequence in sequences])
    for number, members in enumerate(
        np.array_split(np.argsort(strength, kind="stable"), intervals)
    ):
        for member in members:
            sequences[member]["interval"] = number + 1
    counts, edges = np.histogram(strength.clip(0, 1), bins=_BINS, range=(0, 1))
    distances = np.zeros(len(DISTANCE_EDGES) - 1)
    queries: Counter[str] = Counter()
    read: Counter[str] = Counter()
    for sequence in sequences:
        index = np.array(sequence["attention_indices"], int)
        weights = np.array(sequence["attention_values"], float)
        query, key = np.divmod(index, sequence["seq_len"])
        distances += np.histogram(np.abs(query - key), bins=DISTANCE_EDGES, weights=weights)[0]
        for counter, places in ((queries, query), (read, key)):
            for place, weight in zip(places.tolist(), weights.tolist(), strict=True):
                counter[sequence["tokens"][place]] += weight
    return {
        "sequences": sequences,
        "qk_distance_histogram": {
            "bin_edges": list(DISTANCE_EDGES),
            "bin_values": distances.round(4).tolist(),
        },
        "top_query_tokens": _top(queries),
        "top_key_tokens": _top(read),
        "histogram": {"bin_edges": edges.round(4).tolist(), "bin_values": counts.tolist()},
        "statistics": {
            "n_samples": len(sequences),
            "mean_max_activation": round(float(strength.mean()), 6),
        },
    }


def _top(counter: Counter[str]) -> list[dict[str, Any]]:
    return [
        {"token": token, "weight": round(weight, 4)}
        for token, weight in counter.most_common(_TOP_TOKENS)
    ]
