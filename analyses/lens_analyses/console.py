"""What the command says: results on stdout, everything else on stderr, errors in one line.

Logs go through `logging` to a rich console on stderr, so that a progress bar and messages do not mix.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

from lens.common.errors import LensError, in_words
from lens.common.files import printable

if TYPE_CHECKING:
    from rich.console import Console

OK, ERROR, USAGE, PARTIAL = 0, 1, 2, 3
log = logging.getLogger("lens_analyses")


class UsageError(LensError):
    """What was asked for makes no sense, or does not fit the model or the text; exit code 2."""


@contextmanager
def refused_as_usage() -> Iterator[None]:
    """What is refused inside is the fault of what was asked for, and nothing was computed: exit code 2."""
    try:
        yield
    except UsageError:
        raise
    except LensError as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True)
class Output:
    """How one command talks.

    Attributes:
        json: one JSON object on stdout, nothing else there.
        quiet: only errors on stderr.
        debug: show tracebacks.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False

    def result(self, text: str, data: Any) -> None:
        """The answer of the command: `text` for people, or `data` as JSON.

        Raises:
            OSError: nobody takes it, or the disk that takes it is full.
        """
        if sys.stdout is None:
            return
        try:
            sys.stdout.write(printable(to_json(data) if self.json else text.rstrip("\n") + "\n"))
            sys.stdout.flush()
        except OSError:
            _give_up(sys.stdout)
            raise

    @cached_property
    def console(self) -> "Console":
        """The rich console on stderr that log and progress bar share; no colour where there is no terminal."""
        from rich.console import Console

        class Unheard(Console):
            def on_broken_pipe(self) -> None:
                """Nobody reads: the work goes on, in silence."""
                self.quiet = True
                _give_up(sys.stderr)

        return Unheard(stderr=True, highlight=False, quiet=self.quiet)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Set up logging, and turn exceptions into one line and an exit code.

        Raises:
            SystemExit: 1, or 2 for a `UsageError`, after an exception inside the block.
        """
        handler = _Handler(self)
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        log.propagate = False
        try:
            yield
        except LensError as error:
            self._fail(error, str(error), USAGE if isinstance(error, UsageError) else ERROR)
        except KeyboardInterrupt as error:
            self._fail(error, "stopped", ERROR)
        except BrokenPipeError:
            raise SystemExit(ERROR) from None
        except OSError as error:
            self._fail(error, in_words(error), ERROR)
        except Exception as error:
            message = (
                f"{type(error).__name__}: {one_line(str(error))} "
                "(not foreseen; run it again with --debug for the traceback, and report it)"
            )
            self._fail(error, message, ERROR)
        finally:
            log.removeHandler(handler)

    def _fail(self, error: BaseException, message: str, code: int) -> None:
        if self.debug:
            traceback.print_exception(error, file=sys.stderr)
        say(f"error: {message}")
        if self.json:
            told = {"type": type(error).__name__, "message": message}
            with suppress(OSError):  # what could not be said once
                self.result("", {"status": "error", "error": told})
        raise SystemExit(code)


class _Handler(logging.Handler):
    """Log lines on the console that the progress bar uses, so that they come above the bar."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.ERROR if output.quiet else logging.INFO)
        self._console = output.console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(printable(record.getMessage()), markup=False, soft_wrap=True)
        except (OSError, ValueError):  # a full disk or a closed file takes no log: the work goes on
            self._console.quiet = True


def _give_up(stream: TextIO) -> None:
    """What it still holds goes nowhere, so that Python does not try again at the end and fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class LogFile(logging.FileHandler):
    """A log that a full disk does not take is not worth a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Nothing: what was meant to be written fails itself."""


@contextmanager
def progress_bar(
    output: Output, title: str, total: float, completed: Callable[[], float]
) -> Iterator[None]:
    """A bar with elapsed time and ETA on stderr; nothing when quiet or when stderr is no terminal.

    Args:
        output: whose console it is.
        title: in front of the bar.
        total: all the work, in any unit.
        completed: how much of it is done; asked ten times a second.
    """
    from rich import progress

    class Polled(progress.Progress):
        def get_renderables(self) -> Iterable[Any]:
            for task in self.task_ids:
                self.update(task, completed=completed())
            return super().get_renderables()

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    hidden = output.quiet or not output.console.is_terminal

    def share() -> str:
        return f", {min(1.0, completed() / total):.0%}" if total else ""

    with (
        told_each_minute(output, title, share),
        Polled(*columns, console=output.console, disable=hidden, transient=True) as bar,
    ):
        bar.add_task(title, total=total)
        yield


@contextmanager
def told_each_minute(
    output: Output, what: str, more: Callable[[], str] = str, *, every: float = 60.0
) -> Iterator[None]:
    """Outside a terminal, where there is no bar: a line a minute that says what is going on and for how long.

    Args:
        output: whose console it is.
        what: is being done.
        more: asked each time for what else there is to say.
        every: seconds.
    """
    if output.quiet or output.console.is_terminal:
        yield
        return
    ended, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(every):
            log.info("%s: %.0f min so far%s", what, (time.monotonic() - start) / 60, more())

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM stops a run as Ctrl-C does: in order, to be completed later.

    Once: the system sends one for each thread of a worker that dies, and the later ones come
    while the run is saved.
    """

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def to_json(data: Any) -> str:
    """JSON text with a final newline; NaN and infinities become null."""
    return json.dumps(finite(data), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def finite(data: Any) -> Any:
    """The same data without NaN and infinities, which JSON has not."""
    if isinstance(data, dict):
        return {str(name): finite(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    if isinstance(data, float):
        return data if abs(data) < float("inf") else None
    return data


def one_line(message: str) -> str:
    """The message without line breaks."""
    return " ".join(message.split())


def say(message: str) -> None:
    """One line on stderr, if it is there."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{printable(one_line(message))}\n")
