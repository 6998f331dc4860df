"""`evaluate`: how well circuits of every size do the task, beside random circuits of the same sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens import stats
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.mixed import Mixed, mixed_of
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.graph.references import References
from lens.circuits.graph.ways import Ways, calls_of
from lens.common.choices import Count, Seed
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, counted, ends
from lens.models.loaded import LoadedModel
from lens.stats.intervals import around
from lens.tasks.task import Task

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the edges of the Mechanistic Interpretability Benchmark (arXiv 2504.13151)."""
_ROWS, _COPIES = 8, 32


def cpr(shares: Sequence[float], faithfulness: np.ndarray) -> np.ndarray:
    """Circuit performance ratio: area under faithfulness [..., shares] over the share of edges."""
    return np.trapezoid(faithfulness, shares)


def cmd(shares: Sequence[float], faithfulness: np.ndarray) -> np.ndarray:
    """Circuit-model distance: area of `|1 - faithfulness|` [..., shares] over the share of edges."""
    return np.trapezoid(np.abs(1 - faithfulness), shares)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What circuits did, prompt by prompt.

    Attributes:
        metric: [circuits, prompts], larger is better.
        kl: [circuits, prompts], KL(model || circuit) in nats, mean over the answers.
        full, empty: [prompts], metric of the model and with every edge ablated.
    """

    metric: np.ndarray
    kl: np.ndarray
    full: np.ndarray
    empty: np.ndarray

    def faithfulness(self) -> np.ndarray:
        """[circuits], ratio of means `(circuit - empty) / (full - empty)`.

        Raises:
            LensError: ablating everything does not change the metric.
        """
        return ratio(self.metric.mean(1) - self.empty.mean(), self.full.mean() - self.empty.mean())

    def interval(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """95 % interval of `faithfulness` from prompts drawn again: low and high, [circuits].

        NaN for a single prompt. The denominator is drawn along with the numerator, so the interval is
        wide where prompts disagree on what ablation does. `lens.stats.over_units` takes no negative counts.
        """
        if len(self.full) < 2:
            return np.full(len(self.metric), np.nan), np.full(len(self.metric), np.nan)
        return around(self.faithfulness(), self.drawn(seed), len(self.full))

    def drawn(self, seed: int) -> np.ndarray:
        """[draws, circuits], `faithfulness` on prompts drawn again."""
        draws = stats.draws(len(self.full), seed)
        whole = draws @ (self.full - self.empty)
        return (draws @ (self.metric - self.empty).T)[whole != 0] / whole[whole != 0][:, None]


@dataclass(frozen=True, repr=False, eq=False)
class CircuitEvaluation(Result):
    """Faithfulness of circuits of growing size.

    Attributes:
        shares: of the edges that are kept: those of `SHARES` that are whole numbers of edges, each number once.
        signed: outcome of the circuits of the largest scores; `cpr` is of these.
        absolute: of the largest scores by size; `cmd` is of these.
        random: [draws, shares], faithfulness of random edges of the same number.
        edges: [shares], number of edges.
        ablation: what replaces the other edges.
        method, metric, task, model: names.
        seed: of the random circuits and the bootstrap.
    """

    shares: tuple[float, ...]
    signed: Outcome
    absolute: Outcome
    random: np.ndarray
    edges: np.ndarray
    ablation: Ablation
    method: str
    metric: str
    task: str
    model: str
    seed: int

    @property
    def cpr(self) -> float:
        """Area under the signed curve; about 0.25 for random circuits, and may exceed 1."""
        return float(cpr(self.shares, self.signed.faithfulness()))

    @property
    def cmd(self) -> float:
        """Area between the absolute curve and 1; about 0.75 for random circuits."""
        return float(cmd(self.shares, self.absolute.faithfulness()))

    @property
    def random_cpr(self) -> np.ndarray:
        """[draws] of the random circuits."""
        return cpr(self.shares, self.random)

    @property
    def random_cmd(self) -> np.ndarray:
        """[draws] of the random circuits."""
        return cmd(self.shares, self.random)

    def table(self) -> pd.DataFrame:
        """One row per share and ranking.

        Columns: `ranking` ("signed", "absolute"), `share`, `edges`, `faithfulness` with `low` and
        `high` (bootstrap over prompts), `recovered` (metric / that of the model; NaN where the model's is not
        positive, as of metrics of which less is better, which it would turn round), `distance`
        (`|metric of the model - of the circuit|`, means; Wang et al. 2022), `kl` (nats), and of the
        random circuits `random` (mean), `random_low` and `random_high` (least and most).
        """
        parts = []
        for ranking, outcome in (("signed", self.signed), ("absolute", self.absolute)):
            low, high = outcome.interval(self.seed)
            metric, full = outcome.metric.mean(1), outcome.full.mean()
            parts.append(
                pd.DataFrame(
                    {
                        "ranking": ranking,
                        "share": self.shares,
                        "edges": self.edges,
                        "faithfulness": outcome.faithfulness(),
                        "low": low,
                        "high": high,
                        "recovered": metric / full if full > 0 else np.nan,
                        "distance": np.abs(full - metric),
                        "kl": outcome.kl.mean(1),
                        "random": self.random.mean(0),
                        "random_low": self.random.min(0),
                        "random_high": self.random.max(0),
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def findings(self) -> tuple[Sentence, ...]:
        """Both areas with 95 % intervals over prompts, beside those of random circuits: mean, least and most of the draws."""
        draws, prompts = len(self.random), len(self.signed.full)
        several = prompts > 1
        own_cpr, own_cmd = (
            f"{value:.2f}"
            + ends(*around(value, area(self.shares, outcome.drawn(self.seed)), prompts), ".2f")
            * several
            for value, area, outcome in (
                (self.cpr, cpr, self.signed),
                (self.cmd, cmd, self.absolute),
            )
        )
        random_cpr, random_cmd = (
            f"{drawn.mean():.2f}"
            + (f" ({drawn.min():.2f} to {drawn.max():.2f})" if draws > 1 else "")
            for drawn in (self.random_cpr, self.random_cmd)
        )
        text = (
            f"Over all sizes, on {counted(prompts, 'prompt')}, the circuit performance ratio (CPR, more is better) is "
            f"{own_cpr} and of random circuits, drawn {counted(draws, 'time')}, {random_cpr}; the circuit-model distance (CMD, less is "
            f"better) {own_cmd} and {random_cmd}."
        )
        return (Sentence(text, kind="areas"),)

    def __repr__(self) -> str:
        return (
            f"CircuitEvaluation({self.method} on {self.task!r}, {self.model}, {self.ablation.value} "
            f"ablation: CPR {self.cpr:.3g}, CMD {self.cmd:.3g}; {len(self.random)} random circuits: "
            f"CPR {self.random_cpr.mean():.3g}, CMD {self.random_cmd.mean():.3g}; "
            f"{len(self.signed.full)} prompts)"
        )


def evaluate(
    model: LoadedModel,
    task: Task,
    edges: EdgeScores,
    *,
    draws: Count = 5,
    seed: Seed = 0,
    progress: bool = True,
) -> CircuitEvaluation:
    """Run the circuits of the best-scored edges, from 0.1 % (or one of them) to all, and random ones.

        faithfulness = (metric of the circuit - all ablated) / (metric of the model - all ablated)

    Args:
        model, task: those of the scores, or others of the same graph (other prompts, say).
        edges: scores, or what `lens.circuits.find` returns; the ablation is theirs.
        draws: of random circuits at each size.
        seed: of these draws and of the bootstrap.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: another graph than the model's, edges without a score, no random draw, or a task
            that ablating every edge does not change.

    Reference: Mueller et al. 2025, arXiv 2504.13151 (CPR and CMD); Hanna et al. 2024, arXiv 2403.17806.

    Example:
        >>> edges = lens.circuits.score_edges(small, copying, progress=False)
        >>> lens.circuits.evaluate(small, copying, edges, draws=2).cpr > 0.5
        True
    """
    edges = given_as("EdgeScores", edges=edges)
    graph = edges.graph
    counts = sorted({max(1, round(share * graph.n)) for share in SHARES})
    shares = tuple(count / graph.n for count in counts)
    draw = np.random.default_rng(seed)
    chosen = [
        edges.top(count, absolute=absolute, prune=False).kept
        for absolute in (False, True)
        for count in counts
    ]
    for _ in range(draws):
        order = draw.permutation(graph.n)
        chosen += [np.isin(np.arange(graph.n), order[:count]) for count in counts]
    found = run_circuits(model, task, np.stack(chosen), edges.ablation, progress=progress)
    size = len(counts)
    drawn = _part(found, 2 * size, len(chosen)).faithfulness().reshape(draws, size)
    signed, absolute = (_part(found, start, start + size) for start in (0, size))
    return CircuitEvaluation(
        shares, signed, absolute, drawn, np.array(counts), edges.ablation, edges.method, task.metric,
        task.name, model.name, seed,
    )  # fmt: skip


def run_circuit(
    model: LoadedModel, task: Task, circuit: Circuit, *, progress: bool = True
) -> Outcome:
    """Metric and KL of one circuit, prompt by prompt; errors as in `evaluate`.

    Example:
        >>> circuit = lens.circuits.score_edges(small, copying, progress=False).top(60)
        >>> lens.circuits.run_circuit(small, copying, circuit).faithfulness()
    """
    circuit = given_as("Circuit", circuit=circuit)
    return run_circuits(model, task, circuit.kept[None], circuit.ablation, progress=progress)


def run_circuits(
    model: LoadedModel,
    task: Task,
    kept: np.ndarray,
    ablation: Ablation,
    *,
    where: torch.Tensor | None = None,
    ways: np.ndarray | None = None,
    progress: bool = True,
) -> Outcome:
    """Metric and KL of circuits [circuits, edges] bool, prompt by prompt; errors as in `evaluate`.

    With `where` [spans, prompts, tokens] edges are kept in some spans: circuits are [circuits, spans, edges] then. `ways` are
    those across spans that circuits keep, bool [circuits, parts, layers, heads, query spans, key spans]; None: all.
    """
    mixed = mixed_of(model)
    nodes = find_nodes(model, kv=ablation.kv) if mixed is None else mixed
    graph: Any = nodes.graph
    if kept.shape[-1] != graph.n:
        raise LensError(
            f"the circuits are of a graph of {kept.shape[-1]:,} edges, and {model.name} has "
            f"{graph.n:,}; evaluate them on the model that they were made for"
        )
    masks = torch.as_tensor(graph.dense((~_with_ends(kept)).astype(np.float32)))
    if ways is not None and where is None:
        raise LensError("ways are between spans; give where")
    cut = None if ways is None else torch.as_tensor(~_with_ends(ways))
    if mixed is not None and (where is not None or ways is not None):
        raise LensError(
            f"edges in spans are not known of {model.info.class_name}, which has mixers"
        )
    references = References(nodes, task, ablation)
    metric, kl = [], []
    at_most = task.rows_at_once(model)
    with torch.no_grad(), advancing(f"{model.name}: circuits", task.n, progress) as advance:
        for rows in task.chunks(min(_ROWS, at_most)):
            reference, ids = references.of(rows), task.clean[rows]
            at = torch.arange(len(rows))[:, None], task.positions[rows]
            values, divergences, clean = [], [], None
            own = None if where is None else where[:, rows]
            corrupt = (
                []
                if cut is None or isinstance(nodes, Mixed)
                else calls_of(nodes, task.corrupt_or_refuse()[rows])
            )
            for some in torch.arange(len(masks)).split(max(1, min(_COPIES, at_most) // len(rows))):
                if isinstance(nodes, Mixed):
                    found = nodes.masked(ids.to(model.device), reference, masks[some])
                else:
                    at_once = masks[some] if own is None else masks[some].transpose(0, 1)
                    off = None if cut is None or own is None else Ways(cut[some], own, corrupt)
                    found = masked_logits(nodes, ids, reference, at_once, own, off)
                for logits in found:
                    read = logits[at].double().log_softmax(-1)  # [rows, answers, vocab]
                    clean = read if clean is None else clean
                    gap = (clean.exp() * (clean - read)).sum(-1).mean(1)
                    values.append(task.sign * task.measure(logits, rows).double().cpu())
                    divergences.append(gap.cpu())
            metric.append(torch.stack(values).numpy())
            kl.append(torch.stack(divergences).numpy())
            advance(len(rows))
    metrics, divergence = np.concatenate(metric, 1), np.concatenate(kl, 1)
    check_finite(metrics[0], whole=True)
    check_finite(metrics)
    return Outcome(metrics[2:], divergence[2:], metrics[0], metrics[1])


def _with_ends(kept: np.ndarray) -> np.ndarray:
    """With a circuit of everything and one of nothing before them."""
    return np.concatenate([np.full_like(kept[:1], True), np.full_like(kept[:1], False), kept])


def _part(outcome: Outcome, start: int, stop: int) -> Outcome:
    return Outcome(outcome.metric[start:stop], outcome.kl[start:stop], outcome.full, outcome.empty)


def ratio(gain: np.ndarray, whole: float) -> np.ndarray:
    """Gains [...] as shares of what ablating every edge changes; errors as of `check_changes`."""
    check_changes(whole)
    return gain / whole


def check_finite(metric: np.ndarray, whole: bool = False) -> None:
    """Raises LensError where the metric of the whole model, or of a run with edges ablated, is no number: it would be
    the largest of any."""
    if np.isfinite(metric).all():
        return
    if whole:
        raise LensError(
            "the metric of the whole model is NaN or infinite, so nothing can be compared with it; check its "
            "weights and the task"
        )
    raise LensError(
        "the metric is NaN or infinite with edges ablated, so nothing can be compared; choose another metric or "
        "ablation"
    )


def check_changes(whole: float) -> None:
    """Raises LensError where ablating every edge changes nothing."""
    if abs(whole) < 1e-9:
        raise LensError(
            "ablating every edge does not change the metric, so there is nothing to be faithful to; "
            "use other corrupt prompts, another ablation or another metric"
        )
