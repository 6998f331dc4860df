"""Processes of one sequence on this machine, with what torchrun tells each: they import once, then the process splits.

python -m tests.ranks tests.lens.split_capture FOLDER
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.shapes import ROOT

RANKS = 4


def run(module: str, folder: Path) -> None:
    """`module.main(folder, *ready)` in `RANKS` processes of one thread; fails with what they complained of.

    `ready` is what `module.prepare()` gave before the process split, where there is such a function.
    """
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks", module, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def main(module: str, folder: str) -> int:
    """Splits and waits; 1 as soon as one failed, and the others end too."""
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
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
