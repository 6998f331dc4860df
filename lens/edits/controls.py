"""Sets of keys to compare a sink with: as many, as much mass, or standing next to it."""

from __future__ import annotations

import numpy as np

from lens.common.errors import LensError

CONTROLS = ("size", "mass", "position", "self")


def control_keys(
    control: str,
    sources: np.ndarray,
    mass: np.ndarray,
    random: np.random.Generator,
    free: np.ndarray | None = None,
) -> list[int]:
    """Keys that are no sources.

    Args:
        control: "size" (as many random keys), "mass" (random keys, added until their mass comes
            nearest to the sources': where a sink holds most of the mass it may not be reached) or
            "position" (as many keys, the nearest ones to the sources).
        sources: bool [keys].
        mass: [keys], share of all attention that each key receives.
        random: draws the keys.
        free: bool [keys], those that may be drawn; None: all that are no sources.

    Raises:
        LensError: fewer other keys than sources.
    """
    others = np.flatnonzero(~sources if free is None else free)
    count = int(sources.sum())
    if len(others) < count:
        raise LensError(
            f"controls need as many other keys as sources: {count} of {len(sources)} keys are "
            "sources; use longer prompts or controls=()"
        )
    if control == "position":
        places = np.flatnonzero(sources)
        distance = np.abs(others[:, None] - places).min(1)
        return sorted(others[np.argsort(distance, kind="stable")[:count]].tolist())
    drawn = random.permutation(others)
    if control == "size":
        return sorted(drawn[:count].tolist())
    reached = np.cumsum(mass[drawn])
    return sorted(drawn[: 1 + np.abs(reached - mass[sources].sum()).argmin()].tolist())
