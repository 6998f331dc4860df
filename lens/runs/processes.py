"""Whether the process that writes a run is still there."""

import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

SILENCE = timedelta(days=1)
"""A run written on another machine counts as abandoned when it has not changed for this long."""


def this_process() -> dict[str, Any]:
    """Entries of `run.json` by which `is_writing` knows this process again."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "process_started": _start_time(os.getpid()),
    }


def is_writing(meta: Mapping[str, Any]) -> bool:
    """Whether the process that `run.json` names is still there.

    A process of the same number that started at another time is not it. On another machine nobody can
    look: there the run counts as being written while it changes at least once a day.
    """
    pid = meta.get("pid")
    if meta.get("host") != socket.gethostname():
        return not _silent(meta.get("updated"))
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return meta.get("process_started") in (None, _start_time(pid)) and not _is_zombie(pid)


def _silent(updated: Any) -> bool:
    try:
        return datetime.now(UTC) - datetime.fromisoformat(updated) > SILENCE
    except (TypeError, ValueError):
        return True


def _start_time(pid: int) -> int | None:
    """Clock ticks between boot and the start of the process; None where /proc does not tell."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else None


def _is_zombie(pid: int) -> bool:
    """It has exited and only its parent has not noticed."""
    return _stat(pid)[:1] == ["Z"]


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
