"""What two runs were asked and by what they were computed, where that differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from lens.common.errors import LensError
from lens.runs.folders import Run

_FACTS = ("device", "backend", "bos")


def differing_settings(a: Run, b: Run) -> tuple[pd.DataFrame, list[str]]:
    """Rows `setting`, `a`, `b` (strings; "" where one has none), in the order of A's config.toml.

    Also a sentence for each configuration that cannot be read; then none are compared.
    """
    configs, problems = [], []
    for run in (a, b):
        try:
            configs.append(run.config)
        except LensError as error:
            problems.append(f"the settings are not compared: {error}")
    sides = [
        _flat(_facts(run, config))
        for run, config in zip((a, b), [{}, {}] if problems else configs, strict=True)
    ]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    if a.meta["what"] != b.meta["what"]:  # each analysis has settings of its own
        names = [name for name in names if not name.startswith("analysis.")]
    rows = [
        (name, *(str(side.get(name, "")) for side in sides))
        for name in names
        if sides[0].get(name) != sides[1].get(name)
    ]
    return pd.DataFrame(rows, columns=["setting", "a", "b"]), problems


def _facts(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: value for name, value in run.meta["model"].items() if name != "name"}
    model = config.get("model")
    return {
        **config,
        "model": {**(model if isinstance(model, Mapping) else {}), **named},
        "computed": {name: run.meta.get(name) for name in _FACTS},
        "versions": run.meta["versions"],
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found
