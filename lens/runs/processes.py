"""Whether the process that writes a run is still there."""

import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil

SILENCE = timedelta(days=1)
"""A run written on another machine counts as abandoned when it has not changed for this long."""
_CLOCKS = timedelta(minutes=10)  # by which those of two machines may differ


def this_process() -> dict[str, Any]:
    """Entries of `run.json` by which `is_writing` knows this process again."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "process_started": _started(psutil.Process()),
    }


def is_writing(meta: Mapping[str, Any]) -> bool:
    """Whether the process that `run.json` names is still there.

    A process of the same number that started at another time is not it. On another machine nobody can
    look: there the run counts as being written while it changes at least once a day; a date that is yet to
    come says nothing.
    """
    pid = meta.get("pid")
    if meta.get("host") != socket.gethostname():
        return not _silent(meta.get("updated"))
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        process = psutil.Process(pid)
        is_there = (
            process.status() != psutil.STATUS_ZOMBIE
        )  # exited, and its parent has not noticed
        return is_there and meta.get("process_started") in (None, _started(process))
    except (psutil.NoSuchProcess, OverflowError):
        return False
    except psutil.AccessDenied:
        return True


def _silent(updated: Any) -> bool:
    try:
        return not -_CLOCKS <= datetime.now(UTC) - datetime.fromisoformat(updated) <= SILENCE
    except (TypeError, ValueError):
        return True


def _started(process: psutil.Process) -> int:
    """Hundredths of a second between boot and the start of the process; a changed clock changes nothing."""
    return round(100 * (process.create_time() - psutil.boot_time()))
