"""Overlap of circuits: against sets of names, and its null against all renamings written out."""

from dataclasses import replace
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest

import lens
from lens.circuits import make_circuit
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph
from lens.circuits.known import induction_transformer
from lens.circuits.reuse import overlap
from lens.common.errors import LensError
from lens.common.results import of_kind
from lens.heads.measures.scores import HeadScores, Intervention

LAYERS, HEADS, GRAPH = 3, 5, Graph(3, 6, 2, kv="group")


def head_scores(seed: int, prompts: int = 4, model: str = "drawn") -> HeadScores:
    draw = np.random.default_rng(seed)
    return HeadScores(
        draw.normal(size=(LAYERS, HEADS, prompts)), np.zeros(prompts), "ablation",
        Intervention("mean"), "loss", -1, f"task {seed}", model,
    )  # fmt: skip


def edge_scores(seed: int, graph: Graph = GRAPH, prompts: int = 3) -> EdgeScores:
    per_prompt = np.random.default_rng(seed).normal(size=(prompts, graph.n))
    return EdgeScores(
        graph, per_prompt, "exact", Ablation(kv=graph.kv), "loss", f"task {seed}", "drawn"
    )


def spearman(x, y) -> float:
    """By the differences of ranks; no ties."""
    a, b = (np.argsort(np.argsort(v)) for v in (x, y))
    return 1 - 6 * ((a - b) ** 2).sum() / (len(x) * (len(x) ** 2 - 1))


def test_heads_are_counted_as_sets_of_names():
    first, second = head_scores(1), head_scores(2)
    found = overlap(first, second, count=6, draws=3)
    sets = []
    for scores in (first, second):
        values = {f"L{n // HEADS}H{n % HEADS}": v for n, v in enumerate(abs(scores.values).ravel())}
        sets.append(set(sorted(values, key=values.__getitem__)[-6:]))
    assert found.values["heads"] == len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert found.values["first in second"] == len(sets[0] & sets[1]) / 6
    assert {str(head) for head in found.shared} == sets[0] & sets[1]
    expected = spearman(abs(first.values).ravel(), abs(second.values).ravel())
    assert found.values["rank correlation"] == pytest.approx(expected)
    table = found.heads().set_index("name")
    assert set(table.index) == sets[0] | sets[1]
    assert set(table.index[table["first_rank"] <= 6]) == sets[0]
    for head, row in table.iterrows():
        inside = [str(head) in one for one in sets]
        assert row["circuit"] == ("both" if all(inside) else "first" if inside[0] else "second")


def test_circuits_with_their_scores_are_ranked_too():
    scores = edge_scores(1), edge_scores(2)
    circuits = [one.top(count, absolute=False) for one, count in zip(scores, (30, 45), strict=True)]
    plain = overlap(*circuits, draws=40)
    found = overlap(*circuits, scores=scores, draws=40)
    by_scores = overlap(*scores, count=30, draws=40)
    assert found.values["rank correlation"] == by_scores.values["rank correlation"]
    assert {name: found.values[name] for name in plain.values} == plain.values
    assert np.array_equal(found.null["edges"], plain.null["edges"])
    assert np.array_equal(found.null["rank correlation"], by_scores.null["rank correlation"])
    assert found.heads()["first"].notna().all()
    assert plain.heads()["first"].isna().all()
    with pytest.raises(LensError, match="scores are those that two circuits were made from"):
        overlap(*scores, count=3, scores=scores)
    other = edge_scores(2, Graph(2, 6, 2, kv="group"))
    with pytest.raises(LensError, match=r"the scores are of Graph.*and the circuit of Graph"):
        overlap(*circuits, scores=(scores[0], other))


def test_null_of_layers_is_that_of_all_renamings():
    first = [(0, 0), (0, 1), (1, 2), (1, 0)]
    second = [(0, 1), (1, 0), (1, 1)]
    found = overlap(first, second, shape=(2, 3), draws=6000)
    assert found.values["heads"] == 2 / 5
    drawn = []
    for one, other in product(permutations(range(3)), repeat=2):
        renamed = {(layer, (one, other)[layer][head]) for layer, head in second}
        drawn.append(len(renamed & set(first)) / len(renamed | set(first)))
    for level in set(drawn):
        share = (np.abs(found.null["heads"] - level) < 1e-9).mean()
        assert share == pytest.approx(np.mean(np.array(drawn) == level), abs=0.03)
    assert found.p_value("heads") == pytest.approx(np.mean(np.array(drawn) >= 2 / 5), abs=0.03)


def test_what_depth_alone_gives_is_no_reuse():
    whole_layer = [(1, head) for head in range(HEADS)]
    by_layer = overlap(whole_layer, whole_layer, shape=(LAYERS, HEADS), draws=200)
    anywhere = overlap(whole_layer, whole_layer, shape=(LAYERS, HEADS), draws=200, null="all")
    assert by_layer.p_value("heads") == 1
    assert anywhere.p_value("heads") < 0.02
    said = [of_kind(found.findings(), "shared") for found in (by_layer, anywhere)]
    assert "heads of the same layers at random 1.00" in said[0][0]
    assert "heads of any layer at random" in said[1][0]


@pytest.mark.parametrize("graph", [Graph(3, 5, 5), Graph(3, 6, 2), GRAPH])
def test_renamed_edges_are_those_of_the_renamed_heads(graph):
    kept = np.random.default_rng(5).choice(graph.n, 40, replace=False)
    circuit = make_circuit(graph, [graph.edges[edge] for edge in kept], model="drawn")
    other = make_circuit(graph, graph.edges[::7], model="drawn")
    draws = 4
    found = overlap(other, circuit, draws=draws, seed=11)
    groups = graph.kv_readers
    size, draw = graph.heads // groups, np.random.default_rng(11)
    for number in range(draws):
        names = {}
        for layer in range(graph.layers):
            order = draw.permutation(groups)
            inside = draw.permuted(np.tile(np.arange(size), (groups, 1)), axis=1)
            for group in range(groups):
                old = order[group]
                names[f"a{layer}.kv{old}"] = f"a{layer}.kv{group}"
                for head in range(size):
                    was, now = old * size + inside[group, head], group * size + head
                    names[f"a{layer}.h{was}"] = f"a{layer}.h{now}"

        def rename(node: str, names: dict[str, str] = names) -> str:
            stem, sign, rest = node.partition("<")
            return names.get(stem, stem) + sign + rest

        renamed = {"->".join(map(rename, edge.split("->"))) for edge in circuit.edges}
        assert renamed <= set(graph.edges)
        mine = set(other.edges)
        assert found.null["edges"][number] == len(mine & renamed) / len(mine | renamed)
        nodes = {edge.split("->")[0] for edge in renamed}
        assert found.null["nodes"][number] == len(nodes & set(other.nodes)) / len(
            nodes | set(other.nodes)
        )


def test_edge_scores_make_the_circuits_that_are_compared():
    first, second = edge_scores(1), edge_scores(2)
    found = overlap(first, second, count=60, draws=5, resamples=7)
    circuits = overlap(first.top(60), second.top(60), draws=5)
    for name in ("heads", "nodes", "edges", "first in second", "second in first"):
        assert found.values[name] == circuits.values[name]
        np.testing.assert_array_equal(found.null[name], circuits.null[name])
    assert "rank correlation" not in circuits.values
    expected = spearman(abs(first.values), abs(second.values))
    assert found.values["rank correlation"] == pytest.approx(expected)
    assert len(found.resampled["edges"]) == 7
    assert circuits.table()["low"].isna().all()
    row = found.heads().iloc[0]
    layer, head = row["layer"], row["head"]
    written = [
        value
        for edge, value in zip(GRAPH.edges, first.values, strict=True)
        if edge.startswith(f"a{layer}.h{head}->")
    ]
    assert row["first"] == pytest.approx(sum(written))


def test_a_circuit_shares_all_with_itself():
    known = induction_transformer(beta=4)
    scores = lens.circuits.score_edges(known.model, known.task, method="exact", progress=False)
    found = overlap(scores, scores, count=7, draws=50)
    assert found.values == pytest.approx(dict.fromkeys(found.values, 1.0))
    assert found.p_value("edges") < 0.5  # of 2 × 2 renamings one keeps them all
    assert found.table()["low"].isna().all()  # one prompt


def test_two_draws_of_one_task_share_their_heads_and_two_noises_do_not():
    model = lens.load("induction-2l")
    tasks = [lens.tasks.induction(model, 6, seed, length=11) for seed in (0, 1)]
    scores = [lens.heads.importance(model, task, progress=False) for task in tasks]
    same = overlap(*scores, count=3, draws=400, resamples=50)
    assert same.values["heads"] == 1
    assert same.values["rank correlation"] > 0.9
    noise = overlap(head_scores(1), head_scores(8), count=4, draws=400, resamples=50)
    assert noise.p_value("rank correlation") > 0.05
    row = same.table().set_index("measure").loc["rank correlation"]
    assert row["low"] <= row["value"] <= row["high"] + 1e-9
    again = overlap(*scores, count=3, draws=400, resamples=50)
    np.testing.assert_array_equal(same.null["heads"], again.null["heads"])


def test_plot_shows_values_on_the_band_of_chance():
    found = overlap(head_scores(1), head_scores(2), count=6, draws=40, resamples=9)
    drawn: Any = found.plot().data
    band, points = drawn[0], drawn[-1]
    table = found.table().iloc[::-1]
    assert list(points.x) == table["value"].tolist()
    ends = np.array(band.base, float) + np.array(band.x, float)
    np.testing.assert_allclose(ends, table["chance_high"].to_numpy(float))
    assert "Overlap('task 1' and 'task 2': heads" in repr(found)
    beside = replace(found, resampled={"heads": np.array([0.01, 0.02])})  # the value lies outside
    assert beside.values["heads"] > 0.02
    anew: Any = beside.plot().data
    _, line, points = anew
    assert line.x[0] < line.x[1] < 0.02
    assert line.y[:2] == ("heads", "heads")
    assert (
        anew[-1].error_x.array is None
    )  # they were bars of the value, with an arm of a negative length


def test_refusals():
    first = head_scores(1)
    with pytest.raises(LensError, match="null must be one of 'layers', 'all', got 'none'"):
        overlap(first, first, count=2, null="none")
    with pytest.raises(LensError, match="draws must be a positive integer, got 0"):
        overlap(first, first, count=2, draws=0)
    with pytest.raises(LensError, match=r"count is the number of edges or heads .* got None"):
        overlap(first, first)
    with pytest.raises(LensError, match="got 3"):
        overlap(["L0H0"], ["L0H1"], shape=(2, 2), count=3)
    with pytest.raises(LensError, match=r"must be of one kind.*HeadScores and EdgeScores"):
        overlap(first, edge_scores(1), count=2)
    with pytest.raises(LensError, match="are not the same heads; score both"):
        overlap(first, head_scores(2, model="other"), count=2)
    with pytest.raises(LensError, match="drawn has 15 heads, count asks for 16"):
        overlap(first, first, count=16)
    with pytest.raises(LensError, match=r"graph has .* edges, count asks for"):
        overlap(edge_scores(1), edge_scores(2), count=10_000)
    with pytest.raises(LensError, match="different models or graphs"):
        overlap(edge_scores(1), edge_scores(1, Graph(3, 6, 2)), count=2)
    with pytest.raises(LensError, match="edges go upwards"):
        overlap(edge_scores(1), edge_scores(2), count=20, null="all")
    with pytest.raises(LensError, match=r"need shape=\(layers, heads\)"):
        overlap(["L0H0"], ["L0H1"])
    with pytest.raises(LensError, match="there is no L2H0"):
        overlap(["L0H0"], ["L2H0"], shape=(2, 2))
    empty = make_circuit(GRAPH, ["input->logits"], model="drawn")
    with pytest.raises(LensError, match="one of the circuits has no head"):
        overlap(empty, empty)
    broken = replace(first, per_prompt=np.full_like(first.per_prompt, np.nan))
    with pytest.raises(LensError, match="15 scores are NaN"):
        overlap(broken, first, count=2)
