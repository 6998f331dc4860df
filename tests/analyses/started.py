"""`lens ...` as processes of its own that are forked from one that has imported: each starts at once.

What they write goes to files, so that none waits for a reader.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import reduction
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["tests.analyses.imported"])


def forked(function: Callable[..., object], *given: Any) -> Any:
    """A process that calls the function, started."""
    process = FORKING.Process(target=function, args=given)
    with _found():
        process.start()
    return process


class Started:
    """As much of `subprocess.Popen` as tests ask for.

    Args:
        words: of the command.
        complaints: a descriptor that its complaints go to, in place of a file.
    """

    def __init__(self, *words: object, complaints: int | None = None) -> None:
        self._files: list[TextIO] = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        handles = [file.fileno() for file in self._files]
        if complaints is not None:
            handles[1] = complaints
        self._process = forked(_run, [*map(str, words)], _Handles(handles))
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As of a process that was waited for; None: it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Its code if it has ended."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Nothing if it has ended."""
        if self.poll() is None and self.pid:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to both, when it has ended."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "it goes on"
        return self.said(0), self.said(1)

    def said(self, number: int) -> str:
        """What it wrote so far: 0 to stdout, 1 to stderr."""
        place = self._files[number].fileno()  # of which the child has the offset too
        return os.pread(place, os.fstat(place).st_size, 0).decode()

    def complaint(self) -> str:
        """The first line of its complaints, when it is there."""
        while "\n" not in (said := self.said(1)):
            assert self.poll() is None, said
            time.sleep(0.02)
        return said.partition("\n")[0]

    def end(self) -> None:
        """Kill it if it still runs, and forget what it wrote."""
        self._process.kill()
        self._process.join()
        for file in self._files:
            file.close()


class _Handles:
    """Descriptors, which are others in the process that they are handed to."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __reduce__(self) -> Any:
        return _Handles._taken, tuple(map(reduction.DupFd, self.numbers))

    @staticmethod
    def _taken(*given: Any) -> list[int]:
        return [one.detach() for one in given]


@contextlib.contextmanager
def _found():
    """The process that forks finds the project's folders."""
    folders = [ROOT, *(ROOT / name for name in ("kernels", "analyses", "dashboards"))]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _run(words: list[str], handles: Any) -> None:
    for number, handle in enumerate(handles, 1):
        os.dup2(handle, number)
    # a test run that was put in the background ignores Ctrl-C, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from lens_analyses.cli import main

    sys.argv = ["lens", *words]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
