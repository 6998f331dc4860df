"""Page `/`: what was computed, and can it be trusted?"""

from collections.abc import Callable
from typing import Any

from dash import dcc, html

from lens.common.errors import LensError
from lens.runs import BrokenRun, Run
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import card, chip, named, number, remember, select
from lens_dashboards.pages.words import coded
from lens_dashboards.selection import Selection

_SORTED: dict[str, Callable[[Run], Any]] = {
    "run": lambda run: run.title.casefold(),
    "status": lambda run: run.status,
    "analysis": lambda run: run.meta["what"],
    "task": lambda run: run.meta.get("task") or "",
    "model": lambda run: run.meta["model"]["name"].casefold(),
    "tokens": lambda run: run.meta["prompts"].get("tokens") or 0,
    "created": lambda run: run.meta["created"],
    "seconds": lambda run: run.meta.get("seconds") or 0.0,
}
"""Column by which the table is put in order -> what of a run; with a minus in front the other way round."""
_COLUMNS = (
    *("Run", "Status", "Analysis", "Task", "Model", "Heads", "Prompts"),
    *("Tokens", "Created", "Seconds", "More"),
)
PART = 50
"""Runs that the page shows at once."""


def page(library: Library, view: Selection) -> list[Any]:
    """The table of runs that are looked for, or what to do when there is none."""
    try:
        runs = library.runs()
    except LensError as error:
        return [html.H1("Runs"), _empty(str(error))]
    if not runs:
        return [html.H1("Runs"), _empty(f"The folder {library.folder} holds no run yet.")]
    found = _sorted([run for run in runs if _is_found(run, view)], view)
    parts = max(1, -(-len(found) // PART))
    part = min(max(int(view.option("part")), 1), parts)
    shown = found[(part - 1) * PART : part * PART]
    rows = [
        _broken_row(run) if isinstance(run, BrokenRun) else _row(run, library.starts_jobs)
        for run in shown
    ]
    head = [_column(name, view) for name in _COLUMNS]
    table = html.Table([html.Thead(html.Tr(head)), html.Tbody(rows)], className="runs")
    whole = sum(run.status == "success" for run in runs)
    some = f"; {len(found)} of them shown" if len(found) < len(runs) else ""
    return [
        html.H1("Runs"),
        html.P(
            [
                f"{len(runs)} in {library.folder}, {whole} complete{some}. ",
                *([dcc.Link("Compare two", href="/compare")] if len(runs) > 1 else []),
            ],
            className="lead",
        ),
        card(
            [
                _controls(runs, view),
                html.Div(table, className="scroll", tabIndex=0, role="region", **named("Runs")),
                html.P(id="delete-problem", className="problem", role="alert"),
            ]
        ),
        *([_steps(view, part, parts)] if parts > 1 else []),
    ]


def _is_found(run: Run | BrokenRun, view: Selection) -> bool:
    """Whether a run is of the analysis, and has every word, that is looked for."""
    if isinstance(run, BrokenRun):
        return not view.option("what") and all(
            word in f"{run.id} {run.problem}".casefold() for word in _looked_for(view)
        )
    meta = run.meta
    parts = (run.title, run.id, run.status, meta["what"], meta.get("task"), meta["model"]["name"])
    text = " ".join(str(part) for part in parts if part).casefold()
    return view.option("what") in ("", meta["what"]) and all(
        word in text for word in _looked_for(view)
    )


def _looked_for(view: Selection) -> list[str]:
    return view.option("find").casefold().split()


def _sorted(runs: list[Run | BrokenRun], view: Selection) -> list[Run | BrokenRun]:
    """In the order that is asked for; those that cannot be read last."""
    asked = view.option("sort")
    of = _SORTED.get(asked.removeprefix("-"), _SORTED["created"])
    read = [run for run in runs if not isinstance(run, BrokenRun)]
    broken = [run for run in runs if isinstance(run, BrokenRun)]
    return [*sorted(read, key=of, reverse=asked.startswith("-")), *broken]


def _column(name: str, view: Selection) -> html.Th:
    """A heading; of a column that can be sorted by, a link that does."""
    key, asked = name.lower(), view.option("sort")
    if key not in _SORTED:
        return html.Th(name, scope="col")
    up = asked == key
    order = {"aria-sort": "ascending" if up else "descending"} if asked in (key, f"-{key}") else {}
    link = view.where(sort=f"-{key}" if up else key, part="1").url()
    return html.Th(dcc.Link(name, href=link), scope="col", **order)  # pyright: ignore[reportArgumentType]


def _controls(runs: list[Run | BrokenRun], view: Selection) -> html.Div:
    """What is looked for: words, and an analysis."""
    whats = sorted({run.meta["what"] for run in runs if not isinstance(run, BrokenRun)})
    find = view.option("find")
    return html.Div(
        [
            html.Div(
                [
                    html.Label("Find", htmlFor='{"option":"find"}'),
                    dcc.Input(
                        id={"option": "find"},
                        type="search",
                        value=find,
                        debounce=0.4,
                        placeholder="model, task, status, id",
                    ),
                    remember("find", find),
                ],
                className="control",
            ),
            select(
                "what", "Analysis", {"": "all"} | {one: one for one in whats}, view.option("what")
            ),
        ],
        className="controls",
    )


def _steps(view: Selection, part: int, parts: int) -> html.Nav:
    """Links to the newer and the older runs."""
    near = {"newer": part - 1, "older": part + 1}
    links = [
        [dcc.Link(name, href=view.where(part=str(to)).url()), " "]
        for name, to in near.items()
        if 1 <= to <= parts
    ]
    words = f"part {part} of {parts}, {PART} runs each. "
    return html.Nav([words, *(piece for link in links for piece in link)], **named("Parts"))


def _row(run: Run, starts_jobs: bool) -> html.Tr:
    meta, model, prompts = run.meta, run.meta["model"], run.meta["prompts"]
    return html.Tr(
        [
            html.Td(
                [
                    dcc.Link(meta["title"], href=f"/run/{run.id}"),
                    html.Div(run.id, className="small"),
                ]
            ),
            html.Td(chip(run.status)),
            html.Td(meta["what"]),
            html.Td(meta.get("task") or "–"),
            html.Td(model["name"]),
            html.Td(f"{model.get('layers', '?')} × {model.get('heads', '?')}"),
            html.Td(f"{prompts['done']} of {prompts['total']}"),
            html.Td(number(prompts.get("tokens")), className="number"),
            html.Td(meta["created"].replace("T", " ")[:16]),
            html.Td(number(meta.get("seconds"), 3), className="number"),
            html.Td(
                [
                    dcc.Link(
                        "compare",
                        href=Selection(page="compare").where(a=run.id).url(),
                        title=f"compare {run.id} with another run",
                    ),
                    *([" ", _delete(run)] if starts_jobs else []),
                ]
            ),
        ]
    )


def _delete(run: Run) -> html.Button:
    """Deletes a run, after it has asked (`page.js`); where jobs may be started."""
    return html.Button(
        "delete",
        type="button",
        className="quiet",
        title=f"delete {run.id}: the files that it wrote",
        disabled=run.status == "started",
        **{"data-delete": run.id},  # pyright: ignore[reportArgumentType]
    )


def _broken_row(run: BrokenRun) -> html.Tr:
    return html.Tr(
        [
            html.Td(run.id),
            html.Td(chip("error")),
            html.Td(run.problem, colSpan=len(_COLUMNS) - 2, className="problem"),
        ]
    )


def _empty(reason: str) -> html.Section:
    return card(
        [
            html.P(coded(reason)),
            html.P("Make one, then reload this page:"),
            html.Pre(html.Code("lens demo --no-view\nlens run --text-name moby-dick --tokens 128")),
        ],
        "Nothing here yet",
        className="empty",
    )
