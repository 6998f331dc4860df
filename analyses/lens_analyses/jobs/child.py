"""The process of one job: the `lens` command, which ends in order when its worker dies.

python -m lens_analyses.jobs.child PID ARGUMENTS...
"""

import ctypes
import os
import signal
import sys

from lens_analyses.cli import main

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Have the system send SIGTERM to this process when `parent` ends; only Linux can."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before it was asked
        raise SystemExit(1)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    main(sys.argv[2:])
