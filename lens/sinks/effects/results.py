"""`SinkEffect`: what an edit did to the predictions, beside what the same edit of controls did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from lens.common.results import Result, Sentence, described
from lens.edits.side_effects import MEASURES
from lens.stats import over_units

MATCHED = 0.8
"""A mass control is one where its keys held at least this share of the sources' mass."""
TOOK_OVER = 0.1
"""Another key took over in a head where its alpha rose by more than this."""


@dataclass(frozen=True, eq=False)
class SinkEffect(Result):
    """What editing the sources did, beside what editing each control did.

    Attributes:
        values: condition ("sources" and the controls) -> measure -> [prompts]. Measures: delta_loss
            (nats per token), kl (of the edited from the unedited prediction, nats), flip_rate
            (share of positions whose most likely token changed), keys (number edited), mass (share
            of all attention of the edited heads that those keys held before).
        migration: one row per layer and head, means over prompts: `source_before` and
            `source_after`, largest alpha among the sources; `other_before` and `other_after`,
            largest alpha among other keys; `other_key`, the position most often strongest after.
        alphas: per prompt, [2, layers, heads, keys]: alpha of every key before and after, NaN where
            too few queries see a key.
        edit, amount: what was done.
        scope: the heads that were edited, in words.
        tokens: [prompts], T of each.
        bos: "added", "absent" or "mixed".
        seed: of controls and bootstrap.
    """

    values: dict[str, dict[str, np.ndarray]] = field(repr=False)
    migration: pd.DataFrame = field(repr=False)
    alphas: tuple[np.ndarray, ...] = field(repr=False)
    edit: str
    amount: float
    scope: str
    tokens: tuple[int, ...]
    bos: str
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per condition: means over prompts with 95 % bootstrap intervals over prompts.

        `excess` is the sources' delta_loss minus the control's, prompt by prompt, NaN for the
        sources themselves. Intervals are NaN for one prompt.
        """
        rows = []
        sources = self.values["sources"]["delta_loss"]
        for condition, values in self.values.items():
            row: dict[str, Any] = {"condition": condition}
            row |= {name: values[name].mean() for name in ("keys", "mass")}
            shown = {name: values[name] for name in MEASURES}
            unlike = np.full_like(sources, np.nan)
            shown["excess"] = unlike if condition == "sources" else sources - values["delta_loss"]
            for name, numbers in shown.items():
                low, high = over_units(numbers, np.ones(len(numbers)), self.seed)
                row |= {
                    name: numbers.mean(),
                    f"{name}_low": float(low),
                    f"{name}_high": float(high),
                }
            rows.append(row)
        return pd.DataFrame(rows).assign(
            edit=self.edit,
            amount=self.amount,
            scope=self.scope,
            bos=self.bos,
            n=len(self.tokens),
        )

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> tuple[Sentence, ...]:
        """What the numbers say, and what they do not.

        Kinds: `effect`, `prediction`, `mass`, `random` and the like (a control each), `moved`, `limit`.
        """
        table = self.table().set_index("condition")
        sources = table.loc["sources"]
        done = f"Edit {self.edit} (amount {self.amount:g}) of {self.scope}"
        loss = f"{done} changes the loss by {_with_interval(sources, 'delta_loss')} nats per token."
        prediction = (
            f"The prediction moves by a KL of {_with_interval(sources, 'kl')} nats, and "
            f"{sources['flip_rate']:.1%} of the most likely tokens change; {sources['mass']:.0%} of the "
            f"edited heads' attention lay there."
        )
        sentences = [Sentence(loss, kind="effect"), Sentence(prediction, kind="prediction")]
        for control, row in table.drop(index="sources").iterrows():
            if control == "mass" and row["mass"] < MATCHED * sources["mass"]:
                text = (
                    f"There is no mass control to compare with: the other keys hold too little, at most "
                    f"{row['mass']:.0%} of the attention together."
                )
                sentences.append(Sentence(text, kind="mass"))
                continue
            less, more = row["excess_high"] < 0, row["excess_low"] > 0
            verdict = "less than" if less else "more than" if more else "not clearly unlike"
            text = (
                f"That is {verdict} the {control} control ({row['mass']:.0%} of the attention): the "
                f"difference is {_with_interval(row, 'excess')} nats."
            )
            sentences.append(Sentence(text, kind=str(control)))
        rise = self.migration["other_after"] - self.migration["other_before"]
        taken = int((rise > TOOK_OVER).sum())
        text = (
            f"In {taken} of {len(rise)} heads another key's alpha rose by more than {TOOK_OVER}"
            + ("." if taken else "; no other key took the sources' place.")
        )
        sentences.append(Sentence(text, kind="moved"))
        if taken:
            text = (
                "Attention moved to the next sink, so a small change of loss does not show that sinks "
                "are of no use."
            )
            sentences.append(Sentence(text, kind="limit"))
        lengths = f"{min(self.tokens)} to {max(self.tokens)}"
        text = (
            f"Measured on {len(self.tokens)} prompts of {lengths} tokens, BOS {self.bos}; intervals "
            "are 95 % over prompts"
            + (", and there is none for one prompt." if len(self.tokens) == 1 else ".")
        )
        return (*sentences, Sentence(text, kind="limit"))


def _with_interval(row: Any, name: str) -> str:
    return f"{row[name]:.4f} [{row[f'{name}_low']:.4f}, {row[f'{name}_high']:.4f}]"
