"""`Effect`: what an edit did to the predictions, beside what the same edit of controls did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from lens.common.results import Result, Sentence, ends, with_ends
from lens.edits.losses import MEASURES
from lens.stats import over_units
from lens.stats.verdicts import APART, verdict

MATCHED = 0.8
"""A control of equal mass is one where its keys held at least this share of the edited keys' mass, or these of its."""
TOOK_OVER = 0.1
"""Another key took over in a head where its alpha rose by more than this."""


@dataclass(frozen=True, repr=False, eq=False)
class Effect(Result):
    """What an edit did to the predictions, beside what the same edit of each control did.

    Attributes:
        values: condition ("edit", what was edited, and the controls) -> measure -> [amounts,
            prompts]. Measures: delta_loss
            (nats per `per`), kl (of the edited from the unedited prediction, nats), flip_rate
            (share of predictions whose most likely token, or label, changed), keys (number of keys, heads,
            sub-layers or coordinates that are edited), mass (share of all attention of the edited heads
            that those keys held before; of whole heads their attention to the first key; NaN where
            there is none). Of a task also metric (with the edit) and gain (how much better it got).
        migration: at the amount `most`, a row per layer and head, means over prompts: `source_before` and
            `source_after`, largest alpha among the edited keys; `other_before` and `other_after`,
            largest alpha among other keys; `other_key`, the position most often strongest after. NaN
            after edits that have no softmax with fixed weights (`lens.edits.watching.Watch`).
        alphas: at the amount `most`, per prompt, [2, layers, heads, keys]: alpha of every key before and after, NaN where
            too few queries see a key.
        edit: what was done, in words; of several prompts that are edited unlike the first three.
        amounts: how much of it, ascending; NaN for edits that have no amount, or several (`edit` says them).
        scope: the heads that were edited, in words.
        tokens: [prompts], T of each: tokens, of a picture its patches with the positions beside them.
        bos: "added", "absent" or "mixed"; "" of prompts that are no tokens.
        seed: of controls and bootstrap.
        missing: control -> why there is none.
        part: of an encoder-decoder whose heads were edited; `tokens` are those of the targets then.
        metric, task: names, of a task.
        held: where the attention lay that `mass` counts, in words.
        per: what has one loss: "token"; of a model that fills in masks "answer", of a classifier "prompt".
        patches: [prompts], of pictures whose patches are known how many each has.
        most: place of the amount that is told: the one furthest from what changes nothing.
    """

    values: dict[str, dict[str, np.ndarray]] = field(repr=False)
    migration: pd.DataFrame = field(repr=False)
    alphas: tuple[np.ndarray, ...] = field(repr=False)
    edit: str
    amounts: tuple[float, ...]
    scope: str
    tokens: tuple[int, ...]
    bos: str
    seed: int
    missing: dict[str, str] = field(default_factory=dict)
    part: str = ""
    metric: str = ""
    task: str = ""
    held: str = "lay there"
    per: str = "token"
    patches: tuple[int, ...] = ()
    most: int = -1

    def table(self) -> pd.DataFrame:
        """A row per condition and amount: means over prompts, 95 % bootstrap intervals over prompts.

        `excess` is the edit's delta_loss minus the control's, prompt by prompt, NaN for the edit
        itself ("edit"); of a task `excess_gain` likewise. Intervals are NaN for one prompt.
        """
        rows = [
            self._row(condition, place)
            for place in range(len(self.amounts))
            for condition in self.values
        ]
        return pd.DataFrame(rows).assign(
            edit=self.edit, scope=self.scope, bos=self.bos, n=len(self.tokens)
        )

    def _row(self, condition: str, place: int) -> dict[str, Any]:
        values = {name: numbers[place] for name, numbers in self.values[condition].items()}
        row: dict[str, Any] = {"condition": condition, "amount": self.amounts[place]}
        row |= {name: values[name].mean() for name in ("keys", "mass", "metric") if name in values}
        shown = {name: values[name] for name in (*MEASURES, "gain") if name in values}
        for name, measure in (("excess", "delta_loss"), ("excess_gain", "gain")):
            if measure in values:
                more = self.values["edit"][measure][place] - values[measure]
                shown[name] = more if condition != "edit" else np.full_like(more, np.nan)
        for name, numbers in shown.items():
            low, high = over_units(
                numbers, np.ones(len(numbers)), self.seed, shares=name == "flip_rate"
            )
            row |= {name: numbers.mean(), f"{name}_low": float(low), f"{name}_high": float(high)}
        return row

    def findings(self) -> tuple[Sentence, ...]:
        """What the furthest amount does, how that came about with several, and what the numbers do not say.

        Kinds: `effect`, `gain` (of a task), `prediction`, `dose` and `trend` (several amounts), `best` (of
        a task), the name of each control such as `mass`, `moved`, `limit`.
        """
        table = self.table()
        amount, each = self.amounts[self.most], len(self.values)
        first = self.most % len(self.amounts) * each
        whole = table.iloc[first : first + each].set_index("condition")
        edited = whole.loc["edit"]
        by = "" if np.isnan(amount) else f" (amount {amount:g})"
        done = f"Edit {self.edit}{by} of {self.scope}"
        loss = f"{done} changes the loss by {with_ends(edited, 'delta_loss', '.4f')} nats per {self.per}."
        prediction = (
            f"The prediction moves by a KL of {with_ends(edited, 'kl', '.4f')} nats, and "
            f"{edited['flip_rate']:.1%} of the most likely {'labels' if self.per == 'prompt' else 'tokens'} change"
            + (
                "."
                if np.isnan(edited["mass"])
                else f"; {edited['mass']:.0%} of the edited heads' attention {self.held}."
            )
        )
        sentences = [Sentence(loss, kind="effect"), Sentence(prediction, kind="prediction")]
        if self.task:
            sentences.insert(1, self._gain(edited))
        sentences += self._doses(table[table["condition"] == "edit"])
        for control, why in self.missing.items():
            sentences.append(Sentence(f"There is no {_called(control)}: {why}.", kind=control))
        for control, row in whole.drop(index="edit").iterrows():
            sentences.append(self._beside(str(control), row, edited))
        sentences += self._moved()
        sizes = self.patches or self.tokens
        shortest, longest = min(sizes), max(sizes)
        lengths = str(longest) if shortest == longest else f"{shortest} to {longest}"
        s = "s" * (len(sizes) > 1)
        unit = "picture" if self.patches else "prompt"
        what = f"prompt{s} of {lengths} tokens, BOS {self.bos}"
        if self.part:
            what = f"target{s} of {lengths} tokens, heads of the {self.part} part"
        elif not self.bos:
            what = f"{unit}{s} of {lengths} {'patches' if self.patches else 'positions'}"
        text = f"Measured on {len(sizes)} {what}; intervals are 95 % over {unit}s" + (
            f", and there is none for one {unit}." if len(sizes) == 1 else "."
        )
        return (*sentences, Sentence(text, kind="limit"))

    def _gain(self, row: Any) -> Sentence:
        """What the task gains or loses."""
        low, high = row["gain_low"], row["gain_high"]
        judged = (
            "; one prompt has no interval"
            if np.isnan(low)
            else "; the interval holds 0"
            if low <= 0 <= high
            else ""
        )
        text = (
            f"{self.task} goes {_better(row['gain'], low, high)} in {self.metric}, which is then "
            f"{row['metric']:.4f}{judged}."
        )
        return Sentence(text, kind="gain")

    def _doses(self, rows: pd.DataFrame) -> list[Sentence]:
        """The change at each amount, and whether each step adds to it, by the interval of the step."""
        if len(rows) < 2:
            return []
        shown = "; ".join(
            f"{row['amount']:g}: {with_ends(row, 'delta_loss', '+.4f')}"
            for row in rows.to_dict("records")
        )
        steps = np.diff(self.values["edit"]["delta_loss"], axis=0).T  # [prompts, steps]
        told = {
            verdict(*pair)
            for pair in zip(*over_units(steps, np.ones_like(steps), self.seed), strict=True)
        }
        grows = "grows" if told == {"above"} else "falls" if told == {"below"} else "does not grow"
        if "not told apart" in told and not told.issuperset(APART):
            grows = "is not told to grow or to fall"
        dose = f"By amount the loss changes by (nats per {self.per}) {shown}."
        trend = f"The loss {grows} with every step of the amount."
        found = [Sentence(dose, kind="dose"), Sentence(trend, kind="trend")]
        if self.task:
            row = rows.iloc[int(rows["gain"].to_numpy().argmax())]
            best = (
                f"Of {len(rows)} amounts {row['amount']:g} is best in {self.metric} of {self.task}: it goes "
                f"{_better(row['gain'], row['gain_low'], row['gain_high'])}. It was chosen on these prompts, which "
                "flatters it."
            )
            found.append(Sentence(best, kind="best"))
        return found

    def _beside(self, control: str, row: Any, edited: Any) -> Sentence:
        """How the edit stands to a control."""
        own, other = (self.values[name]["delta_loss"][self.most] for name in ("edit", control))
        few, many = row["mass"] < MATCHED * edited["mass"], MATCHED * row["mass"] > edited["mass"]
        if control == "mass" and (few or many):
            held = (
                "the other keys hold too little, at most"
                if few
                else f"those nearest to {edited['mass']:.1%} hold too much,"
            )
            text = f"There is no control of equal mass to compare with: {held} {row['mass']:.1%} of the attention together."
        elif own.any() and np.allclose(own, other, rtol=1e-4, atol=1e-7):
            text = (
                f"The {_called(control)} changes the same as the edit, in every prompt, so there is nothing "
                "to compare with."
            )
        else:
            less, more = row["excess_high"] < 0, row["excess_low"] > 0
            verdict = "less than" if less else "more than" if more else "not clearly unlike"
            if np.isnan(row["excess_low"]):
                verdict = "on one prompt not to be told from"
            held = "" if np.isnan(row["mass"]) else f" ({row['mass']:.0%} of the attention)"
            text = (
                f"That is {verdict} the {_called(control)}{held}: the difference is "
                f"{with_ends(row, 'excess', '.4f')} nats."
            )
            if self.task:
                text = f"{text[:-1]} and {with_ends(row, 'excess_gain', '.4f')} in {self.metric}."
        return Sentence(text, kind=control)

    def _moved(self) -> list[Sentence]:
        """Whether another key took over."""
        rise = self.migration["other_after"] - self.migration["other_before"]
        if rise.isna().all():
            text = "Where the attention went is not known for this edit."
            return [Sentence(text, kind="limit")]
        taken, unknown = int((rise > TOOK_OVER).sum()), int(rise.isna().sum())
        text = (
            f"In {taken} of {len(rise) - unknown} heads another key's alpha rose by more than {TOOK_OVER}"
            + ("." if taken or unknown else "; no other key took their place.")
            + f" In {unknown} others it is not known." * (unknown > 0)
        )
        sentences = [Sentence(text, kind="moved")]
        if taken:
            text = (
                "Attention moved to the next sink, so a small change of loss does not show that sinks "
                "are of no use."
            )
            sentences.append(Sentence(text, kind="limit"))
        return sentences


def _better(gain: float, low: float, high: float) -> str:
    """ "better by 0.2 [0.1, 0.3]": a gain is of the task, whatever the sign of its metric."""
    if all(f"{one:z.4f}" in ("0.0000", "nan") for one in (gain, low, high)):
        return "neither better nor worse by 0.0001"
    sign = -1 if gain < 0 else 1
    low, high = (low, high) if sign > 0 else (-high, -low)
    return f"{'worse' if sign < 0 else 'better'} by {abs(gain):.4f}{ends(low, high, '.4f')}"


def _called(control: str) -> str:
    """A control in a sentence."""
    return "control of equal mass" if control == "mass" else f"{control} control"
