"""Values that name something on this machine."""

from pathlib import Path

from lens.common.errors import LensError
from lens.common.files import on_disk


def local(name: str | Path) -> Path:
    """A path as a person writes it, whole and with its links followed.

    Raises:
        LensError: it is no path of this system, such as one that is too long.
    """
    return on_disk(name).resolve()


def is_folder(name: str) -> bool:
    """Whether a value names a folder of this machine."""
    try:
        return local(name).is_dir()
    except LensError:
        return False


def is_task_file(name: str) -> bool:
    """Whether a task is a file of prompts rather than one that `lens.tasks` makes."""
    return Path(name).suffix in (".jsonl", ".ndjson")
