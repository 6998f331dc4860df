"""`heads.parquet` of a run: every score of every head, beside uniform attention and random weights.

It is made from the traces on disk, so a run that was interrupted ends with the same numbers as one that
was not. Random weights cost one more pass over the prompts, in which nothing but what heads are counted by
is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

import lens
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.models.random_weights import random_weights
from lens.runs import Run
from lens.runs.schema import PROMPT_KINDS
from lens.traces.metrics import HEADLINE_STATISTICS, HEADLINES, METRICS
from lens.traces.profiles import beside_random, pooled_table, prompt_table
from lens_analyses.config import RunConfig
from lens_analyses.console import log


def head_table(
    model: LoadedModel,
    run: Run,
    rows: Sequence[Mapping[str, Any]],
    given: Sequence[Any],
    config: RunConfig,
    warn: Callable[[str], None],
) -> pd.DataFrame:
    """The long table: the mean over the prompts of each kind, then each prompt.

    Args:
        model: that the run is of.
        run: with a trace of every prompt.
        rows: of `prompts.parquet`.
        given: of each row what `lens.capture` takes.
        config: of the run.
        warn: is told what could not be compared with.
    """
    log.info("scoring %s heads", f"{len(model.info.every_head):,}")
    tables = [
        prompt_table(
            run.trace(row["prompt_id"]), row["prompt_id"], seed=config.seed, metrics=METRICS
        )
        for row in rows
    ]
    scored = with_pooled(rows, tables, config.seed)
    try:
        tables = _of_random_weights(model, rows, given, config)
    except (LensError, MemoryError, torch.OutOfMemoryError) as problem:
        why = str(problem) if isinstance(problem, LensError) else "not enough memory"
        warn(f"heads are not compared with random weights: {why}")
        return scored
    return beside_random(scored, with_pooled(rows, tables, config.seed))


def _of_random_weights(
    model: LoadedModel,
    rows: Sequence[Mapping[str, Any]],
    given: Sequence[Any],
    config: RunConfig,
) -> list[pd.DataFrame]:
    """What heads are counted by, prompt by prompt, of the same architecture with random weights."""
    log.info("the same prompts once more through random weights, to compare with")
    random = random_weights(model, config.seed)
    tables = []
    for row, prompt in zip(rows, given, strict=True):
        trace = lens.capture(
            random,
            prompt,
            statistics=HEADLINE_STATISTICS,
            block_size=config.capture.block_size,
            chunk=config.capture.chunk,
            backend=config.capture.backend,
            progress=False,
        )
        name = row["prompt_id"]
        tables.append(prompt_table(trace, name, seed=None, metrics=HEADLINES, uniform=False))
    return tables


def with_pooled(
    rows: Sequence[Mapping[str, Any]], tables: Sequence[pd.DataFrame], seed: int
) -> pd.DataFrame:
    """The tables of the prompts, and before them the mean over those of each kind."""
    pooled = []
    for kind in PROMPT_KINDS:
        pairs = zip(rows, tables, strict=True)
        members = [table for row, table in pairs if row["kind"] == kind]
        if len(members) > 1:
            pooled.append(pooled_table(members, kind, seed=seed))
        elif members:
            pooled.append(members[0].assign(prompt_id=kind))
    return pd.concat([*pooled, *tables], ignore_index=True)
