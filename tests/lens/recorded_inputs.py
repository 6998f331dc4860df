"""What the recorded numbers are of: embedded models with prompts and tasks, and how cells are named."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pandas as pd

import lens

Numbers = dict[str, float]
QUIET: dict[str, Any] = {"progress": False}


@cache
def symbols():
    """`induction-2l`, four prompts of symbols that come twice, and their traces."""
    model = lens.load("induction-2l")
    prompts = [lens.tasks.copied(model, 25, seed=seed) for seed in range(4)]
    return model, prompts, lens.capture(model, prompts, keep_qk=True, **QUIET)


@cache
def reader():
    """`text-lm-3l`, four windows of 48 tokens of Moby-Dick behind BOS, and their traces."""
    model = lens.load("text-lm-3l")
    ids = [i for i in model.encode(lens.tasks.text("moby-dick")) if i != model.bos_id]
    prompts = [[model.bos_id, *ids[47 * i : 47 * (i + 1)]] for i in range(4)]
    return model, prompts, lens.capture(model, prompts, **QUIET)


@cache
def grouped():
    """`stories260k`, whose query heads share key heads, and a task of two windows of 32 tokens."""
    model = lens.load("stories260k")
    return model, lens.tasks.language_modelling(model, lens.tasks.text("lily"), length=32, n=2)


@cache
def copying():
    """Eight prompts of `induction` for `induction-2l`, each with a corrupt twin."""
    return lens.tasks.induction(symbols()[0], n=8, length=12)


@cache
def reading():
    """The windows of `reader` in shape of a task: predict the next token."""
    return lens.tasks.language_modelling(reader()[0], lens.tasks.text("moby-dick"), length=48, n=4)


@cache
def edges():
    """Edges of `induction-2l` scored by integrated gradients."""
    return lens.circuits.score_edges(symbols()[0], copying(), method="eap-ig", **QUIET)


def by_head(table: pd.DataFrame) -> pd.DataFrame:
    """A table of heads under their names; its integers are called `number` where `head` is a name."""
    number = table["number"] if "number" in table else table["head"]
    names = [f"L{layer}H{head}" for layer, head in zip(table["layer"], number, strict=True)]
    return table.set_index(pd.Index(names))


def cells(
    prefix: str, table: pd.DataFrame, columns: str | Sequence[str], rows: str | Sequence[Any]
) -> Numbers:
    """`prefix.column.row` of a table whose index names its rows; words may be one string."""
    columns = columns.split() if isinstance(columns, str) else columns
    rows = rows.split() if isinstance(rows, str) else rows
    return {
        f"{prefix}.{column}.{'.'.join(map(str, row)) if isinstance(row, tuple) else row}": float(
            table.loc[row, column]
        )
        for column in columns
        for row in rows
    }
