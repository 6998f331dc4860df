"""`lens view`: the dashboard over a folder of runs."""

import errno
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlencode

from lens.common.errors import LensError
from lens_analyses.console import UsageError, refused_as_usage, say

LOOPBACK = "127.0.0.1"


def check_port(port: int, host: str = LOOPBACK) -> None:
    """Find out now whether the dashboard can have its port, rather than after the analysis.

    Raises:
        LensError: another program listens there, or the port may not be used.
    """
    if not host:
        raise UsageError("--host must be an address of this machine, got ''")
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
                reason = "is busy" if "in use" in str(error) else "may not be used"
                raise LensError(
                    f"port {port} on {host} {reason}; choose another, e.g. --port {_free_port(host)}"
                ) from None
            raise UsageError(f"--host {host!r} is no address of this machine ({error})") from None


def view_runs(
    target: Path,
    port: int,
    *,
    host: str = LOOPBACK,
    token: str | None = None,
    jobs: bool = False,
    files: Path | None = None,
    quiet: bool = False,
) -> None:
    """Serve the dashboard until it is stopped; `target` is a folder of runs or one run.

    With `jobs` its page /jobs starts analyses, which a worker process beside it computes, and which may read
    what is in the folder `files`.

    Raises:
        LensError: no such folder, a busy port, or no dashboard installed.
        UsageError: `files` without `jobs`, or no folder; an address of another machine.
    """
    if files is not None and not (jobs and files.is_dir()):
        raise UsageError(f"--files {files} must be a folder, and goes with --jobs")
    if not target.is_dir():
        raise LensError(
            f"no folder {target}; make a run first: `lens demo`, or `lens run --out {target}`"
        )
    single = (target / "run.json").exists()
    folder = target.resolve().parent if single else target.resolve()
    try:
        from lens_dashboards.server import check_reach, serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lens"):
            raise
        raise LensError(
            f"the dashboard needs {error.name}; install it with pip install 'attention-lens[dashboard]'"
        ) from error
    with refused_as_usage():
        check_reach(host, token)
    check_port(port, host)
    path = f"/run/{target.resolve().name}" if single else "/"
    if not quiet:
        say(f"dashboard: {_link(host, port, path, token)} (stop it with Ctrl-C)")
    if not jobs:
        with suppress(KeyboardInterrupt):
            serve(folder, port=port, host=host, token=token)
        return
    from lens_analyses.jobs.desk import JobDesk
    from lens_analyses.jobs.worker import beside

    desk = JobDesk(folder, files)
    with suppress(KeyboardInterrupt), beside(folder):
        serve(folder, port=port, host=host, token=token, jobs=desk)


def _link(host: str, port: int, path: str, token: str | None) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}{path}" + (f"?{urlencode({'token': token})}" if token else "")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _free_port(host: str) -> int:
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
