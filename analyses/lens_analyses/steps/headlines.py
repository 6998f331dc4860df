"""The headlines of sections, from their tables: a number with its interval beside what it would be by chance.

What surprises, and which of them a first screen shows, is defined in `lens.runs.headlines`.
"""

from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.results import ends
from lens.heads.measures.scores import HeadScores
from lens.runs.headlines import Headline, higher_chance, highest, is_above_nothing, is_rounding
from lens.stats.verdicts import APART, verdict
from lens_analyses.steps.tried import told

NATS = "nats a token"
_Row = Mapping[Any, Any]


def of_roles(table: pd.DataFrame, random: Mapping[str, float], figure: str) -> Iterator[Headline]:
    """The head with the highest score of each role, beside uniform attention and random weights.

    Args:
        table: of `HeadRoles`.
        random: role -> score of the highest head of the same architecture with random weights; NaN: not known.
        figure: that shows the table.
    """
    for column, weights in random.items():
        scored = table.dropna(subset=[column])
        if scored.empty:
            continue
        top: dict[Any, Any] = scored.loc[[scored[column].idxmax()]].to_dict("records")[0]
        chance = higher_chance(top[f"{column}_baseline"], weights)
        if chance is None:
            continue
        against, baseline, both = chance
        low, high = top[f"{column}_low"], top[f"{column}_high"]
        words = column.replace("_", " ").capitalize()
        yield Headline(
            f"{words} is highest in {top['name']}: {top[column]:.2f}{ends(low, high, '.2f')}, against {both}.",
            float(top[column]),
            low,
            high,
            baseline,
            against,
            figure=figure,
            many=len(scored),
            units=int(top.get("n", 0)),
        )


def of_importance(
    scores: list[HeadScores], tried: pd.DataFrame | None = None
) -> Iterator[Headline]:
    """One headline a task for all its measures: the head that matters most, beside the median head.

    Estimates are not told as losses: where no measure took heads away, the heads that were `tried` are told.

    Args:
        scores: of all measures and tasks.
        tried: heads taken away for real, as `lens_analyses.steps.tried` makes it.
    """
    figures = {score.label + score.task: f"grid_{number}" for number, score in enumerate(scores)}
    for task in dict.fromkeys(score.task for score in scores):
        mine = [score for score in scores if score.task == task]
        chief = next((score for score in mine if score.method == "ablation"), mine[0])
        if len(chief.names) < 2:
            continue  # one head has no others to be compared with
        against = "the median head"
        if chief.method == "ablation":
            text, fields = _of_ablation(chief, mine)
        elif tried is not None and task in set(tried["task"]):
            said = told(tried[(tried["task"] == task).to_numpy()], chief.metric)
            if said is None:
                continue
            (text, fields), against = said, "heads drawn at random"
        else:
            best, fields = _highest_row(chief.table(), "value")
            text = (
                f"{best['name']} is first for {task} by {chief.label}, an estimate: {fields['value']:.3g}"
                f"{ends(fields['low'], fields['high'])} of {chief.metric}, the median head {fields['baseline']:.3g}."
            )
        if not is_above_nothing(fields, float(np.abs(chief.clean).max())):
            continue  # no head whose absence is told apart from none
        yield Headline(
            text,
            **fields,
            against=against,
            unit=chief.metric,
            figure=figures[chief.label + task],
        )


def _of_ablation(chief: HeadScores, mine: list[HeadScores]) -> tuple[str, dict[str, Any]]:
    """The head whose ablation costs most, and the measures that put another first."""
    best, fields = _highest_row(chief.table(), "value")
    name = str(best["name"])
    named: dict[str, list[str]] = {}
    for score in mine:
        named.setdefault(str(score.top(1)[0]), []).append(score.label)
    agree = len(named.pop(name, []))
    others = "".join(f"; by {' and '.join(labels)} it is {head}" for head, labels in named.items())
    text = (
        f"{name} matters most for {chief.task}: without it {chief.metric} is worse by {fields['value']:.3g}"
        f"{ends(fields['low'], fields['high'])}, without the median head by {fields['baseline']:.3g} "
        f"({chief.label}). {agree} of {len(mine)} measures name it first{others}."
    )
    return text, fields


def of_pruning(
    curve: pd.DataFrame, order: str, bearable: int, heads: int, metric: str, sign: int
) -> Iterator[Headline]:
    """What it costs to take out as many heads as can go, beside as many in random orders.

    Args:
        curve: table of `PruningOrders`.
        order: whose rows are told.
        bearable: heads that can go, of so many `heads`.
        metric, sign: that gets worse; -1 where less is better.
    """
    rows = curve[((curve["order"] == order) & (curve["removed"] == bearable)).to_numpy()]
    if bearable == 0 or rows.empty:
        return
    row: dict[Any, Any] = rows.to_dict("records")[0]
    yield Headline(
        f"{bearable} of {heads} heads can go, {order} first: the {metric} {'rises' if sign < 0 else 'falls'} by {row['cost']:.3f}"
        f"{ends(row['low'], row['high'], '.3f')}, and by {row['random_cost']:.3f} without as many in random orders.",
        row["cost"],
        row["low"],
        row["high"],
        row["random_cost"],
        "as many heads in random orders",
        spread=(row["random_high"] - row["random_low"]) / 2,
        unit="nats" if metric == "loss" else metric,
        figure="curve",
    )


def of_highest(
    table: pd.DataFrame,
    column: str,
    text: str,
    others: str,
    *,
    unit: str = "",
    figure: str = "",
    whole: float = 0.0,
    spec: str = ".3g",
    many: int | None = None,
) -> Iterator[Headline]:
    """The row that has most of a column, beside the median row.

    Args:
        table: one row a head, sub-layer, edge or band.
        column: what is compared.
        text: the sentence, with `{name}`, `{value}` and `{baseline}`; the interval is put behind the value.
        others: what the median is of.
        unit, figure: of the headline.
        whole: size of what the column changes, where that is known: less than rounding of it is nothing.
        spec: how its numbers are written.
        many: of how many it is the highest, where the table has not all of them; None: of its rows.
    """
    try:
        best, fields = _highest_row(table, column)
    except LensError:
        return
    fields["many"] = many or fields["many"]
    if not is_above_nothing(fields, whole):
        return
    value = f"{fields['value']:{spec}}{ends(fields['low'], fields['high'], spec)}"
    said = text.format(**(best | {"value": value, "baseline": f"{fields['baseline']:{spec}}"}))
    yield Headline(said, **fields, against=others, unit=unit, figure=figure)


def of_edits(
    table: pd.DataFrame, figures: Mapping[str, str], per: str = "token"
) -> Iterator[Headline]:
    """What edits do to the loss, beside the control that changes as much attention elsewhere.

    Args:
        table: of effects, one below the other.
        figures: words of an edit -> the figure of it.
        per: what has one loss: `Effect.per`.
    """
    for keys, rows in table.groupby(["edit", "scope", "amount"], sort=False):
        edit, scope, amount = keys if isinstance(keys, tuple) else (keys, "", 1)
        by = _rows(rows, "condition")
        control = by.get("mass")
        if not control or verdict(control["excess_low"], control["excess_high"]) not in APART:
            continue
        one = by["edit"]
        if is_rounding(1.0, one["delta_loss"], control["delta_loss"]):  # of a nat
            continue
        share = "" if amount == 1 else f" by {amount:g}"
        yield beside(
            f"{str(edit).replace('_', ' ').capitalize()}{share} in {scope}: the loss changes by "
            f"{change(one, 'delta_loss')} nats a {per}, and by {control['delta_loss']:+z.3g} where as much "
            "attention to other keys is edited.",
            "delta_loss",
            one,
            control,
            "as much attention elsewhere",
            unit=f"nats a {per}",
            figure=figures.get(str(edit), ""),
        )


def of_reaches(table: pd.DataFrame, figure: str) -> Iterator[Headline]:
    """An edit of one head or layer that costs more than the same edit of all heads."""
    rows = _rows(table[(table["condition"] == "edit").to_numpy()], "reach")
    for reach in ("head", "layer"):
        if reach in rows and "all" in rows:
            one, every = rows[reach], rows["all"]
            if one["delta_loss_low"] > every["delta_loss_high"]:
                yield beside(
                    f"Masking the sink of {one['scope']} alone changes the loss by {change(one, 'delta_loss')} "
                    f"nats a token, of all heads by {change(every, 'delta_loss')}.",
                    "delta_loss",
                    one,
                    every,
                    "the same edit of all heads",
                    unit=NATS,
                    figure=figure,
                )


def of_conditions(
    table: pd.DataFrame, this: str, other: str, text: str, against: str, figure: str
) -> Iterator[Headline]:
    """The sink rate of all layers under one condition, beside another condition.

    Args:
        table: with columns condition, layer (NaN: all together), rate, low and high.
        this, other: conditions.
        text: the sentence, with `{value}` and `{baseline}`.
        against: what the other is.
        figure: that shows both.
    """
    whole = _rows(table[table["layer"].isna().to_numpy()], "condition")
    if this not in whole or other not in whole:
        return
    one, chance = whole[this], whole[other]
    interval = ends(one["low"], one["high"], ".0%")
    yield beside(
        text.format(value=f"{one['rate']:.0%}{interval}", baseline=f"{chance['rate']:.0%}"),
        "rate",
        one,
        chance,
        against,
        unit="share of heads",
        figure=figure,
    )


def of_streaming(table: pd.DataFrame, figure: str) -> Iterator[Headline]:
    """What the first key adds to a cache of the last keys."""
    for last, rows in table.groupby("last"):
        by = _rows(rows, "first")
        if 0 in by and 1 in by:
            with_first, without = by[1], by[0]
            yield beside(
                f"With the last {last} keys alone the loss rises by {without['delta_loss']:.3g} nats a token; with "
                f"the first key kept too by {change(with_first, 'delta_loss')}.",
                "delta_loss",
                with_first,
                without,
                "a cache without the first key",
                unit=NATS,
                figure=figure,
            )


def of_search(judged: pd.DataFrame, metric: str, figure: str) -> Iterator[Headline]:
    """Heads chosen on half of the prompts, judged on the others beside all heads together."""
    rows = _rows(judged[(judged["prompts"] == "test").to_numpy()], "heads")
    if not {"chosen", "all"} <= set(rows):
        return
    chosen, every = rows["chosen"], rows["all"]
    yield beside(
        f"Moved in the chosen heads alone, {metric} is better by {change(chosen, 'gain')} on held-out prompts; "
        f"in all heads by {change(every, 'gain')}.",
        "gain",
        chosen,
        every,
        "the same edit of all heads",
        unit=metric,
        figure=figure,
    )


def of_circuit(
    same_size: pd.DataFrame, words: Mapping[str, str], figure: str
) -> Iterator[Headline]:
    """Faithfulness of a circuit, beside the most faithful of the random circuits of its size."""
    rows = _rows(same_size.dropna(subset=["faithfulness"]), "circuit")
    kinds = [kind for kind in words if kind in rows]
    if not kinds or "circuit" not in rows:
        return
    one = rows["circuit"]
    best = max(kinds, key=lambda kind: rows[kind]["faithfulness"])
    chance = rows[best]
    yield beside(
        f"The circuit of {int(one['edges']):,} edges has a faithfulness of {one['faithfulness']:.2f}"
        f"{ends(one['low'], one['high'], '.2f')} on held-out prompts; as many edges, {words[best]}, have "
        f"{chance['faithfulness']:.2f}{ends(chance['low'], chance['high'], '.2f')}.",
        "faithfulness",
        one,
        chance,
        words[best],
        figure=figure,
    )


def of_sink_check(
    table: pd.DataFrame, task: str, metric: str, figure: str, whole: float
) -> Iterator[Headline]:
    """What the sink is to the heads of a circuit, beside as many others of the same layers, beyond rounding of `whole`."""
    for edit, rows in table.groupby("edit", sort=False):
        by = _rows(rows, "heads")
        if {"circuit", "others"} <= set(by):
            one, others = by["circuit"], by["others"]
            if is_rounding(whole, one["gain"], others["gain"]):
                continue
            yield beside(
                f"With the first key {edit} in the circuit's heads {task} gains {change(one, 'gain')} {metric} (below 0 it goes "
                f"worse), in as many others of the same layers {others['gain']:+z.3g}.",
                "gain",
                one,
                others,
                "as many other heads",
                unit=metric,
                figure=figure,
            )


def beside(
    text: str,
    column: str,
    one: _Row,
    other: _Row,
    against: str,
    *,
    unit: str = "",
    figure: str = "",
    many: int = 1,
) -> Headline:
    """A column of a row with its interval, beside that of another row, which scatters by half of its own interval.

    `many`: of how many the row was chosen.
    """
    low, high = _names_of_ends(one, column)
    return Headline(
        text,
        *(one[column], one[low], one[high]),
        baseline=other[column],
        against=against,
        spread=(other[high] - other[low]) / 2,
        unit=unit,
        figure=figure,
        many=many,
        units=int(one.get("n", 0)),
    )


def _names_of_ends(names: Container[Any], column: str) -> tuple[str, str]:
    """The columns of the interval of a column: `<column>_low` and `<column>_high`, or `low` and `high`."""
    own = f"{column}_low", f"{column}_high"
    return own if all(end in names for end in own) else ("low", "high")


def _rows(table: pd.DataFrame, column: str) -> dict[Any, _Row]:
    """The rows of a table by what one of its columns says."""
    return {row[column]: row for row in table.to_dict("records")}


def _highest_row(table: pd.DataFrame, column: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row with most of a column, and the fields of a headline."""
    low, high = _names_of_ends(table, column)
    units = int(table["n"].iloc[0]) if "n" in table else 0
    best, found = highest(table[column], table[low], table[high], units)
    return dict(zip(map(str, table.columns), table.iloc[best], strict=True)), found


def change(row: _Row, column: str) -> str:
    """A change, with its sign, and its interval behind it."""
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return f"{row[column]:+z.3g}{ends(low, high, '+z.3g')}"
