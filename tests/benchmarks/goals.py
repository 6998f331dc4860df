"""The speed and memory goals, and what of each was reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Record = Mapping[str, str]
Figures = Callable[..., float]
CPU, GPU = "causal 4,096", "causal 8,192"
_STEP = "one query on 16,384 keys"
CAPTURE = "capture of 16,384 tokens, 2-layer Llama"


class NotMeasured(LookupError):  # noqa: N818
    """A row that a goal needs is missing or has no figure."""


@dataclass(frozen=True)
class Goal:
    """One figure to reach.

    Attributes:
        text: as it stands in the table.
        figure: `find` -> the figure; `find(case, contender, statistics, column)` reads one row.
        limit: to stay under, or to reach where `at_least`.
        stretch: the better limit, if there is one.
        unit: format of the figure.
        ends: `find` -> both ends of the figure's interval; a goal that lies between them is undecided.
    """

    text: str
    figure: Callable[[Figures], float]
    limit: float
    stretch: float | None = None
    at_least: bool = False
    unit: str = "{:.2f} x"
    ends: Callable[[Figures], tuple[float, float]] | None = None

    def line(self, rows: Sequence[Record]) -> tuple[str, str, str]:
        """(text, figure, verdict)."""

        def find(case: str, contender: str, statistics: str, column: str) -> float:
            for row in rows:
                if (row["case"], row["contender"], row["statistics"]) == (
                    case,
                    contender,
                    statistics,
                ) and row.get(column):
                    return float(row[column])
            raise NotMeasured

        try:
            figure = self.figure(find)
        except NotMeasured:
            return self.text, "not measured", "-"
        told = self.unit.format(figure)
        try:
            low, high = self.ends(find) if self.ends else (figure, figure)
        except NotMeasured:
            low = high = figure
        else:
            told += f" [{low:.2f}, {high:.2f}]" if self.ends else ""
        return self.text, told, self._verdict(low, high)

    def _verdict(self, low: float, high: float) -> str:
        reached = [self._reaches(end, self.limit) for end in (low, high)]
        if self._reaches(low, self.stretch) and self._reaches(high, self.stretch):
            return "met, stretch too"
        if all(reached):
            return "met"
        return "undecided" if any(reached) else "**missed**"

    def _reaches(self, figure: float, limit: float | None) -> bool:
        if limit is None:
            return False
        return figure >= limit if self.at_least else figure <= limit


def _against(case: str, ours: tuple[str, str], other: tuple[str, str], column: str) -> Callable:
    """The figure of one row divided by that of another of the same case."""

    def figure(find: Figures) -> float:
        return find(case, *ours, column) / find(case, *other, column)

    return figure


_EAGER = ("eager with weights", "")
_C, _G = "ours (cpu)", "ours (triton)"
_OUTPUT_MB = 131_072 * 32 * 128 * 2 / 2**20
_MAPS, _COLUMNS = "rows + blocks", "rows + blocks + columns"


def _to_sdpa(
    text: str, case: str, statistics: str, limit: float, stretch: float | None = None
) -> Goal:
    """A time of ours on the CPU at most `limit` of SDPA's."""

    def read(find: Figures, column: str) -> float:
        return find(case, _C, statistics, column)

    return Goal(
        text,
        lambda find: read(find, "ratio_to_sdpa"),
        limit,
        stretch,
        ends=lambda find: (read(find, "ratio_low"), read(find, "ratio_high")),
    )


GOALS: dict[str, tuple[Goal, ...]] = {
    "2 cores, causal, 8 heads x 64, 4,096 tokens": (
        _to_sdpa(
            "row statistics + block mass at most 0.70 x SDPA (stretch 0.60)", CPU, _MAPS, 0.7, 0.6
        ),
        _to_sdpa("all statistics at most 1.0 x SDPA (stretch 0.85)", CPU, "all", 1.0, 0.85),
        _to_sdpa(
            "bfloat16: row statistics + block mass at most 1.0 x SDPA (stretch 0.8)",
            f"{CPU}, bfloat16",
            _MAPS,
            1.0,
            0.8,
        ),
        _to_sdpa(
            "one query on 16,384 keys: row statistics at most 1.0 x SDPA (stretch 0.9)",
            _STEP,
            "rows",
            1.0,
            0.9,
        ),
        _to_sdpa("the same in bfloat16 at most 1.0 x SDPA", f"{_STEP}, bfloat16", "rows", 1.0),
        Goal(
            "row statistics + block mass at least 8 x faster than eager with weights",
            _against(CPU, _EAGER, (_C, _MAPS), "median_ms"),
            8.0,
            at_least=True,
        ),
        Goal(
            "peak extra memory with received mass + diagonals under 5 % of eager's",
            _against(CPU, (_C, _COLUMNS), _EAGER, "peak_mb"),
            0.05,
            unit="{:.1%}",
        ),
        Goal(
            "16,384 tokens captured through 2 Llama layers in a process under 2,000 MB",
            lambda find: find(CAPTURE, "lens.capture", "all", "peak_mb"),
            2000,
            unit="{:,.0f} MB",
        ),
    ),
    "H200, bfloat16, causal, 32 heads x 128": (
        Goal(
            "8,192 tokens: forward + LSE at least 400 TFLOP/s (stretch 500)",
            lambda find: find(GPU, _G, "lse", "tflops"),
            400,
            500,
            at_least=True,
            unit="{:.0f}",
        ),
        Goal(
            "8,192 tokens: row statistics at most 10 % on top of forward + LSE (stretch 5 %)",
            _against(GPU, (_G, "rows"), (_G, "lse"), "median_ms"),
            1.1,
            1.05,
        ),
        Goal(
            "8,192 tokens: everything at most 2.0 x forward + LSE (stretch 1.6)",
            _against(GPU, (_G, "all"), (_G, "lse"), "median_ms"),
            2.0,
            1.6,
        ),
        Goal(
            "8,192 tokens: backward with attribution at most 1.15 x without",
            _against(
                "forward and backward 8,192", (_G, "lse + attribution"), (_G, "lse"), "median_ms"
            ),
            1.15,
        ),
        Goal(
            "131,072 tokens: everything in at most 2,048 MB beyond inputs and output (stretch 1,024)",
            lambda find: find("causal 131,072", _G, "all", "peak_mb") - _OUTPUT_MB,
            2048,
            1024,
            unit="{:,.0f} MB",
        ),
    ),
}


def table(rows: Sequence[Record]) -> list[str]:
    """Markdown lines of all goals."""
    lines: list[str] = []
    for setting, goals in GOALS.items():
        lines += [f"| goal ({setting}) | reached | |", "|---|---|---|"]
        lines += [f"| {' | '.join(goal.line(rows))} |" for goal in goals]
        lines.append("")
    return lines
