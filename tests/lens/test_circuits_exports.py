"""Files of other tools: round trips, and the schema as published."""

import json

import numpy as np
import pytest

from lens.circuits.exports import from_mib, to_attribution_graph, to_mib
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.circuit import load_circuit, make_circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph
from lens.common.errors import LensError

GRAPH = Graph(3, 4, 2, mlps=True)
CHAIN = ("input->a0.h1<v>", "input->a0.h1<q>", "a0.h1->m1", "m1->a2.h3<k>", "a2.h3->logits")
REQUIRED = {  # of the published schema, with the types that it allows
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "nodes": {
        "node_id": str, "feature": (int, type(None)), "layer": (str, int), "ctx_idx": int,
        "feature_type": str, "jsNodeId": str, "clerp": str,
    },
    "links": {"source": str, "target": str, "weight": float},
}  # fmt: skip


def scored(graph=GRAPH, seed=0):
    values = np.random.default_rng(seed).normal(size=(3, graph.n))
    return EdgeScores(graph, values, "eap-ig", Ablation("mean"), "logit_difference", "made", "toy")


@pytest.mark.parametrize(
    "graph", [GRAPH, Graph(2, 3, 3, mlps=False), Graph(2, 3, 3, parallel=True)]
)
def test_scores_come_back_from_importances(graph, tmp_path):
    scores = scored(graph)
    to_mib(scores, tmp_path / "importances.json")
    again = from_mib(tmp_path / "importances.json")
    assert again.graph == graph
    assert (again.values == scores.values).all()
    assert (again.ablation, again.metric, again.task) == (
        scores.ablation,
        "logit_difference",
        "made",
    )


def test_importances_are_as_the_benchmark_reads_them(tmp_path):
    scores, path = scored(), tmp_path / "importances.json"
    circuit = make_circuit(GRAPH, CHAIN)
    to_mib(scores, path, circuit=circuit)
    found = json.loads(path.read_text())
    assert found["cfg"]["n_layers"] == 3
    assert found["cfg"]["parallel_attn_mlp"] is False
    assert set(found["nodes"]) == {*GRAPH.writers, "logits"}
    inside = {name for name, node in found["nodes"].items() if node["in_graph"]}
    assert inside == {"input", "a0.h1", "m1", "a2.h3", "logits"}
    assert {name for name, edge in found["edges"].items() if edge["in_graph"]} == set(CHAIN)
    assert len(found["edges"]) == GRAPH.n


def test_a_file_of_the_benchmark_without_what_it_does_not_know(tmp_path):
    path = tmp_path / "theirs.json"
    cfg = {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    edges = {"a1.h0->logits": {"score": -0.2815, "in_graph": True}}
    path.write_text(json.dumps({"cfg": cfg, "nodes": {}, "edges": edges}))
    found = from_mib(path, sign=-1)
    assert np.nansum(found.values) == pytest.approx(0.2815)
    assert np.isnan(found.values).sum() == found.graph.n - 1
    assert (found.method, found.ablation.value) == ("imported", "counterfactual")
    with pytest.raises(LensError, match="sign must be 1 or -1, got 0"):
        from_mib(path, sign=0)
    for damage, message in (
        ({"cfg": {"n_layers": 2}}, r"lacks cfg\.n_heads, cfg\.parallel_attn_mlp"),
        ({"edges": {"a9.h0->logits": {"score": 1}}}, "there is no edge 'a9"),
        ({"edges": {"a1.h0->logits": {}}}, "is a damaged importances"),
    ):
        path.write_text(json.dumps({"cfg": cfg, "nodes": {}, "edges": edges, **damage}))
        with pytest.raises(LensError, match=message):
            from_mib(path)


def test_an_attribution_graph_has_what_the_schema_requires(tmp_path):
    scores, path = scored(), tmp_path / "graph.json"
    circuit = make_circuit(GRAPH, CHAIN, task="made", model="toy")
    to_attribution_graph(circuit, scores, ["Hello", " there"], path, answer=" you", slug="mine")
    found = json.loads(path.read_text())
    assert {"metadata", "qParams", "nodes", "links"} <= set(found)
    for part, wanted in REQUIRED.items():
        for one in [found[part]] if part == "metadata" else found[part]:
            for key, kind in wanted.items():
                assert isinstance(one[key], kind), (part, key)
    links = {(link["source"], link["target"]): link["weight"] for link in found["links"]}
    both = scores.values[GRAPH.find(CHAIN[:2])].sum()
    assert links["input", "a0.h1"] == pytest.approx(both)
    assert len(links) == 4
    ids = {node["node_id"]: node for node in found["nodes"]}
    assert {end for pair in links for end in pair} == set(ids)
    assert ids["logits"]["clerp"] == " you"
    assert (ids["a2.h3"]["layer"], ids["m1"]["feature_type"]) == ("2", "mlp")
    shares = sum(node["influence"] for name, node in ids.items() if name != "logits")
    assert shares == pytest.approx(1)


def test_a_circuit_file_has_scores_and_curve_beside_its_edges(tmp_path):
    circuit, scores = make_circuit(GRAPH, CHAIN), scored().values
    path = tmp_path / "c.json"
    circuit.save(path, scores=scores, faithfulness={"share": [0.1, 1], "faithfulness": [0.5, 1]})
    found = json.loads(path.read_text())
    assert found["scores"] == list(scores[circuit.kept])
    assert found["faithfulness"]["faithfulness"] == [0.5, 1]
    assert load_circuit(path).edges == circuit.edges
    with pytest.raises(LensError, match="scores must be"):
        circuit.save(path, scores=scores[1:])
    with pytest.raises(LensError, match="not NaN for a kept one"):
        circuit.save(path, scores=np.full(GRAPH.n, np.nan))


def test_what_the_formats_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "x.json"
    shared = scored(Graph(3, 4, 2, kv="group"))
    with pytest.raises(LensError, match="score the edges with kv='head'"):
        to_mib(shared, path)
    missing = EdgeScores(GRAPH, np.full((2, GRAPH.n), np.nan), "eap", Ablation(), "m", "t", "toy")
    with pytest.raises(LensError, match="edges have no score"):
        to_mib(missing, path)
    with pytest.raises(LensError, match="another graph than the scores"):
        to_mib(scored(), path, circuit=make_circuit(Graph(1, 1, 1), []))
    circuit = make_circuit(GRAPH, CHAIN)
    with pytest.raises(LensError, match="another graph than the scores"):
        to_attribution_graph(circuit, shared, ["a"], path)
    with pytest.raises(LensError, match="at least one edge and one token"):
        to_attribution_graph(circuit, scored(), [], path)
    with pytest.raises(LensError, match="their links have no weight"):
        to_attribution_graph(circuit, missing, ["a"], path)
    assert not path.exists()
