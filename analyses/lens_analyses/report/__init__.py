"""One HTML file that opens offline, and the same numbers as JSON, from a run folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens.common.files import write_text
from lens.figures.style import untemplated
from lens.runs import Run
from lens.runs.first_screen import first_screen
from lens.runs.writer import RunWriter
from lens_analyses.console import to_json
from lens_analyses.report.charts import charts, only_picture, pictures, section_charts
from lens_analyses.report.maps import head_maps
from lens_analyses.report.numbers import numbers
from lens_analyses.report.page import page

_LARGEST = 2**28  # bytes of the numbers of a report


@dataclass(frozen=True)
class Report:
    """A report before it is written.

    Attributes:
        html: the page.
        numbers: what it says, as plain values.
    """

    html: str
    numbers: dict[str, Any]

    @property
    def headline(self) -> list[str]:
        """What the run found, in words: `headline_of` its numbers."""
        return headline_of(self.numbers)

    def files(self) -> dict[str, str]:
        """Name -> content."""
        return {"report.json": to_json(self.numbers), "report.html": self.html}

    def write(self, writer: RunWriter) -> None:
        """The files into a run folder, entered in its `run.json`."""
        for name, content in self.files().items():
            writer.text(name, content)


@dataclass(frozen=True)
class Written:
    """Where a report lies."""

    html: Path
    json: Path
    status: str

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"html": str(self.html), "json": str(self.json), "status": self.status}


def headline_of(numbers: Mapping[str, Any]) -> list[str]:
    """The sentences of the first screen, and which kinds of heads there are not.

    Of a run whose sections have none, the first of each and those of the profile.
    """
    if numbers["headlines"]:
        missed = [one["text"] for one in numbers["summary"] if not one["found"]]
        return [*(one["text"] for one in numbers["headlines"]), *missed]
    sections = [part["summary"][0] for part in numbers["sections"] if part["summary"]]
    return [*sections, *(finding["text"] for finding in numbers["summary"])]


def stored_headline(run: Run) -> list[str]:
    """What the command that made a run said it found, from its report; made again where that cannot be read."""
    try:
        return headline_of(run.door.json("report.json", most=_LARGEST))
    except (LensError, KeyError):  # KeyError: of another version
        return render(run).headline


@untemplated()
def render(run: Run, status: str | None = None) -> Report:
    """Make the report of a run; `status` is what the run is about to be.

    What cannot be read is told in its place.

    Raises:
        LensError: nothing of the run can be read.
    """
    sections, problems = run.readable()
    run, damaged = run.readable_tables()
    if "heads" in damaged and not sections:
        raise LensError(damaged["heads"])
    shown = first_screen(run.heads, sections)
    data = numbers(run, sections, shown, damaged, [*run.damage, *problems], status)
    figures = {**charts(data), **section_charts(sections)}
    only = None if shown else only_picture(figures)
    figures |= pictures(shown) if only is None else {"summary": only[1]}
    html = page(data, head_maps(run, data["summary"]), figures, only[0] if only else "")
    return Report(html, data)


def write_report(run: Run, out: Path | None = None) -> Written:
    """Write report.html and report.json into `out`, or into the run folder.

    Raises:
        LensError: as `render`, or the run is being computed right now.
    """
    if run.status == "started":
        raise LensError(
            f"{run.path} is being computed right now; it gets its report when it is done"
        )
    report = render(run)
    if out is None:
        report.write(RunWriter(run.path, run.meta, resumed=True))
    else:
        for name, content in report.files().items():
            write_text(out / name, content)
    folder = run.path if out is None else out
    return Written(folder / "report.html", folder / "report.json", run.status)
