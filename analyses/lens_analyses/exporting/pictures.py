"""Figures of a run as SVG, PDF and PNG in the sizes of a paper, where a browser is there to draw them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import plotly.io as pio

from lens.figures import head_grid, metric_by_layer
from lens.figures.paper import PIXELS_PER_INCH, WIDTHS, for_paper
from lens.runs import Run
from lens.runs.schema import PROMPT_KINDS
from lens_analyses.console import UsageError
from lens_analyses.report.page import COLUMNS

PICTURES = ("svg", "pdf", "png")
_DOTS_PER_INCH = 300
_INSTALL = (
    "install what draws pictures with pip install 'attention-lens[export]', and a browser (apt install "
    "chromium, or Chrome; BROWSER_PATH names another one). `lens report` needs neither"
)


@dataclass(frozen=True)
class Pictures:
    """Files that were written, relative to their folder, and why the others were not."""

    files: tuple[str, ...]
    missing: str = ""


def write_pictures(run: Run, out: Path, kinds: Sequence[str], width: str) -> Pictures:
    """Write every figure of a run in every kind of picture, by one session of the browser.

    Args:
        run: with its tables.
        out: folder.
        kinds: of `PICTURES`.
        width: `single` or `double` column; print is 8 pt, PNG has 300 dots an inch.

    Raises:
        UsageError: an unknown kind or width.
        LensError: no figure in the run.
    """
    if not kinds or (unknown := [kind for kind in kinds if kind not in PICTURES]):
        got = ", ".join(unknown) if kinds else "none"
        raise UsageError(f"pictures are {', '.join(PICTURES)}, got {got}")
    if width not in WIDTHS:
        raise UsageError(f"width must be {' or '.join(WIDTHS)}, got {width!r}")
    figures = {
        name: for_paper(figure, width=width)  # pyright: ignore[reportArgumentType]
        for name, figure in paper_figures(run).items()
    }
    names = [f"{name}.{kind}" for name in figures for kind in kinds]
    if missing := _browser_problem():
        return Pictures((), missing)
    out.mkdir(parents=True, exist_ok=True)
    before = {name: _state(out / name) for name in names}  # of an earlier export
    scales: list[int | float | None] = [
        _DOTS_PER_INCH / PIXELS_PER_INCH if kind == "png" else 1 for _ in figures for kind in kinds
    ]
    drawn = [figure for figure in figures.values() for _ in kinds]
    try:
        pio.write_images(
            drawn,
            [out / name for name in names],
            scale=scales,
            width=[figure.layout.width for figure in drawn],  # pyright: ignore[reportAttributeAccessIssue]
            height=[figure.layout.height for figure in drawn],  # pyright: ignore[reportAttributeAccessIssue]
        )
    except Exception as error:  # of the browser, whatever it says
        done = tuple(name for name in names if _state(out / name) not in (None, before[name]))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Pictures(done, f"the browser failed ({reason}); {_INSTALL}")
    return Pictures(tuple(names))


def paper_figures(run: Run) -> dict[str, go.Figure]:
    """Name -> figure: grids of the scores that reports show, sinks by layer, and those of the sections."""
    kinds = [kind for kind in PROMPT_KINDS if (run.heads["prompt_id"] == kind).any()]
    made = {}
    for metric, variant, best in COLUMNS if kinds else ():
        kind = best if best in kinds else kinds[0]
        rows = run.heads[run.heads["prompt_id"] == kind]
        if ((rows["metric"] == metric) & (rows["variant"] == variant)).any():
            made[f"heads-{metric}-{variant}-{kind}".replace("_", "-")] = head_grid(
                rows, metric, variant
            )
    if kinds:
        rows = run.heads[run.heads["prompt_id"] == kinds[0]]
        made["sinks-by-layer"] = metric_by_layer(rows, "sink_mass")
    for name, section in run.readable()[0].items():
        for part, figure in section.figures.items():
            made[f"{name}-{part}".replace("_", "-")] = figure
    return made


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written; None: there is none."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _browser_problem() -> str:
    """Why no picture can be drawn; "" where it can be tried."""
    try:
        import choreographer.browsers.chromium as chromium
        import kaleido  # noqa: F401
    except ModuleNotFoundError as error:
        return f"no picture can be drawn without {error.name}: {_INSTALL}"
    for name in ("kaleido", "choreographer", "browser_proc"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if chromium.Chromium.find_browser(skip_local=False) is None:
        return f"no picture can be drawn without a browser: {_INSTALL}"
    return ""
