"""Evaluation of circuits: published areas, exact ends, and hand-made curves."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import lens
from lens.circuits import evaluate, run_circuit, score_edges
from lens.circuits.checks import control
from lens.circuits.checks._control import _weighted, magnitudes
from lens.circuits.checks.evaluation import SHARES, Outcome, cmd, cpr
from lens.circuits.checks.recovery import recovery
from lens.circuits.discovery import acdc
from lens.circuits.graph.activations import Ablation, read_activations
from lens.circuits.graph.circuit import make_circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.known import induction_transformer
from lens.common.errors import LensError
from lens.figures import circuits as circuit_figures
from tests.lens.circuit_models import error, small_model, small_task

PUBLISHED = np.array([0.0232, 0.2393, 0.4988, 0.8030, 0.8813, 0.9203, 0.9357, 0.9672, 0.9781, 1.0])


@pytest.mark.parametrize(
    ("curve", "ratio", "distance"),
    [
        (np.ones(10), 0.999, 0.0),
        (np.array([0.0] * 9 + [1.0]), 0.25, 0.749),
        (np.array(SHARES), 0.4999995, 0.4990005),
        (PUBLISHED, 0.96780, 0.03120),  # the benchmark's notebook, GPT-2 on IOI
    ],
)
def test_areas_of_known_curves(curve, ratio, distance):
    assert cpr(SHARES, curve) == pytest.approx(ratio, abs=6e-6)
    assert cmd(SHARES, curve) == pytest.approx(distance, abs=6e-6)


def test_ends_and_sizes():
    model, task = small_model("gpt2"), small_task()
    scores = score_edges(model, task, method="eap")
    found = evaluate(model, task, scores, draws=2)
    for outcome in (found.signed, found.absolute):
        assert error(outcome.full, task.evaluate(model)) < 1e-12
        assert error(outcome.empty, task.evaluate(model, corrupt=True)) < 1e-12
        assert outcome.faithfulness()[-1] == pytest.approx(1, abs=1e-12)
        assert outcome.kl[-1] == pytest.approx(0, abs=1e-12)
        assert outcome.kl[0].min() > 1e-4
    assert found.random[:, -1] == pytest.approx(1, abs=1e-12)
    every = scores.graph.n
    assert list(found.edges) == sorted({max(1, round(share * every)) for share in SHARES})
    assert found.shares == tuple(found.edges / every)  # what is run, not 0.1 % of 29 edges
    table = found.table()
    assert len(table) == 2 * len(found.edges) < 20
    last = table.iloc[-1]
    assert last.distance == pytest.approx(0, abs=1e-12)
    assert found.absolute.full.mean() < 0
    assert np.isnan(last.recovered)  # no share of a metric below 0
    assert (last.low, last.high) == pytest.approx((1, 1))
    band: Any = found.plot().data[0]
    assert band.name == "2 random circuits"
    drawn: Any = scores.plot().data[0]
    assert drawn.z.shape == scores.graph.allowed.shape


def test_intervals_cover_the_mean_and_narrow_with_prompts():
    draw = np.random.default_rng(0)
    widths = []
    for prompts in (9, 900):
        metric = draw.normal(0.6, 0.2, (2, prompts))
        outcome = Outcome(metric, metric, np.ones(prompts), np.zeros(prompts))
        low, high = outcome.interval(seed=1)
        assert (low < outcome.faithfulness()).all()
        assert (high > outcome.faithfulness()).all()
        widths.append((high - low).mean())
    assert widths[1] == pytest.approx(4 * 0.2 / 900**0.5, rel=0.15)
    assert widths[0] > 5 * widths[1]
    one = Outcome(np.ones((2, 1)), np.ones((2, 1)), np.ones(1), np.zeros(1))
    assert np.isnan(one.interval(seed=1)).all()


def test_the_true_circuit_does_the_task_and_its_complement_does_not():
    known = induction_transformer(8, dtype="float64")
    scores = score_edges(known.model, known.task, method="exact")
    circuit = make_circuit(scores.graph, known.edges)
    alone = run_circuit(known.model, known.task, circuit)
    assert alone.faithfulness()[0] == pytest.approx(1, abs=1e-3)
    rest = run_circuit(known.model, known.task, replace(circuit, kept=~circuit.kept))
    assert rest.faithfulness()[0] == pytest.approx(0, abs=1e-3)


def test_random_circuits_have_a_quarter_and_three_quarters():
    """Faithful only when whole: the area of the last step, from half of the edges to all, is 0.25."""
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 6, length=9)
    scores = score_edges(model, task, method="eap", progress=False)
    found = evaluate(model, task, scores, draws=12, progress=False)
    assert found.random_cpr.mean() == pytest.approx(0.25, abs=0.04)
    assert found.random_cmd.mean() == pytest.approx(0.75, abs=0.04)
    assert found.cpr > found.random_cpr.max() + 0.2
    assert found.cmd < found.random_cmd.min() - 0.2


def test_recovery_of_what_a_corruption_can_show():
    known = induction_transformer(8, dtype="float64")
    for name, task in known.tasks.items():
        scores = score_edges(known.model, task, method="exact")
        assert recovery(scores, known.visible[name]).auroc >= 0.95, name


def test_areas_of_a_ranking_by_hand():
    graph = Graph(1, 1, 1, mlps=False)  # input to q, k, v and logits, the head to logits
    assert graph.n == 5

    def areas(*values):
        scores = EdgeScores(graph, np.array([values], float), "eap", Ablation(), "m", "t", "toy")
        return recovery(scores, [graph.edges[0], graph.edges[2]])

    perfect = areas(-5, 1, 4, 0, 2)
    assert (perfect.auroc, perfect.staircase, perfect.auprc) == (1, 1, 1)
    mixed = areas(5, 4, 3, 2, 1)  # in, out, in, out, out
    assert (mixed.auroc, mixed.staircase) == pytest.approx((5 / 6, 5 / 6))
    assert mixed.auprc == pytest.approx((1 + 2 / 3) / 2)
    tied = areas(1, 1, 1, 1, 1)
    assert (tied.auroc, tied.staircase, tied.auprc) == pytest.approx((0.5, 0, 0.4))
    with pytest.raises(LensError, match="the known circuit has 0 of 5 edges"):
        recovery(score_of(graph, 0.0), [])
    with pytest.raises(LensError, match="some edges have no score"):
        recovery(score_of(graph, np.nan), graph.edges[:1])


def score_of(graph, number):
    values = np.full((2, graph.n), number)
    return EdgeScores(graph, values, "eap", Ablation(), "m", "t", "toy")


def test_what_cannot_be_evaluated_is_refused():
    model, task = small_model("gpt2"), small_task()
    other = score_of(Graph(1, 2, 2), 1.0)
    with pytest.raises(LensError, match="the circuits are of a graph of 13 edges, and"):
        evaluate(model, task, other)
    with pytest.raises(LensError, match="draws must be a positive integer, got 0"):
        evaluate(model, task, other, draws=0)
    scores = score_edges(model, task, method="eap")
    after_answers = task.clean.clone()
    after_answers[:, -1] = (after_answers[:, -1] + 1) % 7 + 3
    with pytest.raises(LensError, match="ablating every edge does not change the metric"):
        evaluate(model, replace(task, corrupt=after_answers, positions=task.positions - 1), scores)
    with pytest.raises(LensError, match="'drawn' has its clean prompts as corrupt prompts"):
        score_edges(model, replace(task, corrupt=task.clean.clone()), method="eap")


def test_a_true_circuit_stands_out_among_circuits_of_its_size():
    known = induction_transformer(8, dtype="float64")
    scores = score_edges(known.model, known.task, method="exact")
    circuit = make_circuit(scores.graph, known.edges)
    found = control(known.model, known.task, circuit, draws=9, progress=False)
    assert found.edges == len(known.edges)
    assert found.outcome.faithfulness()[0] == pytest.approx(1, abs=1e-3)
    assert found.faithfulness["uniform"].mean() < 0.3
    assert found.p_value("uniform") <= 0.2
    table = found.table().set_index("circuit")
    assert list(table["draws"].drop("degrees")) == [1, 9, 9]
    assert 0 < len(found.faithfulness["degrees"]) < 9  # the others were the circuit itself
    assert table["p"].isna().tolist() == [True, False, False, False]
    counted = (found.faithfulness["degrees"] >= found.outcome.faithfulness()[0]).sum()
    assert table.loc["degrees", "p"] == pytest.approx(
        (1 + counted) / (1 + len(found.faithfulness["degrees"]))
    )
    assert "7 edges" in repr(found)


def test_magnitudes_are_norms_of_what_writers_change():
    model, task = small_model("gpt2"), small_task()
    sizes = magnitudes(model, task, Ablation())
    nodes = find_nodes(model)
    _, clean = read_activations(nodes, task.clean)
    _, corrupt = read_activations(nodes, task.corrupt_or_refuse())
    expected = [float((clean.input - corrupt.input).norm(dim=-1).mean())]
    for number, layer in enumerate(nodes.layers):
        for head in range(nodes.graph.heads):
            change = clean.heads[number][:, head] - corrupt.heads[number][:, head]
            expected.append(float((change @ layer.block.output[head]).norm(dim=-1).mean()))
        expected.append(float((clean.mlps[number] - corrupt.mlps[number]).norm(dim=-1).mean()))
    assert error(sizes, expected) < 1e-12
    circuit = make_circuit(nodes.graph, nodes.graph.edges[:40])
    found = control(model, task, circuit, kinds=("magnitude",), draws=2, progress=False)
    assert set(found.faithfulness) == {"magnitude"}
    with pytest.raises(
        LensError, match="kinds must be one of 'uniform', 'degrees', 'magnitude', got 'best'"
    ):
        control(model, task, circuit, kinds=("best",))
    with pytest.raises(LensError, match="draws must be a positive integer, got 0"):
        control(model, task, circuit, draws=0)


def test_figures_of_a_circuit():
    graph = Graph(2, 2, 1)
    values = np.zeros((2, graph.n))
    edges = ("input->a0.h1<v>", "a0.h1->a1.h0<q>", "a0.h1->a1.h0<k>", "a1.h0->m1", "m1->logits")
    values[:, graph.find(edges)] = [1, 2, -5, 4, 3]
    scores = EdgeScores(graph, values, "eap", Ablation(), "logit_difference", "t", "toy")
    circuit = make_circuit(graph, edges)
    figure: Any = circuit_figures.layered_graph(circuit, scores)
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert sum(len(trace.x) for trace in lines) == 3 * 4  # q and k of a1.h0 are one line
    widest = max(lines, key=lambda trace: trace.line.width)
    assert tuple(widest.x[:2]) == (0, 2.2)  # a1.h0 at head 0, its MLP at the right
    assert tuple(widest.y[:2]) == (1, 1.4)
    texts = next(trace for trace in figure.data if trace.mode == "markers").text
    assert "a0.h1 to a1.h0<br>q +2<br>k -5" in texts
    blue = [trace for trace in lines if trace.line.color == circuit_figures._NEGATIVE]
    assert [tuple(trace.y[:2]) for trace in blue] == [(0, 1)]
    heads: Any = circuit_figures.head_map(circuit, scores)
    assert heads.data[0].z[0][1] == pytest.approx(-3)
    assert np.isnan(heads.data[0].z[0][0])
    assert heads.data[0].z[1][0] == pytest.approx(4)
    assert "2 of 4 heads" in heads.layout.title.text
    shared = Graph(2, 4, 2, kv="group")
    grouped = make_circuit(shared, ["a0.h2->a1.kv1<k>", "a1.h3->logits"])
    zeros = EdgeScores(
        shared, np.zeros((1, shared.n)), "eap", Ablation(kv="group"), "m", "t", "toy"
    )
    figure = circuit_figures.layered_graph(grouped, zeros)
    assert (2.5, 0.75) in list(zip(figure.data[-1].x, figure.data[-1].y, strict=True))


def chain():
    """A model with one head a layer and a circuit that is the only one of its degrees: the edges into logits alone."""
    model, task = small_model("gpt2"), small_task()
    graph = find_nodes(model).graph
    return model, task, make_circuit(graph, [edge for edge in graph.edges if "->logits" in edge])


def test_a_circuit_is_no_control_of_itself():
    """Where no swap fits, the draws were the circuit: p = 1 read as no better than chance."""
    model, task, circuit = chain()
    found = control(model, task, circuit, kinds=["degrees", "uniform"], draws=4, progress=False)
    assert len(found.faithfulness["degrees"]) == 0
    assert np.isnan([found.p_value("degrees"), found.apart["degrees"]]).all()
    assert len(found.faithfulness["uniform"]) == 4
    assert found.apart["uniform"] > 0


def test_controls_of_large_activations_are_drawn():
    """They were the same edges in each of 20 draws, which a p-value of 1/21 and a spread were made of."""
    draw = np.random.default_rng(0)
    weights = np.array([0, 1, 2, 4.0, 0])
    times = np.mean([_weighted(weights, 1, draw) for _ in range(4000)], 0)
    assert times == pytest.approx(weights / 7, abs=0.03)
    assert _weighted(weights, 4, draw)[1:4].all()  # those without a weight come last
    model, task, circuit = chain()
    found = control(model, task, circuit, kinds=["magnitude"], draws=6, progress=False)
    assert len(np.unique(found.faithfulness["magnitude"])) == 6


def test_a_metric_that_is_no_number_is_refused():
    """It was the largest of all circuits, and `find` took it."""
    model, task, circuit = chain()
    nothing = replace(task.with_metric("loss"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(task), "measure", lambda self, logits, rows: logits[:, 0, 0] * np.nan)
        with pytest.raises(LensError, match="the metric of the whole model is NaN or infinite"):
            run_circuit(model, nothing, circuit, progress=False)
        with pytest.raises(LensError, match="the metric of the whole model is NaN or infinite"):
            acdc(model, nothing, 0.1, progress=False)
    real = type(task).measure
    calls = []

    def measure(self, logits, rows):
        calls.append(1)
        return real(self, logits, rows) * (
            1 if len(calls) == 1 else np.nan
        )  # the first run is the whole model's

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(task), "measure", measure)
        with pytest.raises(LensError, match="the metric is NaN or infinite with edges ablated"):
            run_circuit(model, nothing, circuit, progress=False)
