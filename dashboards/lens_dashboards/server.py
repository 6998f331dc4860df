"""The dashboard's server: Dash over Flask, on this machine only unless a token says otherwise."""

import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from dash import Dash
from flask import Flask, Response, request

from lens.common.errors import LensError
from lens_dashboards.api import make_api
from lens_dashboards.guard import (
    LOOPBACK,
    answer_only,
    ask_for_token,
    is_loopback,
    names_of,
    refuse_nonsense,
)
from lens_dashboards.job_routes import Desk, make_job_routes
from lens_dashboards.library import Library
from lens_dashboards.views import register

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
{%metas%}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{%title%}</title>
{%favicon%}
{%css%}
</head>
<body>
{%app_entry%}
<footer>{%config%}{%scripts%}{%renderer%}</footer>
</body>
</html>"""


def create_app(
    runs: str | Path | Library,
    *,
    hosts: tuple[str, ...] = LOOPBACK,
    token: str | None = None,
    jobs: Desk | None = None,
) -> Dash:
    """The app over a folder of runs.

    Args:
        runs: folder of run folders, or the library of one.
        hosts: names under which it may be asked for; another Host header gets 400.
        token: when given, a request must bring it once as `?token=`, or gets 403.
        jobs: starts analyses for the page /jobs; None: the dashboard only shows runs.
    """
    flask = Flask("lens_dashboards")
    flask.debug = False  # whatever FLASK_DEBUG says
    app = Dash(
        "lens_dashboards",
        server=flask,  # pyright: ignore[reportArgumentType]
        title="attention-lens",
        update_title="",
        assets_folder=str(Path(__file__).parent / "assets"),
        serve_locally=True,
        suppress_callback_exceptions=True,
        index_string=_PAGE,
        add_log_handler=False,
        enable_mcp=False,
    )
    library = runs if isinstance(runs, Library) else Library(runs, starts_jobs=jobs is not None)
    answer_only(flask, hosts)
    if token is not None:
        ask_for_token(flask, token)
    flask.register_blueprint(make_api(library))
    flask.register_blueprint(make_job_routes(jobs))
    register(app, library)
    refuse_nonsense(flask)
    _harden(app, flask)
    return app


def serve(
    runs: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    jobs: Desk | None = None,
    threads: int = 4,
) -> None:
    """Serve the dashboard until interrupted.

    Args:
        runs: folder of run folders.
        host, port: where it listens. Another address than this machine's own needs a token.
        token, jobs: see `create_app`.
        threads: of the server.

    Raises:
        LensError: the port is busy, or a foreign address without a token.
    """
    from lens_dashboards.listening import listen, make_server

    check_reach(host, token)
    library = Library(runs, starts_jobs=jobs is not None)
    library.read_ahead()
    app = create_app(library, hosts=names_of(host), token=token, jobs=jobs)
    server = make_server(app.server, listen(host, port), threads)
    try:
        server.run()
    finally:
        server.close()


def check_reach(host: str, token: str | None) -> None:
    """Raises LensError: an address that others can reach, without a token."""
    if not is_loopback(host) and not token:
        raise LensError(
            f"{host} can be reached by others: give a token, e.g. token={secrets.token_urlsafe(16)!r},"
            " and open the page with ?token=..."
        )


def serve_beside(runs: str | Path) -> tuple[str, Callable[[], None]]:
    """Serve a folder of runs in a thread beside this program, on this machine alone and on a free port.

    Returns:
        The address, and what ends it.
    """
    from waitress import wasyncore

    from lens_dashboards.listening import listen, make_server

    server = make_server(create_app(runs).server, listen("127.0.0.1", 0), threads=4)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()

    def drop() -> None:
        """In the server's own loop, which ends when nothing is open: browsers keep their connections."""
        for channel in list(server.active_channels.values()):
            channel.handle_close()
        wasyncore.close_all(server._map, ignore_all=True)

    def close() -> None:
        server.task_dispatcher.shutdown()
        server.trigger.pull_trigger(drop)
        thread.join(timeout=10)

    return f"http://127.0.0.1:{server.effective_port}", close


def _harden(app: Dash, flask: Flask) -> None:
    policy = (
        "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
        "font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'self'; worker-src blob:; "
        f"script-src 'self' {' '.join(chr(39) + value + chr(39) for value in _script_hashes(app))}"
    )

    @flask.after_request
    def add_headers(response: Response) -> Response:
        response.headers.setdefault("Content-Security-Policy", policy)
        if (
            request.path == "/_favicon.ico"
        ):  # its link names the version; asked for anew at every change of the address
            response.headers["Cache-Control"] = "private, max-age=86400"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["X-Frame-Options"] = "SAMEORIGIN"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


def _script_hashes(app: Dash) -> list[str]:
    return [value.strip("'") for value in app.csp_hashes()]
