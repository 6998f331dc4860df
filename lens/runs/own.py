"""`add`: a user's own number for each head as a section of a run: table, picture, run folder, report and page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lens.common.choices import Seed, is_number
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, all_heads, head_columns, head_id, layers_in_words
from lens.common.results import ends, few
from lens.figures.columns import column_grid
from lens.runs.folders import Run, open_run
from lens.runs.headlines import Headline, highest
from lens.runs.sections import Section
from lens.runs.writer import RunWriter
from lens.stats.intervals import columns
from lens.stats.verdicts import rivals

_OWN = "own numbers"
_LONGEST = 64  # letters of a name, which is that of a folder too
_TAKEN = ("name", "layer", "head", "n")


def add(
    run: Run,
    name: str,
    values: ArrayLike | Mapping[AnyHead, float],
    definition: str,
    *,
    title: str = "",
    unit: str = "",
    seed: Seed = 0,
) -> Section:
    """Put numbers of your own, one for each head, into a run: its pages and reports show them as any other's.

    Args:
        run: a finished run of the model that they are of.
        name: of the section and of the column: small letters, digits and underscores.
        values: [layer, head], or [layer, head, prompt] for means with 95 % intervals over prompts; a row for each
            layer with heads; NaN: not known. Or by head, such as {"L1H3": 0.4} or a Series with such an index; what is not named is not known.
        definition: what the number says, in a sentence with its unit.
        title: heading of its page; made of the name if "".
        unit: such as "nats".
        seed: of the bootstrap.

    Returns:
        The section; numbers that were added under this name before are replaced.

    Raises:
        LensError: no run, no texts, another shape than the run's model has, no number at all, no definition,
            a name that an analysis of the run has, or a run that is being written.

    Example:
        >>> section = lens.runs.add(run, "doubt", np.random.rand(3, 6), "How far I doubt this head, 0 to 1.")
        >>> section.title
        'Doubt'
    """
    for word, text in {
        "name": name,
        "definition": definition,
        "title": title,
        "unit": unit,
    }.items():
        if not isinstance(text, str):
            raise LensError(f"{word} must be a text, got {text!r}")
    run = open_run(run.path)  # what was added since it was opened counts
    layers = attending(run) or list(range(run.meta["model"]["layers"]))  # mixers have heads too
    if isinstance(values, Mapping | pd.Series):
        values = _by_head(cast("Mapping[Any, float]", values), layers, _heads(run))
    numbers = _checked(run, name, values, definition, len(layers))
    heads = head_columns(all_heads(layers, numbers.shape[1]))
    table = pd.DataFrame({**heads, **columns(name, numbers, seed), "n": numbers.shape[2]})
    if (mixers := _mixers(run)) is not None:
        table.insert(3, "mixer", table["name"].map(mixers))
    told = _told(table, numbers.reshape(len(table), -1), name, unit, seed)
    section = Section(
        name=name,
        title=title or name.replace("_", " ").capitalize(),
        summary=tuple(one.text for one in told),
        limits=("These numbers were added by hand: how they were measured is not known here.",),
        columns={
            "name": "The head.",
            "layer": "Layer, by the model's own number.",
            "head": "Head of the layer, from 0.",
            **({} if mixers is None else {"mixer": "Which mixer the head is of."}),
            name: definition,
            f"{name}_low": f"Low end of the 95 % interval of {name}.",
            f"{name}_high": f"High end of the 95 % interval of {name}.",
            "n": "Number of prompts.",
        },
        configuration={"kind": _OWN, "unit": unit, "seed": seed},
        tables={"heads": table},
        figures={"grid": column_grid(table, name)},
        headlines=told,
    )
    RunWriter(run.path, run.meta, resumed=True).record(*section.save(run.path))
    return section


def attending(run: Run) -> list[int]:
    """Layers with softmax attention, by the model's own number; of older folders, which do not say so, all."""
    model = run.meta["model"]
    known = model.get("attending")
    return list(map(int, range(model["layers"]) if known is None else known))


def _mixers(run: Run) -> pd.Series | None:
    """Kind of mixer by the name of a head, of a model of mixers alone whose run has them."""
    if attending(run) or "mixers" not in run.sections:
        return None
    return run.section("mixers").tables["heads"].drop_duplicates("name").set_index("name")["mixer"]


def _heads(run: Run) -> int:
    """Heads of a layer; of a model of mixers alone those that its run has found."""
    mixers = _mixers(run)
    if mixers is None:
        return run.meta["model"]["heads"]
    return 1 + max(head_id(name).head for name in mixers.index)


def _by_head(values: Mapping[Any, float], layers: list[int], heads: int) -> np.ndarray:
    """[layer, head] of numbers by head.

    Raises:
        LensError: a head that the model has not, or no number.
    """
    found = np.full((len(layers), heads), np.nan)
    for given, value in values.items():
        head = head_id(given)
        if head.layer not in layers or head.head >= heads:
            raise LensError(
                f"there is no {head}: the model has heads 0 to {heads - 1} in the {layers_in_words(layers)}"
            )
        if not is_number(value):
            raise LensError(f"values[{given!r}] must be a number, got {value!r}")
        found[layers.index(head.layer), head.head] = value
    return found


def _checked(run: Run, name: str, values: ArrayLike, definition: str, layers: int) -> np.ndarray:
    """The numbers as [layer, head, prompt].

    Raises:
        LensError: as `add`.
    """
    if run.status == "started":
        raise LensError(f"{run.path} is being computed right now; add to it when it is done")
    if not definition.strip():
        raise LensError("definition must say in a sentence what the number is, got none")
    if len(name) > _LONGEST:
        raise LensError(f"name must have at most {_LONGEST} letters, got {len(name)}")
    if name in _TAKEN:
        raise LensError(f"{name} is what another column is called; choose another name")
    if name in run.sections and run.section(name).configuration.get("kind") != _OWN:
        raise LensError(f"run {run.id} has an analysis {name!r}; choose another name")
    try:
        numbers = np.asarray(values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        raise LensError(
            'values must be numbers, [layer, head] or [layer, head, prompt], or by head such as {"L1H3": 0.4}'
        ) from None
    heads = _heads(run)
    if numbers.ndim not in (2, 3) or numbers.shape[:2] != (layers, heads):
        raise LensError(
            f"values must be [{layers} layers, {heads} heads], with prompts as a third axis if there are several, "
            f"got the shape {list(numbers.shape)}"
        )
    numbers = numbers.reshape(layers, heads, -1)
    if numbers.shape[2] == 0 or np.isnan(numbers).all() or np.isinf(numbers).any():
        raise LensError("values must be finite numbers, NaN where a head has none, and not all NaN")
    return numbers


def _told(
    table: pd.DataFrame, numbers: np.ndarray, name: str, unit: str, seed: int
) -> tuple[Headline, ...]:
    """The highest head beside the median one and those that it is not told apart from, its interval that of the highest of
    all; nothing where it is as high."""
    try:
        best, fields = highest(
            table[name], table[f"{name}_low"], table[f"{name}_high"], int(table["n"].iloc[0])
        )
    except LensError:  # one head alone
        return ()
    if not fields["value"] > fields["baseline"]:
        return ()
    known = np.flatnonzero(~np.isnan(numbers).any(1))
    alike = ""
    if best in known and (
        near := rivals(numbers[known], int(np.searchsorted(known, best)), seed=seed)
    ):
        alike = f", not told apart from {few(table['name'].to_numpy()[known[near]].tolist(), 3)}"
    one = Headline("", **fields, against="the median head", unit=unit, figure="grid")
    text = (
        f"{name.replace('_', ' ').capitalize()} is highest in {table['name'][best]}: {one.value:.3g}{ends(*one.ends)}{alike}; "
        f"the median head has {one.baseline:.3g}."
    )
    return (replace(one, text=text),)
