"""What the circuit of this run shares with that of another one, such as of another task."""

from lens import circuits
from lens.circuits.reuse._overlap import MEASURES
from lens.runs.sections import Section
from lens_analyses.steps.columns import defined
from lens_analyses.steps.run_circuits import circuit_of, other_run
from lens_analyses.steps.subject import Subject

COLUMNS = {
    "measure": "What is compared: "
    + "; ".join(f"{name}, {text}" for name, text in MEASURES.items()),
    "value": "Of the two circuits.",
    "low": "Low end of the middle 95 % of circuits of redrawn prompts; missing, as the runs keep the mean scores alone.",
    "high": "High end of it.",
    "chance": "Mean when the other circuit's heads are renamed at random within their layers.",
    "p": "(1 + draws with as much or more) / (1 + draws).",
    "name": "Layer and head.",
    "layer": "Layer, from 0.",
    "head": "Head of the layer, from 0.",
    "circuit": "Which circuit has it: first is this run's.",
    "first": "Sum of the scores of the edges that leave it, in this run.",
    "second": "The same in the other run.",
    "first_rank": "Its place by size in this run, 1 = largest.",
    "second_rank": "Its place in the other run.",
}


def overlap(subject: Subject) -> Section:
    """Jaccard indices, rank correlation and shared heads, beside heads renamed at random."""
    other = other_run(subject.settings.compare, subject.model.name)
    (mine, scores), (its, other_scores) = circuit_of(subject.run), circuit_of(other)
    found = circuits.reuse.overlap(mine, its, scores=(scores, other_scores), seed=subject.seed)
    tables = {"measures": found.table(), "heads": found.heads()}
    shared = ", ".join(map(str, found.shared)) or "none"
    same = mine.task == its.task
    return Section(
        name="overlap",
        title="Overlap: what it shares with the circuit of another run",
        summary=(*found.findings(), f"Heads in both: {shared}."),
        limits=(
            f"The other circuit is that of {other.id} ({its.n:,} edges; this one has {mine.n:,}): of two "
            "sizes, the smaller cannot have more than its share of the larger.",
            *(
                [
                    "Both are of the same task, so this says how well a circuit comes back, not what is reused."
                ]
                if same
                else []
            ),
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={"with": other.id, "null": found.kind, "seed": subject.seed},
        tables=tables,
        figures={"overlap": found.plot()},
    )
