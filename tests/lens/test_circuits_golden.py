"""Golden numbers of hand-built models, worked out independently in float64, and published toys.

Scores are signed as here: positive where ablating the edge makes the task worse.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lens_kernels import patch_effects
from torch import nn

import lens
from lens.circuits import run_circuit, score_edges
from lens.circuits.checks.evaluation import run_circuits
from lens.circuits.checks.recovery import recovery
from lens.circuits.graph.activations import Ablation, read_activations
from lens.circuits.graph.circuit import make_circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.graph.references import References
from lens.circuits.known import induction_transformer, logic_gate
from lens.circuits.known.program import ProgramConfig, ProgramModel
from lens.circuits.scores.methods import EapIg
from tests.tiers import later

QUERY, OUT = "input->a1.h0<q>", "a1.h0->logits"
COPY, KEY = "input->a0.h0<v>", "a0.h0->a1.h0<k>"
VALUE = "input->a1.h0<v>"


def of(scores, *edges):
    return scores.values[scores.graph.find(edges)].tolist()


def scored(known, name="last token", **options):
    return score_edges(known.model, known.tasks[name], **options)


@pytest.mark.parametrize(
    ("beta", "out", "fine"), [later(4, 1.66527, 1.66597), (8, 1.99458, 1.99459), later(30, 2, 2)]
)
def test_the_query_and_the_output_of_the_induction_head(beta, out, fine):
    known = induction_transformer(beta, dtype="float64")
    for method in ("eap", "exact"):  # linear in what the logits read
        assert of(scored(known, method=method), OUT) == pytest.approx([out], abs=1e-5)
    found = scored(known, method=EapIg(200))
    assert of(found, QUERY, OUT) == pytest.approx([fine, out], abs=1e-5)


@pytest.mark.parametrize(("beta", "eap", "exact"), [(4, 0.64663, 1.66527), (30, 0, 2)])
def test_the_first_token_shows_the_key_path(beta, eap, exact):
    known = induction_transformer(beta, dtype="float64")
    assert of(scored(known, "first token", method="eap"), COPY, KEY) == pytest.approx(
        [eap, eap], abs=1e-5
    )
    found = scored(known, "first token", method="exact")
    assert of(found, COPY, KEY) == pytest.approx([exact, exact], abs=1e-5)


@pytest.mark.parametrize(("beta", "both"), [(4, 1.72699), (30, 2)])
def test_the_successor_shows_the_value_path_which_is_linear(beta, both):
    known = induction_transformer(beta, dtype="float64")
    for method in ("eap", "exact", "atp*"):
        found = scored(known, "successor", method=method)
        assert of(found, VALUE, OUT) == pytest.approx([both, both], abs=1e-5), method


def test_positions_show_by_zero_ablation_alone():
    known = induction_transformer(4, dtype="float64")
    edges = ("input->a0.h0<q>", "input->a0.h0<k>")
    for name in known.tasks:
        for method in ("eap", "exact"):
            assert of(scored(known, name, method=method), *edges) == [0, 0]
    by_zero = {
        method: of(scored(known, method=method, baseline="zero"), *edges)
        for method in ("eap", "exact")
    }
    assert by_zero["eap"] == pytest.approx([0.107, 0.107], abs=5e-4)
    assert by_zero["exact"] == pytest.approx([0.766, 0.766], abs=5e-4)


@pytest.mark.parametrize("ablation", ["counterfactual", "zero"])
def test_no_edge_alone_brings_the_answer_back(ablation):
    """Denoising: all is ablated but for one edge. The chain needs all of its edges."""
    known = induction_transformer(4, dtype="float64")
    graph = find_nodes(known.model).graph
    alone = np.eye(graph.n, dtype=bool)[graph.find(known.edges)]
    for task in known.tasks.values():
        found = run_circuits(known.model, task, alone, Ablation(ablation))
        assert found.metric == pytest.approx(np.full((7, 1), found.empty.item()), abs=1e-12)


@pytest.mark.parametrize("beta", [4, 30])
@pytest.mark.parametrize("ablation", ["counterfactual", "zero"])
def test_the_circuit_has_the_clean_answer_and_the_rest_has_none(beta, ablation):
    known = induction_transformer(beta, dtype="float64")
    graph = find_nodes(known.model).graph
    circuit = make_circuit(graph, known.edges, ablation=Ablation(ablation))
    alone = run_circuit(known.model, known.task, circuit)
    clean = known.task.evaluate(known.model).item()
    assert alone.metric.item() == pytest.approx(clean, abs=1e-12)
    rest = run_circuit(known.model, known.task, replace(circuit, kept=~circuit.kept))
    corrupt = known.task.evaluate(known.model, corrupt=True).item()
    expected = corrupt if ablation == "counterfactual" else 0
    assert rest.metric.item() == pytest.approx(expected, abs=1e-12)


def gate_slopes(gate, alphas):
    """Mean over alphas, on both inputs of the gate together, of -d metric / d alpha."""
    known = logic_gate(gate, dtype="float64")
    nodes = find_nodes(known.model)
    reference = References(nodes, known.task, Ablation("zero")).of(torch.tensor([0]))
    edges = nodes.graph.find(["a0.h0->m0", "a0.h1->m0"])
    reader, writer = (end[edges] for end in nodes.graph.ends)
    total = np.zeros(2)
    for alpha in alphas:
        masks = torch.zeros(1, *nodes.graph.allowed.shape, dtype=torch.float64)
        masks[0, reader, writer] = alpha
        masks.requires_grad_()
        logits = masked_logits(nodes, known.task.clean, reference, masks)[0]
        metric = known.task.measure(logits, torch.tensor([0])).sum()
        total -= torch.autograd.grad(metric, masks)[0][0, reader, writer].numpy()
    return total / len(alphas)


@pytest.mark.parametrize(("gate", "eap", "exact"), [("or", 0, 0), ("and", 1, 1), ("sum", 1, 1)])
def test_what_edges_of_gates_score(gate, eap, exact):
    known = logic_gate(gate, dtype="float64")
    edges = ("a0.h0->m0", "a0.h1->m0")
    for method, expected in (("eap", eap), ("exact", exact)):
        found = score_edges(known.model, known.task, method=method, baseline="zero")
        assert of(found, *edges) == pytest.approx([expected] * 2, abs=1e-12), method
    total = 2 if gate == "sum" else 1
    assert gate_slopes(gate, (np.arange(20) + 0.5) / 20) == pytest.approx([total / 2] * 2)


def test_equal_values_hide_each_other():
    """Scores 0, 0, -20 and values 1, 1, 0: neither key counts alone, both together do."""
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key, value = (
        torch.tensor(numbers, dtype=torch.float64).reshape(1, 1, 3, 1)
        for numbers in ([0.0, 0, -20], [1.0, 1, 0])
    )
    scores = key.flatten().clone().requires_grad_()
    out = (scores.softmax(0) * value.flatten()).sum()
    (slope,) = torch.autograd.grad(out, scores)
    assert slope[:2].abs().max() < 2e-9
    found = patch_effects(
        query, key, value, torch.ones_like(query), knock_out=True, block_size=2, scale=1.0
    )
    assert found.knock_out is not None
    assert found.knock_out.flatten()[:2].abs().max() < 1e-8
    assert found.block_knock_out is not None
    assert found.block_knock_out.flatten()[0].item() == pytest.approx(-1, abs=1e-6)


def micro_model():
    """auto-circuit's MicroModel: x + diag(1, 2) x + diag(3, 4) x, twice; tokens are (1, 1) and (-1, -1)."""
    model = ProgramModel(
        ProgramConfig(
            vocab_size=2, hidden_size=2, num_hidden_layers=2, num_attention_heads=2, head_dim=2
        )
    )
    with torch.no_grad():
        model.embed.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        for block in model.blocks:
            attention = block.get_submodule("attn")
            weights = torch.diag_embed(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            attention.get_parameter("v.weight").copy_(weights.flatten(0, 1))
            attention.get_parameter("o.weight").copy_(torch.eye(2).repeat(1, 2))
        model.unembed.weight.copy_(torch.eye(2))
    return lens.load(nn.Module.double(model).eval())


def test_the_micro_model_has_its_published_outputs():
    """One position: attention is the identity. Runs of the corrupt prompt with clean edges put in."""
    nodes = find_nodes(micro_model())
    graph = nodes.graph
    clean, corrupt = torch.tensor([[0]]), torch.tensor([[1]])
    _, reference = read_activations(nodes, clean)
    edges = ("a0.h1->logits", "a0.h0->a1.h1<v>", "input->a0.h0<v>")
    masks = torch.zeros(4, *graph.allowed.shape)
    for count in range(1, 4):
        numbers = graph.find(edges[:count])
        masks[count, graph.ends[0][numbers], graph.ends[1][numbers]] = 1
    with torch.no_grad():
        assert nodes.model.model(clean).logits.flatten().tolist() == [25, 49]
        found = masked_logits(nodes, corrupt, reference, masks)[:, 0, 0]
    assert found.tolist() == [[-25, -49], [-19, -41], [-13, -25], [-9, -13]]


def test_the_staircase_of_a_diagonal_is_a_quarter():
    """(0, 0), (0.5, 0.5), (1, 1): 0.5 by rank, 0.25 by the pessimistic staircase."""
    graph = Graph(1, 1, 1)
    assert graph.n == 8
    values = np.array([[2.0, 2, 1, 1, 2, 2, 1, 1]])
    found = recovery(EdgeScores(graph, values, "eap", Ablation(), "m", "t", "toy"), graph.edges[:4])
    assert (found.auroc, found.staircase, found.auprc) == (0.5, 0.25, 0.5)
