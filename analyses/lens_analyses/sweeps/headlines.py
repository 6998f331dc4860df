"""The few numbers of a run that a table of runs shows, and its first sentences."""

from typing import Any

from lens.runs import Run
from lens.runs.own import attending
from lens.traces.findings import findings

_LOSSES = {"loss": "text", "loss_repeat": "copied"}
LABELS = {
    "induction": "Induction heads",
    "sink": "Sink heads",
    "previous_token": "Previous-token heads",
    "duplicate_token": "Duplicate-token heads",
    "loss": "Loss on text, nats a token",
    "loss_repeat": "Loss on the second copy, nats a token",
}
"""Column of the table -> what it says; heads are those above the threshold of `lens.findings`."""


def headline(run: Run) -> dict[str, Any]:
    """Heads of each kind beside all heads, and mean losses; None where a run has none."""
    found = {one.kind: len(one.heads) if one.found else 0 for one in findings(run.heads)}
    losses = {
        name: run.prompts.loc[run.prompts["kind"] == kind, name].mean()
        for name, kind in _LOSSES.items()
    }
    return {
        "heads": len(attending(run)) * run.meta["model"]["heads"],
        "prompts": len(run.prompts),
        "tokens": int(run.prompts["tokens"].sum()),
        **{name: found.get(name) for name in LABELS if name not in losses},
        **{name: float(value) if value == value else None for name, value in losses.items()},
    }


def summary(run: Run) -> list[str]:
    """The first sentence of each analysis of the run."""
    return [f"{one.title}: {one.summary[0]}" for one in run.readable()[0].values() if one.summary]
