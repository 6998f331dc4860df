"""From scores to circuits: what is chosen, what is pruned, and files."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import lens
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.circuit import load_circuit, make_circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.selection import random_edges, same_degrees, without
from lens.common.errors import LensError
from lens.common.results import of_kind

GRAPH = Graph(2, 2, 2, mlps=False)


def scores(**values):
    """Scores 0 but for the named edges, `a_to_b` with h for a0.h0 and so on."""
    found = np.zeros((3, GRAPH.n))
    for name, number in values.items():
        found[:, GRAPH.find([NAMES[name]])] = number
    return EdgeScores(GRAPH, found, "eap", Ablation(), "logit_difference", "made", "toy")


NAMES = {
    "chain1": "input->a0.h1<v>",
    "chain2": "a0.h1->a1.h0<k>",
    "chain3": "a1.h0->logits",
    "loose": "input->a1.h1<q>",
    "dead": "a0.h0->logits",
}


def test_top_takes_the_largest_and_pruning_drops_what_leads_nowhere():
    found = scores(chain1=1, chain2=-3, chain3=2, loose=5, dead=4)
    names = {NAMES[name] for name in ("loose", "dead", "chain2", "chain3", "chain1")}
    assert set(found.top(5, prune=False).edges) == names
    assert set(found.top(5).edges) == {NAMES[name] for name in ("chain1", "chain2", "chain3")}
    assert found.top(4).n == 0  # without its first edge the chain falls apart
    signed = found.top(4, absolute=False, prune=False)
    assert NAMES["chain2"] not in signed.edges
    assert signed.n == 4


def test_greedy_stays_connected():
    found = scores(chain1=1, chain2=3, chain3=2, loose=5)
    assert found.top(3, method="greedy", prune=False).edges == tuple(
        NAMES[name] for name in ("chain1", "chain2", "chain3")
    )
    assert found.top(1, method="greedy", prune=False).edges == (NAMES["chain3"],)
    assert found.top(GRAPH.n, method="greedy").n == GRAPH.n


def test_a_circuit_comes_back_from_its_file(tmp_path):
    found = scores(chain1=1, chain2=3, chain3=2).top(3)
    found.save(tmp_path / "c.json")
    again = load_circuit(tmp_path / "c.json")
    assert again.edges == found.edges
    assert again.graph == found.graph
    assert (again.ablation, again.made, again.task) == (found.ablation, found.made, found.task)
    assert again.nodes == ("input", "a0.h1", "a1.h0")
    assert "3 of 29 edges" in repr(again)
    for damage, message in (
        ({"format": "other"}, "is no circuit of lens"),
        ({"version": 9}, "version 9; this lens reads 1"),
        ({"graph": None}, "is a damaged circuit"),
    ):
        content = json.loads((tmp_path / "c.json").read_text())
        (tmp_path / "d.json").write_text(json.dumps({**content, **damage}))
        with pytest.raises(LensError, match=message):
            load_circuit(tmp_path / "d.json")


def test_tables():
    table = scores(chain1=1, chain3=2).table()
    assert list(table.edge[:2]) == [NAMES["chain3"], NAMES["chain1"]]
    assert list(table.iloc[0][["writer", "reader", "value", "n"]]) == ["a1.h0", "logits", 2.0, 3]
    assert len(table) == GRAPH.n
    few = scores(chain1=1, chain3=-2, chain2=0.5).table(count=2)
    assert list(few.edge) == [NAMES["chain1"], NAMES["chain3"]]
    assert list(few["value"]) == [1, -2]


def test_random_circuits_of_the_same_degrees():
    graph = Graph(3, 3, 3)
    draw = np.random.default_rng(0)
    kept = random_edges(graph, 41, draw)
    assert kept.sum() == 41
    other = same_degrees(graph, kept, draw)
    assert (other != kept).sum() > 20
    for ends in graph.ends:
        assert (np.bincount(ends[kept]) == np.bincount(ends[other])).all()
    only = graph.allowed[-1].sum()  # all edges into the logits: nothing to swap with
    full = np.arange(graph.n) >= graph.n - only
    assert (same_degrees(graph, full, draw) == full).all()
    assert not same_degrees(graph, np.zeros(graph.n, bool), draw).any()


def test_without_a_writer_nobody_reads_it():
    kept = np.ones(GRAPH.n, bool)
    left = np.flatnonzero(without(GRAPH, kept, ["a0.h1", "input"]))
    assert {GRAPH.edges[edge].split("->")[0] for edge in left} == {"a0.h0", "a1.h0", "a1.h1"}
    with pytest.raises(LensError, match=r"there is no writer 'a9\.h0' in this graph"):
        without(GRAPH, kept, ["a9.h0"])


def test_wrong_choices_are_refused():
    found = scores(chain1=1)
    with pytest.raises(LensError, match="top takes 0 to 29 edges, got 34"):
        found.top(34)
    with pytest.raises(
        LensError, match="method must be one of 'top', 'greedy', 'bootstrap', got 'best'"
    ):
        found.top(3, method="best")
    with pytest.raises(LensError, match="1 edges have no score"):
        scores(chain1=np.nan).top(3)
    with pytest.raises(LensError, match=r"per_prompt must be \[prompts, 29 edges\]"):
        EdgeScores(GRAPH, np.zeros((3, 4)), "eap", Ablation(), "m", "t", "toy")
    with pytest.raises(LensError, match="kept must be 29 booleans"):
        type(make_circuit(GRAPH, []))(GRAPH, np.zeros(4, bool), Ablation(), "", "", "")


def test_find_takes_the_smallest_circuit_that_is_faithful_enough():
    known = lens.circuits.known.induction_transformer(beta=30)
    found = lens.circuits.find(known.model, known.task, method="exact", progress=False)
    tried = found.table()
    enough = tried[tried["faithfulness"] >= 0.85]
    assert found.circuit.n == enough["edges"].min() == tried.loc[tried["chosen"], "edges"].item()
    assert found.circuit.n < found.circuit.graph.n
    row = tried[tried["chosen"]].iloc[0]
    smallest = f"It is the smallest of {len(tried)} circuits tried that reaches"
    for low, ending in (
        (0.9, "."),
        (0.5, " on the mean; its interval does not."),
        (np.nan, "; one prompt has no interval."),
    ):
        other = replace(found, tried=tried.assign(low=low, faithfulness=row["faithfulness"]))
        assert of_kind(other.findings(), "enough")[0] == f"{smallest} 0.85{ending}"
    wide = replace(found, tried=tried.assign(low=-19.5, high=1.42)).plot()
    title = wide.layout.title.text  # type: ignore[attr-defined]
    assert (
        f"faithfulness {row['faithfulness']:.2f} [-19.50, 1.42] on the prompts that chose" in title
    )
    low, high = wide.layout.yaxis.range  # type: ignore[attr-defined]
    assert (low, high) == (
        pytest.approx(min(0, *tried["faithfulness"]), abs=0.2),
        pytest.approx(max(1, *tried["faithfulness"]), abs=0.2),
    )
    (size,) = of_kind(found.findings(), "circuit")
    assert size.startswith(
        f"The circuit has {found.circuit.n:,} of {found.circuit.graph.n:,} edges"
    )
    assert (
        f"on the 1 of 1 prompts that it was chosen on its faithfulness is {row['faithfulness']:.2f}, that of as many"
        in size
    )
    least, mean, most = (
        f"{one:z.2f}" for one in (found.random.min(), found.random.mean(), found.random.max())
    )
    assert f"at random, drawn 5 times, {mean} ({least} to {most}), its KL" in size
    assert found.random.max() < 0.5 < row["faithfulness"]
    curves: Any = {curve.name: curve for curve in found.plot().data}
    for name, rows in tried[tried["edges"] > 0].groupby("ranking"):
        assert [*curves[f"{name} scores"].x] == rows["edges"].tolist()
        assert [*curves[f"{name} scores"].y] == rows["faithfulness"].tolist()
    assert [*curves["chosen"].x] == [found.circuit.n]


def test_find_says_when_no_circuit_is_faithful_enough():
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 6, length=9)
    found = lens.circuits.find(model, task, method="eap", edges=24, progress=False)
    assert found.table()["edges"].max() <= 24
    assert found.table()["faithfulness"].max() < 0.85
    one = replace(found, tried=found.tried.assign(low=np.nan, high=np.nan))  # of a single prompt
    assert "nan" not in " ".join(one.findings())
    (said,) = of_kind(found.findings(), "enough")
    assert said == "None of 2 circuits tried reaches 0.85; this is the most faithful."


def test_a_found_circuit_says_on_how_many_prompts_it_was_chosen():
    """All edges are scored on 20 prompts, and circuits tried on the first 16 of them."""
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 20, length=5)
    found = lens.circuits.find(model, task, method="eap", edges=60, progress=False)
    assert (
        "; on the 16 of 20 prompts that it was chosen on its"
        in of_kind(found.findings(), "circuit")[0]
    )
    signed = replace(found, ranking="signed")
    assert "what works against the task comes last)" in of_kind(signed.findings(), "circuit")[0]


def test_edges_that_work_against_the_task_come_last():
    """They are not left out, as it was said: a signed circuit of all edges has them all."""
    found = scores(chain1=-2.0, chain2=3.0)
    assert found.top(GRAPH.n, absolute=False, prune=False).n == GRAPH.n


def test_find_refuses_shares_and_sizes_that_are_none():
    known = lens.circuits.known.induction_transformer(beta=30)
    with pytest.raises(LensError, match=r"faithfulness must be above 0 and at most 1, got 1\.5"):
        lens.circuits.find(known.model, known.task, faithfulness=1.5)
    with pytest.raises(LensError, match="edges must be a positive integer, got 0"):
        lens.circuits.find(known.model, known.task, edges=0)
    for wrong in ("12", True, 2.5):
        with pytest.raises(
            LensError, match=f"edges must be an? (positive )?integer, got {wrong!r}"
        ):
            lens.circuits.find(known.model, known.task, edges=wrong)
    with pytest.raises(LensError, match="faithfulness must be a number, got 'all'"):
        lens.circuits.find(known.model, known.task, faithfulness="all")
