"""What the user is looking at, as one value that is a link: a URL restores the view.

/                                     the runs, newest first  ?find=&what=&sort=&part=
/jobs                                 analyses to come
/run/<id>                             overview
/run/<id>/head/<layer>/<head>         one head        ?prompt=&q0=&q1=&k0=&k1=&query=
/run/<id>/maps                        up to nine heads side by side  ?heads=&vs=&others=&prompt=&q0=&q1=&k0=&k1=&query=
/run/<id>/atlas                       every head      ?prompt=
/run/<id>/heads                       heads against each other, by any two scores
/run/<id>/sinks                       where attention is parked
/run/<id>/redistribution              what changes when it is moved
/run/<id>/policies                    which heads may be sparse
/run/<id>/mixers                      what linear and recurrent mixers do
/run/<id>/patching                    where the answer is carried, layer by token
/run/<id>/circuits                    which edges carry a task
/run/<id>/reading                      why heads attend where they do, pair by pair
/run/<id>/vision                       where patches of a picture look, up to nine heads  ?map=&beside=&way=&path=&prompt=
/run/<id>/analysis/<section>          what one analysis found
/run/<id>/provenance                  how it was made
/compare                              two runs        ?a=&b=

Every page of a run, and the comparison, takes `?variant=sink_excluded`, and links between them keep it.
The options of each page are in `OPTIONS`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from urllib.parse import parse_qs, quote, unquote, urlencode

from lens.traces.metrics import METRICS, VARIANTS

_USUAL = "induction", "entropy", *METRICS
OPTIONS: dict[str, dict[str, str]] = {
    "runs": {"part": "1", "find": "", "what": "", "sort": "-created"},
    "overview": {"group": "", "metric": ""},
    "head": {"pin": "", "by": ""},
    "maps": {"heads": "", "vs": "", "others": ""},
    "heads": {
        "x": "",
        "y": "",
        "color": "",
        "group": "",
        "show": "scatter",
        "layers": "",
        "pattern": "",
        "sort": "",
        "heads": "",
        "only": "",
    },
    "vision": {"map": "", "beside": "", "way": "query", "path": "on", "by": "", "class": ""},
    "sinks": {"epsilon": "", "edit": ""},
    "redistribution": {"rule": "", "amount": ""},
    "policies": {"policy": "", "head": "", "shown": "", "layer": ""},
    "mixers": {"head": "", "shown": ""},
    "patching": {"stream": ""},
    "circuits": {"ranking": "", "edges": "", "pins": "", "by": "", "groups": ""},
    "reading": {"head": "", "pair": ""},
    "compare": {"a": "", "b": "", "metric": "", "group": ""},
}
"""Options of each page with their defaults; a link holds those that differ."""
PAGES = (
    *("runs", "jobs", "overview", "heads", "head", "maps", "atlas", "sinks", "redistribution"),
    *("policies", "mixers", "patching", "circuits", "reading", "vision", "analysis", "compare"),
    "provenance",
)
_PLAIN = (
    *("heads", "maps", "atlas", "sinks", "redistribution", "policies", "mixers", "circuits"),
    *("patching", "reading", "vision", "provenance"),
)
_WITH_PROMPT = ("head", "maps", "atlas", "vision")
_ZOOMED = ("head", "maps")


def usual_metric(scored: Collection[str]) -> str:
    """The metric that is shown where none is asked for: induction, or without it the first of those that have scores."""
    return next((name for name in _USUAL if name in scored), _USUAL[0])


@dataclass(frozen=True)
class Selection:
    """The view.

    Attributes:
        page: one of `PAGES`.
        run: id of the run, "" on the page of runs.
        variant: as in `lens.traces.metrics`: is the first key counted, wherever a score can do without it?
        layer, head: of the head page.
        prompt: prompt whose trace the head page and the atlas show; "" for the first.
        window: (q0, q1, k0, k1) in tokens that the block map shows, or None for all of it.
        query: token whose row is shaded, or None.
        section: name of the analysis, "" elsewhere.
        options: (name, value) of those of `OPTIONS` that are not at their default, sorted.
    """

    page: str = "runs"
    run: str = ""
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
        """The same view with other options; another prompt starts with the whole of its map."""
        after = replace(self, options=_options(self.page, {**dict(self.options), **changed}))
        if self.page in _WITH_PROMPT and changed.get("prompt", self.prompt) != self.prompt:
            after = replace(after, prompt=changed["prompt"], window=None, query=None)
        return after

    def to(self, page: str, section: str = "") -> "Selection":
        """Another page of the same run."""
        return Selection(page=page, run=self.run, variant=self.variant, section=section)

    def to_head(self, layer: int, head: int, prompt: str = "") -> "Selection":
        """The page of a head of the same run."""
        return replace(self.to("head"), layer=int(layer), head=int(head), prompt=prompt)

    def url(self) -> str:
        """The link that restores the view."""
        if self.page == "jobs":
            return "/jobs"
        query: dict[str, object] = dict(self.options)
        if self.page == "runs":
            return f"/?{urlencode(query)}" if query else "/"
        if self.variant != "raw":
            query["variant"] = self.variant
        if self.page in _WITH_PROMPT and self.prompt:
            query["prompt"] = self.prompt
        path = "/compare" if self.page == "compare" else f"/run/{quote(self.run, safe='')}"
        if self.page in _PLAIN:
            path += f"/{self.page}"
        elif self.page == "analysis":
            path += f"/analysis/{quote(self.section, safe='')}"
        elif self.page == "head":
            path += f"/head/{self.layer}/{self.head}"
        if self.page in _ZOOMED and self.window is not None:
            query.update(zip(("q0", "q1", "k0", "k1"), self.window, strict=True))
        if self.page in _ZOOMED and self.query is not None:
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
            if not _whole(given.get("part", "1")):
                notes.append("There is no such part of the list; the newest runs are shown.")
                given.pop("part")
            return Selection(options=_options("runs", given)), notes
        case ["jobs"]:
            return Selection(page="jobs"), notes
        case ["run", run]:
            view = Selection(page="overview", run=run)
        case ["compare"]:
            view = Selection(page="compare")
        case ["run", run, page] if page in _PLAIN:
            view = Selection(page=page, run=run)
        case ["run", run, "analysis", section]:
            view = Selection(page="analysis", run=run, section=section)
        case ["run", run, "head", layer, head] if _whole(layer) and _whole(head):
            view = Selection(page="head", run=run, layer=int(layer), head=int(head))
        case _:
            return None, notes
    if view.page in _ZOOMED:
        view = _zoomed(view, given, notes)
    if (variant := given.get("variant", "raw")) not in VARIANTS:
        notes.append(f"There is no variant {variant!r}; raw is shown.")
        variant = "raw"
    prompt = given.get("prompt", "") if view.page in _WITH_PROMPT else ""
    if view.page == "overview" and given.get("metric", "") not in ("", *METRICS):
        notes.append(f"There is no metric {given.pop('metric')!r}; the usual one is shown.")
    options = _options(view.page, given)
    return replace(view, variant=variant, prompt=prompt, options=options), notes


def _zoomed(view: Selection, given: dict[str, str], notes: list[str]) -> Selection:
    """With the rectangle and the query of a link."""
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
    return replace(view, window=window, query=int(query) if query else None)


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
