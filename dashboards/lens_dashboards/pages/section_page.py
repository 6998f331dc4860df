"""The frame that pages of an analysis share: where they stand, what was found, and what it does not show."""

from collections.abc import Callable, Iterable
from typing import Any

from dash import dcc, html

from lens.runs import Run
from lens.runs.sections import Section
from lens_dashboards.library import Library, sections
from lens_dashboards.pages.next_steps import missing
from lens_dashboards.pages.parts import card, crumbs, findings, limits, note_banner, run_banner
from lens_dashboards.pages.tabs import NEEDS
from lens_dashboards.selection import Selection

Cards = Callable[[Run, Selection, dict[str, Section], list[str]], list[Any]]
"""(run, view, its sections by name, notes to add to) -> what a page shows between findings and tables."""


def section_page(
    library: Library,
    view: Selection,
    cards: Cards,
    *,
    title: str,
    names: Iterable[str],
    missed: tuple[str, str],
) -> list[Any]:
    """A page of one analysis, or the command that makes it.

    Args:
        library: of the run.
        view: the page and its run.
        cards: makes what is the page's own.
        title: its heading.
        names: sections whose findings, tables and limits it shows, as far as the run has them.
        missed: what is missing without them, in words, and the analysis that makes it, such as "sinks".
    """
    run = library.run(view.run)
    top = [crumbs(run, view), html.H1(title), *run_banner(run)]
    known = sections(run)
    if NEEDS[view.page].isdisjoint(known):
        return [*top, missing(library, run, *missed)]
    notes: list[str] = []
    own = cards(run, view, known, notes)
    held = [known[name] for name in names if name in known]
    banners = map(note_banner, notes)
    return [*top, *banners, findings(held), *own, tables(view, held), limits(held)]


def tables(view: Selection, sections: Iterable[Section]) -> html.Section:
    """Links to the whole of each analysis, with what its tables hold."""
    items = []
    for section in sections:
        held = ", ".join(
            f"{words.replace('_', ' ')} ({len(table):,} rows)"
            for words, table in section.tables.items()
        )
        link = dcc.Link(section.title, href=view.to("analysis", section.name).url())
        items.append(html.Li([link, f": {held}"]))
    return card(html.Ul(items), "Tables, and more figures")
