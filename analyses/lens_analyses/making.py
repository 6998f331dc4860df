"""A run while it is made: its log, how it is stopped, and what its folder says of how it ended."""

import errno
import logging
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lens.common.errors import LensError, in_words
from lens.common.files import PART, on_disk, shorten
from lens.runs import Run
from lens.runs.manifest import remove_own
from lens.runs.writer import RunWriter
from lens_analyses.console import LogFile, UsageError, log, refused_as_usage, stoppable


@dataclass
class Making:
    """A run in the making.

    Attributes:
        writer: of its folder.
        headline: what it found, in words.
        error: why it is not whole, though the run went on; None: it is.
        run: how it ended; there once the block is left.
    """

    writer: RunWriter
    headline: list[str] = field(default_factory=list)
    error: BaseException | None = None
    _run: Run | None = None

    @property
    def run(self) -> Run:
        """The run folder."""
        assert self._run is not None
        return self._run


def check_place(runs: Path) -> None:
    """Before a model is loaded: whether runs can have this folder.

    Raises:
        UsageError: it, or one above it, is a file.
    """
    with refused_as_usage():
        there = _nearest(runs)
    if not there.is_dir():
        raise UsageError(
            f"--out {shorten(str(runs))}: {there} is a file where a folder should be; choose another"
        )


def check_writable(runs: Path) -> None:
    """Before anything is computed for it: whether a folder can be made there.

    Raises:
        UsageError: as `check_place`, or the disk is read-only, or takes no folders; OSError: it is full.
    """
    check_place(runs)
    try:
        with tempfile.TemporaryDirectory(prefix=".", suffix=PART, dir=_nearest(runs)):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(
            f"--out {shorten(str(runs))}: no folder can be made there ({error.strerror}); choose another"
        ) from None


def _nearest(runs: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(one for one in (on_disk(runs), *runs.absolute().parents) if one.exists())


@contextmanager
def making(
    runs: Path, mapping: Mapping[str, Any], meta: Mapping[str, Any], *, again: bool = False
) -> Iterator[Making]:
    """Start or resume a run; its folder says `success`, `partial` or `error` when the block is left.

    Everything logged in the block goes to its `log.txt` too. Ctrl-C and SIGTERM end the block and leave a
    partial run; a `LensError` before any prompt was done leaves no folder.

    Raises:
        LensError: another process is at this run, or what the block raised.
    """
    fresh_parent = not runs.exists()
    made = Making(writer := RunWriter.start(runs, mapping, meta, again=again))
    try:
        with _log_file(writer.path / "log.txt"), stoppable():
            try:
                yield made
                status = "success" if made.error is None else "partial"
            except KeyboardInterrupt:
                status, made.error, made.headline = "partial", None, []
                log.info("stopped")
            except Exception as failure:
                log.debug("%s", traceback.format_exc())
                told = LensError(in_words(failure)) if isinstance(failure, OSError) else failure
                with suppress(OSError):  # a full disk: the folder then counts as stopped
                    _close(writer, "error", told)
                raise told from failure
            made._run = _close(writer, status, made.error)
    except LensError:
        if not writer.resumed and not writer.meta["prompts"]["done"]:
            remove_own(writer.path, writer.meta["files"])
            if fresh_parent:
                with suppress(OSError):
                    runs.rmdir()
        raise


def prompt_row(
    number: int, kind: str, title: str, text: str, ids: list[int], strings: list[str]
) -> dict[str, Any]:
    """A row of `prompts.parquet` with nothing done yet."""
    return {
        "prompt_id": f"p{number:03d}",
        "kind": kind,
        "title": title,
        "text": text,
        "tokens": len(ids),
        "token_ids": ids,
        "token_strings": strings,
        "loss": float("nan"),
        "loss_repeat": float("nan"),
        "status": "pending",
        "seconds": float("nan"),
    }


def _close(writer: RunWriter, status: str, error: BaseException | None) -> Run:
    log.info("%s after %.1f s", status, writer.meta["seconds"])
    writer.record("log.txt")
    return writer.finish(status, error)


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Everything logged goes to `path` too, tracebacks included."""
    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with suppress(OSError):
            handler.close()
