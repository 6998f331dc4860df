"""What a comparison of two runs found, in sentences, and what it does not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lens.common.head_ids import HeadId
from lens.common.results import Sentence, by_size
from lens.runs.comparison.pairing import SEEN, SHARES
from lens.runs.folders import Run
from lens.runs.schema import KIND_WORDS
from lens.stats.verdicts import leave_out_0
from lens.traces.findings import Finding, findings
from lens.traces.metrics import METRICS

_KINDS = {
    "induction": ("induction head", "induction heads"),
    "sink": ("head with a sink on the first token", "heads with a sink on the first token"),
    "previous_token": ("previous-token head", "previous-token heads"),
    "duplicate_token": ("duplicate-token head", "duplicate-token heads"),
}
_NAMED = 6
_CHANGES = 3
_FOLLOWS = (
    "versions.",
    *(f"model.{name}" for name in ("layers", "heads", "kv_heads", "head_dim", "vocab", "context")),
    *(f"model.{name}" for name in ("class", "parameters", "licence")),
)  # what comes with the model and is no choice of its own
_SAME_ORDER = 0.995
MATCHED = (
    "Heads are matched by their number. In two models that were trained apart, L3H5 of one need not do the work of "
    "L3H5 of the other; numbers match in checkpoints, fine-tunes and other precisions of one model."
)


def sentences(
    a: Run,
    b: Run,
    heads: pd.DataFrame,
    metrics: pd.DataFrame,
    losses: pd.DataFrame,
    circuits: pd.DataFrame,
    shared: Mapping[str, int],
    refusal: str,
) -> list[Sentence]:
    """Heads of each kind in both, the largest changes, the order of the heads, losses and circuits.

    Kinds: `heads`, `change`, `order`, `loss`, `circuit`.
    """
    found = {
        "heads": _kinds_of_heads(a, b, heads, shared),
        "change": [] if refusal else _changes(heads, shared),
        "order": [] if refusal else _orders(metrics, shared),
        "loss": map(_loss, losses.to_dict("records")),
        "circuit": map(_circuit, circuits.to_dict("records")),
    }
    return [Sentence(text, kind=kind) for kind, texts in found.items() for text in texts]


def limits(
    heads: pd.DataFrame,
    shared: Mapping[str, int],
    settings: pd.DataFrame,
    circuits: pd.DataFrame,
    refused: Sequence[str],
    refusal: str,
) -> list[Sentence]:
    """One sentence each, most important first; of the kind `limit`."""
    said = [
        *_alignment(settings, refusal),
        *_confounds(settings),
        *_prompts(shared),
        *_chance(heads),
        *_sets(circuits),
        "Thresholds only sort heads for reading: one that crosses its threshold may have changed very "
        "little.",
        "Tables of sections are compared without intervals, as runs do not keep their values of each "
        "prompt.",
        *(f"{sentence}." for sentence in refused),
    ]
    return [Sentence(text, kind="limit") for text in said]


def signed(value: float) -> str:
    """A difference with its sign, three significant digits."""
    return f"{value:+z.3g}".replace("-", "−")


def bracket(low: float, high: float) -> str:
    """The interval of a difference, or "" where there is none."""
    return "" if np.isnan(low) or np.isnan(high) else f" [{signed(low)}, {signed(high)}]"


def _kinds_of_heads(a: Run, b: Run, heads: pd.DataFrame, shared: Mapping[str, int]) -> list[str]:
    """Heads that `lens.traces.findings` names: one by one where the runs share prompts, else counted."""
    found = [{one.kind: one for one in findings(run.heads)} for run in (a, b)]
    said = []
    for kind, (one, many) in _KINDS.items():
        first, second = (side.get(kind) for side in found)
        if first is None or second is None or first.prompt_id != second.prompt_id:
            continue
        where = f"on {KIND_WORDS[first.prompt_id]}, above {first.threshold:g}, uniform attention and random weights"
        mine, theirs = _above(first, heads, "a"), _above(second, heads, "b")
        capital = f"{many[0].upper()}{many[1:]}"
        if not mine and not theirs:
            said.append(f"Neither run has a {one} ({where}).")
        elif len(heads) and shared.get(first.prompt_id):
            parts = (
                ([head for head in mine if head in theirs], "in both"),
                ([head for head in mine if head not in theirs], "only in A"),
                ([head for head in theirs if head not in mine], "only in B"),
            )
            counted = ", ".join(f"{_count(part)} {words}" for part, words in parts)
            said.append(f"{capital} ({where}): {counted}.")
        else:
            sizes = [side.meta["model"]["layers"] * side.meta["model"]["heads"] for side in (a, b)]
            apart = (
                ""
                if shared.get(first.prompt_id)
                else "; not compared head by head, as the runs share no prompt "
                f"({_lengths(a, b, first.prompt_id)})"
            )
            said.append(
                f"{capital} ({where}): {len(mine)} of {sizes[0]} in A, "
                f"{len(theirs)} of {sizes[1]} in B{apart}."
            )
    return said


def _lengths(a: Run, b: Run, kind: str) -> str:
    """How long the prompts of one kind are in each run, where they are not the same ones."""
    said = []
    for name, run in (("A", a), ("B", b)):
        tokens = run.prompts.loc[run.prompts["kind"] == kind, "token_strings"].map(len)
        span = f"{tokens.min():,}"
        said.append(f"{span if tokens.nunique() == 1 else f'{span} to {tokens.max():,}'} in {name}")
    return f"tokens a prompt: {said[0]}, {said[1]}"


def _above(finding: Finding, heads: pd.DataFrame, side: str) -> list[str]:
    """Names, highest first; where heads are compared on such prompts, of those still above on the shared ones."""
    named = [head.name for head in finding.heads] if finding.found else []
    if heads.empty or finding.prompt_id not in set(heads["prompts"]):
        return named
    rows = heads[
        (heads["prompts"] == finding.prompt_id)
        & (heads["metric"] == finding.metric)
        & (heads["variant"] == "raw")
        & (heads[side] > finding.threshold)
    ].sort_values(side, ascending=False, kind="stable")
    above = [str(HeadId(*pair)) for pair in zip(rows["layer"], rows["head"], strict=True)]
    return [name for name in above if name in named]


def _count(heads: Sequence[str]) -> str:
    if not heads:
        return "0"
    more = ", ..." if len(heads) > _NAMED else ""
    return f"{len(heads)} ({', '.join(heads[:_NAMED])}{more})"


def _changes(heads: pd.DataFrame, shared: Mapping[str, int]) -> list[str]:
    """The largest differences between probabilities on shared prompts, one a head."""
    paired = [kind for kind, count in shared.items() if count]
    if not paired:
        return [
            "Whether a head's share of attention differs cannot be said: the runs share no prompt of the "
            "same tokens."
        ]
    rows = heads[heads["metric"].isin(SHARES) & heads["prompts"].isin(paired)]
    rows = rows[rows["difference"].abs() >= SEEN]
    only = (
        ""
        if len(paired) == len(shared)
        else f" on {' and '.join(KIND_WORDS[one] for one in paired)}"
    )
    if rows.empty:
        return [f"No head's share of attention{only} differs by {SEEN:g} or more."]
    if heads["low"].notna().any():
        rows = rows[leave_out_0(rows["low"], rows["high"])]
    if rows.empty:
        return [f"No head's share of attention{only} differs beyond its interval."]
    rows = by_size(rows, "difference").drop_duplicates(["layer", "head"]).head(_CHANGES)
    return [
        "Largest changes of a share of attention, one a head: "
        + "; ".join(map(_change, rows.to_dict("records")))
        + "."
    ]


def _change(row: Mapping[Any, Any]) -> str:
    metric = METRICS[row["metric"]].label.lower()
    without = ", sink excluded" if row["variant"] == "sink_excluded" else ""
    return (
        f"{HeadId(row['layer'], row['head'])} {metric}{without} on {KIND_WORDS[row['prompts']]} from "
        f"{row['a']:.2f} to {row['b']:.2f}, {signed(row['difference'])}"
        f"{bracket(row['low'], row['high'])}"
    )


def _orders(metrics: pd.DataFrame, shared: Mapping[str, int]) -> list[str]:
    """By which scores the heads are in the same order, of shared prompts where there are any."""
    rows = metrics[(metrics["variant"] == "raw") & metrics["rank_correlation"].notna()]
    paired = [kind for kind, count in shared.items() if count]
    rows = rows[rows["prompts"].isin(paired)] if paired else rows
    if rows.empty:
        return []
    apart = "" if paired else ", each on prompts of its own"
    rows = rows.sort_values("rank_correlation", kind="stable")
    least, most = rows.iloc[0], rows.iloc[-1]
    if least["rank_correlation"] >= _SAME_ORDER:
        return [
            f"Every score puts the heads of both runs{apart} into the same order: Spearman's correlation is never "
            f"below {least['rank_correlation']:.3f}."
        ]
    return [
        f"Over all heads the two runs{apart} agree most on the order by {_ordered(most)} and least by "
        f"{_ordered(least)}; 1 is the same order, 0 none."
    ]


def _ordered(row: pd.Series) -> str:
    return (
        f"{METRICS[row['metric']].label.lower()} on {KIND_WORDS[row['prompts']]} "
        f"(Spearman {row['rank_correlation']:.2f})"
    )


def loss_on(row: Mapping[Any, Any]) -> str:
    """What a loss is of."""
    is_copy = row["what"] == "loss_repeat"
    return "the second copy of random tokens" if is_copy else KIND_WORDS[row["prompts"]]


def _loss(row: Mapping[Any, Any]) -> str:
    return (
        f"On {loss_on(row)} the loss is {row['a']:.2f} nats a token in A and {row['b']:.2f} in B: "
        f"{signed(row['difference'])}{bracket(row['low'], row['high'])} over {row['n']} shared prompts."
    )


def _circuit(row: Mapping[Any, Any]) -> str:
    either = row["shared"] + row["only_a"] + row["only_b"]
    chance = "" if np.isnan(row["by_chance"]) else f"; by chance {row['by_chance']:.2f}"
    return (
        f"The circuits {row['circuit_a']} of A and {row['circuit_b']} of B share {row['shared']:,} of "
        f"{either:,} {row['part']} (Jaccard index {row['jaccard']:.2f}{chance})."
    )


def _sets(circuits: pd.DataFrame) -> list[str]:
    if circuits.empty:
        return []
    return [
        "Chance draws circuits of the same sizes from the whole graph. Circuits in like layers share more "
        "than that whatever they do: lens.circuits.reuse.overlap draws within layers."
    ]


def _alignment(settings: pd.DataFrame, refusal: str) -> list[str]:
    if refusal:
        return [refusal]
    if not {"model.name", "model.revision"} & set(settings["setting"]):
        return []
    return [MATCHED]


def _confounds(settings: pd.DataFrame) -> list[str]:
    names = [name for name in settings["setting"] if not name.startswith(_FOLLOWS)]
    if len(names) < 2:
        return []
    return [
        f"The runs differ in {len(names)} settings ({', '.join(names[:_NAMED])}"
        f"{', ...' if len(names) > _NAMED else ''}): a difference can come from any of them."
    ]


def _prompts(shared: Mapping[str, int]) -> list[str]:
    said = []
    if none := [KIND_WORDS[kind] for kind, count in shared.items() if not count]:
        said.append(
            f"On {' and '.join(none)} the runs share no prompt of the same tokens: each run's own mean "
            "is shown, and the difference has no interval."
        )
    if one := [KIND_WORDS[kind] for kind, count in shared.items() if count == 1]:
        said.append(
            f"On {' and '.join(one)} the runs share a single prompt: the difference has no interval."
        )
    return said


def _chance(heads: pd.DataFrame) -> list[str]:
    tested = int(heads["low"].notna().sum()) if len(heads) else 0
    if not tested:
        return []
    return [
        f"Each interval stands for itself: of {tested:,} differences about {tested * 0.05:,.0f} would "
        "lie outside of theirs by chance alone if nothing differed."
    ]
