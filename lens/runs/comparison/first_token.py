"""First-token mass over a series of runs: at which of them heads rest on the first key, beyond what chance gives.

Of each prompt the mean over heads of `sink_mass`, alpha_0, and of `sink_rate`, whether it is above 0.3 (Gu et al. 2024, arXiv
2410.10781); intervals are over prompts. Chance is the larger of uniform attention and the highest
head of the same architecture with random weights, which is above the mean of its heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from lens.common.results import Sentence, with_ends
from lens.runs.folders import Run
from lens.runs.schema import KIND_WORDS, LATER
from lens.stats.intervals import columns

_SCORES = {"mass": "sink_mass", "rate": "sink_rate"}


def first_token(runs: Sequence[Run], names: Sequence[str], seed: int) -> pd.DataFrame:
    """One row per run and kind of prompt: `run`, `place` from 0, `prompts`, `mass` and `rate` with their intervals, `uniform`
    and `random_weights` of the mass (NaN: not known), `n` prompts."""
    rows = []
    for place, (name, run) in enumerate(zip(names, runs, strict=True)):
        kinds = run.prompts.set_index("prompt_id")["kind"]
        heads = run.heads[run.heads["variant"] == "raw"]
        for kind in KIND_WORDS:
            own = heads[heads["prompt_id"].isin(kinds.index[kinds == kind])]
            found = {
                score: own[own["metric"] == metric].groupby("prompt_id")["value"].mean().to_numpy()
                for score, metric in _SCORES.items()
            }
            if not len(found["mass"]):
                continue
            row = {"run": name, "place": place, "prompts": kind}
            for score, values in found.items():
                values = values if len(values) else np.full(1, np.nan)
                cells = columns(score, values[None], seed)
                row |= {column: float(cell[0]) for column, cell in cells.items()}
            whole = heads[(heads["prompt_id"] == kind) & (heads["metric"] == "sink_mass")]
            row |= {column: float(whole[column].mean()) for column in LATER}
            rows.append(row | {"n": len(found["mass"])})
    names_of = ["run", "place", "prompts"]
    names_of += [f"{score}{end}" for score in _SCORES for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*names_of, *LATER, "n"])


def emerged(table: pd.DataFrame) -> Iterator[Sentence]:
    """Of each kind of prompts at which run the mass of the first token lies beyond chance, and how it goes on ("sinks")."""
    for kind, rows in table.groupby("prompts", sort=False):
        if rows["mass"].isna().all():
            continue
        first, last = rows.iloc[0], rows.iloc[-1]
        chance = rows[list(LATER)].max(axis=1)
        sure = rows[rows["mass_low"] > chance]
        said = (
            f"On {KIND_WORDS[str(kind)]} the first token gets {_mass(first)} of the attention of all heads at {first['run']} and "
            f"{_mass(last)} at {last['run']}"
        )
        known = {
            "uniform attention": "uniform",
            "the highest head with random weights": "random_weights",
        }
        by_chance = [
            f"{words} {_range(rows[column].dropna())}"
            for words, column in known.items()
            if rows[column].notna().any()
        ]
        if chance.isna().any():
            when = "what chance gives is not in all of these runs"
        elif rows["mass_low"].isna().all():
            when = "whether that is beyond chance cannot be said of one prompt"
        elif sure.empty:
            when = "it is beyond chance at none"
        elif len(sure) == len(rows):
            when = "it is beyond chance at each of them"
        else:
            when = (
                f"it is beyond chance at {len(sure)} of {len(rows)}, for the first time at {sure['run'].iloc[0]}, where it "
                f"gets {_mass(sure.iloc[0])}"
            )
        when += f" ({', '.join(by_chance)})" if by_chance else ""
        yield Sentence(
            f"{said}; {when}. Heads with a sink there: {first['rate']:.0%} and {last['rate']:.0%}.",
            kind="sinks",
        )


def _range(shares: pd.Series) -> str:
    """The smallest and the largest: runs of other prompts have another chance."""
    return " to ".join(dict.fromkeys(f"{share:.0%}" for share in (shares.min(), shares.max())))


def _mass(row: pd.Series) -> str:
    return with_ends(row, "mass", ".0%")
