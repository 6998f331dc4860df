"""What `lens.reading.examples` gives back: the strongest pair of tokens of each prompt, the best prompts of each head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId, head_columns, head_id
from lens.common.results import Result, Sentence, ends, few
from lens.stats.intervals import columns, known_mean

if TYPE_CHECKING:
    from jaxtyping import Float

By = Literal["attention", "sink_excluded", "written"]
WORDS: dict[str, str] = {
    "attention": "attention",
    "sink_excluded": "attention without the first token",
    "written": "what the pair writes",
}
"""Measure of an example -> what it is called."""
BY: tuple[By, ...] = get_args(By)


@dataclass(frozen=True)
class Example:
    """The pair of tokens of one prompt that a head looks at most, with its surroundings.

    Attributes:
        value: as `by` says.
        uniform: the same of a row that looks at all keys it sees alike.
        prompt: its number, from 0.
        query, key: positions of the pair.
        places: positions of the tokens around the two, in order.
        tokens: what stands there.
        weights: of the query's row at these places, as `by` says; NaN behind it.
    """

    value: float
    uniform: float
    prompt: int
    query: int
    key: int
    places: tuple[int, ...]
    tokens: tuple[str, ...]
    weights: tuple[float, ...]

    def token(self, place: int) -> str:
        """The token at one of the places."""
        return self.tokens[self.places.index(place)]


@dataclass(frozen=True, repr=False, eq=False)
class TopExamples(Result):
    """The prompts of a corpus on which each head attends most.

    Attributes:
        found: measure -> head -> its examples, the strongest first.
        typical: measure -> [layer, head, prompt], the strongest pair of each of at most 1,000 prompts; NaN where a
            prompt has no row with a choice.
        random: measure -> [layer, head, prompt] of the same architecture with random weights; empty if not asked for.
        layers: their numbers.
        prompts: how many there were, of two tokens or more.
        refused: measure -> why it could not be had.
        seed: of the draws.
        model: its name.
    """

    found: Mapping[str, Mapping[HeadId, tuple[Example, ...]]]
    typical: Mapping[str, Float[np.ndarray, "layers heads prompts"]]
    random: Mapping[str, Float[np.ndarray, "layers heads prompts"]]
    layers: tuple[int, ...]
    prompts: int
    refused: Mapping[str, str]
    seed: int
    model: str

    @property
    def heads(self) -> list[HeadId]:
        """Every head, layer by layer."""
        return list(next(iter(self.found.values())))

    def of(self, head: AnyHead, by: By = "attention") -> tuple[Example, ...]:
        """The examples of one head, the strongest first.

        Raises:
            LensError: a measure or a head that there is not.
        """
        heads, asked = self.found[check_choice("by", by, tuple(self.found))], head_id(head)
        if asked not in heads:
            raise LensError(f"there is no {asked} here; the heads are {few(list(map(str, heads)))}")
        return heads[asked]

    def table(self) -> pd.DataFrame:
        """One row per head and measure: `name`, `layer`, `head`, `by`; `best`, mean of its examples; `typical`, mean over
        prompts of the strongest pair, with `_low`, `_high` (95 % bootstrap); `random_weights`, the highest `typical` of a
        head with random weights; `n`, how many prompts that mean is over; the pair of the strongest example, `query_token` and `key_token`."""
        tables = []
        for by, heads in self.found.items():
            best = [np.mean([one.value for one in some] or [np.nan]) for some in heads.values()]
            pairs = [some[0] if some else None for some in heads.values()]
            tables.append(
                pd.DataFrame(
                    head_columns(heads)
                    | {"by": by, "best": best}
                    | columns("typical", self.typical[by], self.seed, known=True)
                    | {"random_weights": self._chance(by)}
                    | {"n": (~np.isnan(self.typical[by])).sum(-1).ravel()}
                    | {
                        "query_token": [
                            "" if one is None else one.token(one.query) for one in pairs
                        ],
                        "key_token": ["" if one is None else one.token(one.key) for one in pairs],
                    }
                )
            )
        return pd.concat(tables, ignore_index=True)

    def examples(self) -> pd.DataFrame:
        """One row per example: `name`, `layer`, `head`, `by`, `rank` from 1, `value`, `uniform`, `prompt`, `query`, `key`,
        `query_token`, `key_token`."""
        rows = [
            (head, by, rank, one)
            for by, heads in self.found.items()
            for head, some in heads.items()
            for rank, one in enumerate(some, 1)
        ]
        names = head_columns(head for head, *_ in rows)
        return pd.DataFrame(
            names
            | {
                "by": [by for _, by, _, _ in rows],
                "rank": [rank for _, _, rank, _ in rows],
                "query_token": [one.token(one.query) for *_, one in rows],
                "key_token": [one.token(one.key) for *_, one in rows],
                **{
                    part: [getattr(one, part) for *_, one in rows]
                    for part in ("value", "uniform", "prompt", "query", "key")
                },
            }
        )

    def strips(self) -> pd.DataFrame:
        """One row per token around an example: `name`, `layer`, `head`, `by`, `rank`, `place`, `token`, `weight`."""
        rows = [
            (head, by, rank, *token)
            for by, heads in self.found.items()
            for head, some in heads.items()
            for rank, one in enumerate(some, 1)
            for token in zip(one.places, one.tokens, one.weights, strict=True)
        ]
        parts = list(zip(*rows, strict=True)) or [()] * 6
        names = ("by", "rank", "place", "token", "weight")
        return pd.DataFrame(head_columns(parts[0]) | dict(zip(names, parts[1:], strict=True)))

    def findings(self) -> tuple[Sentence, ...]:
        """By each measure the head that looks hardest ("strongest"); what could not be had ("unsupported")."""
        said, table = [], self.table()
        for by, rows in table[table["typical"].notna()].groupby("by", sort=False):
            top: dict[Any, Any] = rows.loc[[rows["typical"].idxmax()]].to_dict("records")[0]
            interval = ends(top["typical_low"], top["typical_high"], ".2f")
            chance = (
                ""
                if np.isnan(top["random_weights"])
                else f"; random weights: {top['random_weights']:.2f}"
            )
            said.append(
                Sentence(
                    f"By {WORDS[str(by)]} {top['name']} looks hardest: its strongest pair of a prompt has "
                    f"{top['typical']:.2f}{interval} on average{chance}; the best is {top['query_token']!r} to "
                    f"{top['key_token']!r}.",
                    kind="strongest",
                )
            )
        return (*said, *(Sentence(why, kind="unsupported") for why in self.refused.values()))

    def _chance(self, by: str) -> float:
        found = self.random.get(by)
        return (
            float("nan") if found is None else float(np.fmax.reduce(known_mean(found), axis=None))
        )

    def __repr__(self) -> str:
        said = "\n  ".join(self.findings())
        return f"TopExamples({self.model}: {self.prompts} prompts)\n  {said}"
