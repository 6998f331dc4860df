"""What `lens.reading.explain` and `explain_pairs` give back: the logit of a pair as a sum over two sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import pandas as pd

from lens.common.choices import check_choice, check_counts
from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence, by_size, few, with_ends
from lens.stats.intervals import columns, over_units
from lens.stats.verdicts import mean_told

if TYPE_CHECKING:
    from jaxtyping import Float

Side: TypeAlias = Literal["query", "key"]


@dataclass(frozen=True, repr=False, eq=False)
class Explanation(Result):
    """Why one query attends to one key.

    Attributes:
        head: whose attention.
        query, key: places in the prompt; key None: the learned sink.
        tokens: the query's and the key's.
        parts: names of what wrote the queries, and of what wrote the keys.
        values: [query part, key part], nats; they sum to the logit before a softcap.
        contrast: the same less its average over the keys of the row, or less another key's: they sum to
            `logit - average`, and differences are all that the softmax sees.
        content: `values` if query and key stood at one place; what is left of `values` is due to rotary
            embedding alone. Equal to `values` without it.
        logit: of the pair, before a softcap.
        average: of the logits that it is held against.
        against: "keys": those of all keys that the query sees; "attention": the same, weighted by what it
            attends to them; a number: that key's.
        mass: what the query attends to the key; even: what it would if it attended to all that it sees alike.
        slope: of the softcap there, 1 without one: how much of a small change of `logit` gets through.
        sources: for each side, head -> where that earlier head looks most from that place, in words.
        error: largest difference of a sum of parts from what the model computed, nats.
        model: its name.
    """

    head: HeadId
    query: int
    key: int | None
    tokens: tuple[str, str]
    parts: tuple[tuple[str, ...], tuple[str, ...]]
    values: Float[np.ndarray, "query_parts key_parts"]
    contrast: Float[np.ndarray, "query_parts key_parts"]
    content: Float[np.ndarray, "query_parts key_parts"]
    logit: float
    average: float
    against: str | int
    mass: float
    even: float
    slope: float
    sources: tuple[Mapping[str, str], Mapping[str, str]]
    error: float
    model: str

    def table(self) -> pd.DataFrame:
        """One row per pair of parts, the largest contrast first.

        Columns: `query_part`, `key_part`, `value`, `contrast`, `content`, `distance` (value less content).
        """
        rows, places = (np.ravel(one) for one in np.indices(self.values.shape))
        found = pd.DataFrame(
            {
                "query_part": np.array(self.parts[0], object)[rows],
                "key_part": np.array(self.parts[1], object)[places],
                "value": self.values.ravel(),
                "contrast": self.contrast.ravel(),
                "content": self.content.ravel(),
                "distance": (self.values - self.content).ravel(),
            }
        )
        return by_size(found, "contrast")

    def side(self, side: Side) -> pd.DataFrame:
        """One row per part of one side, summed over the other: `part`, `value`, `contrast`, `share` (of all
        contrast) and `looks_at`, the token that a head looks at most from there; the largest contrast first.

        Raises:
            LensError: another side.
        """
        axis = 1 if check_choice("side", side, Side) == "query" else 0
        names, sources = self.parts[1 - axis], self.sources[1 - axis]
        contrast, total = self.contrast.sum(axis), self.logit - self.average
        found = pd.DataFrame(
            {
                "part": names,
                "value": self.values.sum(axis),
                "contrast": contrast,
                "share": contrast / total if total else np.nan,
                "looks_at": [sources.get(name, "") for name in names],
            }
        )
        return by_size(found, "contrast")

    def findings(self) -> tuple[Sentence, ...]:
        """The pair ("pair"), what carries it on each side ("key", "query"), their largest product ("cell"), what rotary
        embedding does ("distance"), and the softcap ("limit")."""
        where = "its learned sink" if self.key is None else f"{self.tokens[1]!r} at {self.key}"
        above = self.logit - self.average
        said = [
            Sentence(
                f"{self.head}: {self.tokens[0]!r} at {self.query} gives {where} {self.mass:.1%} of its attention (even attention "
                f"{self.even:.1%}); the logit is {self.logit:.3g}, {above:+z.3g} against {_against(self.against)}.",
                kind="pair",
            )
        ]
        for side in ("key", "query"):
            best = self.side(side).iloc[0]
            looks = f" (from there it looks at {best['looks_at']})" if best["looks_at"] else ""
            share = f", {best['share']:.0%} of it" if abs(above) > self.error else ""
            said.append(
                Sentence(
                    f"On the {side} side {best['part']}{looks} carries {best['contrast']:+z.3g}{share}.",
                    kind=side,
                )
            )
        cell = self.table().iloc[0]
        said.append(
            Sentence(
                f"The largest product is {cell['query_part']} × {cell['key_part']}: {cell['contrast']:+z.3g}.",
                kind="cell",
            )
        )
        distance = float((self.values - self.content).sum())
        if np.any(self.values != self.content):
            said.append(
                Sentence(
                    f"At one place the logit would be {self.content.sum():.3g}; the distance adds {distance:+z.3g}.",
                    kind="distance",
                )
            )
        if self.slope < 1:
            said.append(
                Sentence(
                    f"The logit is that before the softcap, of which {self.slope:.0%} of a small change gets through.",
                    kind="limit",
                )
            )
        return tuple(said)


@dataclass(frozen=True, repr=False, eq=False)
class PairExplanation(Result):
    """Why a head attends to keys of a kind, over many pairs; numbers of a prompt are means over its pairs.

    Attributes:
        head: whose attention.
        pairs: which pairs, in words.
        groups: the offsets or classes that they were told apart by, or one name.
        against: as in `Explanation`.
        parts: as in `Explanation`.
        values, contrast, content: [group, prompt, query part, key part] as in `Explanation`; NaN where a
            prompt has no pair of that group.
        size: mean of the absolute contrast of each pair: where it is far above that of the mean, signs cancel.
        mass, even, above: [group, prompt], attention to the keys, what even attention would give them, and their logits less
            what they are held against.
        count: [group, prompt] pairs.
        error: largest difference of a sum from what the model computed, nats.
        seed: of the bootstrap.
        model: its name.
        by: what the groups are: "offset", "class" or "classes" (a user's own).
    """

    head: HeadId
    pairs: str
    groups: tuple[str, ...]
    against: str
    parts: tuple[tuple[str, ...], tuple[str, ...]]
    values: Float[np.ndarray, "groups prompts query_parts key_parts"]
    contrast: Float[np.ndarray, "groups prompts query_parts key_parts"]
    content: Float[np.ndarray, "groups prompts query_parts key_parts"]
    size: Float[np.ndarray, "groups prompts query_parts key_parts"]
    mass: Float[np.ndarray, "groups prompts"]
    even: Float[np.ndarray, "groups prompts"]
    above: Float[np.ndarray, "groups prompts"]
    count: np.ndarray
    error: float
    seed: int
    model: str
    by: str = ""

    def table(self, *, top: int | None = 50) -> pd.DataFrame:
        """One row per group and pair of parts, the largest contrast of each group first.

        Columns: `group`, `query_part`, `key_part`; `value`, `contrast`, `content`, `size`, means over
        prompts; `contrast_low`, `contrast_high` (95 % bootstrap over prompts); `n` prompts and `pairs`.

        Args:
            top: only so many of each group; None: all.

        Raises:
            LensError: a number of pairs that is none.
        """
        if top is not None:
            check_counts(top=top)
        tables = []
        for number, group in enumerate(self.groups):
            some = self.count[number] > 0
            mean = self.contrast[number, some].mean(0)
            order = np.argsort(-np.abs(mean), axis=None, kind="stable")[:top]
            rows, places = np.unravel_index(order, mean.shape)
            value, contrast, content, size = (
                part[number, some][:, rows, places]
                for part in (self.values, self.contrast, self.content, self.size)
            )
            table = {
                "group": group,
                "query_part": np.array(self.parts[0], object)[rows],
                "key_part": np.array(self.parts[1], object)[places],
                "value": value.mean(0),
                **columns("contrast", contrast.T, self.seed, shares=False),
                "content": content.mean(0),
                "size": size.mean(0),
                "n": int(some.sum()),
                "pairs": int(self.count[number].sum()),
            }
            tables.append(pd.DataFrame(table))
        return pd.concat(tables, ignore_index=True)

    def side(self, side: Side) -> pd.DataFrame:
        """One row per group and part of one side, summed over the other; the largest contrast first.

        Columns: `group`, `part`, `value`, `contrast` with `_low`, `_high`, `share` of all contrast with
        `_low`, `_high`, `n`, `pairs`.

        Raises:
            LensError: another side.
        """
        axis = 3 if check_choice("side", side, Side) == "query" else 2
        values, contrast = self.values.sum(axis), self.contrast.sum(axis)
        tables = []
        for number, group in enumerate(self.groups):
            some = self.count[number] > 0
            found = contrast[number, some]  # [prompts, parts]
            above = np.broadcast_to(self.above[number, some, None], found.shape)
            low, high = (
                over_units(found, above, self.seed)
                if (above > 0).all()
                else (np.full(found.shape[1], np.nan),) * 2
            )
            table = pd.DataFrame(
                {
                    "group": group,
                    "part": self.parts[0 if axis == 3 else 1],
                    "value": values[number, some].mean(0),
                    **columns("contrast", found.T, self.seed, shares=False),
                    "share": found.sum(0) / above.sum(0),
                    "share_low": low,
                    "share_high": high,
                    "n": int(some.sum()),
                    "pairs": int(self.count[number].sum()),
                }
            )
            tables.append(by_size(table, "contrast"))
        return pd.concat(tables, ignore_index=True)

    def leading(self, side: Side) -> pd.DataFrame:
        """One row per group: the part of one side that carries most of it, and by how much more than the second.

        Columns: `group`, `part`, `share` with `_low`, `_high`, `second`, `lead` (nats, sizes of the two contrasts) with
        `_low`, `_high` (95 % bootstrap over prompts), `n` prompts and `pairs`.

        Raises:
            LensError: another side.
        """
        table, axis = self.side(side), 3 if side == "query" else 2
        names = self.parts[0 if side == "query" else 1]
        found = []
        for number, (_, rows) in enumerate(table.groupby("group", sort=False)):
            two = [names.index(part) for part in rows["part"].iloc[:2]]
            each = self.contrast[number, self.count[number] > 0].sum(axis - 1)[:, two]
            sized = each * np.sign(each.mean(0))
            lead = sized[:, 0] - sized[:, 1:].sum(1)
            names_of = ["group", "part", "share", "share_low", "share_high", "n", "pairs"]
            best = rows[names_of].head(1).reset_index(drop=True)
            best["second"] = rows["part"].iloc[1] if len(two) > 1 else ""
            found.append(best.assign(**columns("lead", lead[None], self.seed)))
        return pd.concat(found, ignore_index=True)

    def _of_groups(self, side: Side) -> list[Sentence]:
        """What leads in how many groups, from which share to which, and what leads elsewhere."""
        rows = self.leading(side)
        # Of several prompts, in all of which it is attended more than others.
        rows = rows[np.isfinite(rows["share_low"])]
        start = f"{self.head} on {self.pairs} by {self.by}, {side} side"
        if rows.empty:
            return [
                Sentence(
                    f"{start}: no group has logits above the mean in all of its prompts, two or more.",
                    kind="groups",
                )
            ]
        best = rows["part"].mode()[0]
        own, others = rows[rows["part"] == best], rows[rows["part"] != best]
        least, most = (
            f"{with_ends(row, 'share', '.0%')} ({row['group']})"
            for row in own.sort_values("share").iloc[[0, -1]].to_dict("records")
        )
        span = least if len(own) == 1 else f"{least} to {most}"
        every = self.side(side)
        rest = every[every["group"].isin(own["group"]) & (every["part"] != best)]["share"]
        beside = (
            f"the median of the others {rest.median():.1%}" if len(rest) else "there is no other"
        )
        said = [
            Sentence(
                f"{start}: {best} carries most in {len(own)} of {len(rows)} groups with logits above the mean in "
                f"all of their prompts, two or more, {span} of the logit; {beside}.",
                kind="groups",
            )
        ]
        if len(others):
            sure = others[others["lead_low"] > 0]
            named = few([f"{row['part']} ({row['group']})" for row in sure.to_dict("records")])
            said.append(
                Sentence(
                    f"{start}: another part leads in {len(others)}"
                    + (f", surely {named}." if len(sure) else ", in none of them surely."),
                    kind="other",
                )
            )
        return said

    def findings(self) -> tuple[Sentence, ...]:
        """Of each group: the pairs ("pairs"), and what carries them on each side ("key", "query").

        Of several groups instead, of each side: what leads in how many of them ("groups"), and where another part
        does ("other").
        """
        if len(self.groups) > 1:
            return tuple(said for side in ("key", "query") for said in self._of_groups(side))
        said = []
        for number, group in enumerate(self.groups):
            if self.by:
                text = f"{self.head}: all pairs are of one group, {group}."
                said.append(Sentence(text, kind="groups"))
            some = self.count[number] > 0
            mass = mean_told(self.mass[number, some], self.seed, ".1%")
            above = mean_told(self.above[number, some], self.seed, "+.3g")
            said.append(
                Sentence(
                    f"{self.head} on {self.pairs}: {int(self.count[number].sum())} pairs in {int(some.sum())} "
                    f"prompt{'s' * int(some.sum() != 1)} get {mass} of their row's attention (even "
                    f"attention {self.even[number, some].mean():.1%}); logits are {above} "
                    f"against {_against(self.against)}.",
                    kind="pairs",
                )
            )
            for side in ("key", "query"):
                rows = self.side(side)
                shares = [with_ends(row, "share", ".0%") for row in rows.head(2).to_dict("records")]
                second = f", the next, {rows['part'][1]}, {shares[1]}" if len(rows) > 1 else ""
                said.append(
                    Sentence(
                        f"{self.head}: on the {side} side {rows['part'][0]} carries {shares[0]} of that{second}.",
                        kind=side,
                    )
                )
        return tuple(said)


def _against(what: str | int) -> str:
    if isinstance(what, int):
        return f"the key at {what}"
    mean = "the mean over the keys that it sees"
    return mean if what == "keys" else f"{mean}, weighted by its attention"
