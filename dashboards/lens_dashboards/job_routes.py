"""Routes under `/api/jobs`: the page of jobs asks here, and somebody else's desk does the work.

Nothing is computed here: the desk only writes rows into a queue. A dashboard without a desk is read-only
and says so. Changes need JSON from this very page: a form of another site can send neither.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Protocol
from urllib.parse import urlsplit

from flask import Blueprint, Response, jsonify, request
from werkzeug.exceptions import BadRequest, HTTPException

from lens.common.errors import LensError

LARGEST_BODY = 64 << 10
"""Bytes of a job: a form of settings is a few hundred."""
READ_ONLY = (
    "This dashboard only shows runs. Start it with `lens view --jobs` to start analyses here."
)


class Desk(Protocol):
    """What the page of jobs needs."""

    def form(self) -> list[dict[str, Any]]:
        """Settings of a new analysis."""
        ...

    def state(self) -> dict[str, Any]:
        """Jobs, newest first, and the number of workers."""
        ...

    def log(self, number: int) -> list[str]:
        """Last lines of a job's log."""
        ...

    def submit(self, kind: str, settings: Mapping[str, Any]) -> int:
        """Check and queue; the number of the job."""
        ...

    def cancel(self, number: int) -> None:
        """Ask a job to stop."""
        ...

    def retry(self, number: int) -> None:
        """Queue a job again."""
        ...

    def delete(self, run: str) -> int:
        """Delete what a run wrote; how many files of others stay."""
        ...


def make_job_routes(desk: Desk | None) -> Blueprint:
    """The routes; each answers 403 without a desk, and 400 with the reason for what the desk refuses."""
    api = Blueprint("jobs", __name__, url_prefix="/api/jobs")

    @api.before_request
    def check() -> Response | None:
        if desk is None:
            return _refusal(READ_ONLY, 403)
        if request.method == "POST":
            request.max_content_length = LARGEST_BODY
            if not request.is_json:
                return _refusal("send JSON (Content-Type: application/json)", 415)
            origin = request.headers.get("Origin")
            if origin is not None and urlsplit(origin).netloc != request.host:
                return _refusal("another site may not start analyses here", 403)
        return None

    @api.app_errorhandler(HTTPException)
    def refuse(error: HTTPException) -> Response | HTTPException:
        """A body that is too large, a method that is not taken: as JSON, like what the desk refuses."""
        if not f"{request.path}/".startswith(f"{api.url_prefix}/") or error.code is None:
            return error
        large = f"more than {LARGEST_BODY:,} bytes, which no job is"
        told = _refusal(large if error.code == 413 else error.description or error.name, error.code)
        told.headers.extend((name, value) for name, value in error.get_headers() if name == "Allow")
        return told

    def answer(ask: Callable[..., Any]) -> Callable[..., Response]:
        @wraps(ask)
        def told(**given: Any) -> Response:
            try:
                return jsonify(ask(**given))
            except LensError as error:
                return _refusal(str(error), 400)

        return told

    def the_desk() -> Desk:
        assert desk is not None  # `check` has refused before
        return desk

    @api.get("/form")
    @answer
    def get_form() -> list[dict[str, Any]]:
        return the_desk().form()

    @api.get("")
    @answer
    def get_state() -> dict[str, Any]:
        return the_desk().state()

    @api.get("/<int:number>/log")
    @answer
    def get_log(number: int) -> dict[str, list[str]]:
        return {"lines": the_desk().log(number)}

    @api.post("")
    @answer
    def post_job() -> dict[str, int]:
        given = _sent()
        if not isinstance(given, dict) or not isinstance(given.get("settings"), dict):
            raise LensError('a job is {"kind": "run", "settings": {"model.name": ...}}')
        return {"id": the_desk().submit(str(given.get("kind", "run")), given["settings"])}

    @api.post("/<int:number>/<any(cancel, retry):action>")
    @answer
    def post_action(number: int, action: str) -> dict[str, int]:
        (the_desk().cancel if action == "cancel" else the_desk().retry)(number)
        return {"id": number}

    @api.post("/delete")
    @answer
    def post_delete() -> dict[str, int]:
        given = _sent()
        if not isinstance(given, dict) or not isinstance(given.get("run"), str):
            raise LensError('what is deleted is {"run": "ID"}')
        return {"left": the_desk().delete(given["run"])}

    return api


def _sent() -> Any:
    """The JSON of this request.

    Raises:
        LensError: it is none, or it is nested too deeply.
    """
    try:
        return request.get_json()
    except (BadRequest, RecursionError):
        raise LensError('this is no JSON; a job is {"settings": {"model.name": ...}}') from None


def _refusal(reason: str, status: int) -> Response:
    answer = jsonify({"error": reason})
    answer.status_code = status
    return answer
