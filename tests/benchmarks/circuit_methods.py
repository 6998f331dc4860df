"""Ways to score and choose edges, on models whose circuit is known, on `induction-2l` and on `smollm2-135m`.

    python tests/benchmarks/circuit_methods.py [--smollm2] [--places] [--write] [--work DIR]

prints CIRCUIT_METHODS.md, and writes it with `--write`. With `--smollm2` alone the rows of that model are made, the others stay: it
says about how long that takes, writes after every row, and what stopped goes on where it was (rows are kept in `--work`,
runs/circuit-methods if not given, until all are there). With `--places` the paragraph on edges at places is made alone, of
`induction-2l` or with `--smollm2` of that model, and the rest stays. On known circuits: area under the curve of the edges that show on each
task, and of edges at single tokens. On `induction-2l` and, with `--smollm2`, on indirect objects with `smollm2-135m`: edges are
scored on 16 prompts (8 of the large model) and circuits run on as many others; a circuit's size is the smallest of 12 (8) with a
faithfulness of 0.85 there, and the overlap that of two halves of the prompts at that size.
"""

import argparse
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

import lens
from lens.circuits.checks.evaluation import run_circuits
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.known import PROGRAMS, induction_transformer, tracr
from lens.circuits.scores import Hybrid
from lens.models.loaded import LoadedModel
from lens.tasks import Task

METHODS = ("eap", "eap-ig", "eap-ig-activations", "eap-ig-stages", "exact", "hybrid")
PRUNING = "hybrid with edge pruning"
_HYBRID = Hybrid(pruning=0.9, steps=150)
PAIR = "hybrid of eap-ig and eap"
_LARGE = ("eap", "eap-ig", PAIR)  # too many stages and edges for the others
_TABLE = Path(__file__).with_name("CIRCUIT_METHODS.md")
_ENOUGH = 0.85
_FEW = 8  # prompts of the large model
_MARK = "<!-- smollm2 -->"
_PLACES = "Edges at places"


def main() -> None:
    """Print the page; of `smollm2-135m` or of the others, what stands there of the rest stays."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--places", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/circuit-methods"))
    given = parser.parse_args()
    old = _TABLE.read_text(encoding="utf-8") if _TABLE.exists() else ""
    small, _, large = (part.strip() for part in old.partition(_MARK))
    if not given.smollm2 and not given.places:
        small = known_models()

    def put(large: str) -> None:
        if given.write:
            _TABLE.write_text(f"{small}\n\n{_MARK}\n{large}\n", encoding="utf-8")

    if given.places and given.smollm2:
        large = with_places(large, large_places())
    elif given.places:
        small = with_places(small, small_places())
    elif given.smollm2:
        for text in large_model(given.work):
            large = text
            put(text)
    put(large)
    print(f"{small}\n\n{_MARK}\n{large}")
    if (
        given.smollm2 and not given.places
    ):  # the page is whole: the next call computes its rows anew
        for method in _LARGE:
            (given.work / f"{method}.npz").unlink(missing_ok=True)


def known_models() -> str:
    """The page up to `smollm2-135m`."""
    small = lens.load("induction-2l")
    *_, rows = trained(small, *copying(small), (*METHODS, PRUNING))
    return f"""# Methods that find circuits

`python tests/benchmarks/circuit_methods.py`: float32, CPU. `hybrid` is the mean of eap-ig, eap and eap-ig-activations at equal scale; with edge
pruning: of 90 % of the edges, {_HYBRID.steps} steps, warm-started.

Known circuits: chance that an edge that shows is scored above another, mean over the tasks of each model.

{known_circuits()}

Edges that all {len(METHODS)} methods keep of the known circuit's size (consensus), and those whose sign is sure over prompts drawn again (bootstrap), beside as
many with the largest eap-ig scores: share of them that shows.

{known_consensus()}

The same of edges at single tokens (`lens.circuits.scores.positions`), where those show that change the metric by more than 1 % of its change when
they are cut alone: edges scored everywhere alike by eap-ig, and at places by eap and eap-ig; and how far those of ways between tokens.

{known_places()}

`induction-2l`, induction, scored on 16 prompts and run on 16 others: CPR (area under the faithfulness of signed circuits, higher is
better), CMD (distance of those by size from 1, lower is better); edges of the smallest of 12 circuits that reaches {_ENOUGH}, by the
largest scores and by those of them whose sign is sure (`bootstrap`); Jaccard index of the circuits of this size from two halves of the prompts.

{rows}

{small_places()}"""


def copying(model: LoadedModel) -> tuple[Task, Task]:
    """Prompts that edges are scored on, and others."""
    return lens.tasks.induction(model, 16), lens.tasks.induction(model, 16, seed=1)


def small_places() -> str:
    """The paragraph of `induction-2l`."""
    small = lens.load("induction-2l")
    copies = {"first copy": (1, 26), "second copy": (26, 51)}
    return at_places(small, *copying(small), copies)


def large_places() -> str:
    """That of `smollm2-135m`."""
    model = lens.load("smollm2-135m")
    return at_places(model, *indirect(model), None)


def indirect(model: LoadedModel) -> tuple[Task, Task]:
    """Indirect objects that edges are scored on, and others."""
    return lens.tasks.ioi(model, _FEW), lens.tasks.ioi(model, _FEW, seed=1)


def with_places(page: str, text: str) -> str:
    """The page with this paragraph on places, in place of the one that it ends with."""
    *rest, last = page.split("\n\n")
    return "\n\n".join([*rest, *([] if last.startswith(_PLACES) else [last]), text])


def known_circuits() -> str:
    """One row per model."""
    models = [induction_transformer(beta=beta) for beta in (4, 8, 30)]
    models += [tracr(name) for name in PROGRAMS]
    lines = [f"| | {' | '.join(METHODS)} |", "|---" + "|--:" * len(METHODS) + "|"]
    for known in models:
        cells = []
        for method in METHODS:
            found = [
                lens.circuits.checks.recovery(
                    lens.circuits.score_edges(known.model, task, method=method, progress=False),
                    known.visible.get(name) or known.edges,
                ).auroc
                for name, task in known.tasks.items()
            ]
            cells.append(f"{np.mean(found):.2f}")
        lines.append(f"| {known.model.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def known_consensus() -> str:
    """One row per model: share of the edges of the core, of the bootstrap and of as many by eap-ig that show."""
    models = [induction_transformer(beta=beta) for beta in (4, 8, 30)]
    models += [tracr(name) for name in PROGRAMS]
    lines = [
        "| | edges that show | core: edges | of them show | as many by eap-ig | bootstrap: edges | of them show | as many by eap-ig |",
        "|---" + "|--:" * 7 + "|",
    ]
    for known in models:
        rows = []
        for name, task in known.tasks.items():
            true = known.visible.get(name) or known.edges
            scores = {
                method: lens.circuits.score_edges(known.model, task, method=method, progress=False)
                for method in METHODS
            }
            best, size = scores["eap-ig"], len(true)
            core = lens.circuits.checks.consensus(
                [one.top(size, prune=False) for one in scores.values()]
            ).core
            sure = best.top(size, method="bootstrap", prune=False)
            row: list[float] = [size]
            for some in (core, sure):
                row += [some.n, hits(some.edges, true)]
                row.append(hits(best.top(some.n, prune=False).edges, true) if some.n else np.nan)
            rows.append(row)
        shown = [f"{value:.2f}" for value in np.nanmean(np.array(rows, float), 0)]
        lines.append(f"| {known.model.name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def hits(edges: Sequence[str], true: Collection[str]) -> float:
    """Share of the edges that are true; NaN of none."""
    return len(set(edges) & set(true)) / len(edges) if len(edges) else float("nan")


def known_places() -> str:
    """One row per model: edges at tokens that show, against everything else."""
    models = [induction_transformer(beta=beta) for beta in (4, 8, 30)]
    models += [tracr(name) for name in PROGRAMS]
    lines = [
        "| | everywhere, eap-ig | at places, eap | at places, eap-ig | between places, eap | between places, eap-ig |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for known in models:
        areas: list[list[float]] = []
        for task in known.tasks.values():
            few = task.take(torch.arange(min(task.n, 8)))
            exact, *others = (
                lens.circuits.scores.positions(known.model, few, "each", method=one, progress=False)
                for one in ("exact", "eap", "eap-ig")
            )
            whole = others[1].within.mean(0).sum(0)
            guesses = [np.tile(whole, (len(exact.spans), 1))]
            pairs = [
                (exact.within, one) for one in (guesses[0], *(one.within.mean(0) for one in others))
            ]
            pairs += [(exact.across, one.across.mean(0)) for one in others]
            areas.append([area(true.mean(0), guess) for true, guess in pairs])
        shown = [f"{value:.2f}" for value in np.nanmean(areas, 0)]
        lines.append(f"| {known.model.name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def area(true: np.ndarray, guess: np.ndarray) -> float:
    """Chance that what shows (1 % of the largest) is above what does not, ties counting half; NaN where nothing does."""
    shows = np.abs(true) > 0.01 * np.abs(true).max()
    if not 0 < shows.sum() < shows.size:
        return float("nan")
    ranks = rankdata(np.abs(guess))[shows.ravel()]
    inside = int(shows.sum())
    return float((ranks.sum() - inside * (inside + 1) / 2) / (inside * (shows.size - inside)))


def at_places(model: LoadedModel, task: Task, others: Task, spans: Any) -> str:
    """Sizes of circuits at places, on prompts with the places of those that were scored."""
    scores = lens.circuits.scores.positions(model, task, spans, progress=False)
    judged = lens.circuits.checks.evaluate_positions(
        model, others, scores, spans=spans, progress=False
    )
    said = *judged.findings(), *scores.findings()
    return " ".join([f"{_PLACES} ({task.name}, {task.n} prompts).", *said])


def large_model(work: Path) -> Iterator[str]:
    """The same of indirect objects with `smollm2-135m`, after every row."""
    model = lens.load("smollm2-135m")
    task, others = indirect(model)
    started = time.perf_counter()
    graph = lens.circuits.score_edges(
        model, task.take(torch.arange(2)), method="eap", progress=False
    ).graph
    passes = (time.perf_counter() - started) / 3 / 2  # seconds of a pass over a prompt
    left = [one for one in _LARGE if not (work / f"{one}.npz").exists()]
    runs = {"eap": 3, "eap-ig": 15, PAIR: 18}
    # scored twice (halves together are once more), and 46 circuits of all prompts, whose parts read their own sums
    seconds = sum(passes * _FEW * (2 * runs[one] + 46 * 2) for one in left) + passes * _FEW * 200
    print(f"about {seconds / 60:.0f} minutes for {', '.join([*left, 'places'])}", file=sys.stderr)
    head = f"""`smollm2-135m`, indirect objects, in the same way on {_FEW} prompts and {_FEW} others, smallest of 8 ({", ".join(_LARGE)}; the others take a run or a backward pass for each of
{graph.n:,} edges, or each stage):

"""
    rows = ""
    for rows in trained(model, task, others, _LARGE, work, draws=1, sizes=8):
        yield head + rows
    yield f"{head}{rows}\n\n{at_places(model, task, others, None)}"


def scored(model: LoadedModel, task: Task, method: str) -> EdgeScores:
    """By a word, or by a hybrid that is no word."""
    asked: Any = {PRUNING: _HYBRID, PAIR: Hybrid(("eap-ig", "eap"))}.get(method, method)
    return lens.circuits.score_edges(model, task, method=asked, progress=False)


def trained(
    model: LoadedModel,
    task: Task,
    others: Task,
    methods: Sequence[str],
    work: Path | None = None,
    **much: int,
) -> Iterator[str]:
    """One row per method, and the core of all of them: the table after every row, which is kept in `work`."""
    lines = [
        "| | CPR | CMD | edges, largest | edges, bootstrap | overlap of halves |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    views = []
    for method in methods:
        file = None if work is None else work / f"{method}.npz"
        if file is not None and file.exists():
            with np.load(file) as found:
                line, kept = str(found["line"]), found["kept"]
        else:
            line, kept = row_of(model, task, others, method, **much)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                np.savez(file, line=line, kept=kept)
        lines.append(line)
        views.append(kept)
        yield "\n".join(lines)
    if np.all(views):  # no smaller circuit is faithful enough, by any of them
        return
    best = lens.circuits.score_edges(model, task, method="eap-ig", progress=False)
    names = np.array(best.graph.edges)
    made = [
        lens.circuits.make_circuit(
            best.graph, names[kept].tolist(), ablation=best.ablation, task=task.name, model=model.name,
            made="a method",
        )
        for kept in views
    ]  # fmt: skip
    agreed = lens.circuits.checks.consensus(made)
    kept = np.stack([agreed.core.kept, best.top(max(1, agreed.core.n), prune=False).kept])
    faithful = run_circuits(model, others, kept, best.ablation, progress=False).faithfulness()
    lines.append("")
    lines.append(
        f"{agreed.findings()[0]} The core has a faithfulness of {faithful[0]:.2f}, as many edges with the largest eap-ig "
        f"scores {faithful[1]:.2f}."
    )
    yield "\n".join(lines)


def row_of(
    model: LoadedModel, task: Task, others: Task, method: str, draws: int = 5, sizes: int = 12
) -> tuple[str, np.ndarray]:
    """The row of one method, and the edges of its circuit, bool [edges]."""
    scores = scored(model, task, method)
    judged = lens.circuits.evaluate(model, others, scores, draws=draws, progress=False)
    found = {one: smallest(model, others, scores, one, sizes) for one in ("top", "bootstrap")}
    count = found["top"] or scores.graph.n
    halves = [
        scored(model, task.take(rows), method).top(count)
        for rows in torch.arange(task.n).split(task.n // 2)
    ]
    named = {None: "–", scores.graph.n: "all"}
    shown = [named.get(found[one], str(found[one])) for one in ("top", "bootstrap")]
    overlap = lens.circuits.checks.jaccard(halves).mean
    line = (
        f"| {method} | {judged.cpr:.2f} | {judged.cmd:.2f} | {' | '.join(shown)} | {overlap:.2f} |"
    )
    return line, scores.top(count).kept


def smallest(model, task, scores, method: str, sizes: int) -> int | None:
    """Edges of the smallest circuit that is faithful enough."""
    counts = np.unique(np.geomspace(2, scores.graph.n, sizes).round().astype(int))
    made = [scores.top(int(count), method=method) for count in counts]
    kept = np.stack([one.kept for one in made])
    values = run_circuits(model, task, kept, scores.ablation, progress=False).faithfulness()
    sizes = [one.n for one, value in zip(made, values, strict=True) if value >= _ENOUGH]
    return min(sizes, default=None)


if __name__ == "__main__":
    main()
