"""`lens.policies.run`: a task, or needles, under policies and dense, on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.choices import Seed, check_counts
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, numbered, with_ends
from lens.edits.running import edit
from lens.edits.sparse import Sparse
from lens.models.loaded import LoadedModel
from lens.passes.blocks import check_block_size
from lens.passes.logits import fills_masks
from lens.policies.base import Full, Policy, several
from lens.stats.intervals import columns
from lens.stats.verdicts import verdict
from lens.tasks import Task
from lens.tasks.needles import Trial, answered

NEEDLES = "needle recall"
_CHANGE = {"above": "better", "below": "worse", "not told apart": "not told apart from dense"}


@dataclass(frozen=True, repr=False, eq=False)
class PolicyRuns(Result):
    """A metric of each prompt, dense and under policies.

    Attributes:
        dense: [prompts], the metric of the model as it is.
        sparse: [policies, prompts], under each policy.
        kl: [policies, prompts], divergence of the answers' distributions from the dense ones, nats; NaN for
            needles, whose answers are generated.
        density: [policies], share of the visible blocks that were kept in all sparse rows.
        policies: as they write themselves.
        metric: of the task, or "needle recall".
        sign: 1 where more is better, -1 where less is.
        question: last tokens of each prompt that ran sparse, or None: all of them.
        seed: of the intervals.
        model: its name.
    """

    dense: np.ndarray
    sparse: np.ndarray
    kl: np.ndarray
    density: np.ndarray
    policies: tuple[str, ...]
    metric: str
    sign: int
    question: int | None
    seed: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per policy: `policy`, `density`, `metric`, `n`, and `dense`, `sparse`, `change` (sparse - dense,
        paired) and `kl` as means over prompts with their 95 % intervals (`_low`, `_high`)."""
        table = {"policy": self.policies, "density": self.density, "metric": self.metric}
        table["n"] = len(self.dense)
        dense = np.broadcast_to(self.dense, self.sparse.shape)
        for name, values in (
            ("dense", dense), ("sparse", self.sparse), ("change", self.sparse - dense), ("kl", self.kl),
        ):  # fmt: skip
            table |= columns(name, values, self.seed, shares=False)
        return pd.DataFrame(table)

    def findings(self) -> tuple[Sentence, ...]:
        """One sentence per policy ("change"), and what was sparse ("limit")."""
        said = []
        for row in self.table().to_dict("records"):
            low, high = sorted(self.sign * row[f"change_{end}"] for end in ("low", "high"))
            divergence = "" if np.isnan(row["kl"]) else f"; KL {row['kl']:.4f} nats"
            said.append(
                Sentence(
                    f"Under {row['policy']}, with {row['density']:.1%} of the blocks, the {self.metric} goes from "
                    f"{row['dense']:.4f} to {row['sparse']:.4f}, {with_ends(row, 'change', '+.4f')}"
                    f" ({_told(low, high, len(self.dense))}){divergence}.",
                    kind="change",
                )
            )
        rows = (
            "Every row of the prompts and every decoding step ran sparse"
            if self.question is None
            else f"The last {self.question} tokens of each prompt and every decoding step ran sparse, the context "
            "before them dense"
        )
        said.append(Sentence(f"{rows}; n = {len(self.dense)} prompts, paired.", kind="limit"))
        return tuple(said)

    def __repr__(self) -> str:
        return f"PolicyRuns({self.model}: {self.metric}, {len(self.policies)} policies, {len(self.dense)} prompts)"


def _told(low: float, high: float, prompts: int) -> str:
    if np.isnan(low):
        return f"{'one prompt tells' if prompts == 1 else f'{prompts} prompts tell'} nothing apart"
    return _CHANGE[verdict(low, high)]


def run(
    model: LoadedModel,
    task: Task | Sequence[Trial],
    policy: Policy | Sequence[Policy],
    *,
    block_size: int | tuple[int, int] | None = None,
    question: int | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> PolicyRuns:
    """What policies change of a task's metric, or of how much of a needle comes back, paired with dense runs.

    All heads follow the policy (`PerHead` mixes several), at prefill and in every decoding step.

    Args:
        model: as `lens.load` returns it; a language model.
        task: of `lens.tasks`, or trials of `lens.tasks.needles`, whose answer is generated greedily: the
            share of the needle's tokens that comes back.
        policy: one or several.
        block_size: tokens, one number or (query_block, key_block); None: each policy's own.
        question: start at the question: so many last tokens of each prompt and what is generated after
            them run sparse, the context before them dense; None: all rows.
        seed: of the intervals.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: what is no policy, task or trial; prompts that are not longer than the question; needles for
            a model that fills in masked tokens.

    Example:
        >>> found = lens.policies.run(model, task, lens.policies.AShape(4, 8), block_size=4, progress=False)
        >>> found.table()[["policy", "density", "dense", "sparse", "change", "kl"]]
    """
    given: Any = list(task) if isinstance(task, Sequence) and not isinstance(task, str) else task
    if not (isinstance(given, list) and given and all(isinstance(one, Trial) for one in given)):
        given_as("Task", task=task)
    policies = several("policy", policy)
    sizes = [
        check_block_size(one.block_size if block_size is None else block_size) for one in policies
    ]
    for one in policies:
        one.check(model)
    if fills_masks(model) and not isinstance(given, Task):
        raise LensError(
            f"{model.info.class_name} predicts masked tokens and no next token, so no needle comes back"
        )
    lengths = _lengths(given)
    if question is not None:
        check_counts(question=question)
        if min(lengths) <= question:
            raise LensError(
                f"question is {question} tokens, and a prompt has {min(lengths)}: nothing would be context"
            )
    if isinstance(given, Task):
        given.check(model)
    first = {length: 0 if question is None else length - question for length in lengths}
    runs = [(Full(), sizes[0]), *zip(policies, sizes, strict=True)]
    values = np.full((2, len(runs), len(lengths)), np.nan)  # metric, KL
    density = np.ones(len(runs))
    with advancing(f"{model.name}: runs", len(runs) * len(first), progress) as advance:
        references: dict[int, Task] = {}
        for place, (one, size) in enumerate(runs):
            kept = []
            for length, row in first.items():
                rows = [at for at, own in enumerate(lengths) if own == length]
                with edit(model, Sparse(one, size, row)) as (done,):
                    if isinstance(given, Task):
                        part = _cut(given, rows, length)
                        values[0, place, rows] = part.evaluate(model).numpy()
                        if not place:
                            references[length] = part.with_kl(model)
                        values[1, place, rows] = references[length].evaluate(model).numpy()
                    else:
                        values[0, place, rows] = [
                            given[at].recall(answered(model, given[at])) for at in rows
                        ]
                kept.append(done.density * len(rows))
                advance(1)
            density[place] = sum(kept) / len(lengths)
    return PolicyRuns(
        dense=values[0, 0],
        sparse=values[0, 1:],
        kl=values[1, 1:],
        density=density[1:],
        policies=numbered(policies),
        metric=given.metric.replace("_", " ") if isinstance(given, Task) else NEEDLES,
        sign=given.sign if isinstance(given, Task) else 1,
        question=question,
        seed=seed,
        model=model.name,
    )


def _lengths(given: Task | list[Trial]) -> list[int]:
    """Tokens of each prompt."""
    if isinstance(given, Task):
        return [given.length] * given.n if given.lengths is None else given.lengths.tolist()
    return [len(trial.prompt) for trial in given]


def _cut(task: Task, rows: list[int], length: int) -> Task:
    """These prompts of one length, without what fills them up: policies look at their last rows."""
    some = task.take(torch.tensor(rows))
    return replace(some, clean=some.clean[:, :length], corrupt=None, lengths=None, marks={})
