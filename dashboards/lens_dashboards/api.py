"""What the page fetches beside Dash: rectangles of attention as raw float32, rows, tables."""

import hashlib
import json
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd
from flask import Blueprint, Response, request

from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.common.png import png
from lens.figures.overlays import SCAN_STOPS
from lens.runs.exchange.tables import csv_text
from lens.traces.metrics import VARIANTS
from lens.traces.pictures import grids_of
from lens.traces.pixels import Pooling
from lens_dashboards.circuit_edges import RANKINGS, circuit_edges
from lens_dashboards.circuit_groups import named_groups
from lens_dashboards.head_columns import head_columns
from lens_dashboards.library import Library
from lens_dashboards.library import section as read_section
from lens_dashboards.pages.maps import MOST_MAPS
from lens_dashboards.raster import MOST_CELLS, header, raster, row

_MOST_REPORT = 2**28
_ATLAS = ("layers", "heads", "rows", "columns")


def make_api(library: Library) -> Blueprint:
    """Routes under `/api`; ids are looked up in the library, never joined to a path."""
    api = Blueprint("api", __name__, url_prefix="/api")

    @api.get("/run/<run_id>/raster/<prompt>/<heads>")
    @_refusing
    def get_raster(run_id: str, prompt: str, heads: str) -> Response:
        """A rectangle of each head (`L0H1,L2H3`): float32 rows, one after the other; a list of sizes in `X-Raster`."""
        trace, variant, window = library.trace(run_id, prompt), _variant(), _window()
        names, most = heads.split(","), request.args.get("cells", MOST_CELLS, type=int)
        if len(names) > MOST_MAPS or not 1 <= most <= MOST_CELLS:
            raise LensError(
                f"at most {MOST_MAPS} heads of 1 to {MOST_CELLS} cells a side are drawn at once; "
                f"got {len(names)} of {most}"
            )
        pooling: Any = check_choice("pooling", request.args.get("pooling", "max"), Pooling)
        asked = [trace.head_id(name) for name in names]
        found = [raster(trace, *head, window, pooling, variant, most) for head in asked]
        values = np.concatenate([one.values.ravel() for one in found])
        return _binary(values, [header(trace, one, pooling) for one in found])

    @api.get("/run/<run_id>/atlas/<prompt>")
    @_refusing
    def get_atlas(run_id: str, prompt: str) -> Response:
        """A small picture of every head: float32 [layers, heads, rows, columns]; `numbers` of the layers."""
        values = library.atlas(run_id, prompt, _variant())
        numbers = {"numbers": library.trace(run_id, prompt).layers}
        return _binary(values, dict(zip(_ATLAS, values.shape, strict=True)) | numbers)

    @api.get("/run/<run_id>/row/<prompt>/<int:layer>/<int:head>/<int:query>")
    @_refusing
    def get_row(run_id: str, prompt: str, layer: int, head: int, query: int) -> Response:
        """Exact probabilities of one query over all keys."""
        values = row(library.trace(run_id, prompt), layer, head, query, _variant())
        return _binary(values[None], {"rows": 1, "columns": len(values), "query": query})

    @api.get("/run/<run_id>/tokens/<prompt>")
    @_refusing
    def get_tokens(run_id: str, prompt: str) -> Response:
        """Token strings of a prompt."""
        return _cached(json.dumps(library.trace(run_id, prompt).tokens), "application/json")

    @api.get("/run/<run_id>/picture/<prompt>.png")
    @_refusing
    def get_picture(run_id: str, prompt: str) -> Response:
        """The picture of a prompt, as its trace keeps it."""
        found = grids_of(library.trace(run_id, prompt).attrs)[0].pixels
        return _cached(png(found), "image/png")

    @api.get("/run/<run_id>/look/<prompt>/<int:row_>/<int:column>")
    @_refusing
    def get_look(run_id: str, prompt: str, row_: int, column: int) -> Response:
        """Where a patch looks and who looks at it: float32 [ways, maps, patches], row by row.

        The header has the scan path of each: (x, y) in pixels of the picture, the strongest region first.
        """
        trace, heads = library.trace(run_id, prompt), request.args.get("heads", "mean").split(",")
        ways = [one for one in ("query", "key") if request.args.get("way", one) == one]
        if len(heads) > MOST_MAPS or not ways:
            raise LensError(
                f"at most {MOST_MAPS} heads are shown, one way: query or key; got {len(heads)}"
            )
        patch, variant = (row_, column), _variant()
        asked: list[dict[str, Any]] = [{way: patch} for way in ways]
        found = [trace.overlay(heads, variant=variant, **one) for one in asked]
        paths = [
            one.regions(place).head(SCAN_STOPS)[["x", "y"]].round(1).to_numpy().tolist()
            for one in found
            for place in range(len(heads))
        ]
        values = np.stack([one.values for one in found])
        return _binary(values, {"ways": ways, "heads": heads, "paths": paths})

    @api.get("/run/<run_id>/heads.csv")
    @_refusing
    def get_heads(run_id: str) -> Response:
        """The whole head table as CSV."""
        return _csv(library.run(run_id).heads, f"{run_id}_heads.csv")

    @api.get("/run/<run_id>/section/<section>/<table>.csv")
    @_refusing
    def get_table(run_id: str, section: str, table: str) -> Response:
        """A table of an analysis as CSV."""
        tables = read_section(library.run(run_id), section).tables
        if table not in tables:
            raise LensError(f"{section} has no table {table!r}; it has: {', '.join(tables)}")
        return _csv(tables[table], f"{run_id}_{section}_{table}.csv")

    @api.get("/run/<run_id>/columns.csv")
    @_refusing
    def get_columns(run_id: str) -> Response:
        """Every score of every head, as the page of heads has them."""
        run = library.run(run_id)
        groups = list(dict.fromkeys(run.heads["prompt_id"]))
        group = request.args.get("group") or next(iter(groups), "")
        if group not in groups:
            raise LensError(f"run {run_id} has no prompts {group!r}; it has: {', '.join(groups)}")
        table = head_columns(run, group, "raw").table
        return _csv(table, f"{run_id}_columns_{group}.csv")

    @api.get("/run/<run_id>/circuit.json")
    @_refusing
    def get_circuit(run_id: str) -> Response:
        """A circuit of the best edges, as `lens.circuits.load_circuit` reads it."""
        edges = circuit_edges(library.run(run_id))
        count, ranking = request.args.get("edges", ""), request.args.get("ranking", "absolute")
        if ranking not in RANKINGS or not count.isdigit() or not 0 < int(count) <= len(edges.names):
            raise LensError(
                f"give edges=1 to {len(edges.names)} and ranking={' or '.join(RANKINGS)}"
            )
        notes: list[str] = []
        groups = named_groups(request.args.get("groups", ""), edges, notes)
        if notes:
            raise LensError(" ".join(notes))
        made = f"{ranking} top {count}, pruned"
        found = edges.circuit(edges.top(int(count), ranking), made, groups)
        response = Response(json.dumps(found), mimetype="application/json")
        return _saved(response, f"{run_id}_circuit_{ranking}_{count}.json")

    @api.get("/run/<run_id>/report.html")
    @_refusing
    def get_report(run_id: str) -> Response:
        """The report that the run wrote."""
        door = library.run(run_id).door
        if not door.has("report.html"):
            raise LensError(f"run {run_id} has no report yet; make it: lens report {run_id}")
        response = Response(door.text("report.html", _MOST_REPORT), mimetype="text/html")
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "img-src data:; font-src data:; sandbox allow-scripts allow-downloads"
        )
        return response

    @api.get("/<path:rest>")
    def get_nothing(rest: str) -> Response:
        """Whatever else is asked for under `/api`."""
        return Response(f"there is nothing at /api/{rest}", status=404, mimetype="text/plain")

    return api


def _csv(table: pd.DataFrame, name: str) -> Response:
    return _saved(Response(csv_text(table), mimetype="text/csv"), name)


def _saved(response: Response, name: str) -> Response:
    """To be saved under a name that says which run and what of it."""
    response.headers.set("Content-Disposition", "attachment", filename=name)
    return response


def _refusing(view: Callable[..., Response]) -> Callable[..., Response]:
    """A `LensError` becomes a 404 with its text."""

    @wraps(view)
    def guarded(*args: Any, **kwargs: Any) -> Response:
        try:
            return view(*args, **kwargs)
        except LensError as error:
            return Response(str(error), status=404, mimetype="text/plain")

    return guarded


def _variant() -> str:
    given = request.args.get("variant", "raw")
    if given not in VARIANTS:
        raise LensError(f"variant must be {' or '.join(VARIANTS)}, got {given!r}")
    return given


def _window() -> tuple[int, int, int, int] | None:
    names = ("q0", "q1", "k0", "k1")
    given = [request.args.get(name, type=int) for name in names]
    if all(value is None for value in given):
        return None
    if any(value is None for value in given):
        raise LensError("a rectangle needs q0, q1, k0 and k1, all whole numbers")
    return (given[0] or 0, given[1] or 0, given[2] or 0, given[3] or 0)


def _binary(values: np.ndarray, header: dict[str, Any] | list[dict[str, Any]]) -> Response:
    response = _cached(
        np.ascontiguousarray(values, dtype="<f4").tobytes(), "application/octet-stream"
    )
    response.headers["X-Raster"] = json.dumps(header)
    return response


def _cached(body: bytes | str, mimetype: str) -> Response:
    """With an ETag, so that a second look costs no transfer."""
    response = Response(body, mimetype=mimetype)
    raw = body.encode() if isinstance(body, str) else body
    response.set_etag(hashlib.sha256(raw).hexdigest()[:16])
    response.headers["Cache-Control"] = "private, no-cache"
    return response.make_conditional(request)  # pyright: ignore[reportReturnType]
