"""What `lens.sinks.kinds` gives back: the kind of every head's sink, tests of each kind, and where sinks come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from lens.common.results import Result, Sentence, ends, with_ends
from lens.stats.verdicts import of_many_told
from lens.traces.scores import SINK_EPSILON

_TEST = {
    "zero": "with the sources' values at 0",
    "mask": "with the sources hidden",
    "mean": "with their mean value over the prompts",
    "other": "with their values of another prompt",
    "without": "without their learned sinks",
    "open": "with all of their output let through",
}


NOP, BROADCAST, FIXED = 0.1, 0.5, 0.05


@dataclass(frozen=True, repr=False, eq=False)
class SinkKinds(Result):
    """Kinds of sinks, head by head.

    Attributes:
        rows: one per head: `kind` ("none", "nop", "fixed broadcast", "input broadcast", "mixed", "learned", "gate";
            "broadcast" of one prompt, where fixed and input are not told apart); `mass` that the sources get and `share`
            of the size of what the head writes that comes from them, each with `_low`, `_high` (95 % over prompts); `sure`,
            whether the kind is the same at all ends of these (never of one prompt, which has none), `gate`, `learned`
            and `variation` taken as they are, without intervals;
            `uniform_mass`, `uniform_share`: the same if attention were spread evenly; `variation` of the sources'
            values over prompts, their variance over the mean square: 0 where they are the same, about 1 without a common mean; `rank`, `rank_centred`: stable rank of what the head writes, and about the mean
            row; `learned`: what the model's own sink takes; `gate`: what a gate on the output lets through.
        tests: a row per kind and test, all heads of the kind edited together (`lens.sinks.causes.kind_tests`).
        origin: a row per layer (`lens.sinks.causes.origins`).
        moves: a row per way and target (`lens.sinks.causes.moves`).
        bos: "added", "absent" or "mixed".
        tokens: [prompts], T of each.
    """

    rows: pd.DataFrame = field(repr=False)
    tests: pd.DataFrame = field(repr=False)
    origin: pd.DataFrame = field(repr=False)
    moves: pd.DataFrame = field(repr=False)
    bos: str
    tokens: tuple[int, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> how many heads have it."""
        return {str(kind): int(count) for kind, count in self.rows["kind"].value_counts().items()}

    def table(self) -> pd.DataFrame:
        """The rows, with BOS policy and number of prompts."""
        return self.rows.assign(bos=self.bos, n=len(self.tokens))

    def findings(self) -> tuple[Sentence, ...]:
        """How many heads have each kind ("kinds"), what each test does ("test"), origin ("origin") and moves ("move")."""
        shown = ", ".join(f"{kind} {count}" for kind, count in self.counts.items())
        even = self.rows["uniform_mass"].mean()
        sure = int(self.rows["sure"].sum())
        text = (
            f"Of {len(self.rows)} heads the sinks are: {shown} (a sink takes more than {SINK_EPSILON:.0%}, even attention "
            f"gives the sources {even:.1%}; of what a head writes a nop has less than {NOP:.0%} from them, a broadcast more "
            f"than {BROADCAST:.0%}, a fixed one with a variation below {FIXED:g})"
        )
        if len(self.tokens) > 1:
            text += f"; {sure} are of their kind at all ends of the intervals of mass and share"
        said = [Sentence(f"{text}.", kind="kinds")]
        for kind, rows in self.tests.groupby("kind", sort=False):
            parts = [
                f"{_TEST[row['test']]} {with_ends(row, 'delta_loss', '+.4f')}" + _beside(row)
                for row in rows.to_dict("records")
            ]
            count = int(rows["heads"].iloc[0])
            said.append(
                Sentence(
                    f"The loss of the {count} heads of kind {kind} changes, nats a token: {'; '.join(parts)}.",
                    kind="test",
                )
            )
        said += self._origin()
        for row in self.moves.to_dict("records"):
            said.append(
                Sentence(
                    f"{_MOVED[row['way']].format(row['target'])}: the target gets {row['target_after']:.0%}"
                    f"{ends(row['target_after_low'], row['target_after_high'], '.0%')} instead of "
                    f"{row['target_before']:.0%}, the source {row['source_after']:.0%} instead of "
                    f"{row['source_before']:.0%} (mean α of {row['heads']} heads).",
                    kind="move",
                )
            )
        text = (
            f"{len(self.tokens)} prompts of {min(self.tokens)} to {max(self.tokens)} tokens, BOS {self.bos}; where the "
            "first token is always the same its value cannot change, so that every broadcast is fixed."
        )
        return (*said, Sentence(text, kind="limit"))

    def _origin(self) -> list[Sentence]:
        """The layer in which each of the sources' sizes is farthest from that of other positions."""
        said = []
        for name, word in _ORIGIN.items():
            if self.origin[name].isna().all():
                continue
            row, told = _highest(self.origin, name, ".3g", len(self.tokens), np.inf, " times")
            said.append(f"{word} {told} in layer {row['layer']:.0f}")
        if not said:
            return []
        text = f"At most, over the median of other positions, the sources have {', '.join(said)}."
        return [Sentence(text, kind="origin"), *self._neuron()]

    def _neuron(self) -> list[Sentence]:
        """The layer in which one neuron makes the largest share of what its MLP writes at the sources."""
        if self.origin["neuron_share"].isna().all():
            return []
        row, share = _highest(self.origin, "neuron_share", ".0%", len(self.tokens), 1)
        return [
            Sentence(
                f"Neuron {row['neuron']:.0f} of the MLP in layer {row['layer']:.0f} makes {share} of what is written there at the sources, "
                f"whichever is largest at other positions {row['neuron_share_others']:.0%}; it writes through {row['channels']:.0f} "
                "dimensions.",
                kind="origin",
            )
        ]


def kind_of(row: Mapping[Any, Any]) -> str:
    """What takes most of the head, and how; "none" where nothing takes `SINK_EPSILON`."""
    taken = {"gate": 1 - row["gate"], "learned": row["learned"], "keys": row["mass"]}
    taken = {name: value for name, value in taken.items() if value > SINK_EPSILON}
    if not taken:
        return "none"
    most = max(taken, key=lambda name: taken[name])
    if most != "keys":
        return most
    if row["share"] < NOP or np.isnan(row["share"]):  # of a head that writes nothing
        return "nop"
    if row["share"] <= BROADCAST:
        return "mixed"
    if np.isnan(row["variation"]):
        return "broadcast"
    return "fixed broadcast" if row["variation"] < FIXED else "input broadcast"


def is_sure(row: Mapping[Any, Any]) -> bool:
    """Whether the kind is the same at both ends of the intervals of mass and share; not of one prompt, without intervals."""
    places = product((row["mass_low"], row["mass_high"]), (row["share_low"], row["share_high"]))
    kinds = {kind_of({**row, "mass": mass, "share": share}) for mass, share in places}
    return kinds == {kind_of(row)} and not np.isnan(row["mass_low"])


def _highest(
    table: pd.DataFrame, name: str, form: str, prompts: int, most: float, unit: str = ""
) -> tuple[pd.Series, str]:
    """The row with the highest value of 0 to `most`, and this in words, with the interval of the highest of all."""
    row = table.iloc[int(np.nanargmax(table[name]))]
    many = int(table[name].notna().sum())
    return row, of_many_told(row, name, form, many, prompts, least=0, most=most, unit=unit)


def _beside(row: Mapping[Any, Any]) -> str:
    """The control, and whether the change is told apart from it."""
    if row["control"] != row["control"]:
        return ""
    low, high = row["excess_low"], row["excess_high"]
    apart = "more" if low > 0 else "less" if high < 0 else "not told apart"
    apart = "" if low != low else f", {apart}"
    here = f"{row['mass']:.0%}" + (" of the output held back" if row["test"] == "open" else "")
    return f" (random keys with {row['control_mass']:.0%} of the attention, {here} here, {row['control']:+z.4f}{apart})"


_ORIGIN = {
    "norm": "a state of",
    "variance": "an output variance of",
    "gradient": "a gradient of",
    "value_gradient": "a gradient by their values of",
}
_MOVED = {
    "state": "Source and position {} swap their states",
    "massive": "They swap the massive dimensions alone (position {})",
    "alone": "Position {} sees nothing but itself",
    "other state": "Control: position {} swaps with one that is no source",
    "other dimensions": "Control: as many other dimensions are swapped (position {})",
}
