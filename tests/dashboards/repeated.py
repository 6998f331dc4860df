"""Runs as large as wanted: the heads of a small one over and over."""

from pathlib import Path
from typing import Any

import pandas as pd

from lens.runs import Run
from lens.runs.writer import RunWriter
from lens.traces.trace import AttentionTrace


def repeat_heads(trace: AttentionTrace, layers: int, heads: int) -> AttentionTrace:
    """The trace of a model of this size: layer i has the numbers of layer i modulo the real ones."""
    sizes = trace.dataset.sizes
    picked = [layer % sizes["layer"] for layer in range(layers)]
    data = trace.dataset.isel(layer=picked)
    for dim in {"head", "kv_head"} & set(data.dims):
        data = data.isel({dim: [head % data.sizes[dim] for head in range(heads)]})
        data = data.assign_coords({dim: range(heads)})
    by_layer = {name: [trace.attrs[name][at] for at in picked] for name in ("windows", "scale")}
    return AttentionTrace(data.assign_coords(layer=range(layers)).assign_attrs(by_layer))


def repeat_run(
    folder: Path, run: Run, layers: int, heads: int, trace: AttentionTrace | None = None
) -> Run:
    """A run of `layers` × `heads` heads in `folder`, with the trace of one prompt: p000's, or `trace`."""
    kept = ("command", "prompts", "versions", "block_size", "bos", "device", "backend", "seed")
    meta: dict[str, Any] = {name: run.meta[name] for name in kept} | {
        "title": f"{layers * heads:,} heads",
        "what": "profile",
        "model": {**run.meta["model"], "name": "repeated", "layers": layers, "heads": heads},
    }
    writer = RunWriter.start(folder, {"layers": layers, "heads": heads}, meta)
    shown = run.trace("p000") if trace is None else trace
    writer.table("prompts", _with_tokens(run.prompts, shown))
    of_layers, of_heads = run.meta["model"]["layers"], run.meta["model"]["heads"]
    real = dict(list(run.heads.groupby(["layer", "head"])))
    parts = [
        real[layer % of_layers, head % of_heads].assign(layer=layer, head=head)
        for layer in range(layers)
        for head in range(heads)
    ]
    writer.table("heads", pd.concat(parts, ignore_index=True))
    repeat_heads(shown, layers, heads).save(writer.path / "trace" / "p000")
    return writer.finish()


def _with_tokens(prompts: pd.DataFrame, trace: AttentionTrace) -> pd.DataFrame:
    """The prompts, p000 with the tokens of a trace: a reader holds the two together."""
    is_shown = (prompts["prompt_id"] == "p000").tolist()
    pairs = list(zip(is_shown, prompts["token_strings"], strict=True))
    tokens = [trace.tokens if shown else list(given) for shown, given in pairs]
    return prompts.assign(
        token_strings=pd.Series(tokens, prompts.index), tokens=[len(one) for one in tokens]
    )
