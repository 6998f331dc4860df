"""How the effect of an edit depends on its reach (one head, its layer, all) and on the BOS token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from lens.common.head_ids import AnyHead, head_id
from lens.common.results import Result, Sentence, described, of_kind
from lens.edits.attention import Mask
from lens.edits.clean_runs import CleanRuns, clean_runs
from lens.edits.controls import CONTROLS
from lens.edits.effect_results import Effect
from lens.edits.effects import OfKeys, effect
from lens.models.loaded import LoadedModel
from lens.sinks.detection.emergences import bos_pair

SCOPES = ("head", "layer", "from_layer", "all")


@dataclass(frozen=True, eq=False)
class ScopedEffects(Result):
    """`Effect` at each of several scopes, with the same seed.

    Attributes:
        effects: one of `SCOPES`, or "with BOS" and "without BOS" -> effect; the widest last.
    """

    effects: dict[str, Effect] = field(repr=False)

    def table(self) -> pd.DataFrame:
        """One row per scope and condition; `reach` names the scope, the rest as `Effect.table`."""
        parts = [found.table().assign(reach=name) for name, found in self.effects.items()]
        return pd.concat(parts, ignore_index=True)

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> tuple[Sentence, ...]:
        """The effect of each scope, as the kind `effect`, then the limits of the widest."""
        said = [
            Sentence(f"{name}: {text}", kind="effect")
            for name, found in self.effects.items()
            for text in of_kind(found.findings(), "effect")
        ]
        widest = list(self.effects.values())[-1]
        return (*said, *of_kind(widest.findings(), "moved", "limit"))


def by_scope(
    model: LoadedModel,
    prompts: Any,
    *,
    head: AnyHead,
    edit: OfKeys | None = None,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
    clean: CleanRuns | None = None,
) -> ScopedEffects:
    """`lens.effect` of one head, its layer, all layers from it on, and all layers.

    Args:
        model, prompts, controls, seed, clean: as for `lens.effect`.
        edit: likewise, its heads and layers aside; None: `Mask("first")`.
        head: such as "L1H0".

    Raises:
        LensError: a head that is not there, and as `lens.effect`.

    Example:
        >>> lens.sinks.by_scope(model, texts, head="L1H0").table()
    """
    found = head_id(head, layers=model.info.layers, heads=model.info.heads)
    reach: dict[str, dict[str, Any]] = {
        "head": {"heads": [found]},
        "layer": {"layers": [found.layer]},
        "from_layer": {"layers": range(found.layer, model.info.layers)},
        "all": {},
    }
    runs = clean_runs(model, clean)
    return ScopedEffects(
        {
            name: effect(
                model,
                prompts,
                replace(edit or Mask(), **({"heads": None, "layers": None} | reach[name])),
                controls=controls,
                seed=seed,
                clean=runs,
            )
            for name in SCOPES
        }
    )


def by_bos(
    model: LoadedModel,
    prompts: Any,
    *,
    edit: OfKeys | None = None,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
    clean: CleanRuns | None = None,
) -> ScopedEffects:
    """`lens.effect` of the first token on the same text with BOS in front and without.

    Args:
        model, prompts, controls, seed, clean: as for `lens.effect`.
        edit: likewise; None: `Mask("first")`.

    Raises:
        LensError: as `lens.sinks.bos_pair` and `lens.effect`.

    Example:
        >>> lens.sinks.by_bos(model, texts).table()[["reach", "condition", "delta_loss", "bos"]]
    """
    return ScopedEffects(
        {
            name: effect(model, ids, edit or Mask(), controls=controls, seed=seed, clean=clean)
            for name, ids in bos_pair(model, prompts).items()
        }
    )
