"""Sections of a run: what one analysis found, as sentences, tables and figures, in the run folder.

An analysis writes `sections/<name>/`; report, dashboard and notebook read it from there, so that none
of them can say something else. Nothing here needs torch; nothing is loaded from a pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens.common.errors import LensError
from lens.common.files import write_atomically, write_json, write_text
from lens.common.schema import validated
from lens.runs.door import Door, shape_of
from lens.runs.headlines import Headline, those_that_stand
from lens.runs.schema import SECTIONS, DetectionEntries, SectionFile

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FOLDER = "sections"
INDEX = "section.json"
_TEMPLATE = "plotly"  # what plotly gives a figure that says nothing else
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, eq=False)
class Section:
    """What one analysis found.

    Attributes:
        name: of its folder: small letters, digits and underscores.
        title: heading for people.
        summary: findings in plain words, with numbers and intervals, most important first.
        limits: what they do not show.
        columns: column of a table -> its definition with unit; every column has one.
        configuration: plain values: what was done, so that it can be done again.
        tables: name -> table, in the order to be shown.
        figures: name -> plotly figure, in the order to be shown.
        headlines: what of it a first screen shows; those that their baseline explains are left out.
    """

    name: str
    title: str
    summary: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, go.Figure] = field(default_factory=dict)
    headlines: tuple[Headline, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "headlines", those_that_stand(self.headlines))
        shown = {one.figure for one in self.headlines} - {""}
        if lacking := sorted(shown - set(self.figures)):
            raise LensError(
                f"section {self.name!r}: a headline shows the figure {lacking[0]!r}, which it lacks; "
                f"it has: {', '.join(self.figures) or 'none'}"
            )
        for name in (self.name, *self.tables, *self.figures):
            if not _NAME.fullmatch(name):
                raise LensError(
                    f"names of sections, tables and figures are small letters, digits and "
                    f"underscores, got {name!r}"
                )
        used = [str(column) for table in self.tables.values() for column in table.columns]
        if missing := sorted(set(used) - set(self.columns)):
            raise LensError(
                f"section {self.name!r}: the columns {', '.join(missing)} have no definition; "
                "add them to columns"
            )

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} of {len(table):,} rows" for name, table in self.tables.items())
        held = (
            f"{len(self.summary)} sentences, {len(self.figures)} figures, tables: {rows or 'none'}"
        )
        return f"<Section {self.name}: {self.title}; {held}>"

    def save(self, run: Path) -> list[str]:
        """Write the section into a run folder; the index last, so that a half one is not there.

        Returns:
            The files, relative to the run folder.
        """
        folder = run / FOLDER / self.name
        for name, table in self.tables.items():
            write_atomically(
                folder / f"{name}.parquet",
                lambda path, table=table: table.to_parquet(path, index=False),
            )
        for name, figure in self.figures.items():
            write_text(folder / f"{name}.json", _without_template(figure))
        index = {
            "name": self.name,
            "title": self.title,
            "summary": list(self.summary),
            "limits": list(self.limits),
            "columns": dict(self.columns),
            "configuration": dict(self.configuration),
            "tables": list(self.tables),
            "figures": list(self.figures),
            "headlines": [one.as_json() for one in self.headlines],
            "shapes": {name: shape_of(folder / f"{name}.parquet") for name in self.tables},
        }
        write_json(folder / INDEX, index)
        parts = (INDEX, *(f"{name}.parquet" for name in self.tables))
        parts += tuple(f"{name}.json" for name in self.figures)
        return [f"{FOLDER}/{self.name}/{part}" for part in parts]


def load_section(door: Door, name: str) -> Section:
    """Read a section of a run folder.

    Raises:
        LensError: there is none of this name, or it is damaged.
    """
    run = door.folder
    have = section_names(run)
    if name not in have:
        raise LensError(
            f"{run} has no section {name!r}; it has: {', '.join(have) or 'none'}; "
            "`lens heads`, `lens sinks`, `lens redistribute`, `lens policies`, `lens mixers`, `lens explain`, `lens vision`, `lens examples`, `lens generate`, `lens patch` and `lens circuit` write sections"
        )
    place = f"{FOLDER}/{name}"
    index = door.entries(SectionFile, f"{place}/{INDEX}")
    if index.name != name:
        raise LensError(f"{run / place / INDEX} is of the section {index.name!r}; run again")
    needed = SECTIONS.get(name, {})
    if lacking := ", ".join(part for part in needed if part not in index.tables):
        raise LensError(f"{run / place / INDEX} lacks the tables {lacking}; run again")
    if name == "detection":
        validated(DetectionEntries, index.configuration, run / place / INDEX)
    shown = {str(dict(one).get("figure", "")) for one in index.headlines} - {""}
    if lacking := ", ".join(sorted(shown - set(index.figures))):
        raise LensError(
            f"{run / place / INDEX} lacks the figures {lacking} of its headlines; run again"
        )
    return Section(
        name=name,
        title=index.title,
        summary=tuple(index.summary),
        limits=tuple(index.limits),
        columns=index.columns,
        configuration=index.configuration,
        tables={
            part: door.table(
                f"{place}/{part}.parquet", needed.get(part), shape=index.shapes.get(part)
            )
            for part in index.tables
        },
        figures={part: _figure(door, f"{place}/{part}.json") for part in index.figures},
        headlines=tuple(Headline.from_json(dict(one)) for one in index.headlines),
    )


def _without_template(figure: go.Figure) -> str:
    """Its JSON without plotly's usual template, which is larger than most figures and slow to check."""
    import plotly.io as pio

    from lens.figures.style import BARE

    text = figure.to_json()
    assert text is not None
    content = json.loads(text)
    template = content["layout"].get("template")
    if all(template != pio.templates[name].to_plotly_json() for name in (BARE, _TEMPLATE)):
        return text
    del content["layout"]["template"]
    return json.dumps(content)


def _figure(door: Door, name: str) -> go.Figure:
    import plotly.graph_objects as go
    import plotly.io as pio

    from lens.figures.style import BARE

    content = door.json(name)
    try:
        figure = go.Figure(content)
        other = pio.templates.default not in (_TEMPLATE, BARE)
        if other and "template" not in content.get("layout", {}):
            figure.update_layout(template=_TEMPLATE)
        return figure
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LensError(f"{door.folder / name} is no figure ({reason}); run again") from error


def section_names(run: Path) -> list[str]:
    """Names of the finished sections of a run folder, oldest first."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if (entry / INDEX).is_file()]
    found.sort(key=lambda entry: ((entry / INDEX).stat().st_mtime_ns, entry.name))
    return [entry.name for entry in found if _NAME.fullmatch(entry.name)]
