"""The numbers of a report: `report.json`, from a run folder (docs/schema/report.md).

The page is made from these and nothing else, so that what is read and what is stored cannot differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

import lens
from lens.common.errors import LensError
from lens.runs import Run
from lens.runs.first_screen import Shown
from lens.runs.schema import PROMPT_KINDS
from lens.runs.sections import Section
from lens.stats.intervals import columns
from lens.traces.findings import Finding, findings
from lens.traces.metrics import METRICS
from lens.traces.profiles import SINK_EPSILON
from lens_analyses.console import finite
from lens_analyses.report.limits import limits

SCHEMA, SCHEMA_VERSION = "attention-lens/report", 1
EPSILONS = tuple(round(0.05 * step, 2) for step in range(1, 20))
CITATION = (
    "@software{attention_lens,\n"
    "  title   = {attention-lens: what every attention head of a model does},\n"
    f"  version = {{{lens.__version__}}},\n"
    "  license = {Apache-2.0}\n"
    "}"
)


def numbers(
    run: Run,
    sections: Mapping[str, Section],
    shown: Sequence[Shown],
    damaged: Mapping[str, str],
    warnings: Sequence[str] = (),
    status: str | None = None,
) -> dict[str, Any]:
    """Everything that a report says, as plain values without NaN.

    Args:
        run: a run with its tables, without rows where they are damaged.
        sections: that it has.
        shown: on its first screen.
        damaged: table -> why it cannot be read.
        warnings: beside those of the run.
        status: of the run, if it is about to change.
    """
    meta, heads = run.meta, run.heads
    try:
        config = run.config
    except LensError as error:
        config, warnings = {}, [*warnings, str(error)]
    pooled = pd.DataFrame(heads[heads["prompt_id"].isin(PROMPT_KINDS)])
    found = findings(heads)
    prompts = run.prompts.drop(columns=["text", "token_ids", "token_strings"])
    data = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "run": run.id,
        "title": run.title,
        "what": meta["what"],
        "status": status or run.status,
        "created": meta["created"],
        "seconds": meta["seconds"],
        "headlines": [headline(one) for one in shown],
        "summary": [_finding(one) for one in found],
        "setup": {
            **{key: meta[key] for key in ("model", "device", "backend", "block_size", "seed")},
            "bos": run.bos,
            "prompts": prompts.to_dict("records"),
            "losses": _losses(run),
        },
        "metrics": {name: _metric(name) for name in dict.fromkeys(pooled["metric"])},
        "heads": pooled.set_axis(["prompts", *pooled.columns[1:]], axis="columns").to_dict(
            "records"
        ),
        "sinks": _sinks(run),
        "sections": [_section(section) for section in sections.values()],
        "unsupported": run.unsupported,
        "damaged": dict(damaged),
        "limits": limits(run, config, sections),
        "warnings": [*meta["warnings"], *warnings],
        "provenance": {
            "command": meta.get("command"),
            "config": config,
            "config_hash": run.id.rpartition("-")[2],
            "versions": meta["versions"],
            "report_version": lens.__version__,
            "citation": CITATION,
        },
    }
    return finite(plain(data))


def headline(shown: Shown) -> dict[str, Any]:
    """One finding of a first screen, for a template."""
    one = shown.headline
    return {
        **one.as_json(),
        "surprise": one.surprise,
        "section": shown.section,
        "title": shown.title,
    }


def _section(section: Section) -> dict[str, Any]:
    return {
        "name": section.name,
        "title": section.title,
        "summary": list(section.summary),
        "limits": list(section.limits),
        "columns": dict(section.columns),
        "configuration": dict(section.configuration),
        "tables": {name: table.to_dict("records") for name, table in section.tables.items()},
        "figures": list(section.figures),
    }


def _finding(one: Finding) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "found": one.found,
        "text": one.text,
        "metric": one.metric,
        "prompts": one.prompt_id,
        "threshold": one.threshold,
        "uniform": one.uniform,
        "random_weights": one.random_weights,
        "heads": [
            {
                "layer": head.layer,
                "head": head.head,
                "value": head.value,
                "low": head.low,
                "high": head.high,
            }
            for head in one.heads
        ],
    }


def _metric(name: str) -> dict[str, Any]:
    known = METRICS[name]
    return {
        "label": known.label,
        "definition": known.definition,
        "unit": known.unit,
        "source": known.source,
    }


def _losses(run: Run) -> list[dict[str, Any]]:
    """Mean loss in nats a token by kind of prompt, with the loss that guessing would have."""
    vocab = run.meta["model"].get("vocab")
    chance = float(np.log(vocab)) if vocab else float("nan")
    rows = []
    for kind, column in (("text", "loss"), ("copied", "loss"), ("copied", "loss_repeat")):
        values = run.prompts.loc[run.prompts["kind"] == kind, column].dropna().to_numpy()
        if len(values):
            row = {"prompts": kind, "what": column, **_mean(values), "n": len(values)}
            rows.append(row | {"chance": chance})
    return rows


def _sinks(run: Run) -> dict[str, Any]:
    """Sink rate of the model (Gu et al., arXiv 2410.10781) and how it depends on epsilon.

    `rate(eps)`: share of (prompt, layer, head) with alpha_0 > eps, the threshold taken per prompt.
    """
    rates, curve = [], []
    for kind in PROMPT_KINDS:
        members = run.prompts.loc[run.prompts["kind"] == kind, "prompt_id"]
        rows = run.heads[
            (run.heads["metric"] == "sink_mass") & run.heads["prompt_id"].isin(members)
        ]
        alpha = rows.pivot(index="prompt_id", columns=["layer", "head"], values="value").to_numpy()
        if not alpha.size:
            continue
        for epsilon in EPSILONS:
            share = (alpha > epsilon).mean(axis=1)
            row = {"prompts": kind, "epsilon": epsilon, **_mean(share), "n": len(share)}
            curve.append(row)
            if epsilon == SINK_EPSILON:
                rates.append(row)
    return {"epsilon": SINK_EPSILON, "rate": rates, "sensitivity": curve}


def _mean(values: np.ndarray) -> dict[str, float]:
    """`value`, the mean over prompts, with `low` and `high`; NaN for fewer than two."""
    found = columns("value", values[None], 0, plain=True)
    return {name: float(column[0]) for name, column in found.items()}


def plain(data: Any) -> Any:
    """numpy's and pandas' numbers as Python's."""
    if isinstance(data, dict):
        return {name: plain(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if isinstance(data, (np.generic,)):
        return data.item()
    return None if data is pd.NA else data
