"""Labelled prompts as people keep them: a folder of pictures with one sub-folder per label, or a table.

A table is a data frame, a `.csv` or a `.jsonl` file with a column `label`, and `text` or `path` (of a picture, which is looked
for beside the table).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lens.common.errors import LensError, first_line
from lens.common.files import json_of_line, on_disk, read_text

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TABLES = (".csv", ".jsonl", ".ndjson")
_LARGEST = 256 << 20  # bytes of a table
_EXPECTED = (
    "no folder and no table; give a folder with a sub-folder per label, or a table "
    f"({', '.join(TABLES)}) with label, and text or path"
)


class Labelled(NamedTuple):
    """Prompts with their labels.

    Attributes:
        prompts: texts, or paths of pictures.
        labels: a number or a name each, as they are written.
        left: how many more there were, by label.
    """

    prompts: list[Any]
    labels: list[Any]
    left: dict[str, int]


def read_labelled(given: Any, *, most: int | None = None) -> Labelled:
    """The prompts of a folder or a table.

    Args:
        given: a folder, a file, or a data frame.
        most: prompts to take, as evenly over the labels as they allow, of each label the first ones.

    Raises:
        LensError: no such folder or file, no picture in it, or a table without the columns or with an empty place.
    """
    if isinstance(given, str | Path):
        path = on_disk(given)
        pairs = _of_folder(path) if path.is_dir() else _of_table(read_table(path, _EXPECTED), path)
    else:
        pairs = _of_table(given, None)
    chosen, left = pairs, {}
    if most is not None and len(pairs) > most:
        chosen = _evenly(pairs, most)
        every, taken = (Counter(str(label) for _, label in some) for some in (pairs, chosen))
        left = dict(every - taken)
    prompts, labels = map(list, zip(*chosen, strict=True))
    return Labelled(prompts, labels, left)


def _of_folder(folder: Path) -> list[tuple[Any, Any]]:
    pairs: list[tuple[Any, Any]] = [
        (path, inner.name)
        for inner in sorted(folder.iterdir())
        if inner.is_dir() and not inner.name.startswith(".")
        for path in sorted(inner.iterdir())
        if path.suffix.lower() in PICTURES and not path.name.startswith(".")
    ]
    if not pairs:
        raise LensError(
            f"{folder} has no sub-folder with pictures in it; each label has a sub-folder of its name, with pictures "
            f"({', '.join(PICTURES)})"
        )
    return pairs


def read_table(path: Path, expected: str) -> pd.DataFrame:
    """A table of a `.csv` or `.jsonl` file; of a `.csv` all is text.

    Args:
        path: of the file.
        expected: what it is and what to give, for the error of another file.

    Raises:
        LensError: no such file, or one that holds no table.
    """
    if path.suffix not in TABLES:
        raise LensError(f"{path} is {expected}")
    content = read_text(path, most=_LARGEST)
    try:
        if path.suffix == ".csv":
            return pd.read_csv(StringIO(content), dtype=str, keep_default_na=False, na_values=[""])
        return pd.DataFrame(
            [dict(json_of_line(line)) for line in content.splitlines() if line.strip()]
        )
    except (ValueError, TypeError) as error:
        raise LensError(
            f"{path} holds a line that is no {'row' if path.suffix == '.csv' else 'JSON object'}: {first_line(error)}"
        ) from error


def _of_table(given: Any, file: Path | None) -> list[tuple[Any, Any]]:
    columns = set(given.columns) if isinstance(given, pd.DataFrame) else set()
    named = [name for name in ("text", "path") if name in columns]
    if "label" not in columns or len(named) != 1:
        shown = ", ".join(map(str, given.columns)) if columns else type(given).__name__
        raise LensError(
            "without labels prompts must be a folder with a sub-folder per label, or a table (a data frame, .csv, "
            f".jsonl) with label, and either text or path of each; got {shown}"
        )
    (name,) = named
    if bool(given[[name, "label"]].isna().any(axis=None)):
        raise LensError(
            f"a row of the table lacks its {name} or its label; fill it or leave it out"
        )
    if not len(given):
        raise LensError("the table has no row; give each prompt with its label")
    prompts = given[name].tolist()
    if name == "path":
        beside = Path() if file is None else file.parent
        prompts = [beside / on_disk(str(one)) for one in prompts]
    return list(zip(prompts, given["label"].tolist(), strict=True))


def _evenly(pairs: Sequence[tuple[Any, Any]], most: int) -> list[tuple[Any, Any]]:
    """One of each label in turn, until there are enough; in their own order."""
    by_label: dict[Any, list[int]] = {}
    for number, (_, label) in enumerate(pairs):
        by_label.setdefault(label, []).append(number)
    turns = [one for turn in zip_longest(*by_label.values()) for one in turn if one is not None]
    return [pairs[number] for number in sorted(turns[:most])]
