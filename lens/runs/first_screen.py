"""What the first screen of a run shows: its most surprising findings, each with a small picture.

Report, overview and console take it from here, so that none of them can say something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lens.figures.heads import head_grid
from lens.figures.small import small
from lens.runs.headlines import Headline, higher_chance
from lens.runs.sections import Section
from lens.traces.findings import Finding, findings

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MOST, OF_ONE = 5, 2
"""Headlines of a first screen, and of one section among them."""
PROFILE = "profile"
"""Name of what a run has without any section: the scores of its heads."""


@dataclass(frozen=True, eq=False)
class Shown:
    """One finding of a first screen.

    Attributes:
        headline: what was found.
        section: name of the section that found it, or `PROFILE`.
        title: of that section.
        picture: its figure, small; None where it names none.
    """

    headline: Headline
    section: str
    title: str
    picture: go.Figure | None


def first_screen(heads: pd.DataFrame, sections: Mapping[str, Section]) -> list[Shown]:
    """At most five findings of a run, the most surprising first (docs/headlines.md).

    Args:
        heads: the run's table of scores.
        sections: that it has; one from an older version has no headlines and shows none.

    Example:
        >>> shown = lens.runs.first_screen.first_screen(run.heads, run.readable()[0])
    """
    found = first(sections.values())
    if "roles" not in sections:  # which says the same of more scores
        found += first([_of_profile(heads)], MOST - len(found), MOST)
    return [
        Shown(
            one,
            section.name,
            section.title,
            small(section.figures[one.figure]) if one.figure else None,
        )
        for section, one in found
    ]


def first(
    sections: Iterable[Section], most: int = MOST, of_one: int = OF_ONE
) -> list[tuple[Section, Headline]]:
    """The most surprising headlines of a run, with their sections.

    Args:
        sections: of one run.
        most: how many at most.
        of_one: how many of one section at most.

    Returns:
        The most surprising first; those without an interval last.
    """

    def order(pair: tuple[Section, Headline]) -> tuple[bool, float]:
        return not pair[1].is_sure, -pair[1].surprise

    chosen: list[tuple[Section, Headline]] = []
    for section in sections:
        chosen += sorted(((section, one) for one in section.headlines), key=order)[:of_one]
    return sorted(chosen, key=order)[: max(0, most)]


def _of_profile(heads: pd.DataFrame) -> Section:
    """The scores of heads as a section of a run."""
    found = [one for one in findings(heads) if one.found]
    many = max(1, len(heads[["layer", "head"]].drop_duplicates()))
    return Section(
        name=PROFILE,
        title="Profile of the heads",
        figures={
            one.kind: head_grid(
                heads[(heads["prompt_id"] == one.prompt_id).to_numpy()], one.metric, "raw"
            )
            for one in found
        },
        headlines=tuple(headline for one in found for headline in _of_finding(one, many)),
    )


def _of_finding(finding: Finding, many: int) -> Iterator[Headline]:
    top = finding.heads[0]
    if chance := higher_chance(finding.uniform, finding.random_weights):
        against, baseline, both = chance
        text = f"{finding.count}, most {top}, against {both}."
        yield Headline(
            text, top.value, top.low, top.high, baseline, against, figure=finding.kind, many=many
        )
