"""Processes of one sequence on this machine, with what torchrun tells each.

They split from one that is forked from a process that has imported (`tests.analyses.started`).
"""

import importlib
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.analyses.started import forked

RANKS = 4


def run(module: str, folder: Path) -> None:
    """`module.main(folder, *ready)` in `RANKS` processes of one thread; fails with what they complained of.

    `ready` is what `module.prepare()` gave before the process split, where there is such a function.
    """
    complaints = folder.with_suffix(".complaints")
    first = forked(_split, module, str(folder), str(complaints))
    first.join(400)
    ended = first.exitcode
    first.kill()
    assert ended == 0, complaints.read_text()[-3000:]


def _split(module: str, folder: str, complaints: str) -> None:
    """Splits and waits; ends with 1 as soon as one failed, and the others end too."""
    os.dup2(os.open(complaints, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    work: Any = importlib.import_module(module)
    ready = work.prepare() if hasattr(work, "prepare") else ()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    running = set()
    for rank in range(RANKS):
        if not (child := os.fork()):
            os.environ.update(place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            try:
                work.main(Path(folder), *ready)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        running.add(child)
    while running:
        child, status = os.wait()
        running.remove(child)
        if status:
            for other in running:  # they would wait for it
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
