"""`lens view`: the dashboard over a folder of runs."""

import socket
import sys
from contextlib import suppress
from pathlib import Path

from lens.common.errors import LensError

LOOPBACK = "127.0.0.1"


def check_port(port: int, host: str = LOOPBACK) -> None:
    """Find out now whether the dashboard can have its port, rather than after the analysis.

    Raises:
        LensError: another program listens there, or the port may not be used.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "is busy" if "in use" in str(error) else f"cannot be used ({error.strerror})"
            raise LensError(
                f"port {port} on {host} {reason}; choose another, e.g. --port {_free_port(host)}"
            ) from None


def view_runs(
    target: Path,
    port: int,
    *,
    host: str = LOOPBACK,
    token: str | None = None,
    jobs: bool = False,
    quiet: bool = False,
) -> None:
    """Serve the dashboard until it is stopped; `target` is a folder of runs or one run.

    With `jobs` its page /jobs starts analyses, which a worker process beside it computes.

    Raises:
        LensError: no such folder, a busy port, or no dashboard installed.
    """
    if not target.is_dir():
        raise LensError(
            f"no folder {target}; make a run first: `lens demo`, or `lens run --out {target}`"
        )
    single = (target / "run.json").exists()
    folder = target.resolve().parent if single else target.resolve()
    check_port(port, host)
    try:
        from lens_dashboards.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lens"):
            raise
        raise LensError(
            f"the dashboard needs {error.name}; install it with pip install 'attention-lens[dashboard]'"
        ) from error
    path = f"/run/{target.resolve().name}" if single else "/"
    if not quiet:
        sys.stderr.write(f"dashboard: http://{host}:{port}{path}   (stop it with Ctrl-C)\n")
    if not jobs:
        with suppress(KeyboardInterrupt):
            serve(folder, port=port, host=host, token=token)
        return
    from lens_analyses.jobs.desk import JobDesk
    from lens_analyses.jobs.worker import beside

    desk = JobDesk(folder)
    with suppress(KeyboardInterrupt), beside(folder):
        serve(folder, port=port, host=host, token=token, jobs=desk)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host if host == LOOPBACK else "", 0))
        return probe.getsockname()[1]
