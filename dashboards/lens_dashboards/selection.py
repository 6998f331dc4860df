"""What the user is looking at, as one value that is a link: a URL restores the view.

/                                     the runs
/jobs                                 analyses to come
/run/<id>                             overview        ?group=&metric=&variant=
/run/<id>/head/<layer>/<head>         one head        ?prompt=&q0=&q1=&k0=&k1=&query=
/run/<id>/atlas                       every head          ?prompt=
/run/<id>/heads                       heads against each other, by any two scores
/run/<id>/sinks                       where attention is parked
/run/<id>/redistribution              what changes when it is moved
/run/<id>/circuits                    which edges carry a task
/run/<id>/analysis/<section>          what one analysis found
/run/<id>/provenance                  how it was made
/compare                              two runs       ?a=&b=

The options of each page are in `OPTIONS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import parse_qs, quote, unquote, urlencode

from lens.metrics import METRICS, VARIANTS

OPTIONS: dict[str, dict[str, str]] = {
    "head": {"pin": ""},
    "heads": {
        "x": "",
        "y": "",
        "color": "",
        "group": "",
        "variant": "raw",
        "show": "scatter",
        "layers": "",
        "pattern": "",
        "sort": "",
        "heads": "",
        "only": "",
    },
    "sinks": {"epsilon": "", "edit": ""},
    "redistribution": {"amount": ""},
    "circuits": {"ranking": "", "edges": "", "node": "", "pins": ""},
    "compare": {"a": "", "b": "", "metric": "", "variant": "raw", "group": ""},
}
"""Options of each page with their defaults; a link holds those that differ."""
PAGES = (
    *("runs", "jobs", "overview", "heads", "head", "atlas", "sinks", "redistribution", "circuits"),
    *("analysis", "compare", "provenance"),
)
_PLAIN = ("heads", "sinks", "redistribution", "circuits", "provenance")
DEFAULT_METRIC = "induction"


@dataclass(frozen=True)
class Selection:
    """The view.

    Attributes:
        page: one of `PAGES`.
        run: id of the run, "" on the page of runs.
        group: `prompt_id` of the head table: `text`, `copied`, or one prompt; "" for the default.
        metric, variant: as in `lens.metrics`.
        layer, head: of the head page.
        prompt: prompt whose trace the head page and the atlas show; "" for the first.
        window: (q0, q1, k0, k1) in tokens that the block map shows, or None for all of it.
        query: token whose row is shaded, or None.
        section: name of the analysis, "" elsewhere.
        options: (name, value) of those of `OPTIONS` that are not at their default, sorted.
    """

    page: str = "runs"
    run: str = ""
    group: str = ""
    metric: str = DEFAULT_METRIC
    variant: str = "raw"
    layer: int = 0
    head: int = 0
    prompt: str = ""
    window: tuple[int, int, int, int] | None = None
    query: int | None = None
    section: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def option(self, name: str) -> str:
        """The value of an option of this page."""
        return dict(self.options).get(name, OPTIONS[self.page][name])

    def where(self, **changed: str) -> "Selection":
        """The same view with other options."""
        return replace(self, options=_options(self.page, {**dict(self.options), **changed}))

    def url(self) -> str:
        """The link that restores the view."""
        if self.page == "runs":
            return "/"
        if self.page == "jobs":
            return "/jobs"
        if self.page == "compare":
            return f"/compare?{urlencode(self.options)}" if self.options else "/compare"
        path = f"/run/{quote(self.run, safe='')}"
        if self.page == "analysis":
            return f"{path}/analysis/{quote(self.section, safe='')}"
        query: dict[str, object] = dict(self.options)
        if self.page in _PLAIN:
            path += f"/{self.page}"
            return f"{path}?{urlencode(query)}" if query else path
        if self.page == "overview":
            defaults = Selection()
            for name in ("group", "metric", "variant"):
                if getattr(self, name) != getattr(defaults, name):
                    query[name] = getattr(self, name)
        elif self.page == "atlas":
            path += "/atlas"
            if self.prompt:
                query["prompt"] = self.prompt
        else:
            path += f"/head/{self.layer}/{self.head}"
            if self.prompt:
                query["prompt"] = self.prompt
            if self.window is not None:
                query.update(zip(("q0", "q1", "k0", "k1"), self.window, strict=True))
            if self.query is not None:
                query["query"] = self.query
        return f"{path}?{urlencode(query)}" if query else path


def read_url(path: str, search: str = "") -> tuple[Selection | None, list[str]]:
    """The view that a link asks for, and notes on what in it could not be used.

    Returns:
        None for a path that is no page; the notes say which values fell back to their defaults.
    """
    parts = [unquote(part) for part in path.strip("/").split("/")] if path.strip("/") else []
    given = {name: values[-1] for name, values in parse_qs(search.lstrip("?")).items()}
    notes: list[str] = []
    match parts:
        case []:
            return Selection(), notes
        case ["jobs"]:
            return Selection(page="jobs"), notes
        case ["run", run]:
            return _overview(run, given, notes), notes
        case ["compare"]:
            return Selection(page="compare", options=_options("compare", given)), notes
        case ["run", run, page] if page in _PLAIN:
            return Selection(page=page, run=run, options=_options(page, given)), notes
        case ["run", run, "atlas"]:
            return Selection(page="atlas", run=run, prompt=given.get("prompt", "")), notes
        case ["run", run, "analysis", section]:
            return Selection(page="analysis", run=run, section=section), notes
        case ["run", run, "head", layer, head] if _whole(layer) and _whole(head):
            return _head(run, int(layer), int(head), given, notes), notes
        case _:
            return None, notes


def _overview(run: str, given: dict[str, str], notes: list[str]) -> Selection:
    metric, variant = given.get("metric", DEFAULT_METRIC), given.get("variant", "raw")
    if metric not in METRICS:
        notes.append(f"There is no metric {metric!r}; {DEFAULT_METRIC} is shown.")
        metric = DEFAULT_METRIC
    if variant not in VARIANTS:
        notes.append(f"There is no variant {variant!r}; raw is shown.")
        variant = "raw"
    return Selection("overview", run, given.get("group", ""), metric, variant)


def _head(run: str, layer: int, head: int, given: dict[str, str], notes: list[str]) -> Selection:
    window = None
    bounds = [given.get(name, "") for name in ("q0", "q1", "k0", "k1")]
    if any(bounds):
        numbers = [int(bound) if _whole(bound) else -1 for bound in bounds]
        if min(numbers) >= 0 and numbers[0] < numbers[1] and numbers[2] < numbers[3]:
            window = (numbers[0], numbers[1], numbers[2], numbers[3])
        else:
            notes.append("The zoom in this link is not readable; the whole map is shown.")
    query = given.get("query", "")
    if query and not _whole(query):
        notes.append(f"There is no query {query!r}; none is selected.")
        query = ""
    return Selection(
        page="head",
        run=run,
        layer=layer,
        head=head,
        prompt=given.get("prompt", ""),
        window=window,
        query=int(query) if query else None,
        options=_options("head", given),
    )


def _options(page: str, given: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Those that the page has and that are not at their default."""
    defaults = OPTIONS.get(page, {})
    return tuple(
        (name, given[name])
        for name in sorted(defaults)
        if given.get(name) and given[name] != defaults[name]
    )


def _whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
