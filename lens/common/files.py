"""Files that appear whole or not at all, and files read with care: regular ones of a bounded size, JSON without NaN.

What is read may be damaged, or made by somebody else: a pipe would be waited for without end, a link could
lead anywhere, a number of brackets or bytes could take all memory. Each is refused in one line.
"""

import contextlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lens.common.choices import is_number, is_whole
from lens.common.errors import FileError, LensError

PART = ".lens-part"
"""End of the name of a file that is not whole yet."""
MOST_JSON = 32 * 2**20
_DEEPEST = 64
_SHOWN = 80  # characters
_HALF = re.compile("[\ud800-\udfff]")
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN = {int, float, bool, type(None)}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, then rename it; nothing is left on failure.

    Raises:
        FileError: the disk is full, the folder cannot be written, and the like; it names `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:200]}.", suffix=PART)
        os.close(handle)
        _write_then_rename(Path(name), path, write)
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _fault_of_the_system(error)
        if number is None:
            raise
        raise FileError(number, os.strerror(number), str(path)) from error


def _fault_of_the_system(error: Exception) -> int | None:
    """The number of the system's fault that a writer in another language tells in words."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _write_then_rename(temporary: Path, path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time in a block that belongs to a folder: others wait; nothing is left behind.

    Where the system or the disk knows no such lock, nobody waits.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; NaN is refused (use null)."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=plain)
    write_text(path, text + "\n")


def plain(value: Any) -> int | float:
    """A number of numpy as one of Python, for `json.dumps(..., default=plain)`.

    Raises:
        TypeError: it is none.
    """
    if is_whole(value):
        return int(value)
    if is_number(value):
        return float(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def as_path(what: str, given: Any) -> Path:
    """The path that was given: a text or a `Path`.

    Raises:
        LensError: `a task must be the path of a file or folder, got ['x']`
    """
    if not isinstance(given, str | os.PathLike) or not str(given) or "\0" in str(given):
        raise LensError(f"{what} must be the path of a file or folder, got {given!r}"[:200])
    return Path(given)


def on_disk(given: str | Path) -> Path:
    """A path as a person writes it, `~` and all, whether something lies there or not.

    Raises:
        LensError: it is no path of this system: too long, of a user that is not known, not to be looked at.
    """
    try:
        path = Path(given).expanduser()
        path.exists()
        path.resolve()  # a circle of links
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LensError(f"{shorten(str(given))!r} is no path of this machine: {reason}") from None
    return path


def shorten(text: str) -> str:
    """Not more of a value than a line of an error holds."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, is in a folder; not where nobody can tell."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, a circle of links
        return False


@contextlib.contextmanager
def open_regular(path: Path, *, most: int, within: Path | None = None) -> Iterator[BinaryIO]:
    """A regular file of at most `most` bytes, open for reading in the block.

    Args:
        path: of the file.
        most: bytes.
        within: folder that the file must lie in, links followed.

    Raises:
        LensError: it is not there, a folder, pipe or device, larger, a link out of `within`, or fails while it is read.
    """
    try:
        own = within is not None and path.parent == within and not path.is_symlink()
        real = path if own else path.resolve(strict=True)
        if within is not None and not own and not lies_in(real, within):
            raise LensError(f"{path} is a link out of {within}; it is not followed")
        handle = os.open(real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # ValueError: a NUL; RuntimeError: a circle of links
        raise LensError(f"{path} cannot be read ({error}); restore it or make it again") from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        os.close(handle)
        if not stat.S_ISREG(found.st_mode):
            raise LensError(
                f"{path} is no regular file but a folder, pipe or device; make it again"
            )
        raise LensError(
            f"{path} has {found.st_size:,} bytes, more than the {most:,} that are read; make it again"
        )
    with os.fdopen(handle, "rb") as file:
        try:
            yield file
        except OSError as error:
            if error.filename is not None or isinstance(error, LensError):
                raise
            raise LensError(
                f"{path} cannot be read ({error}); restore it or make it again"
            ) from error


def read_text(path: Path, *, most: int = MOST_JSON, within: Path | None = None) -> str:
    """The text of a UTF-8 file.

    Raises:
        LensError: as `open_regular`, or it is not UTF-8.
    """
    with open_regular(path, most=most, within=within) as file:
        try:
            return file.read(most).decode()
        except UnicodeDecodeError as error:
            raise LensError(
                f"{path} cannot be read ({error}); restore it or make it again"
            ) from error


def read_json(path: Path, *, most: int = MOST_JSON, within: Path | None = None) -> dict[str, Any]:
    """Read a JSON object; halves of characters in its strings, which nothing can write, become U+FFFD.

    Raises:
        LensError: as `read_text`, or it is no JSON object, has NaN, or nests deeper than 64.
    """
    text = read_text(path, most=most, within=within)
    try:
        value = _settled(json.loads(text, parse_constant=_no_number))
    except (ValueError, RecursionError) as error:
        raise LensError(f"{path} cannot be read ({error}); restore it or make it again") from error
    if not isinstance(value, dict):
        raise LensError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def json_of_line(line: str) -> Any:
    """What a line of JSON says.

    Raises:
        ValueError: it is no JSON, nests too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def printable(text: str) -> str:
    """A text as it may be shown: control characters and changes of direction become U+FFFD."""
    return _NOT_TEXT.sub("\ufffd", text)


def _settled(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if depth > _DEEPEST and isinstance(value, (list, dict)):
        raise ValueError(f"nested deeper than {_DEEPEST}")
    if isinstance(value, list):
        if set(map(type, value)) <= _PLAIN:
            return value
        return [_settled(one, depth + 1) for one in value]
    if isinstance(value, dict):
        return {_HALF.sub("\ufffd", name): _settled(one, depth + 1) for name, one in value.items()}
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")
