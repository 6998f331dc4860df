"""Which edges carry a task: scores of all of them, the circuit they make, and what it is worth."""

from dataclasses import asdict, replace

import numpy as np
import torch

from lens import circuits
from lens.circuits.checks._control import CONTROLS
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.scores.methods import named
from lens.common.errors import LensError
from lens.common.results import by_size
from lens.figures.circuits import head_map, layered_graph
from lens.runs.folders import CIRCUITS, IMPORTANCES
from lens.runs.sections import Section
from lens.tasks import Task
from lens_analyses.config import RunConfig
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_circuit, of_highest
from lens_analyses.steps.subject import Subject

_MOST_EDGES = 1000  # rows of the table of edges
HELD_OUT = 16  # prompts that the circuit is tried on
_FEW = 8  # of them, for the checks that run hundreds of circuits
_NODES = 64  # that are taken out one by one


def edges(subject: Subject) -> Section:
    """Scores of every edge on half of the task's prompts, the circuit of the best, its stability."""
    task, _ = halves(subject)
    settings = subject.settings
    word, integrated = named(settings.method)
    found = circuits.find(
        subject.model,
        task,
        method=word if integrated is None else replace(integrated, steps=settings.steps),
        edges=settings.edges or None,
        seed=subject.seed,
        progress=subject.progress,
    )
    scores, chosen, ranking = found.scores, found.circuit, found.ranking
    stable = circuits.checks.stability(
        scores, chosen.n, absolute=ranking == "absolute", seed=subject.seed
    )
    folder = subject.run.path / CIRCUITS
    circuits.exports.to_mib(scores, subject.run.path / IMPORTANCES, circuit=chosen)
    chosen.save(folder / f"{_name(task)}.json", scores=scores.values)
    strings = (
        list(map(str, subject.run.prompts["token_strings"].iloc[0]))
        if task.clean.is_floating_point()  # pictures, whose positions are those of the first one
        else subject.model.token_strings(task.clean[0].tolist())
    )
    circuits.exports.to_attribution_graph(
        chosen, scores, strings, folder / "attribution-graph" / f"{_name(task)}.json"
    )
    table = by_size(scores.table(count=_MOST_EDGES, seed=subject.seed), "value")
    in_circuit = set(chosen.edges)
    table["in_circuit"] = [name in in_circuit for name in table["edge"]]
    tables = {"edges": table, "sizes": found.table(), "stability": stable.table()}
    return Section(
        name="edges",
        title="Edges: what passes between which parts",
        summary=(
            *scores.findings(seed=subject.seed),
            *found.findings(),
            *stable.findings(),
        ),
        limits=(
            "Scores are first-order estimates unless the method is exact; what they are worth, the "
            "section on the circuit says.",
            f"The table has the {len(table):,} largest of {scores.graph.n:,} edges; all are in "
            f"{IMPORTANCES}.",
            *task.dropped,
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={
            "method": scores.method,
            "steps": scores.steps,
            "rule": scores.rule,
            "ranking": ranking,
            "ablation": asdict(scores.ablation),
            "metric": scores.metric,
            "task": scores.task,
            "prompts": scores.n,
        },
        tables=tables,
        figures={
            "circuit": layered_graph(chosen, scores),
            "heads": head_map(chosen, scores),
        },
        headlines=tuple(
            of_highest(
                table,
                "value",
                f"{{edge}} matters most for {scores.task}: its score is {{value}} {scores.metric}, the median edge's "
                "{baseline}.",
                "the median edge",
                unit=scores.metric,
                figure="circuit",
                whole=float(task.evaluate(subject.model).abs().max()),
                many=scores.graph.n,
            )
        ),
    )


def circuit(subject: Subject) -> Section:
    """The circuit on prompts that it was not made from, beside others of its size."""
    _, task = halves(subject)
    file = subject.run.path / CIRCUITS / f"{_name(task)}.json"
    scores = circuits.exports.from_mib(subject.run.path / IMPORTANCES)
    chosen = circuits.load_circuit(file)
    options = {"seed": subject.seed, "progress": subject.progress}
    curve = circuits.evaluate(subject.model, task, scores, draws=2, **options)
    beside = circuits.checks.control(subject.model, task, chosen, draws=20, **options)
    few = task.take(torch.arange(min(task.n, _FEW)))
    complete = circuits.checks.completeness(
        subject.model, few, chosen, runs=2, steps=3, candidates=5, draws=5, **options
    )
    minimal = circuits.checks.minimality(
        subject.model, few, chosen, nodes=largest(chosen, scores)[:_NODES], draws=10, **options
    )
    table = curve.table()
    ranking = subject.run.section("edges").configuration["ranking"]
    rows = table[(table["ranking"] == ranking).to_numpy()]
    chosen.save(
        file,
        scores=scores.values,
        faithfulness={name: rows[name].tolist() for name in ("share", "edges", "faithfulness")},
    )
    tables = {
        "faithfulness": table,
        "same_size": beside.table(),
        "completeness": complete.table(),
        "minimality": minimal.table(),
    }
    return Section(
        name="circuit",
        title="The circuit: is it faithful, complete and minimal?",
        summary=(
            *(f"On held-out prompts: {said}" for said in beside.findings()),
            *curve.findings(),
            *complete.findings(),
            *minimal.findings(),
        ),
        limits=(
            f"Everything here is on {task.n} prompts that the circuit was not made from (completeness "
            f"and minimality on {few.n} of them).",
            "Faithfulness is (circuit - all ablated) / (model - all ablated), ratio of means; with "
            "another ablation, metric or set of prompts it is another number.",
            "Sets of heads for completeness were looked for greedily, so a worse one may exist; what "
            "one node adds is for this circuit and not for the model.",
            f"Of the heads and MLPs of the circuit the {len(minimal.nodes)} with the largest scores were "
            "taken out.",
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={
            "made": chosen.made,
            "edges": chosen.n,
            "ablation": asdict(chosen.ablation),
            "held_out": task.n,
            "seed": subject.seed,
        },
        tables=tables,
        figures={"faithfulness": curve.plot()},
        headlines=tuple(of_circuit(tables["same_size"], CONTROLS, "faithfulness")),
    )


def halves(subject: Subject) -> tuple[Task, Task]:
    """Prompts to make the circuit from, `analysis.n` of them, and at most 16 others to try it on.

    Raises:
        LensError: fewer than 4 prompts.
    """
    task = replace(subject, config=_doubled(subject)).task
    if task.n < 4:
        raise LensError(
            f"the task has {task.n} prompts, and a circuit needs 2 to be made from and 2 others to be "
            "tried on; raise --n"
        )
    rows = torch.arange(task.n)
    return task.take(rows[::2]), task.take(rows[1::2][:HELD_OUT])


def _doubled(subject: Subject) -> RunConfig:
    settings = subject.settings.model_copy(update={"n": 2 * subject.settings.n})
    return subject.config.model_copy(update={"analysis": settings})


def largest(chosen: Circuit, scores: EdgeScores) -> list[str]:
    """Heads and MLPs of the circuit, those first whose kept edges have the largest scores by size."""
    graph = chosen.graph
    sizes = np.bincount(
        graph.ends[1], np.abs(scores.values) * chosen.kept, minlength=len(graph.writers)
    )
    order = [graph.writers[number] for number in np.argsort(-sizes, kind="stable")]
    return [name for name in order if name in chosen.nodes and name != "input"]


def _name(task: Task) -> str:
    return "".join(sign if sign.isalnum() else "-" for sign in task.name.lower()).strip("-")


COLUMNS = {
    "edge": "Writer->reader; a head reads by <q>, <k> and <v>, heads of a layer of a hybrid as one, such as a1.",
    "writer": "Input, head or MLP whose output is read.",
    "reader": "What reads it.",
    "value": "Score, in units of the metric; positive: the task goes worse without the edge.",
    "stderr": "Standard error over prompts.",
    "low": "Low end of the 95 % interval over prompts; of random circuits, 2.5th percentile of the draws.",
    "high": "High end of it.",
    "n": "Number of prompts.",
    "in_circuit": "Whether the circuit has the edge.",
    "chosen": "Whether this circuit of those tried was taken.",
    "edges": "Number of edges.",
    "writers": "Number of parts that are read in the circuit.",
    "faithfulness": "(circuit - all ablated) / (model - all ablated), ratio of means over prompts.",
    "of": "What is compared between circuits.",
    "mean": "Jaccard index, shared / in either, mean over pairs of circuits.",
    "least": "Least of any pair.",
    "most": "Most of any pair.",
    "chance": "Expected of random circuits of this size; missing: not known.",
    "circuits": "Number of circuits.",
    "ranking": "signed: largest scores first; absolute: largest by size.",
    "share": "Of the edges that are kept; of minimality: of what ablating everything changes.",
    "recovered": "Metric of the circuit / metric of the model; missing where the model's is not positive.",
    "distance": "|metric of the model - of the circuit|, means (Wang et al. 2022).",
    "kl": "KL(model || circuit) at the answers, nats.",
    "random": "Of random circuits of the same size, mean; of minimality: 95th percentile of the sizes.",
    "random_low": "Least of the random circuits.",
    "random_high": "Most of the random circuits.",
    "circuit": "Which circuit; of completeness: metric of the circuit without the set.",
    "draws": "Number of circuits drawn, the circuit itself left out.",
    "p": "(1 + draws as faithful) / (1 + draws); missing for the circuit itself, and without draws.",
    "apart": "Share of the circuit's edges that the circuits drawn have not, mean.",
    "kind": "How the set was found: nothing removed, greedily (largest gap of a run), or at random.",
    "removed": "Heads that are ablated in circuit and model.",
    "size": "Number of them.",
    "model": "Metric of the model without the set.",
    "gap": "Model - circuit, both without the set, in units of the metric.",
    "node": "Head or MLP that is taken out of the circuit.",
    "given": "What is out already.",
    "drop": "Metric of the circuit with the node - without it.",
}
