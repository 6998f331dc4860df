"""Boxes on the pictures of a run, as a table names them: `picture`, `left`, `top`, `right`, `bottom`."""

from pathlib import Path

import pandas as pd

from lens.common.errors import LensError
from lens.tasks.labelled import TABLES, read_table

ENDS = ["left", "top", "right", "bottom"]
_EXPECTED = f"no table of boxes; give a {' or '.join(TABLES)} with picture, {', '.join(ENDS)}"


def read_boxes(path: Path, names: list[str]) -> pd.DataFrame:
    """The boxes of a table: `number` of the picture, `left`, `top`, `right`, `bottom` in its pixels.

    Args:
        path: of the table.
        names: of the files of the pictures.

    Raises:
        LensError: no such table or columns, a box that has no area, or of a picture that the run does not have.
    """
    table = read_table(path, _EXPECTED)
    if missing := [name for name in ("picture", *ENDS) if name not in table.columns]:
        raise LensError(
            f"{path} has no column {', '.join(missing)}; a row is picture, {', '.join(ENDS)}"
        )
    if table.empty:
        raise LensError(f"{path} has no box; a row is picture, {', '.join(ENDS)}")
    if twice := {name for name in names if names.count(name) > 1}:
        raise LensError(
            f"several pictures are called {', '.join(sorted(twice))}, so a box of one cannot name it; rename them"
        )
    numbers = {name: number for number, name in enumerate(names)}
    if unknown := sorted(set(map(str, table["picture"])) - set(numbers)):
        raise LensError(
            f"{path} has boxes of {', '.join(unknown[:3])}, which the run does not have; it has {', '.join(names[:6])}"
        )
    ends = table[ENDS].apply(pd.to_numeric, errors="coerce").astype(float)
    wrong = (
        ends.isna().any(axis=1) | (ends["left"] >= ends["right"]) | (ends["top"] >= ends["bottom"])
    )
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise LensError(
            f"row {row + 1} of {path} is no box: left < right and top < bottom in pixels, got "
            f"{', '.join(map(str, table[ENDS].iloc[row]))}"
        )
    ends.insert(0, "number", table["picture"].astype(str).map(numbers).astype(int))
    return ends
