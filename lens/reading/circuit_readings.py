"""What `lens.reading.circuit` gives back: heads and edges of a circuit in words, each with its test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from lens.common.results import Result, Sentence, ends, few, with_ends
from lens.stats.verdicts import by_chance

NO_KIND = "another token"
LOOKS: Mapping[str, Callable[[Sequence[int], int, int], bool]] = {
    "the token after an earlier copy": lambda ids, row, key: (
        0 < key <= row and ids[key - 1] == ids[row]
    ),
    "the token before": lambda _, row, key: key == row - 1,
    "an earlier copy": lambda ids, row, key: key < row and ids[key] == ids[row],
    "itself": lambda _, row, key: key == row,
    "the first token": lambda _, __, key: key == 0,
    NO_KIND: lambda _, __, ___: True,
}
"""What a key is to a row; the last where no other is true in half of the rows, of equal ones the first."""
_SIDES = {"q": "query", "k": "key"}


@dataclass(frozen=True, repr=False, eq=False)
class CircuitReading(Result):
    """A circuit in words.

    Attributes:
        rows: one per edge and head that it feeds (several, where a group of heads has one `<k>` and `<v>`): `writer`, `reader`, `side` ("q", "k", "v", or "" into MLPs and logits); `share` of the reader's
            logit that the writer carries on that side, or of what the reader writes that comes from it (NaN where that
            logit is not above its row's mean); `drop` of the
            metric when the edge alone is cut, `of_effect`, its share in what cutting all edges does; each with `_low`,
            `_high` where it is over prompts; `holds`: whether the drop's interval is above 0; of one prompt none does.
        heads: one per head: `looks_at`, most often from the `rows` that it works in (their share), the `mass` that it
            gives there with `_low`, `_high`, and what `uniform` attention would.
        metric, task, model: names.
        n: prompts.
    """

    rows: pd.DataFrame = field(repr=False)
    heads: pd.DataFrame = field(repr=False)
    metric: str
    task: str
    model: str
    n: int

    def table(self) -> pd.DataFrame:
        """The rows, the edges that cost most first."""
        return self.rows.sort_values("drop", ascending=False, kind="stable", ignore_index=True)

    def findings(self) -> tuple[Sentence, ...]:
        """What each head looks at and why ("head"), what the logits read ("logits"), and edges whose cut shows
        nothing ("fails")."""
        said: list[Sentence] = []
        looks = (
            dict(zip(self.heads["name"], self.heads["looks_at"], strict=True))
            if len(self.heads)
            else {}
        )
        for head in self.heads.to_dict("records"):
            own = self.rows[self.rows["reader"] == head["name"]]
            why = [
                _because(row, looks)
                for side in ("k", "q", "v")
                for row in own[(own["side"] == side) & own["share"].notna()]
                .sort_values("share", ascending=False)
                .to_dict("records")[:1]
            ]
            interval = ends(head["mass_low"], head["mass_high"], ".0%")
            text = f"{head['name']} looks at tokens of no one kind"
            if head["looks_at"] != NO_KIND:
                text = (
                    f"{head['name']} looks at {head['looks_at']} (in {head['rows']:.0%} of its rows, with "
                    f"{head['mass']:.0%}{interval} of their attention; {head['uniform']:.0%} if it were even)"
                )
            said.append(Sentence(f"{text}{': ' * bool(why)}{'; '.join(why)}.", kind="head"))
        for row in self.table().to_dict("records"):
            if row["reader"] == "logits" and row["holds"]:
                text = f"{row['writer']} writes the answer: cutting it off the logits takes {_cost(row)}."
                said.append(Sentence(text, kind="logits"))
        edges = self.rows.drop_duplicates("edge")
        failed = list(edges["edge"][~edges["holds"]])
        if failed:
            prompts = f"these {self.n} prompts" if self.n > 1 else "this one prompt"
            chance = by_chance(len(edges), sides=1)
            chance = (
                f" (of {len(edges)} edges that do nothing {chance:.2g} would show a loss by chance)"
            )
            text = (
                f"Of {len(edges)} edges {len(failed)} can be cut alone without a sure loss on {prompts}, "
                f"so what is said of them is not shown: {few(failed, 8)}"
                + chance * (self.n > 1)
                + "."
            )
            said.append(Sentence(text, kind="fails"))
        return tuple(said)


def _because(row: Mapping, looks: Mapping[str, str]) -> str:  # type: ignore[type-arg]
    """What an edge carries, and what it costs to cut it."""
    looking = (
        f", which looks at {looks[row['writer']]},"
        if looks.get(row["writer"], NO_KIND) != NO_KIND
        else ""
    )
    share = with_ends(row, "share", ".0%")
    what = (
        f"{share} of what it writes comes from {row['writer']}{looking.rstrip(',')}"
        if row["side"] == "v"
        else f"on the {_SIDES[row['side']]} side {row['writer']}{looking} carries {share} of the logit"
    )
    test = f"cut off, {_cost(row)} is lost" if row["holds"] else "cutting it off shows no sure loss"
    return f"{what} ({test})"


def _cost(row: Mapping) -> str:  # type: ignore[type-arg]
    form = ".0%" if abs(row["of_effect"]) >= 0.1 else ".2%"
    return f"{with_ends(row, 'of_effect', form)} of the effect"
