"""Which heads of the cross-attention align target and source: their strongest keys against labels, and in order.

A head that aligns looks, from each token of the target, at the one place of the source that it stands for; in
languages with one word order, and in speech, these places go on as the target does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from lens.common.choices import check_lists
from lens.common.errors import LensError
from lens.common.head_ids import head_columns, head_id, one_or_more
from lens.common.results import Result, Sentence, counted, ends
from lens.stats import over_rows, over_units
from lens.stats.intervals import known_mean
from lens.stats.verdicts import of_many, verdict
from lens.traces.alignment_labels import At, Labels, rows_of
from lens.traces.parts import TraceParts
from lens.traces.trace import AttentionTrace

_MEASURES = ("monotonicity", "confidence", "accuracy", "chance", "shuffled", "error", "mass")


@dataclass(frozen=True, repr=False, eq=False)
class Alignment(Result):
    """How each head of the cross-attention aligns target and source.

    Attributes:
        per_prompt: name -> [heads, prompts], NaN where a prompt cannot say it:
            "monotonicity", Kendall's tau-b between the queries and their strongest keys, -1 to 1;
            "confidence", mean of the largest probability of a row;
            "accuracy", share of the labelled rows whose strongest key is a label;
            "chance", the same of a key drawn from all keys;
            "shuffled", the same against the labels of the other rows: what the head's favourite keys hit in any order;
            "error", mean distance from the strongest key to the nearest label, keys;
            "mass", mean probability on the labels (of traces with q and k).
        hits: of one prompt, [heads, labelled rows] 0 or 1, for its interval; else None.
        heads: (layer, head) of each row.
        model: its name.
        seconds: from one key to the next, where keys are moments of a sound.
        at: which row stands for a token of the target, "read" or "predicted".
        rows: of each prompt, how many queries.
        known: places in `heads` of those that somebody lists as aligning.
    """

    per_prompt: Mapping[str, np.ndarray]
    hits: np.ndarray | None
    heads: tuple[tuple[int, int], ...]
    model: str
    seconds: float | None
    at: str
    rows: tuple[int, ...] = ()
    known: tuple[int, ...] = ()

    @property
    def ordered(self) -> int:
        """How many heads have an order: others look at one key from all rows."""
        return int(np.isfinite(self.per_prompt["monotonicity"]).any(1).sum())

    @property
    def random_order(self) -> float:
        """The monotonicity that the best of as many heads with an order reaches in one of twenty sets of random orders; at most 1."""
        scatter = [  # of tau
            2 * (2 * n + 5) / (9 * n * (n - 1)) if n > 1 else 1.0 for n in self.rows
        ]
        best = NormalDist().inv_cdf(1 - 0.05 / max(1, self.ordered))
        return min(1.0, float(best * np.sqrt(sum(scatter)) / max(1, len(scatter))))

    @property
    def labelled(self) -> bool:
        """Whether there were labels."""
        return bool(np.isfinite(self.per_prompt["accuracy"]).any())

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per head, the best aligned first: `name`, `layer`, `head` and the measures.

        Means over prompts; `_low` and `_high` of monotonicity and accuracy are 95 % bootstrap intervals over
        prompts; of one prompt accuracy has one over blocks of its rows. Without labels the order is by monotonicity.
        `error_seconds` where keys are moments of a sound; `known`, where heads were listed; `prompts`.
        """
        found: dict[str, Any] = head_columns(self.heads)
        for name in _MEASURES:
            values = self.per_prompt[name]
            known = ~np.isnan(values)
            found[name] = known_mean(values)
            if name in ("monotonicity", "accuracy"):
                low, high = over_units(np.where(known, values, 0).T, known.T.astype(float), seed)
                if name == "accuracy" and self.hits is not None and self.hits.shape[1]:
                    low, high = over_rows(self.hits, seed)
                found |= {f"{name}_low": low, f"{name}_high": high}
        if self.seconds is not None:
            found["error_seconds"] = found["error"] * self.seconds
        if self.known:
            found["known"] = np.isin(np.arange(len(self.heads)), self.known)
        table = pd.DataFrame(found | {"prompts": self.per_prompt["accuracy"].shape[1]})
        order = "accuracy" if self.labelled else "monotonicity"
        return table.sort_values(order, ascending=False, kind="stable", ignore_index=True)

    def findings(self) -> tuple[Sentence, ...]:
        """The head that aligns best, beside chance, and the one that goes on as the target does; each with the interval of the
        highest of all."""
        table, said = self.table(), []
        if self.labelled:
            said.append(self._points(table))
        if self.known:
            said.append(self._of_known())
        ordered = table.dropna(subset=["monotonicity"])
        if len(ordered):
            first = ordered.iloc[int(ordered["monotonicity"].to_numpy().argmax())]
            tau, low, high = (float(first[f"monotonicity{end}"]) for end in ("", "_low", "_high"))
            low, high = of_many(
                tau, low, high, len(ordered), int(first["prompts"]), least=-1, most=1
            )
            told = f"{first['name']} goes on as the target does"
            if np.isnan(low):
                told = f"{first['name']} goes on most as the target does, of one prompt without an interval"
            elif tau <= self.random_order or verdict(low, high) != "above":
                told = f"No head is told to go on as the target does, {first['name']} most"
            said.append(
                Sentence(
                    f"{told}: Kendall's tau of its strongest keys is {tau:z.2f}{ends(low, high, '.2f')}; the best of {self.ordered} heads whose "
                    f"keys have a random order reaches {self.random_order:.2f}.",
                    kind="monotonicity",
                )
            )
        else:
            said.append(
                Sentence(
                    "Every head looks at one key from all rows, so none has an order.", kind="limit"
                )
            )
        return tuple(said)

    def _points(self, table: pd.DataFrame) -> Sentence:
        """The head that points at labels most, beside a key at random and its own keys against other labels."""
        best, many = table.iloc[0], int(table["accuracy"].notna().sum())
        prompts, on = int(best["prompts"]), counted(int(best["prompts"]), "prompt")
        if self.hits is not None:  # the interval is over blocks of rows
            prompts, on = 0, f"one prompt ({self.hits.shape[1]})"
        share, low, high = (float(best[f"accuracy{end}"]) for end in ("", "_low", "_high"))
        low, high = of_many(share, low, high, many, prompts, least=0, most=1)
        others = ""  # of one row there are none
        if best["shuffled"] >= 0:
            others = f", its keys against the labels of other rows in {best['shuffled']:.0%}"
        above = verdict(low, high, np.fmax(best["chance"], best["shuffled"])) == "above"
        told = "points best" if above else "points most, not told apart from chance"
        return Sentence(
            f"Of {many} heads {best['name']} {told}: the strongest key is a label in {share:.0%}"
            f"{ends(low, high, '.0%')} of the labelled rows of {on}; a key at random in {best['chance']:.0%}{others}.",
            kind="alignment",
        )

    def _of_known(self) -> Sentence:
        """The heads that are listed as aligning, beside the others."""
        listed = np.isin(np.arange(len(self.heads)), self.known)
        name = "accuracy" if self.labelled else "monotonicity"
        values = self.per_prompt[name]
        if self.labelled and self.hits is not None:
            values = self.hits
        gap = known_mean(values[listed].T) - known_mean(values[~listed].T)  # of each prompt, or row
        if values is self.hits:
            low, high = over_rows(gap, 0)
        else:
            low, high = over_units(np.nan_to_num(gap), (~np.isnan(gap)).astype(float), 0)
        one = int(listed.sum()) == 1
        those = "head that is" if one else f"{listed.sum()} heads that are"
        s = "s" * one
        what = (
            f"point{s} at labels in a share of"
            if self.labelled
            else f"ha{'s' if one else 've'} a mean tau of"
        )
        means = [
            float(known_mean(known_mean(self.per_prompt[name][one].T))) for one in (listed, ~listed)
        ]
        return Sentence(
            f"The {those} listed as aligning {what} {means[0]:.2f}, the other {(~listed).sum()} "
            f"{means[1]:.2f}: a difference of {means[0] - means[1]:+.2f}{ends(float(low), float(high), '+.2f')}.",
            kind="known",
        )


def alignment(
    traces: AttentionTrace | TraceParts | Sequence[AttentionTrace | TraceParts],
    labels: Labels | Sequence[Labels] | None = None,
    *,
    at: At = "read",
    known: Sequence[Any] | None = None,
) -> Alignment:
    """How each head of the cross-attention aligns target and source.

    Args:
        traces: as `lens.capture` gives them of an encoder-decoder, of one prompt or several.
        labels: of each prompt, which source positions a target position stands for: a mapping or pairs, in numbers
            or words (`{"house": "Haus"}`), of a sound in seconds; of several prompts a list of them. None: order alone.
        at: the row that stands for token t of the target: "read", where the decoder reads it (row t), or
            "predicted", where it is predicted (row t - 1), as in speech.
        known: heads that somebody lists as aligning ("L3H1" or (3, 1)), to be compared with the others; of Whisper
            `model.model.generation_config.alignment_heads`.

    Raises:
        LensError: traces without cross-attention, of several models, or labels that do not fit.

    Example:
        >>> captured = lens.capture(translator, ([3, 4, 5, 6], [2, 3, 4, 5]), progress=False)
        >>> lens.traces.alignment(captured, {1: 0, 2: 1, 3: 2}).table().columns[:4].tolist()
        ['name', 'layer', 'head', 'monotonicity']
    """
    single = isinstance(traces, AttentionTrace | TraceParts)
    if not single:
        check_lists(traces=traces)
    several = [_cross(one) for one in ([traces] if single else traces)]
    if not several:
        raise LensError("alignment needs at least one trace, got an empty list")
    if len({(one.model, one.layers, one.heads) for one in several}) > 1:
        raise LensError("traces must come from one model, with the same layers and heads")
    given: list[Any] = [None] * len(several)
    if labels is not None:
        if not single:
            check_lists(labels=labels)
        given = [labels] if single else list(labels)
    if len(given) != len(several):
        raise LensError(f"labels must be one for each of {len(several)} prompts, got {len(given)}")
    every = [(head.layer, head.head) for head in several[0].every_head]
    listed = (
        {tuple(head_id(one)) for one in one_or_more("known", known)} if known is not None else set()
    )
    if unknown := sorted(listed - set(every)):
        raise LensError(f"known lists heads that the cross-attention has not got: {unknown}")
    if known is not None and not 0 < len(listed) < len(every):
        raise LensError(
            "known must list some of the heads, and not all: they are compared with the others"
        )
    measured = [
        _measured(one, rows_of(one, own, at)) for one, own in zip(several, given, strict=True)
    ]
    return Alignment(
        per_prompt={name: np.stack([one[name] for one in measured], 1) for name in _MEASURES},
        hits=measured[0]["hits"] if len(measured) == 1 else None,
        heads=tuple(every),
        model=several[0].model,
        seconds=several[0].attrs.get("seconds_per_position"),
        at=at,
        rows=tuple(one.queries for one in several),
        known=tuple(place for place, head in enumerate(every) if head in listed),
    )


def _cross(given: Any) -> AttentionTrace:
    found = given.get("cross") if isinstance(given, TraceParts) else given
    if not isinstance(found, AttentionTrace) or not found.cross:
        raise LensError(
            "alignment takes traces of cross-attention: of lens.capture(model, prompt) or of model.part('cross')"
        )
    if "strongest" not in found.dataset:
        raise LensError("the trace has no strongest keys; capture it with statistics='all'")
    return found


def _measured(trace: AttentionTrace, rows: Mapping[int, Sequence[int]]) -> dict[str, np.ndarray]:
    """name -> [heads], and `hits` [heads, labelled rows]."""
    data = trace.dataset
    strongest = _flat(data["strongest"].values)  # [heads, queries]
    found = {"monotonicity": np.array([_tau(keys) for keys in strongest])}
    unknown = np.full(len(strongest), np.nan)
    found["confidence"] = unknown
    if {"max_logit", "lse"} <= set(data):
        found["confidence"] = _flat(np.exp(data["max_logit"].values - data["lse"].values)).mean(-1)
    places = list(rows)
    distance = np.full((len(strongest), len(places)), np.nan)
    for column, row in enumerate(places):
        keys = np.array(rows[row])
        distance[:, column] = np.abs(strongest[:, row, None] - keys).min(-1)
    found["hits"] = (distance == 0).astype(float)
    if not places:
        return found | dict.fromkeys(("accuracy", "chance", "shuffled", "error", "mass"), unknown)
    chance = np.mean([len(set(keys)) for keys in rows.values()]) / trace.length
    return found | {
        "accuracy": found["hits"].mean(-1),
        "chance": np.full(len(strongest), chance),
        "shuffled": _against_others(strongest[:, places], [rows[row] for row in places]),
        "error": distance.mean(-1),
        "mass": _mass(trace, rows),
    }


def _against_others(strongest: np.ndarray, labels: Sequence[Sequence[int]]) -> np.ndarray:
    """[heads] share of the pairs of two rows in which the strongest key of one [heads, rows] is a label of the other."""
    if len(labels) < 2:
        return np.full(len(strongest), np.nan)
    hit = np.stack([np.isin(strongest, one) for one in labels], -1)  # [heads, rows, rows]
    own = np.trace(hit, axis1=1, axis2=2)
    return (hit.sum((1, 2)) - own) / (len(labels) * (len(labels) - 1))


def _mass(trace: AttentionTrace, rows: Mapping[int, Sequence[int]]) -> np.ndarray:
    """[heads] mean probability on the labels; NaN where the trace has no exact tiles."""
    found = []
    for layer, head in trace.every_head:
        if trace.tile_refusal(layer, head):
            found.append(np.nan)
            continue
        of_rows = [
            trace.tile(layer, head, (row, row + 1), (0, trace.length))[0, sorted(set(keys))].sum()
            for row, keys in rows.items()
        ]
        found.append(np.mean(of_rows))
    return np.array(found)


def _tau(keys: np.ndarray) -> float:
    """Kendall's tau-b of a row of positions with its order; NaN where all are one."""
    if len(keys) < 2 or (keys == keys[0]).all():
        return np.nan
    found: Any = kendalltau(np.arange(len(keys)), keys)
    return float(found.statistic)


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, values.shape[-1])
