"""Heads that say something of their own on the prompts of a task: discrete sparse-autoencoder codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.circuits.graph.activations import read_activations
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.head_sets import heads_of
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.known.circuit import KnownCircuit
from lens.circuits.scores._sae import codes_of, train
from lens.common.choices import Count, Seed, is_number, is_whole
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, head_columns, head_id
from lens.common.progress import advancing
from lens.common.results import Result, Sentence
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task

Positions = Literal["last", "mean"]


@dataclass(frozen=True)
class CodeSettings:
    """How codes were made.

    Attributes:
        examples: prompts that the autoencoder was trained on, half clean, half corrupt; they are not
            scored.
        features, penalty, epochs: of the autoencoder (`lens.circuits.scores._sae`).
        positions: "last", head outputs where the last answer is read; "mean" over all positions.
        seeds: each draws its own training prompts and starting weights.
    """

    examples: int
    features: int
    penalty: float
    epochs: int
    positions: Positions
    seeds: tuple[int, ...]


@dataclass(frozen=True, repr=False, eq=False)
class CodeScores(Result):
    """How many codes of each head occur on clean prompts and on no corrupt one.

    Attributes:
        per_seed: [seed, layer, head], number of such codes among the held-out prompts.
        held_out: clean prompts scored by each seed, and as many corrupt ones.
        settings: how the codes were made.
        task, model: names.
    """

    per_seed: np.ndarray
    held_out: int
    settings: CodeSettings
    task: str
    model: str

    @property
    def values(self) -> np.ndarray:
        """[layer, head] mean over seeds."""
        return self.per_seed.mean(0)

    @property
    def probabilities(self) -> np.ndarray:
        """[layer, head] softmax of `values` over all heads."""
        scores = np.exp(self.values - self.values.max())
        return scores / scores.sum()

    def auroc(self, known: Iterable[AnyHead] | Circuit | KnownCircuit) -> float:
        """Chance that a head of a known circuit scores above another head, ties counting half.

        Raises:
            LensError: none or all of the heads are in it, or one that the model has not got.
        """
        return float(_areas(self.values[None], known)[0])

    def auroc_per_seed(self, known: Iterable[AnyHead] | Circuit | KnownCircuit) -> np.ndarray:
        """[seed], `auroc` of each seed alone: their mean and spread say what one run is worth."""
        return _areas(self.per_seed, known)

    def table(self) -> pd.DataFrame:
        """One row per head, most codes first: `name`, `layer`, `head`, `value`, `std` over seeds, `probability`."""
        several = len(self.per_seed) > 1
        spread = self.per_seed.std(0, ddof=1) if several else np.full(self.values.shape, np.nan)
        rows = pd.DataFrame(
            {
                **head_columns(list(np.ndindex(self.values.shape))),
                "value": self.values.ravel(),
                "std": spread.ravel(),
                "probability": self.probabilities.ravel(),
            }
        )
        return rows.sort_values("value", ascending=False, kind="stable", ignore_index=True)

    def findings(self) -> tuple[Sentence, ...]:
        """Which heads have most codes of their own, or that none has any (both "codes"), and what that is
        not ("limit")."""
        what = (
            f"{self.held_out} held-out pairs of prompts of {self.task}, {len(self.per_seed)} seeds"
        )
        silent = int((self.values == 0).sum())
        if silent == self.values.size:
            none = f"No head has a code that clean prompts alone use ({what})."
            return (Sentence(none, kind="codes"),)
        several = len(self.per_seed) > 1
        shown = ", ".join(
            f"{row['name']} {row['value']:.3g}"
            + (f" (± {row['std']:.2g} over seeds)" if several else "")
            for row in self.table().head(3).to_dict("records")
        )
        most = (
            f"Most codes that clean prompts alone use: {shown}, the median head {np.median(self.values):.3g} "
            f"({what}); {silent} of {self.values.size} heads have none."
        )
        limit = "Codes differ where outputs differ, which is no proof that the task uses them."
        return Sentence(most, kind="codes"), Sentence(limit, kind="limit")


def _areas(values: np.ndarray, known: Iterable[AnyHead] | Circuit | KnownCircuit) -> np.ndarray:
    """[runs] of values [runs, layer, head]."""
    layers, heads = values.shape[1:]
    true = np.zeros((layers, heads), bool)
    for head in heads_of(known):
        true[head_id(head, layers=layers, heads=heads)] = True
    if not 0 < true.sum() < true.size:
        raise LensError(
            f"the known circuit has {true.sum()} of {true.size} heads; a curve needs some in and some out"
        )
    difference = values[:, true][:, :, None] - values[:, ~true][:, None]
    return ((difference > 0) + 0.5 * (difference == 0)).mean((1, 2))


def codes(
    model: LoadedModel,
    task: Task,
    *,
    examples: int = 10,
    features: Count = 200,
    penalty: float = 0.02,
    epochs: Count = 500,
    positions: Positions = "mean",
    seeds: Count = 10,
    seed: Seed = 0,
    progress: bool = True,
) -> CodeScores:
    """Score heads by the discrete codes of one sparse autoencoder that all of them share.

    The code of a head on a prompt is the most active feature of what it adds to the residual stream.
    A head scores the number of codes that occur on clean prompts and never on corrupt ones; prompts
    that the autoencoder was trained on are left out, where the paper scores them too. Known limit:
    where clean and corrupt prompts are drawn from the same set, the scores say next to nothing (`tracr`).
    One seed is no evidence: two known heads of `induction-2l` are found with an area of 0.69 +- 0.13 (10
    seeds, 12 prompts, 500 epochs; `CodeScores.auroc_per_seed`), and 0.59 +- 0.06 with 48 prompts and
    200 epochs.

    Args:
        model: one whose edges can be scored, see `lens.circuits.graph.nodes.find_nodes`.
        task: with corrupt prompts, its negatives.
        examples: training prompts, half of them corrupt: an even number of at least 2.
        features, penalty, epochs: of the autoencoder.
        positions: "last" or "mean".
        seeds: how many times, with new training prompts and weights each time.
        seed: of the first.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: no corrupt prompts, too few prompts to hold some out, or settings that are none.

    Reference: O'Neill and Bui 2024, arXiv 2405.12522.

    Example:
        >>> found = lens.circuits.scores.codes(small, copying, examples=2, epochs=20, seeds=2)
        >>> found.values.shape
        (2, 4)
    """
    model.info.check_all_attend("codes")
    corrupt = task.corrupt_or_refuse()
    if not is_number(penalty):
        raise LensError(f"penalty must be a number, got {penalty!r}")
    if task.n < 2:
        raise LensError(
            f"{task.name!r} has one pair of prompts, and codes need 2: some to train on, the others to count on"
        )
    if not is_whole(examples) or examples < 2 or examples % 2 or examples // 2 >= task.n:
        raise LensError(
            f"examples must be an even number of 2 to {2 * task.n - 2} ({task.n} pairs of prompts, some "
            f"held out), got {examples}"
        )
    task.check(model)
    task.refuse_lengths("codes")
    settings = CodeSettings(
        examples, features, penalty, epochs, positions, tuple(range(seed, seed + seeds))
    )
    clean, other = (_outputs(model, task, ids, positions) for ids in (task.clean, corrupt))
    with advancing(f"{model.name}: codes", seeds, progress) as advance:
        found = own_codes(clean, other, settings, advance)
    found = found.reshape(seeds, model.info.layers, model.info.heads)
    return CodeScores(found, task.n - examples // 2, settings, task.name, model.name)


def own_codes(
    clean: Tensor,
    corrupt: Tensor,
    settings: CodeSettings,
    advance: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """[seed, head], number of codes of each head that held-out clean prompts alone have.

    Args:
        clean, corrupt: [prompts, heads, d_model], what each head says; the prompts are pairs.
        settings: of the autoencoder and its training prompts.
        advance: called after each seed.
    """
    prompts, heads = clean.shape[:2]
    found = np.empty((len(settings.seeds), heads))
    for place, seed in enumerate(settings.seeds):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(prompts))
        training, rest = order[: settings.examples // 2], order[settings.examples // 2 :]
        samples = torch.cat([outputs[training].flatten(0, 1) for outputs in (clean, corrupt)])
        size, penalty, epochs = settings.features, settings.penalty, settings.epochs
        weights = train(samples, size, penalty=penalty, epochs=epochs, seed=seed)
        mine, other = (codes_of(weights, outputs[rest]).numpy() for outputs in (clean, corrupt))
        found[place] = [
            len(set(mine[:, head].tolist()) - set(other[:, head].tolist())) for head in range(heads)
        ]
        advance(1)
    return found


def _outputs(model: LoadedModel, task: Task, ids: Tensor, positions: Positions) -> Tensor:
    """[prompts, heads of all layers, d_model] that each head adds to the residual stream."""
    nodes = find_nodes(model)
    found = []
    for rows in task.chunks(task.rows_at_once(model)):
        _, written = read_activations(nodes, ids[rows])
        last = task.positions[rows].amax(1)
        at = torch.arange(len(rows))
        parts = [
            (z.mean(2) if positions == "mean" else z[at, :, last])[:, :, None] @ layer.block.output
            for z, layer in zip(written.heads, nodes.layers, strict=True)
        ]
        found.append(torch.cat(parts, 1)[:, :, 0].detach().float().cpu())
    return torch.cat(found)
