"""The one exception that a user is meant to read, and faults of the system told as one."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class LensError(Exception):
    """Says in one line what was expected, what came, and what to do.

    The command line prints it without a traceback and exits with 1, or with 2 where what was asked for makes
    no sense; the dashboard shows it on a card.
    """


def first_line(error: Exception) -> str:
    """What an error of somebody else's code says, in one line: a title with what follows it; else its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said[:200].rstrip(".:")


@contextmanager
def told(say: Callable[[str], str]) -> Iterator[None]:
    """Whatever somebody else's code raises in the block is a LensError, `say` of its first line."""
    try:
        yield
    except LensError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise LensError(say(kind + first_line(error))) from error


class FileError(LensError, OSError):
    """A file or folder that cannot be read or written, for a reason of the system's, which is in `errno`."""

    def __str__(self) -> str:
        return in_words(self)


def in_words(error: OSError) -> str:
    """A fault of the system in one line: where, what, and what to do."""
    place = "a file or stream" if error.filename is None else os.fsdecode(error.filename)
    place = place if len(place) <= _LONGEST_PLACE else f"{place[:_LONGEST_PLACE]}…"
    for codes, reason in _FAULTS.items():
        if error.errno in codes:
            return f"{place}: {reason}"
    return f"{place}: {error.strerror or error}"


_LONGEST_PLACE = 300  # characters of a path in an error
_FAULTS = {
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
    ): "there is no space left; free some and run the same command "
    "again: what was finished is kept",
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
    ): "it may not be read or written here; change its permissions, or "
    "choose another place, e.g. with --out",
    (errno.ENOENT,): "it is not there, or the folder that it is in takes no files",
    (errno.ENAMETOOLONG,): "its name is too long for this disk",
    (errno.EMFILE, errno.ENFILE): "too many files are open; raise the limit with `ulimit -n`",
    (
        errno.ENOTDIR,
        errno.EEXIST,
    ): "a file is where a folder should be; choose another place, e.g. with --out",
    (errno.EISDIR,): "it is a folder, and a file is needed",
}
