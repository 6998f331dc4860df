"""Page `/run/<id>/vision`: which heads matter, how far they look, in which pattern; where a patch looks, who looks at it.

Four views of the same heads, linked by the address: a click in one chooses the head, the layer or the picture of all.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from dash import dcc, html

from lens.common.colors import VIRIDIS
from lens.common.errors import LensError
from lens.figures.vision_views import NEAR, head_matrix, pattern_points, strength
from lens.runs import Run
from lens.runs.sections import Section
from lens.traces.pictures import grids_of
from lens_dashboards.library import Library, sections
from lens_dashboards.pages.head import known_prompt, prompt_control
from lens_dashboards.pages.maps import MOST_MAPS
from lens_dashboards.pages.parts import (
    card,
    choice,
    crumbs,
    graph,
    names_control,
    note_banner,
    python_call,
    run_banner,
    select,
)
from lens_dashboards.selection import Selection

_SECTIONS = (
    "overlays",
    "grounding",
    "classes",
    "rings",
    "pattern_summary",
    "structure",
    "similarity",
    "chain",
)
_METRICS = {
    "probability": "probability lost by the right class",
    "accuracy": "accuracy lost",
    "loss": "loss gained",
    "js": "outputs moved (Jensen-Shannon)",
    "cosine": "embedding turned (1 - cosine)",
    "distance": "embedding moved (distance)",
    NEAR: "attention on a patch and its neighbours",
}
_ALL = "all"
_WAYS = {"query": "where the patch looks", "key": "who looks at the patch"}
_PATHS = {"on": "shown", "off": "hidden"}


def page(library: Library, view: Selection) -> list[Any]:
    """Two pictures under one patch, and links to what the analyses of pictures found."""
    run = library.run(view.run)
    top = [crumbs(run, view), html.H1("What was looked at"), *run_banner(run)]
    traces = [name for name in run.traces if _has_picture(library, run.id, name)]
    if not traces:
        return [
            *top,
            card(
                html.P(
                    [
                        "This run has no picture. Of a model that reads pictures ",
                        html.Code("lens vision"),
                        " makes one; how, says ",
                        html.Code("lens vision --help"),
                        ".",
                    ]
                ),
                "No picture",
                className="empty",
            ),
        ]
    notes: list[str] = []
    prompt = known_prompt(view, traces, notes)
    trace = library.trace(run.id, prompt)
    layers = [f"L{layer}" for layer in trace.layers]
    names = [*layers, *map(str, trace.every_head)]
    shown = choice(view, "map", names, layers[-1], notes)
    maps = [shown, *_beside(view, {*names, "mean"} - {shown}, notes)]
    several = len(maps) > 1
    way = choice(view, "way", _WAYS, "query", notes) if several else ""
    path = choice(view, "path", _PATHS, "on", notes)
    grid = grids_of(trace.attrs)[0]
    variant = view.variant
    base = f"/api/run/{quote(run.id, safe='')}"
    held = sections(run)
    config = {
        "picture": f"{base}/picture/{prompt}.png",
        "look": f"{base}/look/{prompt}",
        "query": urlencode(
            {"heads": ",".join(maps), "variant": variant, **({"way": way} if way else {})}
        ),
        "maps": maps,
        "way": way,
        "path": path == "on",
        "size": list(grid.size),
        "box": list(grid.box),
        "height": grid.height,
        "width": grid.width,
        "patch": [grid.height // 2, grid.width // 2],
        "palette": list(VIRIDIS),
        "boxes": _boxes(held, prompt),
    }
    call = (
        "from lens.runs import open_run\n\n"
        f"trace = open_run({str(run.path)!r}).trace({prompt!r})\n"
        f"trace.overlay({maps if several else shown!r}, {way or 'query'}=({grid.height // 2}, {grid.width // 2}), variant={variant!r})"
        f".plot(path={path == 'on'})"
    )
    links = [
        html.Li(dcc.Link(held[name].title, href=view.to("analysis", name).url()))
        for name in _SECTIONS
        if name in held
    ]
    views = _linked(run, view, held, shown, prompt, notes)
    return [
        *top,
        *map(note_banner, notes),
        dcc.Store(id="vision-config", data=config),
        dcc.Store(id="vision-mounted"),
        prompt_control(run, traces, prompt),
        html.Div(
            [
                select("map", "Heads", {name: name for name in names}, shown),
                names_control("beside", "Others side by side, with commas", ",".join(maps[1:])),
                *([select("way", "Which way", _WAYS, way)] if several else []),
                select("path", "Scan path", _PATHS, path),
            ],
            className="controls",
        ),
        *views,
        card(
            html.Div(
                [
                    html.Div(
                        [_canvas(f"{name}: {_WAYS[way]}", name) for name in maps]
                        if several
                        else [
                            _canvas(f"{words[0].upper()}{words[1:]}") for words in _WAYS.values()
                        ],
                        className="looks" if several else "halves",
                    ),
                    html.P("Loading …", className="look-said", **{"aria-live": "polite"}),  # pyright: ignore[reportArgumentType]
                    html.P(
                        "Move over a picture to choose the patch, or use the arrow keys with a picture in focus. "
                        "Colours are shares of the highest value of each picture; a head's name is its layer and "
                        "number, a layer's the mean of its heads. The scan path joins what is looked at most, the "
                        "strongest first: patches that hold half of it, joined where they touch.",
                        className="small",
                    ),
                ],
                id="vision",
                className="vision",
            ),
            f"{', '.join(maps)} on {_title_of(run, prompt)}",
        ),
        *([card(html.Ul(links), "Analyses of pictures")] if links else []),
        card(python_call(call), "Take it with you"),
    ]


def _linked(
    run: Run,
    view: Selection,
    held: Mapping[str, Section],
    shown: str,
    prompt: str,
    notes: list[str],
) -> list[Any]:
    """Importance, strength and patterns, as far as the run has them."""
    if "rings" not in held:
        return []

    def link(head: str, picture: str) -> str:
        return view.where(map=head, **({"prompt": picture} if picture else {})).url()

    rings = held["rings"].tables["rings"]
    rings = rings[(rings["prompt_id"] == prompt).to_numpy()]
    call = f"from lens.figures import vision_views\nfrom lens.runs import open_run\n\nrun = open_run({str(run.path)!r})\n"
    of_rings = (
        f"{call}rings = run.section('rings').tables['rings'].query('prompt_id == {prompt!r}')\n"
    )
    cards = [
        _matrix_card(view, held, rings, shown, link, notes),
        card(
            graph(
                {"points": "strength"},  # pyright: ignore[reportArgumentType]
                strength(rings, shown, link),
                f"Attention of {shown} by distance on the picture, and over the layers",
                f"{of_rings}vision_views.strength(rings, {shown!r})",
            ),
            "How far it looks",
        ),
    ]
    if "pattern_summary" in held:
        maps = held["pattern_summary"].tables["maps"]
        code = f"{call}maps = run.section('pattern_summary').tables['maps']\n"
        cards.append(
            card(
                graph(
                    {"points": "patterns"},  # pyright: ignore[reportArgumentType]
                    pattern_points(maps, shown, prompt, link),
                    "Every head on every picture by its pattern of attention",
                    f"{code}vision_views.pattern_points(maps, {shown!r}, {prompt!r})",
                ),
                "In which pattern",
            )
        )
    return [html.Div(cards, className="halves")]


def _matrix_card(
    view: Selection,
    held: Mapping[str, Section],
    rings: Any,
    shown: str,
    link: Any,
    notes: list[str],
) -> html.Section:
    """Every head by a metric, of all examples or of one class."""
    measured = held.get("classes")
    known = list(_METRICS) if measured else [NEAR]
    metric = choice(view, "by", known, known[0], notes)
    controls = [select("by", "Heads by", {name: _METRICS[name] for name in known}, metric)]
    if metric == NEAR or measured is None:
        near = rings[(rings["ring"] <= 1).to_numpy()]
        values = near.groupby(["layer", "head", "name"], as_index=False)["mass"].sum()
        values, of = values.rename(columns={"mass": "value"}), "on this picture"
    else:
        by_class = measured.tables["classes"]
        labels = [str(label) for label in dict.fromkeys(by_class["class"])]
        label = choice(view, "class", [_ALL, *labels], _ALL, notes)
        controls.append(
            select("class", "Class", {_ALL: "all", **{one: one for one in labels}}, label)
        )
        table = measured.tables["metrics"] if label == _ALL else by_class
        values = table[(table["metric"] == metric).to_numpy()]
        if label != _ALL:
            values = values[(values["class"].astype(str) == label).to_numpy()]
        of = f"all {int(values['n'].iloc[0])} examples" if label == _ALL else f"class {label}"
    text = f"{_METRICS[metric]}, {of}"
    text = f"{text[0].upper()}{text[1:]}"
    figure = head_matrix(values, metric, text, shown, link)
    return card(
        [
            html.Div(controls, className="controls"),
            graph({"points": "importance"}, figure, text),  # pyright: ignore[reportArgumentType]
        ],
        "Which heads matter" if metric != NEAR else "Which heads look nearby",
    )


def _beside(view: Selection, known: set[str], notes: list[str]) -> list[str]:
    """The other heads, layers or mean, each once."""
    given = dict.fromkeys(view.option("beside").replace(",", " ").split())
    if unknown := [name for name in given if name not in known]:
        notes.append(f"{', '.join(unknown[:5])} is shown already, or no head or layer of this run.")
    found = [name for name in given if name in known]
    if len(found) >= MOST_MAPS:
        notes.append(
            f"At most {MOST_MAPS} pictures are shown; {', '.join(found[MOST_MAPS - 1 :])} left out."
        )
    return found[: MOST_MAPS - 1]


def _canvas(name: str, title: str = "") -> html.Div:
    look: dict[str, Any] = {"aria-label": f"{name}, on the picture", "role": "img"}
    return html.Div([html.H3(title or name), html.Canvas(tabIndex=0, **look)], className="look")


def _boxes(held: Mapping[str, Section], prompt: str) -> list[list[float]]:
    """Boxes that were given for a picture: left, top, right, bottom in its pixels."""
    if "grounding" not in held:
        return []
    table = held["grounding"].tables["boxes"]
    own = table[(table["prompt_id"] == prompt).to_numpy()]
    return own[["left", "top", "right", "bottom"]].to_numpy(float).tolist()


def _title_of(run: Run, prompt: str) -> str:
    """Of a picture, for people; its id where the table of prompts cannot be read."""
    try:
        return run.prompts.set_index("prompt_id")["title"].get(prompt, prompt)
    except LensError:
        return prompt


def _has_picture(library: Library, run_id: str, prompt: str) -> bool:
    try:
        grids_of(library.trace(run_id, prompt).attrs)
    except LensError:
        return False
    return True
