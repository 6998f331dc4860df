"""Named numbers of the embedded models, one function per room: what must stay when code moves.

    python -m tests.lens.recorded_numbers --write

computes all of them and writes them to data/numbers.json; test_numbers.py computes them again. A
function here may be changed to call a function by its new name, and its numbers keep their names. A
number is picked by what it belongs to (a head, an edge, a condition), never by its place in a table.
Write the file anew only where a number is meant to change, and say why in the commit.

What a random draw or many steps of training decide to the last digit is left out, and so are
sentences.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lens
from lens.runs import compare_runs
from tests.lens.recorded_edits import redistribution, sink_effects, sinks, vision
from tests.lens.recorded_inputs import (
    QUIET,
    Numbers,
    by_head,
    cells,
    copying,
    edges,
    grouped,
    reader,
    reading,
    symbols,
)
from tests.lens.test_comparison import make_run

FILE = Path(__file__).parent / "data" / "numbers.json"


def capture() -> Numbers:
    """One value of each statistic, at a head that looks back and at one of the reader."""
    found: Numbers = {}
    axes = {"query": 30, "key": 6, "offset": 2, "match": 2, "query_block": 0, "key_block": 0}
    cases = (("induction-2l", symbols()[2][0], 1, 0), ("text-lm-3l", reader()[2][0], 2, 4))
    for name, trace, layer, head in cases:
        for statistic, array in trace.dataset.data_vars.items():
            if statistic in ("q", "k"):
                continue
            at = {"layer": layer, "head": head, **axes}
            found[f"capture.{name}.{statistic}"] = float(
                array.isel({axis: at[axis] for axis in array.dims}).item()
            )
    model, _ = grouped()
    once = lens.capture(model, "Once upon a time there was a little girl", **QUIET).dataset
    for statistic in ("lse", "entropy", "distance"):
        value = once[statistic].sel(layer=3).isel(head=5, query=-1)
        found[f"capture.stories260k.{statistic}"] = float(value)
    return found


def profile() -> Numbers:
    """Main columns of the profile, with intervals."""
    table = by_head(lens.profile(symbols()[2], all=True))
    columns = (
        "previous_token duplicate_token induction induction_low induction_high "
        "induction_sink_excluded current_token first_token prefix_mass prefix_mass_low "
        "prefix_mass_high entropy entropy_low entropy_high entropy_sink_excluded effective_keys "
        "distance distance_low distance_high distance_sink_excluded locality positional sink_mass "
        "top_key_mass"
    )
    found = cells("profile", table, columns, "L0H1 L1H0")
    reads = by_head(lens.profile(reader()[2], all=True))
    return found | cells("profile.text-lm-3l", reads, "delimiter sink_rate sink_mass", "L1H0 L2H4")


def importance() -> Numbers:
    """Every method and every baseline, single heads and a group."""
    model, task = symbols()[0], copying()
    found: Numbers = {}
    for method in ("gradient", "gate", "attribution", "atp"):
        table = by_head(lens.heads.importance(model, task, method=method, **QUIET).table())
        name = "atp*" if method == "atp" else method
        found |= cells(f"heads.importance.{name}", table, "value low high", "L0H1 L1H0")
    for baseline in ("zero", "mean", "pooled_mean", "resample", "counterfactual", "optimal"):
        scores = lens.heads.importance(model, task, method="ablation", baseline=baseline, **QUIET)
        table = by_head(scores.table())
        found |= cells(f"heads.importance.ablation.{baseline}", table, "value low high", "L1H3")
    wrong = (task.correct + 1) % 64
    direct = replace(task, metric="logit_difference", wrong=wrong)
    table = by_head(lens.heads.importance(model, direct, method="direct", **QUIET).table())
    found |= cells("heads.importance.direct", table, "value low high", "L1H0 L1H2")
    table = by_head(lens.heads.importance(*grouped(), **QUIET).table())
    found |= cells("heads.importance.stories260k", table, "value low high", "L0H3 L4H6")
    group = lens.heads.pruning.ablate(model, task, heads=["L1H0", "L1H2", "L1H3"], **QUIET)
    low, high = group.interval()
    return found | {
        "heads.group.value": group.value,
        "heads.group.low": low,
        "heads.group.high": high,
    }


def comparing_heads() -> Numbers:
    """Agreement of measures, orders of pruning, likeness and clusters of heads."""
    model, prompts, _ = symbols()
    task, heads = copying(), lens.heads
    zero, mean = (
        heads.importance(model, task, baseline=name, **QUIET) for name in ("zero", "mean")
    )
    table = heads.agreement(zero, mean).table().set_index(["first", "second"])
    pair = ("ablation (zero)", "ablation (mean)")
    found = cells("heads.agreement", table, "tau tau_low tau_high overlap", [pair])
    curve = heads.pruning.curve(model, task, order=mean, draws=2, **QUIET).table()
    columns = "value cost low high random_cost"
    found |= cells("heads.pruning_curve", curve.set_index("removed"), columns, [3, 6])
    table = heads.pruning.metrics(model, task).table()
    table = by_head(table).set_index("metric", append=True)
    at = [("L0H1", "accuracy"), ("L1H0", "distance")]
    found |= cells("heads.pruning_metrics", table, "value low high", at)
    for measure in ("js", "log_odds", "cka"):
        alike = heads.similarity(model, prompts, method=measure, **QUIET)
        table = alike.table().set_index(["first", "second"])
        at = [("L1H0", "L1H3"), ("L0H0", "L0H2")]
        found |= cells(f"heads.similarity.{measure}", table, "value low high", at)
    alike = heads.similarity(model, prompts, **QUIET)
    table = by_head(alike.redundancy(resamples=20))
    found |= cells("heads.redundancy", table, "value low high", "L1H2 L0H1")
    clusters = alike.clusters(resamples=20)
    found |= {
        "heads.clusters.silhouette": clusters.silhouette,
        "heads.clusters.cut": clusters.cut,
        "heads.clusters.count": len(clusters.members),
        "heads.clusters.rand": float(clusters.rand.mean()),
    }
    return found


def kinds_of_heads() -> Numbers:
    """What single heads do: weights, roles, retrieval, short windows, stability over prompts."""
    model, prompts, traces = symbols()
    heads = lens.heads
    table = by_head(heads.weights.copying(model))
    found = cells("heads.copying", table, "eigenvalue eigenvalue_random top_share", "L0H1 L1H2")
    table = heads.weights.composition(model).set_index(["earlier", "later", "kind"])
    at = [("L0H1", "L1H0", kind) for kind in "qkv"]
    found |= cells("heads.composition", table, "score", at)
    table = by_head(heads.roles(model, prompts, **QUIET).table())
    columns = (
        "previous_token previous_token_baseline induction induction_low induction_high "
        "normalized_entropy_sink_excluded first_column_entropy activity output_norm noop drain "
        "drain_value first_contribution"
    )
    found |= cells("heads.roles", table, columns, "L1H0")
    domains = {"a": prompts[:2], "b": prompts[2:]}
    table = by_head(heads.activity(model, domains, **QUIET).table())
    table = table.set_index("domain", append=True)
    columns = "activity activity_low activity_high loss loss_low loss_high"
    found |= cells("heads.dormancy", table, columns, [("L1H0", "a")])
    table = by_head(heads.streaming(model, prompts, first=2, last=8, **QUIET).table())
    table = table.rename(columns=lambda name: name.replace("row_error", "error"))
    found |= cells(
        "heads.streaming", table, "kept kept_low kept_high error error_low error_high", "L1H2"
    )
    table = by_head(heads.patterns(traces).table())
    columns = "a_shape vertical_slash block_sparse vertical_slash_low margin"
    found |= cells("heads.pattern_classes", table, columns, "L1H0")
    needles = lens.tasks.needles.copied(model, n=4, length=30, needle=4)
    table = by_head(heads.retrieval(model, needles, **QUIET).table())
    table = table.rename(columns={"retrieval_low": "low", "retrieval_high": "high"})
    found |= cells("heads.retrieval", table, "retrieval low high", "L1H3 L1H0")
    halves = {"a": traces[:2], "b": traces[2:]}
    table = heads.stability(halves).table()
    table = table[table["n"] > 0].query("first == 'a' and second == 'b' and variant == 'raw'")
    table = by_head(table).set_index("metric", append=True)
    at = [("L1H0", metric) for metric in table.loc["L1H0"].index if "p99" not in metric]
    found |= cells("heads.stability", table, "value", at)
    more = [lens.tasks.copied(model, 25, seed=seed) for seed in range(4, 8)]
    eight = {"a": traces, "b": lens.capture(model, more, **QUIET)}
    table = lens.traces.variance(eight, resamples=50).table().set_index("source")
    return found | cells("heads.variance", table, "share low high", ["head", "condition × head"])


def circuit_scores() -> Numbers:
    """Edges and nodes by every method, patches and routes."""
    model, task, circuits = symbols()[0], copying(), lens.circuits
    found: Numbers = {}
    methods = (
        "exact eap eap-ig eap-ig-stages clean-corrupted atp* atp*-together atp*-grad-drop "
        "relp relp-values"
    )
    for method in methods.split():
        scored = circuits.score_edges(model, task, method=method, **QUIET)
        table = scored.table().set_index("edge")
        at = ["a1.h0->logits", "a0.h1->a1.h0<k>"]
        name = method.replace("stages", "activations")  # as it was called when it was recorded
        found |= cells(f"circuits.score_edges.{name}", table, "value", at)
    table = edges().table().set_index("edge")
    found |= cells("circuits.score_edges.eap-ig", table, "low high stderr", ["a1.h0->logits"])
    columns = "change low high effect"
    table = circuits.patch(model, task, **QUIET).table().set_index("node")
    found |= cells("circuits.patch", table, columns, ["a1.h0"])
    table = circuits.patch(model, task, receivers=["a1.h0"], **QUIET).table().set_index("node")
    found |= cells("circuits.path_patch", table, columns, ["a0.h1"])
    table = circuits.scores.hisp(model, task, **QUIET).table().set_index("node")
    found |= cells("circuits.hisp", table, "value low high", ["a1.h0<k>"])
    table = by_head(circuits.scores.flow_routes(model, task, **QUIET).table())
    found |= cells("circuits.flow_routes", table, "value low high used", "L1H2")
    known = circuits.known.induction_transformer(beta=30)
    exact = circuits.score_edges(known.model, known.task, method="exact", **QUIET)
    recovered = circuits.checks.recovery(exact, known.visible[next(iter(known.tasks))])
    part = circuits.checks.recovery(
        edges(), ["a0.h1->a1.h2<k>", "a1.h2->logits", "input->a0.h1<v>"]
    )
    return found | {
        "circuits.recovery.known.auroc": recovered.auroc,
        "circuits.recovery.part.auroc": part.auroc,
        "circuits.recovery.part.auprc": part.auprc,
        "circuits.recovery.part.staircase": part.staircase,
    }


def circuit_checks() -> Numbers:
    """Circuits found, evaluated and compared."""
    model, task, circuits = symbols()[0], copying(), lens.circuits
    result = circuits.evaluate(model, task, edges(), draws=2, **QUIET)
    found = {"circuits.evaluate.cpr": result.cpr, "circuits.evaluate.cmd": result.cmd}
    table = result.table()
    fifth = table[table["edges"] == round(0.2 * edges().graph.n)].assign(share=0.2)
    table = fifth.set_index(["ranking", "share"])
    at = [("signed", 0.2), ("absolute", 0.2)]
    columns = "faithfulness low high distance kl"
    found |= cells("circuits.evaluate", table, columns, at)
    table = (
        circuits.discovery.acdc(model, task, [0.05, 0.2], **QUIET).table().set_index("threshold")
    )
    found |= cells("circuits.acdc", table, "edges loss whole", [0.05, 0.2])
    circuit = edges().top(30)
    outcome = circuits.run_circuit(model, task, circuit, **QUIET)
    found["circuits.run_circuit.metric"] = float(outcome.metric.mean())
    found["circuits.run_circuit.kl"] = float(outcome.kl.mean())
    result = circuits.checks.completeness(
        model, task, circuit, runs=2, steps=2, candidates=3, draws=2, **QUIET
    )
    table = result.table().set_index("kind")
    found |= cells("circuits.completeness", table, "model circuit gap low high", ["none"])
    found["circuits.completeness.incompleteness"] = result.incompleteness
    table = (
        circuits.checks.minimality(model, task, circuit, draws=3, **QUIET).table().set_index("node")
    )
    found |= cells("circuits.minimality", table, "drop low high share", "a0.h1 a1.h2")
    table = circuits.checks.stability(edges(), 40, resamples=6).table().set_index("of")
    found |= cells("circuits.stability", table, "mean least chance", ["edges"])
    other = circuits.score_edges(model, task, method="eap", **QUIET).top(20)
    shared = circuits.reuse.overlap(edges().top(20), other, draws=20, resamples=10)
    found |= cells("circuits.overlap", shared.table().set_index("measure"), "value", "heads edges")
    table = circuits.head_parts(model, task, ["L1H0"]).table().set_index("name")
    columns = "full full_low full_high pattern value interaction without_sink induction sink_mass"
    found |= cells("circuits.join", table, columns, ["L1H0"])
    table = (
        circuits.checks.sink_check(model, task, ["L1H0"], draws=2)
        .table()
        .set_index(["edit", "heads"])
    )
    at = [("excluded", "circuit"), ("redistributed", "circuit")]
    table = table.rename(columns=lambda name: name.replace("gain", "change"))
    return found | cells("circuits.sink_check", table, "value change change_low change_high", at)


def layers() -> Numbers:
    """Sub-layers skipped one by one and one after the other."""
    model, task, room = reader()[0], reading(), lens.heads.sublayers
    table = room.importance(model, task, **QUIET).table().set_index("name")
    columns = "drop drop_low drop_high distance distance_low distance_high"
    found = cells("layers.importance", table, columns, "L1.attention L2.mlp")
    table = room.block_influence(model, task).table().set_index("layer")
    found |= cells("layers.block_influence", table, "influence low high", [0, 2])
    table = room.greedy_removal(model, task, count=3, **QUIET).table().set_index("name")
    return found | cells("layers.greedy_removal", table, "removed metric distance", "L1.mlp L2.mlp")


def tasks() -> Numbers:
    """The mean metric of each task on each embedded model that can read it."""
    models: Mapping[str, Any] = {
        "induction-2l": symbols()[0],
        "text-lm-3l": reader()[0],
        "stories260k": grouped()[0],
    }
    made = {
        "induction": (lens.tasks.induction, tuple(models)),
        "greater_than": (lens.tasks.greater_than, ("text-lm-3l", "stories260k")),
    }
    found = {
        f"tasks.{name}.{model}": float(make(models[model], n=4).evaluate(models[model]).mean())
        for name, (make, readers) in made.items()
        for model in readers
    }
    corrupt = copying().corrupt_or_refuse()
    found["tasks.induction.corrupt"] = float(
        replace(copying(), clean=corrupt, corrupt=None).evaluate(symbols()[0]).mean()
    )
    found["tasks.language_modelling.text-lm-3l"] = float(reading().evaluate(reader()[0]).mean())
    model, task = grouped()
    return found | {"tasks.language_modelling.stories260k": float(task.evaluate(model).mean())}


def imported() -> Numbers:
    """A trace made from whole matrices of attention, in which each row is a drawn distribution."""
    random = np.random.default_rng(7)
    layers = []
    for _ in range(2):
        rows = np.tril(random.random((1, 3, 19, 19)) ** 4)
        layers.append(torch.tensor(rows / rows.sum(-1, keepdims=True), dtype=torch.float32))
    trace = lens.traces.from_attentions(layers, token_ids=[*range(10), *range(9)])
    table = by_head(lens.profile(trace))
    columns = "previous_token induction duplicate_token entropy distance first_token sink_mass"
    return cells("interchange.from_attentions", table, columns, "L0H2 L1H1")


def comparison() -> Numbers:
    """Two made-up runs on the same prompts, head by head."""
    with tempfile.TemporaryDirectory() as folder:
        a, b = (make_run(Path(folder) / str(seed), seed) for seed in (1, 2))
        table = compare_runs(a, b).table()
    table = by_head(table).set_index("metric", append=True)
    at = [("L0H1", "induction"), ("L1H2", "entropy")]
    return cells("comparison", table, "a b difference low high", at)


ROOMS: Mapping[str, Callable[[], Numbers]] = {
    room.__name__: room
    for room in (
        capture,
        profile,
        importance,
        comparing_heads,
        kinds_of_heads,
        circuit_scores,
        circuit_checks,
        sinks,
        sink_effects,
        redistribution,
        vision,
        layers,
        tasks,
        imported,
        comparison,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute the recorded numbers.")
    parser.add_argument("--write", action="store_true", help=f"write them to {FILE.name}")
    write = parser.parse_args().write
    found = {name: room() for name, room in ROOMS.items()}
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    if write:
        FILE.write_text(text, encoding="utf-8")
    print(f"{sum(map(len, found.values()))} numbers of {len(found)} rooms", "written" * write)


if __name__ == "__main__":
    main()
