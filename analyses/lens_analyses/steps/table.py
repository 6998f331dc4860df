"""One table per head: role, pattern, causal effect, gradient, redundancy, side by side."""

import pandas as pd

from lens.common.errors import LensError
from lens.heads.weights import copying
from lens.runs.sections import Section
from lens_analyses.steps.subject import Subject

_ROLES = (
    "previous_token",
    "current_token",
    "duplicate_token",
    "induction",
    "first_token",
    "delimiter",
    "local",
    "entropy",
    "entropy_sink_excluded",
    "noop",
    "value_drain",
    "activity",
)
_ON_COPIED = ("previous_token", "duplicate_token", "induction")


def heads(subject: Subject) -> Section:
    """The sections before this one, joined by layer and head."""
    run = subject.run
    columns = {
        "name": "The head.",
        "layer": "Layer, from 0.",
        "head": "Head in the layer, from 0.",
    }
    importance = run.section("importance")
    joined = importance.tables["scores"].set_index("name")
    columns |= {str(name): importance.columns[str(name)] for name in joined.columns}
    roles = run.section("roles")
    for role in _ROLES:
        kind = "copied" if role in _ON_COPIED else "text"
        table = roles.tables.get(kind, next(iter(roles.tables.values()))).set_index("name")
        for name in (role, f"{role}_low", f"{role}_high", f"{role}_baseline"):
            if name in table and table[name].notna().any():
                joined[name] = table[name]
                columns[name] = roles.columns[name]
    patterns = run.section("patterns").tables["heads"].set_index("name")
    joined["pattern"], joined["pattern_margin"] = patterns["pattern"], patterns["margin"]
    alike = run.section("similarity").tables["cka_redundancy"].set_index("name")
    joined["redundancy"], joined["nearest"] = alike["value"], alike["nearest"]
    columns |= {
        "pattern": "Simplest class of sparse pattern that keeps most of its mass.",
        "pattern_margin": "By how much it keeps more than the best other class.",
        "redundancy": "CKA of its output with the head most like it, 1 = the same up to a rotation.",
        "nearest": "That head.",
    }
    fetching = run.section("retrieval")
    for table, column in (
        ("retrieval", "retrieval"),
        ("streaming", "row_error"),
        ("gate", "alpha"),
    ):
        if table in fetching.tables:
            name = {"row_error": "streaming_error", "alpha": "full_attention_gate"}.get(
                column, column
            )
            joined[name] = fetching.tables[table].set_index("name")[column]
            columns[name] = fetching.columns[column]
    limits = []
    try:
        weights = copying(subject.model).set_index("name")
        joined["copying_eigenvalue"], joined["copying_top5"] = (
            weights["eigenvalue"],
            weights["top_share"],
        )
        columns |= {
            "copying_eigenvalue": "Sum of eigenvalues over sum of their sizes of W_E W_V W_O W_U, in [-1, 1].",
            "copying_top5": "Share of tokens that the head writes among its 5 strongest when it reads them, of "
            "at most 1,024 tokens.",
        }
    except LensError as problem:
        limits.append(f"No copying scores: {problem}.")
    table = joined.reset_index().sort_values(["layer", "head"], ignore_index=True)
    return Section(
        name="heads",
        title="Every head, all measures",
        summary=tuple(_sentences(table, importance.configuration["measures"])),
        limits=(*limits, "NaN means not scored; the section of the score says why."),
        columns=columns,
        configuration={
            "joined": ["importance", "roles", "patterns", "retrieval", "similarity", "copying"]
        },
        tables={"heads": table},
    )


def _sentences(table: pd.DataFrame, measures: list[dict]) -> list[str]:
    """Where what a head does and what it is worth do not go together."""
    several = len({one["task"] for one in measures}) > 1
    measured = [one for one in measures if one["method"] == "ablation"]
    if not measured:
        return []
    first = measured[0]
    name = f"{first['label']} on {first['task']}" if several else first["label"]
    order = table.sort_values(name, ascending=False, kind="stable")
    best = order.iloc[0]
    said = []
    if "induction" in table:
        known = table.sort_values("induction", ascending=False, kind="stable").iloc[0]
        said.append(
            f"{known['name']} has the highest induction score, {known['induction']:.2f}; by {name} it is "
            f"number {int((table[name] > known[name]).sum()) + 1} of {len(table)} heads."
        )
    said.append(
        f"{best['name']} matters most by {name}; the head that writes most like it is {best['nearest']} "
        f"(CKA {best['redundancy']:.2f})."
    )
    return said
