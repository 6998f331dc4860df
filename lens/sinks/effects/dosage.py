"""How the effect of an edit grows with its amount."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.common.results import Result, Sentence, described, of_kind
from lens.edits.controls import CONTROLS
from lens.models.loaded import LoadedModel
from lens.passes.keys import Keys
from lens.sinks.effects.causal import effect
from lens.sinks.effects.clean import CleanRuns, clean_runs
from lens.sinks.effects.results import SinkEffect


@dataclass(frozen=True, eq=False)
class DoseResponse(Result):
    """`SinkEffect` at several amounts, with the same prompts and the same control keys.

    Attributes:
        effects: one per amount, ascending.
    """

    effects: tuple[SinkEffect, ...] = field(repr=False)

    def table(self) -> pd.DataFrame:
        """One row per amount and condition; columns of `SinkEffect.table`."""
        return pd.concat([found.table() for found in self.effects], ignore_index=True)

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> tuple[Sentence, ...]:
        """The effect at each amount, whether it grows, and how it stands to the mass control.

        Kinds: `dose`, `trend`, `mass`, `limit`.
        """
        table = self.table()
        rows = table[table["condition"] == "sources"]
        first = rows.iloc[0]
        shown = "; ".join(
            f"{row['amount']:g}: {row['delta_loss']:+.4f} [{row['delta_loss_low']:+.4f}, "
            f"{row['delta_loss_high']:+.4f}]"
            for row in rows.to_dict("records")
        )
        text = f"Edit {first['edit']} of {first['scope']} changes the loss by amount (nats per token): {shown}."
        sentences = [Sentence(text, kind="dose")]
        if len(rows) > 1:
            steps = rows["delta_loss"].diff().iloc[1:]
            grows = (
                "grows with every step"
                if (steps > 0).all()
                else "falls with every step"
                if (steps < 0).all()
                else "does not grow with every step"
            )
            sentences.append(Sentence(f"The loss {grows} of the amount.", kind="trend"))
        limit = f"{first['n']} prompts, BOS {first['bos']}; 95 % intervals over prompts."
        return (
            *sentences,
            *of_kind(self.effects[-1].findings(), "mass"),
            Sentence(limit, kind="limit"),
        )


def dose_response(
    model: LoadedModel,
    prompts: Any,
    *,
    sources: Keys = "first",
    amounts: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    edit: str = "mask",
    layers: Sequence[int] | None = None,
    heads: Sequence[AnyHead] | None = None,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
    clean: CleanRuns | None = None,
) -> DoseResponse:
    """`lens.sinks.effect` at each of `amounts`.

    Args:
        model, prompts, sources, edit, layers, heads, controls, seed, clean: as for `effect`.
        amounts: fractions 0..1, each once.

    Raises:
        LensError: no amount or one twice, and as `effect`.

    Example:
        >>> lens.sinks.dose_response(model, texts, heads=["L1H0"]).plot()
    """
    if not len(amounts) or len(set(amounts)) < len(amounts):
        raise LensError(f"amounts must be different fractions, at least one; got {list(amounts)}")
    runs = clean_runs(model, clean)
    return DoseResponse(
        tuple(
            effect(
                model,
                prompts,
                sources=sources,
                edit=edit,
                amount=amount,
                layers=layers,
                heads=heads,
                controls=controls,
                seed=seed,
                clean=runs,
            )
            for amount in sorted(amounts)
        )
    )
