"""Whether the sections of a run agree: what one took over from another, and what a circuit's file has too.

Each function gives one sentence a problem, which names the file and the column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.choices import is_whole
from lens.common.errors import LensError

if TYPE_CHECKING:
    from lens.runs.folders import Run
    from lens.runs.sections import Section

_JOINED = "heads"
"""The section whose table `heads` has a row per head, with columns of the sections before it under their own names."""
_OWN = "own numbers"  # of `lens.runs.add`, drawn by a seed of their own
_TOLERANCE = 1e-5


def section_agreement_problems(run: Run) -> Iterator[str]:
    """Of the sections together; one that cannot be read is told where it is read."""
    sections: dict[str, Section] = {}
    for name in run.sections:
        try:
            sections[name] = run.section(name)
        except LensError:
            continue
    yield from _seeds(run, sections)
    if _JOINED in sections:
        yield from _joined(sections)
    if "edges" in sections and len(run.circuits) == 1:
        yield from _edges(run, sections)


def _seeds(run: Run, sections: Mapping[str, Section]) -> Iterator[str]:
    """A section that was drawn by another seed is of another run."""
    seed = run.config.get("seed")
    for name, section in sections.items():
        found = section.configuration.get("seed")
        own = section.configuration.get("kind") == _OWN
        if is_whole(seed) and is_whole(found) and found != seed and not own:
            yield f"sections/{name}/section.json: configuration.seed is {found}, the run has the seed {seed}"


def _joined(sections: Mapping[str, Section]) -> Iterator[str]:
    """Columns that the table of all heads shares with the sections that it is joined of."""
    table = sections[_JOINED].tables.get("heads")
    if table is None or "name" not in table or not table["name"].is_unique:
        return
    names = sections[_JOINED].configuration.get("joined", ())
    beside = [
        one.set_index("name")
        for name in names
        if name in sections
        for one in sections[name].tables.values()
        if "name" in one and one["name"].is_unique
    ]
    own = table.set_index("name")
    for column in own.columns.difference(["layer", "head", "n"]):
        others = [one[column].reindex(own.index) for one in beside if column in one]
        if others and not any(_same(own[column], one) for one in others):
            yield (
                f"sections/{_JOINED}/heads.parquet: column {column} has other numbers than the section that it is taken "
                "from"
            )


def _edges(run: Run, sections: Mapping[str, Section]) -> Iterator[str]:
    """Scores of edges and faithfulness, which the file of the circuit that was found has too."""
    file = run.circuit(run.circuits[0])
    table = sections["edges"].tables.get("edges")
    if table is not None and {"edge", "value", "in_circuit"} <= set(table):
        name = "sections/edges/edges.parquet"
        listed = set(table["edge"][table["in_circuit"].astype(bool)])
        if listed != set(file.edges) & set(table["edge"]):
            yield f"{name}: column in_circuit has other edges than circuits/{run.circuits[0]}.json"
        known = dict(zip(file.edges, file.scores or (), strict=False))
        both = table[table["edge"].isin(known)]
        if not _same(both["value"], both["edge"].map(known)):
            yield f"{name}: column value has other scores than circuits/{run.circuits[0]}.json"
    curve = sections["circuit"].tables.get("faithfulness") if "circuit" in sections else None
    if curve is not None and file.faithfulness and {"ranking", *file.faithfulness} <= set(curve):
        expected = pd.DataFrame(file.faithfulness)
        curves = [rows for _, rows in curve.groupby("ranking") if len(rows) == len(expected)]
        if not any(all(_same(rows[one], expected[one]) for one in expected) for rows in curves):
            yield (
                f"sections/circuit/faithfulness.parquet: no ranking has the curve of circuits/{run.circuits[0]}.json"
            )


def _same(one: pd.Series, other: pd.Series) -> bool:
    """Whether two columns, in one order, have the same numbers or words."""
    if all(map(pd.api.types.is_numeric_dtype, (one, other))):
        pair = one.to_numpy(float), other.to_numpy(float)
        return len(one) == len(other) and np.allclose(
            *pair, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True
        )
    return list(map(str, one)) == list(map(str, other))
