"""Tests of what is claimed of a circuit, each against a null that says how chance would look.

Equivalence and independence are of the circuit as it is: not to be rejected is good. Minimality,
sufficiency and partial necessity compare with random circuits: to be rejected is good. Shi et al. 2024,
Hypothesis Testing the Circuit Hypothesis in LLMs, arXiv 2410.13032.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens import stats
from lens.circuits.checks.evaluation import run_circuits
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.selection import random_edges, random_path
from lens.common.choices import Count, Seed, is_number
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.results import Result, Sentence
from lens.models.loaded import LoadedModel
from lens.stats.controls import p_value
from lens.tasks.task import Task

EPSILON, QUANTILE, DRAWS, PERMUTATIONS = 0.1, 0.9, 100, 1000


@dataclass(frozen=True)
class HypothesisTest:
    """One test.

    Attributes:
        name: "equivalence", "independence", "sufficiency" or "necessity".
        null: what is assumed, in words.
        statistic: see the function that made it.
        p: chance of a statistic at least as extreme under the null.
        n: prompts, or random circuits.
    """

    name: str
    null: str
    statistic: float
    p: float
    n: int


@dataclass(frozen=True, repr=False, eq=False)
class EdgeTests(Result):
    """Minimality, edge by edge.

    Attributes:
        edges: that were tested.
        changes: [edges], mean over prompts of |F(C) - F(C without the edge)|.
        null: [draws], the same for an edge of a random path that was added to the circuit.
        p: [edges], chance that an edge of the null kind exceeds as many of the draws.
    """

    edges: tuple[str, ...]
    changes: np.ndarray
    null: np.ndarray
    p: np.ndarray

    def needed(self, alpha: float = 0.05) -> tuple[str, ...]:
        """Edges that are told from the null at this level, Bonferroni over the edges tested."""
        level = alpha / len(self.edges)
        return tuple(name for name, p in zip(self.edges, self.p, strict=True) if p <= level)

    def table(self) -> pd.DataFrame:
        """One row per edge, largest change first: `edge`, `change`, `null` (90th percentile), `p`."""
        rows = pd.DataFrame(
            {
                "edge": self.edges,
                "change": self.changes,
                "null": stats.quantile(self.null, QUANTILE),
                "p": self.p,
            }
        )
        return rows.sort_values("change", ascending=False, kind="stable", ignore_index=True)

    def findings(self) -> tuple[Sentence, ...]:
        """How many edges are told from edges that were added at random ("told"), and where draws are too few to tell any
        ("draws")."""
        row, many, draws = self.table().iloc[0], len(self.edges), len(self.null)
        told = (
            f"{len(self.needed())} of {many} edges of the circuit are told from edges of random paths that were added to it "
            f"(p at most 0.05 / {many}); most does {row['edge']}: it changes the metric by {row['change']:.3g}, 90 of 100 added "
            f"ones by at most {row['null']:.3g} ({draws} draws)."
        )
        least = QUANTILE**draws
        if least <= 0.05 / many:
            return (Sentence(told, kind="told"),)
        few = (
            f"With {draws} draws p is at least {least:.2g} and above 0.05 / {many} whatever an edge does: more draws are needed "
            "to tell any."
        )
        return Sentence(told, kind="told"), Sentence(few, kind="draws")

    def __repr__(self) -> str:
        return (
            f"EdgeTests({len(self.needed())} of {len(self.edges)} edges are told from added ones)"
        )


def equivalence(
    model_values: np.ndarray, circuit_values: np.ndarray, *, epsilon: float = EPSILON
) -> HypothesisTest:
    """Is model or circuit the better one about as often as not?

    With k = number of prompts on which the model is better and t = |k/n - 1/2|, under
    `|P(better) - 1/2| < epsilon`:

        p = sum over i with |i/n - 1/2| >= t of C(n, i) (1/2 + epsilon)^i (1/2 - epsilon)^(n - i)

    Prompts on which both are equal count half. The statistic is k/n (published code has the mean
    difference of the scores there).

    Raises:
        LensError: other shapes, no prompt, numbers that are not finite, or an epsilon outside of 0 to 1/2.

    Example:
        >>> found = lens.circuits.checks.equivalence(np.ones(4), np.array([0.0, 0.0, 2.0, 2.0]))
        >>> found.statistic, found.p
        (0.5, 1.0)
    """
    from scipy.stats import binom

    shapes = {model_values.shape, circuit_values.shape}
    if len(shapes) > 1 or model_values.ndim != 1 or not model_values.size:
        raise LensError(
            f"equivalence compares one number per prompt of both, got the shapes "
            f"{list(model_values.shape)} and {list(circuit_values.shape)}"
        )
    _check_finite("equivalence", model_values, circuit_values)
    if not (is_number(epsilon) and 0 <= epsilon < 0.5):
        raise LensError(f"epsilon must be 0 or more and below 0.5, got {epsilon}")
    difference = model_values - circuit_values
    n = len(difference)
    better = (difference > 0).sum() + 0.5 * (difference == 0).sum()
    distance = abs(better / n - 0.5)
    counts = np.arange(n + 1)
    extreme = counts[np.abs(counts / n - 0.5) >= distance - 1e-12]
    p = binom.pmf(extreme, n, 0.5 + epsilon).sum()
    null = f"the model is better on half of the prompts, give or take {epsilon}"
    return HypothesisTest("equivalence", null, float(better / n), float(min(1.0, p)), n)


def independence(
    complement: np.ndarray,
    task: np.ndarray,
    *,
    permutations: Count = PERMUTATIONS,
    seed: Seed = 0,
) -> HypothesisTest:
    """Does what is left without the circuit know anything of the task?

    The Hilbert-Schmidt independence criterion `tr(K H L H) / n^2` of one number per prompt of each,
    such as the metric of the complement and that of the model; Gaussian kernels with the median
    distance as width, p by permutations of the prompts.

    Raises:
        LensError: other shapes, fewer than 4 prompts, or numbers that are not finite or all equal.

    Reference: Gretton et al., A Kernel Statistical Test of Independence, NeurIPS 2007.

    Example:
        >>> lens.circuits.checks.independence(np.arange(9.0), np.arange(9.0) ** 2, permutations=99).p < 0.05
        True
    """
    if complement.shape != task.shape or complement.ndim != 1 or len(task) < 4:
        raise LensError(
            "independence takes one number of at least 4 prompts of both, got the shapes "
            f"{list(complement.shape)} and {list(task.shape)}"
        )
    _check_finite("independence", complement, task)
    kernel, other = _centred(complement), _gaussian(task)
    n, draw = len(task), np.random.default_rng(seed)
    found = float((kernel * other).sum() / n**2)
    shuffled = np.empty(permutations)
    for number in range(permutations):
        order = draw.permutation(n)
        shuffled[number] = (kernel * other[np.ix_(order, order)]).sum() / n**2
    null = "the rest of the model and the task are independent"
    return HypothesisTest("independence", null, found, p_value(found, shuffled), n)


def sufficiency(
    model: LoadedModel,
    task: Task,
    circuit: Circuit,
    *,
    draws: Count = DRAWS,
    seed: Seed = 0,
    progress: bool = True,
) -> HypothesisTest:
    """Is the circuit nearer to the model than random circuits of as many edges are?

    The statistic is the share of them that are farther: of `|F(M) - F(C)|`, mean over prompts. Under
    the null an arbitrary one is farther with chance 0.9 at most; p by the binomial distribution.

    Raises:
        LensError: no draw, or another graph.

    Example:
        >>> circuit = lens.circuits.score_edges(small, copying, progress=False).top(40)
        >>> found = lens.circuits.checks.sufficiency(small, copying, circuit, draws=30, progress=False)
        >>> found.statistic, round(found.p, 3)
        (1.0, 0.042)
    """
    near = _distances(model, task, circuit, False, draws, seed, progress)
    null = "at most 90 % of random circuits of this size are farther from the model"
    return _of_draws("sufficiency", null, near[1:] > near[0])


def necessity(
    model: LoadedModel,
    task: Task,
    circuit: Circuit,
    *,
    draws: Count = DRAWS,
    seed: Seed = 0,
    progress: bool = True,
) -> HypothesisTest:
    """Does the model miss the circuit's edges more than random ones (partial necessity)?

    As `sufficiency`, of the complements: the statistic is the share of random circuits without which
    the model stays nearer to itself.

    Raises:
        LensError: as `sufficiency`.

    Example:
        >>> circuit = lens.circuits.score_edges(small, copying, progress=False).top(40)
        >>> found = lens.circuits.checks.necessity(small, copying, circuit, draws=30, progress=False)
        >>> found.p < 0.05
        False
    """
    missed = _distances(model, task, circuit, True, draws, seed, progress)
    null = "at most 90 % of random circuits of this size are missed less"
    return _of_draws("necessity", null, missed[1:] < missed[0])


def minimality_test(
    model: LoadedModel,
    task: Task,
    circuit: Circuit,
    *,
    edges: tuple[str, ...] | None = None,
    draws: Count = DRAWS,
    seed: Seed = 0,
    progress: bool = True,
) -> EdgeTests:
    """Does each edge of the circuit matter more than an edge that was added at random?

    The null: a random path from `input` to `logits` is added to the circuit, and one of its new edges
    taken out again. With k = draws whose change is smaller, p is the chance of k or more of them at a
    rate of 0.9.

    Args:
        model, task, circuit: as for `run_circuit`.
        edges: those to test; all of the circuit if not given.
        draws: random paths; fewer than 29 cannot reach p = 0.05 whatever the edge does.
        seed: of the draws.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: no draw, an edge that is not in the circuit, or one that has all edges already.

    Example:
        >>> circuit = lens.circuits.score_edges(small, copying, progress=False).top(40)
        >>> lens.circuits.checks.minimality_test(small, copying, circuit, edges=circuit.edges[:2], draws=60).needed()
        ('input->a0.h0<q>', 'input->a0.h2<q>')
    """
    circuit = given_as("Circuit", circuit=circuit)
    graph, draw = circuit.graph, np.random.default_rng(seed)
    if circuit.kept.all():
        raise LensError("the circuit has every edge, so nothing can be added to compare with")
    names = circuit.edges if edges is None else tuple(edges)
    numbers = graph.find(names)
    if not len(numbers) or not circuit.kept[numbers].all():
        raise LensError("edges must be edges of the circuit, at least one")
    kept = [circuit.kept]
    for number in numbers:
        kept.append(circuit.kept.copy())
        kept[-1][number] = False
    for _ in range(draws):
        path = new = np.array([], int)
        while not len(new):
            path = random_path(graph, draw)
            new = path[~circuit.kept[path]]
        inflated = circuit.kept.copy()
        inflated[path] = True
        reduced = inflated.copy()
        reduced[draw.choice(new)] = False
        kept += [inflated, reduced]
    found = run_circuits(model, task, np.stack(kept), circuit.ablation, progress=progress).metric
    changes = np.abs(found[0] - found[1 : 1 + len(numbers)]).mean(1)
    added = found[1 + len(numbers) :]
    null = np.abs(added[::2] - added[1::2]).mean(1)
    p = [_tail(int((null < change).sum()), draws) for change in changes]
    return EdgeTests(names, changes, null, np.array(p))


def _check_finite(test: str, *values: np.ndarray) -> None:
    """Raises LensError: a comparison with a number that is none would count as one that failed."""
    for one in values:
        if (lost := ~np.isfinite(one)).any():
            raise LensError(
                f"{test} takes finite numbers, and {lost.sum()} of {len(one)} are not, the first of prompt "
                f"{lost.argmax()}; leave these prompts out"
            )


def _distances(
    model: LoadedModel,
    task: Task,
    circuit: Circuit,
    complement: bool,
    draws: int,
    seed: int,
    progress: bool,
) -> np.ndarray:
    """[1 + draws] |F(M) - F(C)|, mean over prompts, of the circuit and of random ones, or of their complements."""
    circuit, draw = given_as("Circuit", circuit=circuit), np.random.default_rng(seed)
    kept = [circuit.kept] + [random_edges(circuit.graph, circuit.n, draw) for _ in range(draws)]
    masks = np.stack(kept) ^ complement
    found = run_circuits(model, task, masks, circuit.ablation, progress=progress)
    return np.abs(found.full - found.metric).mean(1)


def _of_draws(name: str, null: str, beaten: np.ndarray) -> HypothesisTest:
    """[draws] bool, those that the circuit beats."""
    k, n = int(beaten.sum()), len(beaten)
    return HypothesisTest(name, null, k / n, _tail(k, n), n)


def _tail(k: int, n: int) -> float:
    """P(X >= k) of X binomial with n draws at a rate of 0.9."""
    from scipy.stats import binom

    return float(binom.sf(k - 1, n, QUANTILE))


def _gaussian(values: np.ndarray) -> np.ndarray:
    """[n, n] kernel, as wide as the median distance between different numbers."""
    apart = np.abs(values[:, None] - values)
    width = np.median(apart[apart > 0]) if (apart > 0).any() else 0.0
    if not width:
        raise LensError("all numbers are equal, so that nothing can depend on them")
    return np.exp(-(apart**2) / (2 * width**2))


def _centred(values: np.ndarray) -> np.ndarray:
    kernel = _gaussian(values)
    return kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()
