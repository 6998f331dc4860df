"""The tabs of a run: its pages, and which of them it has nothing for."""

from typing import Any

from dash import dcc, html

from lens.runs import Run
from lens_dashboards.selection import Selection

_TABS = {
    "overview": "Overview",
    "heads": "Heads",
    "maps": "Side by side",
    "atlas": "Atlas",
    "sinks": "Sinks",
    "redistribution": "Redistribution",
    "policies": "Policies",
    "mixers": "Mixers",
    "patching": "Patching",
    "circuits": "Circuits",
    "reading": "Reading",
    "vision": "Vision",
    "provenance": "Provenance",
}
NEEDS = {
    "sinks": {"detection"},
    "redistribution": {"dose", "search", "redistribution"},
    "policies": {"policies"},
    "mixers": {"mixers"},
    "patching": {"patching"},
    "circuits": {"edges"},
    "reading": {
        "explain",
        "groups",
        "removal",
        "subspace",
        "retrieval_kinds",
        "faithfulness",
        "mixing",
        "adversary",
        "perturbation",
    },
    "vision": {"overlays"},
}
"""Page -> sections of which it needs one."""


def holds(run: Run, page: str) -> bool:
    """Whether a run has what a page shows."""
    needed = NEEDS.get(page)
    return needed is None or not needed.isdisjoint(run.sections)


def _attends_everywhere(run: Run) -> bool:
    """Whether every layer of its model has softmax attention, so that it hardly has mixers."""
    attending = run.meta["model"].get("attending")
    return attending is None or len(attending) == run.meta["model"]["layers"]


def tabs(run: Run, view: Selection) -> html.Nav:
    """Links to the pages of a run; those that it has nothing for are told by it."""
    links: list[Any] = []
    for page, words in _TABS.items():
        if page == "mixers" and not holds(run, page) and _attends_everywhere(run):
            continue
        if page == view.page:
            links.append(html.Span(words, className="current", **{"aria-current": "page"}))  # pyright: ignore[reportArgumentType]
        elif holds(run, page):
            links.append(dcc.Link(words, href=view.to(page).url()))
        else:
            title = "This run has nothing for this page; it says which command makes it."
            link = view.to(page).url()
            links.append(dcc.Link(f"{words} (empty)", href=link, className="vacant", title=title))
    return html.Nav(links, className="tabs pages", **{"aria-label": "Pages of this run"})  # pyright: ignore[reportArgumentType]
