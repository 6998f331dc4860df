"""Conserved flow: how unequally keys give, and how much of a row is its own.

Wu et al., "Flowformer", ICML 2022, arXiv 2202.06258. On softmax attention every row takes in 1; a key gives out
O_j, its received mass. Conserved, a row takes I_i = sum_j P_ij / O_j: small where it lives on keys that everyone looks at.

Some key always receives most. Whether it is looked at by all is another question: the key is chosen by every second row, and
what it receives is measured on the rows between, as a multiple of what uniform attention gives it there. Without a key that
rows have in common that is 1, whatever the rows are. Beside all numbers stand those of uniform attention over what each
position sees, and intervals over pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.given import given_traces
from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence
from lens.stats import over_units
from lens.stats.verdicts import by_chance, of_many
from lens.vision._patches import SMALLEST, head_table, uniform_maps

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

_LONGEST = 4096
_FEWEST = 16  # rows that see a key, for it to be the one with most: the last keys of a causal mask have few
_FEWEST_PICTURES = 5  # of fewer, all lie on one side by chance more often than an interval allows
_DIGITS = 6  # of a Gini: single precision is no finding
_NAMES = ("largest", "gini", "entropy", "exclusive")


@dataclass(frozen=True, repr=False, eq=False)
class Flow(Result):
    """Conserved flow of every head; every array is [layers, heads], mean over pictures.

    Attributes:
        largest: what the key that receives most receives from other rows than it was chosen by, times what it has there
            under uniform attention.
        gini: of the received mass over keys: 0 alike, near 1 all on one.
        entropy: of it, as a share of the highest possible.
        exclusive: lowest conserved intake of a row: how much its sources are its own.
        low, high: of each of these names the 95 % interval over pictures; NaN of a single one.
        uniform: of each of these names what uniform attention has.
        rises: low and high end of what the Gini of the last layer has over that of the first, mean over heads, each less that of
            uniform attention.
        error: largest deviation of the conserved sums from the number of keys (0 in exact numbers).
        n: pictures.
        layers: numbers of the layers.
    """

    largest: np.ndarray = field(repr=False)
    gini: np.ndarray = field(repr=False)
    entropy: np.ndarray = field(repr=False)
    exclusive: np.ndarray = field(repr=False)
    low: dict[str, np.ndarray] = field(repr=False)
    high: dict[str, np.ndarray] = field(repr=False)
    uniform: dict[str, np.ndarray] = field(repr=False)
    rises: tuple[float, float]
    error: float
    n: int
    layers: tuple[int, ...]

    def table(self) -> pd.DataFrame:
        """One row per head: `layer`, `head`, `name`, and `largest`, `gini`, `entropy`, `exclusive`, each with `_low`, `_high` and
        `_uniform`."""
        columns = {}
        for name in _NAMES:
            columns[name] = getattr(self, name)
            ends = (("low", self.low), ("high", self.high), ("uniform", self.uniform))
            columns |= {f"{name}_{end}": of[name] for end, of in ends}
        return head_table(self.layers, columns)

    def findings(self) -> tuple[Sentence, ...]:
        """Heads whose rows have a key in common, where the interval lies above uniform attention ("flow"); how unequal keys
        are in the last layer beside the first, where it tells them apart ("rises"); else what is not told ("limit")."""
        if self.n < _FEWEST_PICTURES:
            few = f"Of fewer than {_FEWEST_PICTURES} pictures (here {self.n}) nothing is said of flow beside uniform attention."
            return (Sentence(few, kind="limit"),)
        found = []
        above = self.low["largest"] > self.uniform["largest"] + SMALLEST
        if above.any():
            place = np.unravel_index(int(np.where(above, self.largest, 0).argmax()), above.shape)
            name = HeadId(self.layers[int(place[0])], int(place[1]))
            value, low, high = (
                float(one[place])
                for one in (self.largest, self.low["largest"], self.high["largest"])
            )
            low, high = of_many(value, low, high, above.size, self.n, least=0)
            more = (
                f"In {int(above.sum())} of {above.size} heads rows have a key in common ({by_chance(above.size, sides=1):.1f} by chance), most in {name}: it receives "
                f"{self.largest[place]:.2f} [{low:.2f}, {high:.2f}] times what it has under uniform attention, over {self.n} pictures."
            )
            found.append(Sentence(more, kind="flow"))
        low, high = self.rises
        if low > 0 or high < 0:
            first, last = (self.gini[at].mean() for at in (0, -1))
            goes = (
                f"Keys are {'more' if low > 0 else 'less'} unequal in layer {self.layers[-1]} than in layer {self.layers[0]}: Gini "
                f"{last:.2f} and {first:.2f} (uniform attention {self.uniform['gini'][-1].mean():.2f} and "
                f"{self.uniform['gini'][0].mean():.2f}), beyond that apart by {low:+z.2f} to {high:+z.2f} over {self.n} pictures."
            )
            found.append(Sentence(goes, kind="rises"))
        if not found:
            none = f"Over {self.n} pictures flow is not told apart from uniform attention, and the last layer not from the first."
            found.append(Sentence(none, kind="limit"))
        return tuple(found)


def flow(traces: AttentionTrace | Sequence[AttentionTrace], *, seed: Seed = 0) -> Flow:
    """What keys give out and rows take in, conserved, over all positions; with intervals over pictures.

    Args:
        traces: of one model, with q and k (`keep_qk`), of at most 4,096 positions; one or several.
        seed: of the intervals.

    Raises:
        LensError: longer, of several models, or without exact tiles.

    Reference:
        arXiv 2202.06258, applied to softmax attention.

    Example:
        >>> lens.vision.flow(lens.capture(vit, {"pixel_values": images}, keep_qk=True)).table()
    """
    several = given_traces(traces)
    if len({(one.model, one.layers, one.heads) for one in several}) > 1:
        raise LensError("traces must come from one model; take their flow apart")
    if (longest := max(one.length for one in several)) > _LONGEST:
        raise LensError(
            f"flow looks at whole maps of at most {_LONGEST:,} positions, got {longest:,}"
        )
    found, fair, worst = [], [], 0.0
    for trace in several:
        whole = (0, trace.length)
        for layer, even, _ in uniform_maps(trace, whole):
            fair += [_numbers(even, even)] * trace.heads
            for head in range(trace.heads):
                one = trace.tile(layer, head, whole, whole)
                found.append(_numbers(one, even))
                out = one.sum(0)
                intake = (one / np.where(out > 0, out, 1)).sum()
                worst = max(worst, abs(float(intake) - int((out > 0).sum())))
    shape = (len(several), len(several[0].layers), several[0].heads, len(_NAMES))
    each, evenly = (np.reshape(one, shape) for one in (found, fair))
    low, high = over_units(each, np.ones_like(each), seed)
    unequal = np.round((each - evenly)[..., 1].mean(-1), _DIGITS)  # [pictures, layers]
    gained = unequal[:, -1] - unequal[:, 0]
    rises = over_units(gained, np.ones_like(gained), seed)
    mean = each.mean(0)
    return Flow(
        *np.moveaxis(mean, -1, 0),
        low=_named(low),
        high=_named(high),
        uniform=_named(evenly.mean(0)),
        rises=(float(rises[0]), float(rises[1])),
        error=worst,
        n=len(several),
        layers=several[0].layers,
    )


def _named(values: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[..., number] for number, name in enumerate(_NAMES)}


def _numbers(one: np.ndarray, even: np.ndarray) -> list[float]:
    """`_NAMES` of a map [queries, keys], of which uniform attention is `even`."""
    out, n = one.sum(0), len(one)
    rows = (even > 0).sum(0)
    choose, test = slice(0, None, 2), slice(1, None, 2)
    expected = [even[half].sum(0) for half in (choose, test)]
    may = (rows >= min(_FEWEST, rows.max())) & (expected[0] > 0) & (expected[1] > 0)
    times = [
        np.where(may, one[half].sum(0) / np.where(may, own, 1), 0)
        for half, own in zip((choose, test), expected, strict=True)
    ]
    ordered = np.sort(out)
    gini = ((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / (n * ordered.sum())
    share = out / out.sum()
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(max(n, 2))
    intake = (one / np.where(out > 0, out, 1)).sum(-1)
    return [
        float(times[1][int(times[0].argmax())]),
        max(float(gini), 0.0),
        float(entropy),
        float(intake.min()),
    ]
