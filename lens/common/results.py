"""What a result says of itself where it is printed, and where a notebook shows it."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lens.common.plots import draw, opened

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SENTENCES = 4
ROWS = 8


class Sentence(str):
    """One thing that a result says, in plain words; it is a string, and knows what it speaks of.

    Attributes:
        kind: what it says, such as "effect" or "limit": by this it is found, never by its place or words.

    Example:
        >>> said = Sentence("Of 18 heads 4 have a sink.", kind="rate")
        >>> said.kind, said.text
        ('rate', 'Of 18 heads 4 have a sink.')
    """

    kind: str

    def __new__(cls, text: str, kind: str) -> Sentence:
        sentence = super().__new__(cls, text)
        sentence.kind = kind
        return sentence

    @property
    def text(self) -> str:
        """The words alone."""
        return self[:]

    def __getnewargs__(self) -> tuple[str, str]:
        return self.text, self.kind


def of_kind(sentences: Iterable[Sentence], *kinds: str) -> tuple[Sentence, ...]:
    """Those of these kinds, in their order."""
    return tuple(sentence for sentence in sentences if sentence.kind in kinds)


def ends(low: float, high: float, form: str = ".3g") -> str:
    """` [low, high]` behind a number, both in this form; nothing where one is NaN, as of a single prompt."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f" [{written(low, form)}, {written(high, form)}]"


def written(value: float, form: str) -> str:
    """A number in this form, in which what rounds to 0 has no minus before it.

    Example:
        >>> written(-0.004, ".2f"), written(-0.004, "+.1%")
        ('0.00', '-0.4%')
    """
    sign = form[:1] if form[:1] in ("+", "-", " ") else ""
    return format(value, f"{sign}z{form.removeprefix(sign).removeprefix('z')}")


def if_known(value: float, form: str = ".1%") -> str:
    """A number in words; `not known` of NaN, such as uniform attention where the mask is not."""
    return "not known" if math.isnan(value) else written(value, form)


def with_ends(row: Any, name: str, form: str = ".3g", *, plain: bool = False) -> str:
    """A number of a row of a table with its interval: `0.5 [0.4, 0.6]` of the columns `name`, `name_low` and `name_high`.

    Args:
        plain: the ends are `low` and `high`, as of `lens.stats.intervals.columns`.
    """
    start = "" if plain else f"{name}_"
    return f"{written(row[name], form)}{ends(row[f'{start}low'], row[f'{start}high'], form)}"


def counted(count: int, one: str) -> str:
    """ "1 prompt", "2 prompts": a number with its noun, whose plural takes an s.

    Example:
        >>> counted(1, "random order"), counted(0, "head")
        ('1 random order', '0 heads')
    """
    return f"{count} {one}{'s' * (count != 1)}"


def numbered(names: Iterable[object], form: str = "{} ({})") -> tuple[str, ...]:
    """Names, of which those that came before have a number behind them: "A", "B", "A (2)".

    Example:
        >>> numbered(["patch", "patch"], "{}_{}")
        ('patch', 'patch_2')
    """
    found: list[str] = []
    for own in map(str, names):
        name, count = own, 1
        while name in found:
            count += 1
            name = form.format(own, count)
        found.append(name)
    return tuple(found)


def few(names: Sequence[object], most: int = 6, joint: str = ", ") -> str:
    """The first names and how many more there are: `L0H1, L0H2 and 3 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return joint.join(map(str, names[:most])) + more


def by_size(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows of a table, those with the largest number by size first, of equal ones the first; without a number last."""
    return table.sort_values(column, key=abs, ascending=False, kind="stable", ignore_index=True)


class Result:
    """Anything that an analysis gives back: in a notebook its sentences and the first rows of its table."""

    def table(self) -> pd.DataFrame:
        """The numbers, with intervals where there are any."""
        raise NotImplementedError

    def findings(self) -> tuple[Sentence, ...]:
        """What the numbers say; nothing where they stand alone."""
        return ()

    def plot(self, *args: Any, **options: Any) -> go.Figure:
        """The figure of this result; `title`, `width`, `height` and `theme` are options of every figure.

        Raises:
            LensError: it has none.
        """
        return draw(self, *args, **options)

    def view(self) -> Any:
        """This result in the dashboard, served from a temporary run folder: `.url`, `.close()` (`lens.open`).

        Raises:
            LensError: the dashboard is not installed.
        """
        return opened(self)

    def __repr__(self) -> str:
        """`Name`, then up to `SENTENCES` findings, one a line; how many more there are."""
        said = list(self.findings())
        more = len(said) - SENTENCES
        rest = [f"... {more} more in .findings()"] if more > 0 else []
        return "\n  ".join([type(self).__name__, *said[:SENTENCES], *rest])

    def _repr_html_(self) -> str:
        return as_html(repr(self), self.table())


def as_html(text: str, table: pd.DataFrame) -> str:
    """A notebook's view of a result: its lines of text, then the first rows of its table."""
    name, *sentences = text.split("\n")
    said = "".join(f"<br>{html.escape(sentence.strip())}" for sentence in sentences)
    shown = table.head(ROWS).to_html(float_format="{:.4g}".format, border=0)
    rest = f"<p>{len(table):,} rows in <code>.table()</code></p>" if len(table) > ROWS else ""
    return f"<div><p><b>{html.escape(name)}</b>{said}</p>{shown}{rest}</div>"
