"""Values that name something on this machine, and how much of a wrong one an error shows."""

from pathlib import Path

from lens.common.errors import LensError

_SHOWN = 80  # characters


def local(name: str | Path) -> Path:
    """A path as a person writes it, whole and with its links followed.

    Raises:
        LensError: it is no path of this system, such as one that is too long.
    """
    try:
        path = Path(name).expanduser().resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LensError(f"{shorten(str(name))!r} is no path of this machine: {reason}") from None
    return path


def is_folder(name: str) -> bool:
    """Whether a value names a folder of this machine."""
    try:
        return local(name).is_dir()
    except LensError:
        return False


def is_task_file(name: str) -> bool:
    """Whether a task is a file of prompts rather than one that `lens.tasks` makes."""
    return Path(name).suffix in (".jsonl", ".ndjson")


def shorten(text: str) -> str:
    """Not more of a value than a line of an error holds."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
