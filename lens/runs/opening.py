"""`lens.open`: traces and results in memory as a run folder of their own, served by the dashboard until it is closed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lens.common.errors import LensError
from lens.common.files import as_path
from lens.common.plots import background
from lens.common.results import Result, numbered
from lens.common.version import __version__
from lens.runs.folders import Run
from lens.runs.schema import HEADS, PROMPTS, Kind
from lens.runs.sections import Section
from lens.runs.writer import RunWriter
from lens.traces.metrics import METRICS
from lens.traces.profiles import pooled_table, prompt_table
from lens.traces.trace import AttentionTrace


@dataclass(repr=False, eq=False)
class Opened:
    """A dashboard that is being served; closed by `close()`, at the end of a `with` block or of the program.

    Attributes:
        url: of the page.
        run: that it shows.
    """

    url: str
    run: Run
    _close: Any = field(default=None)
    _folder: Any = field(default=None)

    def close(self) -> None:
        """Stop serving, and remove the folder if it is a temporary one."""
        if self._close is not None:
            self._close()
            self._close = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Opened({self.url})" if self._close is not None else "Opened(closed)"

    def _repr_html_(self) -> str:
        return f'<p>Dashboard: <a href="{self.url}" target="_blank">{self.url}</a></p>'


def open(*shown: Any, folder: str | Path | None = None) -> Opened:
    """Look at traces and results in the dashboard: one call, and a link.

    Args:
        shown: traces (also in lists), results, or both; or one run of `lens.runs.open_run`, which is served as it is.
        folder: where the run folder is made, and stays; a temporary one, gone with `close()`, if None.

    Returns:
        `.url` is the page: of a trace's first head, or of the first result; `.close()` ends it. It listens on this
        machine alone, on a free port.

    Raises:
        LensError: nothing to show, something else, traces of several models, or the dashboard is not installed.

    Example:
        >>> page = lens.open(trace)
        >>> page.url.startswith("http://127.0.0.1:")
        True
        >>> page.close()
    """
    if len(shown) == 1 and isinstance(shown[0], Run):
        run = shown[0]
        address, close = background(run.path.parent)
        return Opened(f"{address}/run/{run.id}", run, close)
    traces, results = _sorted(shown)
    temporary = None
    if folder is None:
        temporary = tempfile.TemporaryDirectory(prefix="lens-open-")
        folder = temporary.name
    run = _written(traces, results, as_path("folder", folder))
    address, close = background(run.path.parent)
    page = f"analysis/{_name(results[0])}" if results and not traces else ""
    if traces:
        page = f"head/{traces[0].layers[0]}/0"
    return Opened(f"{address}/run/{run.id}/{page}", run, close, temporary)


def _sorted(shown: Sequence[Any]) -> tuple[list[AttentionTrace], list[Result]]:
    """Traces and results.

    Raises:
        LensError: none, or something else.
    """
    flat: list[Any] = []
    for one in shown:
        flat += [*one] if isinstance(one, list | tuple) else [one]
    traces = [one for one in flat if isinstance(one, AttentionTrace)]
    results = [one for one in flat if isinstance(one, Result)]
    if not flat or len(traces) + len(results) < len(flat):
        got = ", ".join(type(one).__name__ for one in flat) or "nothing"
        raise LensError(f"lens.open shows traces, results and runs, got {got}")
    if any(trace.cross or trace.part for trace in traces):
        raise LensError(
            "lens.open shows traces of models with one row of tokens; use trace.view(...)"
        )
    if len({(trace.model, trace.layers, trace.heads) for trace in traces}) > 1:
        raise LensError("lens.open shows traces of one model; open each model by itself")
    return traces, results


def _written(traces: list[AttentionTrace], results: list[Result], runs: Path) -> Run:
    """A run folder with these traces and a section for each result."""
    model = traces[0].model if traces else str(getattr(results[0], "model", "results"))
    attrs = traces[0].attrs if traces else {}
    layers, heads = _sizes(traces, results)
    meta = {
        "what": "profile",
        "title": f"{model}, opened from memory",
        "command": "lens.open(...)",
        "model": {"name": model, "layers": layers, "heads": heads, "dtype": attrs.get("dtype")},
        "versions": {"attention-lens": __version__},
        "prompts": {
            **dict.fromkeys(("total", "done"), len(traces)),
            "tokens": sum(trace.length for trace in traces),
        },
    }
    writer = RunWriter.start(runs, {"opened": [_stamp(one) for one in (*traces, *results)]}, meta)
    for number, trace in enumerate(traces):
        place = trace.save(writer.path / "trace" / f"p{number:03d}")
        writer.record(*(one.relative_to(writer.path).as_posix() for one in sorted(place.iterdir())))
    writer.table("prompts", _prompts(traces) if traces else empty_table(PROMPTS))
    tables = [
        prompt_table(trace, f"p{number:03d}", metrics=list(METRICS) if trace.labels else None)
        for number, trace in enumerate(traces)
    ]
    together = [pooled_table(tables, "text")] if tables else []
    every = [*together, *tables] or [empty_table(HEADS)]
    writer.table("heads", pd.concat(every, ignore_index=True))
    names, titles = numbered(map(_name, results), "{}_{}"), numbered(map(_title, results))
    for result, name, title in zip(results, names, titles, strict=True):
        writer.record(*_section(result, name, title).save(writer.path))
    return writer.finish()


def _sizes(traces: list[AttentionTrace], results: list[Result]) -> tuple[int, int]:
    """Layers and heads that a model must have for all that is shown."""
    layers = [max(trace.layers) for trace in traces]
    heads = [trace.heads - 1 for trace in traces]
    for result in results:
        table = result.table()
        if {"layer", "head"} <= set(table) and len(table):
            layers.append(int(table["layer"].max()))
            heads.append(int(pd.to_numeric(table["head"], errors="coerce").fillna(0).max()))
    return max(layers, default=0) + 1, max(heads, default=0) + 1


def empty_table(kinds: Mapping[str, Kind]) -> pd.DataFrame:
    """A table without rows, of the types that its columns have."""
    import pyarrow as pa

    types = {
        "text": pa.string(),
        "integer": pa.int64(),
        "number": pa.float64(),
        "integers": pa.list_(pa.int64()),
        "texts": pa.list_(pa.string()),
    }
    return pd.DataFrame(
        {name: pd.Series([], dtype=pd.ArrowDtype(types[kind])) for name, kind in kinds.items()}
    )


def _prompts(traces: list[AttentionTrace]) -> pd.DataFrame:
    rows = [
        {
            "prompt_id": f"p{number:03d}",
            "kind": "text",
            "title": f"trace {number}",
            "text": "".join(trace.tokens),
            "tokens": trace.length,
            "token_ids": trace.dataset["token_id"].values.tolist(),
            "token_strings": trace.tokens,
            "loss": float("nan"),
            "loss_repeat": float("nan"),
            "status": "done",
            "seconds": float("nan"),
        }
        for number, trace in enumerate(traces)
    ]
    return pd.DataFrame(rows)


def _section(result: Result, name: str, title: str) -> Section:
    """The sentences, table and figure of a result."""
    table = result.table().reset_index(drop=True)
    table.columns = [str(name) for name in table.columns]
    kind = type(result).__name__
    try:
        figures = {"figure": result.plot()}
    except LensError:
        figures = {}
    return Section(
        name=name,
        title=title,
        summary=result.findings() or tuple(repr(result).splitlines()),
        limits=("Opened from memory: how it was made is not kept here.",),
        columns=dict.fromkeys(table.columns, f"As in {kind}.table(), see help({kind})."),
        tables={"table": table},
        figures=figures,
    )


def _title(result: Result) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(result).__name__).capitalize()


def _name(result: Result) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(result).__name__).lower()


def _stamp(one: Any) -> str:
    """What tells two objects apart in one folder."""
    return f"{type(one).__name__} {id(one)}"
