"""A run of a model of which only some layers have softmax attention: its numbers in files, reports and pages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from lens_dashboards.circuit_edges import circuit_edges
from lens_dashboards.library import Library
from lens_dashboards.server import create_app
from lens_dashboards.views import render

import lens
from lens.common.errors import LensError
from lens.common.head_ids import head_of_node
from lens.runs import open_run
from lens.runs.validation import validate

ASSETS = Path(lens.__file__).parent / "assets/models/stories260k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random LFM2 of five layers, softmax attention in layers 1 and 4."""
    folder = tmp_path_factory.mktemp("model") / "lfm2"
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        layer_types=["conv", "full_attention", "conv", "conv", "full_attention"],
    )
    transformers.Lfm2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder)
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory, lens_command):
    answer = lens_command(
        "sinks", "--model", folder, "--text-name", "moby-dick", "--tokens", "18", "--windows", "2",
        "--edits", "mask", "--amounts", "1", "--set", "prompts.copied=0", "--set",
        "analysis.length=18", "--out", tmp_path_factory.mktemp("runs"), "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


def test_files_sections_and_traces_have_the_models_numbers(run):
    assert validate(run) == []
    assert run.meta["model"]["attending"] == [1, 4]
    assert set(run.heads["layer"]) == {1, 4}
    trace = run.trace(run.traces[0])
    assert (trace.layers, trace.without_attention) == ((1, 4), (0, 2, 3))
    assert "detection" in run.sections
    for name in run.sections:
        for table in run.section(name).tables.values():
            for column in ("layer", "edited_layer"):
                if column in table:
                    assert set(table[column].dropna().astype(int)) <= {1, 4}, (name, column)


def test_the_report_and_the_pages_say_which_layers_have_heads(run):
    report = (run.path / "report.html").read_text()
    assert "4 heads in 2 layers (the other 3 have no softmax attention)" in report
    assert "layers 1, 4 of 5" in report
    table = run.heads[run.heads["prompt_id"] == "text"]
    figure = lens.figures.head_grid(table, "sink_rate")
    assert (list(figure.data[0].y), figure.layout.yaxis.type) == (["1", "4"], "category")
    library = Library(run.path.parent)
    page = str(render(library, f"/run/{run.id}", ""))
    assert "layers 1 and 4 of 5 × 2 heads" in page
    page = str(render(library, f"/run/{run.id}/head/4/1", ""))
    assert "L4H1 of" in page
    assert f"/run/{run.id}/head/1/1" not in page, "the head before L4H0 is L1H1, that of L4H1 L4H0"
    assert f"/run/{run.id}/head/4/0" in page
    first = str(render(library, f"/run/{run.id}/head/4/0", ""))
    assert f"/run/{run.id}/head/1/1" in first
    answer = (
        create_app(run.path.parent)
        .server.test_client()
        .get(f"/api/run/{run.id}/raster/{run.traces[0]}/L4H1")
    )
    assert answer.status_code == 200
    refused = (
        create_app(run.path.parent)
        .server.test_client()
        .get(f"/api/run/{run.id}/raster/{run.traces[0]}/L2H1")
    )
    assert "there is no L2H1" in refused.get_data(as_text=True)


CIRCUIT = "circuit --task induction --n 2 --copied 1 --set analysis.length=6 --edges 120 --set analysis.steps=2"


@pytest.fixture(scope="module")
def circuit_run(folder, tmp_path_factory, lens_command):
    out = tmp_path_factory.mktemp("circuit")
    answer = lens_command(*CIRCUIT.split(), "--model", folder, "--out", out, "--json")
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


def test_a_circuit_of_the_command_has_the_librarys_numbers(circuit_run, folder):
    model = lens.load(str(folder))
    task = lens.tasks.induction(model, 4, 0).take(torch.arange(0, 4, 2))
    method = lens.circuits.EapIg(steps=2)
    expected = lens.circuits.find(model, task, method=method, edges=120, progress=False)
    scores = lens.circuits.exports.from_mib(circuit_run.path / "circuits/mib/importances.json")
    assert scores.graph == expected.scores.graph
    assert "a0.h15->m2" in scores.graph.edges, "a channel of a convolution"
    assert scores.values == pytest.approx(expected.scores.values, rel=1e-4, abs=1e-7)
    chosen = lens.circuits.load_circuit(circuit_run.path / "circuits/induction.json")
    assert chosen.edges == expected.circuit.edges
    tables = circuit_run.section("edges").tables
    assert tables["edges"]["edge"][0] == scores.graph.edges[np.abs(scores.values).argmax()]
    assert set(tables["edges"].loc[tables["edges"]["in_circuit"], "edge"]) <= set(chosen.edges)
    same = circuit_run.section("circuit").tables["same_size"]
    assert set(same["circuit"]) == {"circuit", "uniform", "degrees", "magnitude"}
    graph = json.loads((circuit_run.path / "circuits/attribution-graph/induction.json").read_text())
    reached, links = {"input"}, {(one["source"], one["target"]) for one in graph["links"]}
    while more := {reader for writer, reader in links if writer in reached} - reached:
        reached |= more
    assert reached == {one["node_id"] for one in graph["nodes"]}, "its heads hang on what they read"


def test_what_is_not_of_mixers_is_unsupported_in_one_line(circuit_run):
    assert validate(circuit_run) == []
    assert circuit_run.sections == ["edges", "circuit", "joined"]
    assert set(circuit_run.section("joined").tables["heads"]["name"]) == {
        "L1H0",
        "L1H1",
        "L4H0",
        "L4H1",
    }
    reasons = circuit_run.unsupported
    assert "Lfm2" in reasons["reading"]
    assert all("\n" not in one for one in reasons.values())
    report = (circuit_run.path / "report.html").read_text()
    assert "The circuit: is it faithful, complete and minimal?" in report
    edges = circuit_edges(circuit_run)
    head = next(
        node for node in edges.nodes(edges.find(edges.chosen)) if edges.is_mixer(node["node"])
    )
    shown = str(
        render(
            Library(circuit_run.path.parent),
            f"/run/{circuit_run.id}/circuits",
            f"?pins={head['node']}",
        )
    )
    assert f"{head_of_node(head['node'])} (mixer)" in shown
    for _, nodes in edges.paths(edges.find(edges.chosen)):
        readers = [edges.fed(reader) for writer, reader in edges.ends if writer == nodes[0]]
        assert any(nodes[1] in own for own in readers)


def test_a_circuit_that_the_page_saves_is_the_librarys(circuit_run, tmp_path):
    client = create_app(circuit_run.path.parent).server.test_client()
    saved = client.get(f"/api/run/{circuit_run.id}/circuit.json?edges=20&ranking=absolute")
    (tmp_path / "saved.json").write_text(saved.get_data(as_text=True))
    scores = lens.circuits.exports.from_mib(circuit_run.path / "circuits/mib/importances.json")
    circuit = lens.circuits.load_circuit(tmp_path / "saved.json")
    assert circuit.edges == scores.top(20).edges
    assert circuit.n > 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda found: found["edges"].update({"a0.h1->a0": {"score": 1.0}}), "has the edge 'a0.h1->a0', which its graph"),
        (lambda found: found["edges"].pop("a0.h1->m0"), "has no score of 1 edges of its graph"),
        (lambda found: found["lens"]["graph"]["before"].pop(), "is no graph: writers begin with input"),
        (lambda found: found["lens"].pop("graph"), "has the edge 'input->a0', which its graph"),
    ],
)  # fmt: skip
def test_damaged_scores_of_a_hybrid_are_refused(circuit_run, tmp_path, damage, said):
    run = Path(shutil.copytree(circuit_run.path, tmp_path / circuit_run.id))
    (run / "manifest.json").unlink(missing_ok=True)
    path = run / "circuits/mib/importances.json"
    found = json.loads(path.read_text())
    damage(found)
    path.write_text(json.dumps(found))
    with pytest.raises(LensError, match=said):
        open_run(run).importances()
    assert any(said in one for one in validate(open_run(run)))
