"""One table per head: role, pattern, causal effect, gradient, redundancy, side by side."""

import pandas as pd

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.results import with_ends
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
_SECTIONS = ("importance", "roles", "patterns", "retrieval", "similarity")
_JOINED = (
    (
        "patterns",
        "heads",
        "pattern",
        "pattern",
        "Simplest class of sparse pattern that keeps most of its mass.",
    ),
    (
        "patterns",
        "heads",
        "margin",
        "pattern_margin",
        "By how much it keeps more than the best other class.",
    ),
    (
        "similarity",
        "cka_redundancy",
        "value",
        "redundancy",
        "CKA of its output with the head most like it, 1 = the same up to a rotation.",
    ),
    ("similarity", "cka_redundancy", "low", "redundancy_low", "Low end of its 95 % interval."),
    ("similarity", "cka_redundancy", "high", "redundancy_high", "High end of it."),
    ("similarity", "cka_redundancy", "nearest", "nearest", "That head."),
    (
        "similarity",
        "cka_redundancy",
        "floor",
        "redundancy_floor",
        "CKA of the two across different prompts: what position and mask alone make alike.",
    ),
    ("retrieval", "retrieval", "retrieval", "retrieval", ""),
    ("retrieval", "streaming", "row_error", "streaming_error", ""),
    ("retrieval", "gate", "alpha", "full_attention_gate", ""),
)
"""Section, its table and column -> the column here and its definition; "" is that of the section."""
_ON_COPIED = ("previous_token", "duplicate_token", "induction")


def heads(subject: Subject) -> Section:
    """The sections before this one, joined by layer and head."""
    run = subject.run
    columns = {
        "name": "The head.",
        "layer": "Layer, from 0.",
        "head": "Head in the layer, from 0.",
    }
    joined = pd.DataFrame(subject.run.heads[["layer", "head"]].drop_duplicates())
    joined.index = pd.Index(
        [str(HeadId(*pair)) for pair in joined.to_numpy().tolist()], name="name"
    )
    measures: list[dict] = []
    sections = {name: run.section(name) for name in _SECTIONS if name in run.sections}
    if importance := sections.get("importance"):
        scores = importance.tables["scores"].set_index("name").drop(columns=["layer", "head"])
        joined = joined.join(scores)
        columns |= {str(name): importance.columns[str(name)] for name in scores.columns}
        measures = importance.configuration["measures"]
    if roles := sections.get("roles"):
        for role in _ROLES:
            kind = "copied" if role in _ON_COPIED else "text"
            table = roles.tables.get(kind, next(iter(roles.tables.values()))).set_index("name")
            if role not in table or table[role].isna().all():
                continue
            for name in (role, f"{role}_low", f"{role}_high", f"{role}_baseline"):
                if name in table:
                    joined[name] = table[name]
                    columns[name] = roles.columns[name]
    for section, table, column, name, definition in _JOINED:
        found = sections.get(section)
        if found and table in found.tables:
            joined[name] = found.tables[table].set_index("name")[column]
            columns[name] = definition or found.columns[column]
    missing = [name for name in _SECTIONS if name not in sections]
    limits = [f"Without {', '.join(missing)}, which could not be had."] if missing else []
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
        summary=tuple(_sentences(table, measures)),
        limits=(*limits, "NaN means not scored; the section of the score says why."),
        columns=columns,
        configuration={"joined": [*sections, "copying"]},
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
    if "induction" in table and table["induction"].notna().any():
        known = table.sort_values("induction", ascending=False, kind="stable").iloc[0]
        said.append(
            f"{known['name']} has the highest induction score, {with_ends(known, 'induction', '.2f')}; by {name} it is "
            f"number {int((table[name] > known[name]).sum()) + 1} of {len(table)} heads."
        )
    if "nearest" not in table:
        return said
    floor = best["redundancy_floor"]
    across = "" if pd.isna(floor) else f", across different prompts {floor:.2f}"
    said.append(
        f"{best['name']} matters most by {name}; the head that writes most like it is {best['nearest']} "
        f"(CKA {with_ends(best, 'redundancy', '.2f')}{across})."
    )
    return said
