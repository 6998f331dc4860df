"""Where in the prompt a circuit works: edges in spans, what heads carry from span to span, and circuits of both."""

import numpy as np

from lens import circuits
from lens.circuits.checks._positions import ENOUGH, PositionEvaluation
from lens.circuits.scores.methods import named
from lens.common.results import of_kind, with_ends
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens_analyses.config.listed import spans_of
from lens_analyses.steps.circuits import halves
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import beside
from lens_analyses.steps.subject import Subject

_MOST = 1000  # rows of the table of edges
_SHARES = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5)
_METHODS = ("exact", "eap", "eap-ig")
COLUMNS = {
    "edge": "Writer->reader; across spans the head and its part, such as a1.h0<k>.",
    "span": "Where it is read; across spans that of the query.",
    "key_span": "Across spans that of the key; empty within a span.",
    "value": "Score, in units of the metric; positive: the task goes worse without it.",
    "low": "Low end of the 95 % interval over prompts.",
    "high": "High end of it.",
    "n": "Number of prompts.",
    "by": "Which edges a circuit has: the best at places, the best everywhere, random ones; with ways across spans cut, too.",
    "share": "Of the (edge, token) pairs, and of the ways' pairs of a query and a key, that a circuit has at most.",
    "kept": "Share of the (edge, token) pairs that it has.",
    "ways": "Share of the pairs of a query and a key along which its heads carry what they carry; the others are cut.",
    "faithfulness": "(circuit - all ablated) / (model - all ablated), ratio of means over held-out prompts.",
}


def positions(subject: Subject) -> Section:
    """Edges at places on half of the prompts, and circuits of them on the others."""
    task, held_out = halves(subject)
    settings, spans = subject.settings, spans_of(subject.settings.spans)
    word, _ = named(settings.method)
    method = word if word in _METHODS else "eap-ig"
    scores = circuits.scores.positions(
        subject.model,
        task,
        spans,
        method=circuits.EapIg(steps=settings.steps) if method == "eap-ig" else method,
        progress=subject.progress,
    )
    judged = circuits.checks.evaluate_positions(
        subject.model, held_out, scores, _SHARES, spans=spans, seed=subject.seed,
        progress=subject.progress,
    )  # fmt: skip
    tables = {"scores": scores.table(_MOST, seed=subject.seed), "sizes": judged.table()}
    said = scores.findings()
    return Section(
        name="positions",
        title="Where in the prompt: edges at places, and what heads carry between them",
        summary=(*judged.findings(), *of_kind(said, "within", "across", "cancelled")),
        limits=(
            f"Scored on {task.n} prompts by {method}, run on {held_out.n} others; the table has the {len(tables['scores']):,} "
            f"largest of {scores.within[0].size + scores.across[0].size:,} scores.",
            "What is cut carries what the corrupt prompt makes there; circuits everywhere, and at places without a word of ways, "
            "have all ways across spans.",
            "A span is one place: what differs between its tokens is not told apart.",
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={
            "spans": list(scores.spans),
            "method": method,
            "prompts": task.n,
            "held_out": held_out.n,
            "seed": subject.seed,
        },
        tables=tables,
        figures={"scores": scores.plot(), "sizes": judged.plot()},
        headlines=_headlines(judged),
    )


def _headlines(judged: PositionEvaluation) -> tuple[Headline, ...]:
    """The smallest circuit of places and ways that does most of the task, beside a random one of its size."""
    size = judged.smallest()["places and ways"]
    if np.isnan(size):
        return ()
    table = judged.table()
    is_best = (table["by"] == "places and ways") & (table["kept"] == size)
    share = table.loc[is_best & (table["faithfulness"] >= ENOUGH), "share"].min()
    rows = table[table["share"] == share].to_dict("records")
    one, chance = (
        next(row for row in rows if row["by"] == by)
        for by in ("places and ways", "random places and ways")
    )
    return (
        beside(
            f"With {size:.1%} of the edges' tokens and {one['ways']:.1%} of the ways between spans, the rest cut, a circuit "
            f"has a faithfulness of {with_ends(one, 'faithfulness', '.2f', plain=True)} on held-out prompts, by "
            f"which its size was chosen (the smallest with {ENOUGH}); a "
            f"random one of this size has {chance['faithfulness']:.2f}.",
            "faithfulness",
            one,
            chance,
            "random places and ways",
            figure="sizes",
        ),
    )
