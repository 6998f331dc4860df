"""Nodes drawn as one: kept in the link and in the saved circuit, and refused where they make no sense."""

import json
import re

import numpy as np
import pytest
from lens_dashboards.circuit_edges import circuit_edges
from lens_dashboards.circuit_groups import (
    add_group,
    drawn_groups,
    named_groups,
    read_groups,
    write_groups,
)

from lens.common.errors import LensError
from lens.figures.circuits import edge_graph

CIRCUIT = """[id='{"points":"circuit"}']"""
SIZE = {"layers": 3, "heads": 2, "kv_heads": 2, "mlps": True, "of": 99}
EDGES = [
    ("input", "a0.h0<q>", 0.5),
    ("a0.h0", "a1.h1<k>", 0.25),
    ("a0.h1", "a1.h1<k>", -0.125),
    ("a1.h1", "logits", 1.0),
    ("a0.h0", "logits", 0.0625),
]


def test_a_group_is_one_node_with_the_edges_of_its_nodes():
    figure = edge_graph(EDGES, groups={"movers": ["a0.h0", "a1.h1"]}, **SIZE)
    nodes = figure.data[-1]
    assert list(nodes.customdata) == ["input", "movers", "a0.h1", "logits"]
    at = list(nodes.customdata).index("movers")
    assert (nodes.x[at], nodes.y[at]) == (0.5, 0.5)  # the middle of (0, 0) and (1, 1)
    assert nodes.marker.symbol[at] == "diamond"
    texts = " ".join(figure.data[-2].text)
    assert "movers to logits" in texts
    assert "+1" in texts
    assert "+0.0625" in texts
    assert "4 edges" not in figure.layout.title.text
    assert "1 edges within groups left out" in figure.layout.title.text


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a0.h1": ["a0.h0"]}, r"name of a node, nor < or > in it: 'a0\.h1'"),
        ({"a<b": ["a0.h0"]}, "nor < or > in it"),
        ({"x": ["a0.h0"], "y": ["a0.h0"]}, r"a0\.h0 is in the groups 'x' and 'y'"),
        (
            {"x": ["a0.h0", "L0H1"]},
            r"has no node 'L0H1' of the group 'x'; nodes are named as 'a0\.h1'",
        ),
    ],
)
def test_groups_that_cannot_be_drawn_are_refused(groups, message):
    with pytest.raises(LensError, match=message):
        edge_graph(EDGES, groups=groups, **SIZE)


def test_groups_are_written_and_read_again(circuit_run):
    edges = circuit_edges(circuit_run)
    groups = add_group({}, "early ones", ["a0.h1", "a0.h2"], edges)
    groups = add_group(groups, "copy & move", ["a1.h3"], edges)
    notes = []
    assert named_groups(write_groups(groups), edges, notes) == groups
    assert notes == []
    assert read_groups(json.loads(json.dumps({"groups": groups})), edges) == groups
    kept = named_groups("x=a0.h1;x=a0.h2;y=a9.h9", edges, notes)
    assert kept == {"x": ["a0.h1"]}
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("name", "nodes", "message"),
    [
        ("", ["a0.h0"], "a name of 1 to 40 letters"),
        ("a=b", ["a0.h0"], "without = ; "),
        ("mine", ["a0.h0"], "the name 'mine' is taken"),
        ("logits", ["a0.h0"], "the name 'logits' is taken"),
        ("new", ["a7.h0"], r"has no node 'a7\.h0'"),
        ("new", ["a0.h1"], r"a0\.h1 is in another group already"),
        ("new", [], "a group needs nodes"),
    ],
)
def test_groups_that_cannot_be_kept_are_refused(circuit_run, name, nodes, message):
    with pytest.raises(LensError, match=message):
        add_group({"mine": ["a0.h1"]}, name, nodes, circuit_edges(circuit_run))


def test_groups_of_a_file_must_be_lists_of_nodes(circuit_run):
    with pytest.raises(LensError, match="the groups of a circuit are"):
        read_groups({"groups": {"x": "a0.h1"}}, circuit_edges(circuit_run))


def test_heads_are_grouped_by_layer_and_by_role(circuit_run):
    edges = circuit_edges(circuit_run)
    by_layer = drawn_groups(circuit_run, edges, "layer", {"mine": ["a0.h1"]})
    assert by_layer["heads of layer 1"] == [f"a1.h{head}" for head in range(4)]
    assert by_layer["heads of layer 0"] == ["a0.h0", "a0.h2", "a0.h3"]
    assert by_layer["mine"] == ["a0.h1"]
    by_role = drawn_groups(circuit_run, edges, "role", {})
    rows = circuit_run.heads.query(
        "prompt_id == 'copied' and metric == 'induction' and variant == 'raw' and value > 0.3"
    )
    expected = sorted(f"a{a}.h{b}" for a, b in zip(rows["layer"], rows["head"], strict=True))
    assert sorted(by_role["induction heads"]) == expected
    members = [node for nodes in by_role.values() for node in nodes]
    assert len(members) == len(set(members))
    assert drawn_groups(circuit_run, edges, "", {}) == {}


@pytest.mark.browser
def test_pinned_nodes_are_grouped_saved_and_loaded(page, serve, circuit_run, tmp_path):
    site = serve(circuit_run.path.parent)
    page.goto(f"{site}/run/{circuit_run.id}/circuits?pins=a1.h0,a1.h2")
    page.wait_for_selector(f"{CIRCUIT} .point")
    page.locator("#make-group").click()
    page.wait_for_selector("#group-problem:has-text('a group needs a name')")
    page.get_by_label("Name").fill("late heads")
    page.locator("#make-group").click()
    page.wait_for_url(re.compile("groups=late"))
    page.wait_for_selector("#groups:has-text('late heads: a1.h0, a1.h2')")
    assert "pins" not in page.url
    page.wait_for_selector(f"{CIRCUIT} .point")
    assert "late heads" in page.locator(f"{CIRCUIT} .textpoint text").all_text_contents()
    page.reload()
    page.wait_for_selector("#groups:has-text('late heads')")
    with page.expect_download() as download:
        page.get_by_role("link", name="save this circuit").click()
    saved = tmp_path / "circuit.json"
    download.value.save_as(saved)
    assert download.value.suggested_filename.startswith(f"{circuit_run.id}_circuit_absolute_")
    assert json.loads(saved.read_text())["groups"] == {"late heads": ["a1.h0", "a1.h2"]}
    page.locator("#circuit-file input").set_input_files(saved)
    page.wait_for_selector("text=Groups in it: late heads.")
    page.get_by_role("link", name="ungroup").click()
    page.wait_for_selector("#groups:not(:has-text('late heads'))", state="attached")
    assert "groups" not in page.url


def test_a_saved_circuit_with_unknown_groups_is_refused(circuit_run):
    from lens_dashboards.server import create_app

    client = create_app(circuit_run.path.parent).server.test_client()
    where = f"/api/run/{circuit_run.id}/circuit.json?edges=5"
    answer = client.get(f"{where}&groups=x%3Da7.h7")
    assert answer.status_code == 404
    assert "has no node 'a7.h7'" in answer.get_data(as_text=True)
    assert np.isfinite(client.get(where).get_json()["scores"]).all()
