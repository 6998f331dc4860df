"""The heads of a circuit beside their attention: role, sink, what they look at, pattern and value."""

import lens
from lens import circuits
from lens.circuits.graph.head_sets import heads_of
from lens.circuits.patches.head_parts import ROLES
from lens.common.errors import LensError
from lens.common.head_ids import HeadId, head_of_node
from lens.common.results import of_kind
from lens.runs.sections import Section
from lens_analyses.steps.circuits import halves, largest
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_highest, of_sink_check
from lens_analyses.steps.run_circuits import circuit_of
from lens_analyses.steps.subject import Subject

_HEADS = 24  # that are looked at, those with the largest scores
_EDGES = 60  # that are read aloud
_DRAWS = 5  # of other heads, for the check with the sink taken out
COLUMNS = {
    "name": "Layer and head.",
    "layer": "Layer, from 0.",
    "head": "Head of the layer, from 0.",
    "full": "Metric lost when the whole head comes from the corrupt run; positive: the task goes worse.",
    "pattern": "Metric lost when its queries and keys come from the corrupt run (QK).",
    "value": "Metric lost when its values come from the corrupt run (OV); of an edit: the metric.",
    "interaction": "full - pattern - value.",
    "without_sink": "full, with the first key taken out of both patterns: far from full, the sink is part of it.",
    "previous_token": "Mean attention to the token before.",
    "duplicate_token": "Mean attention to earlier copies of the token.",
    "induction": "Mean attention to what came after earlier copies of the token.",
    "current_token": "Mean attention to the token itself.",
    "sink_mass": "Mean attention to the first key.",
    "attends_to": "Token that the last answer's row looks at most in more prompts than any other.",
    "attends_prompts": "In how many prompts.",
    "attends_mass": "Mean attention to it there.",
    "first_key": "Mean attention of that row to the first key.",
    "edit": "excluded: the first key's part is left out; redistributed: its mass goes to the other keys.",
    "heads": "Those of the circuit with the largest scores, or as many others of the same layers.",
    "gain": "How much better the metric got with the edit, whatever its sign.",
    "draws": "Sets of other heads that were drawn.",
    "n": "Number of prompts.",
    "edge": "Writer and reader.",
    "writer": "Head, MLP or input that writes.",
    "reader": "Head, MLP or logits that reads.",
    "side": "q, k, v: into queries, keys or values; empty: into an MLP or the logits.",
    "share": "Of the reader's logit that the writer carries on that side, or of what it writes that comes from the writer.",
    "drop": "Metric lost when the edge alone is cut, with the ablation of the circuit.",
    "of_effect": "The same as a share of what cutting all edges does.",
    "holds": "Whether the interval of the drop is above 0; of one prompt, which has none, it never is.",
    "looks_at": "What the head looks at most in the rows that it works in.",
    "mass": "Attention of these rows that goes there.",
    "uniform": "The same if attention were even.",
    "rows": "Share of these rows in which such a key gets most.",
}


def joined(subject: Subject) -> Section:
    """What each head of the circuit looks at, through what it acts, and whether the sink is part of it."""
    _, task = halves(subject)
    chosen, scores = circuit_of(subject.run)
    attending, whole = subject.model.info.attending, heads_of(chosen)
    of_softmax = [head for head in whole if head.layer in attending]
    beside = sum(".s" in name for name in chosen.nodes)  # heads of a mixer beside softmax heads
    if not of_softmax:
        raise LensError(
            f"the {len(whole) + beside} heads of this circuit are of mixers, which look at no keys, or pairs of heads; "
            "`lens mixers` measures them"
        )
    heads = _largest_heads(largest(chosen, scores), attending)
    check = circuits.checks.sink_check(
        subject.model, task, heads, draws=_DRAWS, seed=subject.seed, progress=subject.progress
    )
    tables, figures = {"sink": check.table()}, {"sink": check.plot()}
    summary: list[str] = []
    limits = ["The sink is the first key; sinks elsewhere are left as they are."]
    if mixers := len(whole) + beside - len(of_softmax):
        limits.append(
            f"{mixers} more heads of the circuit are of mixers and left out: they have no attention weights."
        )
    if task.corrupt is None:
        limits.insert(
            0,
            f"{task.name} has no corrupt prompts, so effects were not split into pattern and value; give "
            "corrupt prompts (a .jsonl file with clean and corrupt).",
        )
    else:
        found = circuits.head_parts(
            subject.model, task, heads, seed=subject.seed, progress=subject.progress
        )
        tables, figures = {"heads": found.table(), **tables}, {"parts": found.plot(), **figures}
        summary += found.findings(most=6)
        limits.insert(
            0,
            f"Each head alone, the {len(heads)} of {len(of_softmax)} with the largest scores; a head "
            "whose work others take over shows no effect.",
        )
    return Section(
        name="joined",
        title="The circuit's heads: what they look at, how they act, and the sink",
        summary=(*summary, *check.findings()),
        limits=tuple(limits),
        columns=defined(tables.values(), COLUMNS),
        configuration={
            "heads": [str(head) for head in heads],
            "roles": list(ROLES),
            "held_out": task.n,
            "draws": _DRAWS,
            "seed": subject.seed,
        },
        tables=tables,
        figures=figures,
        headlines=tuple(
            of_sink_check(
                tables["sink"], task.name, task.metric, "sink", float(abs(check.plain).max())
            )
        ),
    )


def reading(subject: Subject) -> Section:
    """What each head of the circuit looks at, because of whom, and what cutting each edge costs, in sentences."""
    _, task = halves(subject)
    chosen, scores = circuit_of(subject.run)
    read = chosen if chosen.n <= _EDGES else scores.top(_EDGES)
    found = lens.reading.circuit(
        subject.model, task, read, seed=subject.seed, progress=subject.progress
    )
    said = found.findings()
    tables = {"edges": found.table(), "heads": found.heads}
    return Section(
        name="reading",
        title="The circuit in words: what each head looks at, and because of whom",
        summary=of_kind(said, "logits", "head"),
        limits=(
            *of_kind(said, "fails"),
            f"{read.n} edges of {chosen.n} are read"
            + (", the largest." if read is not chosen else "."),
            "Shares are of one head's logit or output with norms held; the loss is that of cutting the edge alone.",
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={"edges": read.n, "held_out": task.n, "seed": subject.seed},
        tables=tables,
        figures={},
        headlines=tuple(
            of_highest(
                tables["edges"],
                "drop",
                "{edge} is the edge that {value} of the metric hang on, on the median edge of the circuit {baseline}.",
                "the median edge of the circuit",
                unit=task.metric,
                whole=float(task.evaluate(subject.model).abs().max()),
            )
        ),
    )


def _largest_heads(nodes: list[str], attending: tuple[int, ...]) -> list[HeadId]:
    """The first `_HEADS` heads of softmax attention of nodes such as a3.h5, largest first."""
    found = filter(None, map(head_of_node, nodes))
    return [head for head in found if head.layer in attending][:_HEADS]
