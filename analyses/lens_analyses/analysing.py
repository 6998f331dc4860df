"""The steps of a run after its profile: each makes its section, or leaves the reason why there is none.

What a model or its prompts do not allow is `unsupported`, and the run is whole without it. What was not foreseen
is a failure: the other sections are made, and the run is partial, so that the same command tries it again.
"""

import time
import traceback
from contextlib import suppress
from pathlib import Path

from lens.common.errors import LensError
from lens.runs.folders import CIRCUITS
from lens.runs.writer import RunWriter
from lens_analyses.console import log, one_line, told_each_minute
from lens_analyses.estimate import Pace
from lens_analyses.steps import Step, steps_of
from lens_analyses.steps.subject import Subject


def analyse(subject: Subject, writer: RunWriter, pace: Pace) -> LensError | None:
    """Make the sections of this kind of run that are not there.

    Args:
        subject: the run with its profile.
        writer: of its folder.
        pace: of the run so far.

    Returns:
        What failed, by section; None where nothing did.

    Raises:
        OSError: a file cannot be written, which the next step could not either.
    """
    for left_out in subject.left_out():
        log.warning("%s", left_out)
        writer.warn(left_out)
    failed: dict[str, str] = {}
    for step in steps_of(subject.config.what, subject.model.chosen, subject.labelled):
        if not step.is_wanted(subject.settings, subject.config.prompts):
            continue
        if step.name in subject.run.sections:
            log.info("%s was finished before", step.name)
        elif step.needs in failed:
            failed[step.name] = f"needs the section {step.needs}, which failed"
        elif step.needs in writer.meta["unsupported"]:
            _leave_out(step, f"needs the section {step.needs}, which is unsupported", writer)
        else:
            try:
                _make(step, subject, writer, pace)
            except OSError:
                raise
            except LensError as reason:
                _leave_out(step, str(reason), writer)
            except Exception as failure:
                log.debug("%s", traceback.format_exc())
                failed[step.name] = f"{type(failure).__name__}: {one_line(str(failure))}"
        pace.took(step.name, None)  # where it ran, that is known already
    _clear(subject.run.path / "work")
    told = [f"the section {name} failed: {reason}" for name, reason in failed.items()]
    for line in told:
        log.warning("%s", line)
        writer.warn(line)
    return LensError("; ".join(told)) if told else None


def _make(step: Step, subject: Subject, writer: RunWriter, pace: Pace) -> None:
    start = time.monotonic()
    log.info("%s%s", step.name, pace.words())
    before = _circuits(writer.path)

    def left() -> str:
        return pace.words(step.name, time.monotonic() - start)

    with told_each_minute(subject.output, step.name, left):
        section = step.run(subject)
    pace.took(step.name, time.monotonic() - start)
    made = [name for name, state in _circuits(writer.path).items() if before.get(name) != state]
    writer.record(*made, *section.save(writer.path))
    log.debug("%s took %.1f s", step.name, time.monotonic() - start)


def _leave_out(step: Step, reason: str, writer: RunWriter) -> None:
    log.info("%s is unsupported: %s", step.name, reason)
    writer.update(unsupported={**writer.meta["unsupported"], step.name: reason})


def _circuits(run: Path) -> dict[str, tuple[int, int]]:
    """Files that steps write beside their sections -> when they changed, and the size."""
    found = {path: path.stat() for path in (run / CIRCUITS).rglob("*.json")}
    return {
        path.relative_to(run).as_posix(): (state.st_mtime_ns, state.st_size)
        for path, state in found.items()
    }


def _clear(work: Path) -> None:
    """Remove half-done work, and its folder unless it holds what is somebody else's."""
    for half_done in work.glob("*.npz"):
        half_done.unlink()
    with suppress(OSError):
        work.rmdir()
