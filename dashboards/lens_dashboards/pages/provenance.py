"""Page `/run/<id>/provenance`: could a stranger repeat this?"""

from typing import Any

from dash import html

from lens.common.errors import LensError
from lens.runs import Run
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import card, crumbs, named, number, run_banner
from lens_dashboards.selection import Selection

_PLAIN = (
    "id",
    "status",
    "created",
    "updated",
    "seconds",
    "device",
    "backend",
    "block_size",
    "seed",
    "bos",
)


def page(library: Library, view: Selection) -> list[Any]:
    """Command, configuration, model, versions, prompts and files of a run."""
    run = library.run(view.run)
    meta = run.meta
    facts = {name: meta[name] for name in _PLAIN if meta.get(name) is not None}
    facts["status"] = run.status
    return [
        crumbs(run, view),
        html.H1("Provenance"),
        *run_banner(run),
        card(
            [html.Pre(html.Code(str(meta.get("command", "unknown")))), _config(run)], "To repeat it"
        ),
        html.Div(
            [
                card(_facts(facts), "Run"),
                card(_facts(meta["model"]), "Model"),
                card(_facts(meta["versions"]), "Versions"),
            ],
            className="thirds",
        ),
        card(_prompts(run), "Prompts"),
        card(
            html.Details(
                [
                    html.Summary(f"{len(meta['files'])} files"),
                    _facts(
                        {name: f"{size:,} bytes" for name, size in sorted(meta["files"].items())}
                    ),
                ]
            ),
            "Files",
        ),
    ]


def _config(run: Run) -> html.Details:
    try:
        text = run.door.text("config.toml")
    except LensError as error:
        text = str(error)
    return html.Details([html.Summary("config.toml"), html.Pre(html.Code(text))])


def _facts(values: dict[str, Any]) -> html.Table:
    return html.Table(
        html.Tbody(
            [
                html.Tr([html.Th(name, scope="row"), html.Td("–" if value is None else str(value))])
                for name, value in values.items()
            ]
        ),
        className="facts-table",
    )


def _prompts(run: Run) -> Any:
    try:
        prompts = run.prompts
    except LensError as error:
        return html.P(str(error), className="problem")
    columns = ("prompt_id", "kind", "title", "tokens", "loss", "loss_repeat", "status")
    shown = [name for name in columns if name in prompts]
    rows = [
        html.Tr([html.Td(number(v) if isinstance(v, float) else str(v)) for v in row])
        for row in prompts[shown].itertuples(index=False)
    ]
    return html.Div(
        html.Table(
            [html.Thead(html.Tr([html.Th(name, scope="col") for name in shown])), html.Tbody(rows)]
        ),
        className="scroll",
        tabIndex=0,
        role="region",
        **named("Prompts"),
    )
