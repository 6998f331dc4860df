"""What two runs were asked and by what they were computed, where that differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from lens.runs.folders import Run

_FACTS = ("device", "backend", "bos")


def differing_settings(a: Run, b: Run) -> pd.DataFrame:
    """Rows `setting`, `a`, `b` (strings; "" where one has none), in the order of A's config.toml."""
    sides = [_flat(_facts(run)) for run in (a, b)]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    if a.meta["what"] != b.meta["what"]:  # each analysis has settings of its own
        names = [name for name in names if not name.startswith("analysis.")]
    rows = [
        (name, *(str(side.get(name, "")) for side in sides))
        for name in names
        if sides[0].get(name) != sides[1].get(name)
    ]
    return pd.DataFrame(rows, columns=["setting", "a", "b"])


def _facts(run: Run) -> dict[str, Any]:
    named = {name: value for name, value in run.meta["model"].items() if name != "name"}
    config = run.config
    config["model"] = {**config.get("model", {}), **named}
    return {
        **config,
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
