"""`lens circuit`: which edges carry a task, in the folder of a profile."""

import json

import numpy as np
import pytest
import torch
from lens_analyses.steps import STEPS

from lens import circuits
from lens.passes.loading import load
from lens.runs import open_run
from lens.runs.validation import validate
from lens.tasks import induction

RUN = "circuit --model induction-2l --task induction --n 4 --copied 2"


@pytest.fixture(scope="module")
def run(lens_command, tmp_path_factory):
    answer = lens_command(*RUN.split(), "--out", tmp_path_factory.mktemp("circuit"), "--json")
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


def test_both_sections_are_there_and_the_folder_is_whole(run):
    assert run.sections == ["edges", "circuit", "joined", "reading"]
    assert validate(run) == []
    assert "circuits/induction.json" in run.meta["files"]
    assert "circuits/mib/importances.json" in run.meta["files"]
    assert "lens circuit --model induction-2l --copied 2 --n 4" in run.meta["command"]


def test_scores_are_those_of_the_library_on_every_other_prompt(run):
    model = load("induction-2l")
    task = induction(model, 8, 0).take(torch.arange(0, 8, 2))
    expected = circuits.score_edges(model, task, progress=False)
    found = circuits.exports.from_mib(run.path / "circuits/mib/importances.json")
    assert found.values == pytest.approx(expected.values, rel=1e-3, abs=1e-4)
    table = run.section("edges").tables["edges"]
    assert (table["value"].abs().diff().dropna() <= 0).all()
    assert table["edge"][0] == expected.table()["edge"][0]


def test_the_circuit_file_is_the_circuit_that_the_tables_are_about(run):
    circuit = circuits.load_circuit(run.path / "circuits/induction.json")
    table = run.section("edges").tables["edges"]
    assert set(table.loc[table["in_circuit"], "edge"]) == set(circuit.edges)
    assert set(table["edge"]) == set(circuit.graph.edges)
    content = json.loads((run.path / "circuits/induction.json").read_text())
    assert len(content["scores"]) == circuit.n
    curve = run.section("circuit").tables["faithfulness"]
    absolute = curve.loc[curve["ranking"] == "absolute", "faithfulness"]
    assert content["faithfulness"]["faithfulness"] == pytest.approx(absolute.tolist())
    graph = json.loads((run.path / "circuits/attribution-graph/induction.json").read_text())
    assert {node["node_id"] for node in graph["nodes"]} >= {"a0.h1", "a1.h0", "logits"}


def test_the_induction_circuit_is_faithful_and_needs_the_previous_token_head(run):
    tables = run.section("circuit").tables
    same = tables["same_size"].set_index("circuit")
    assert same.loc["circuit", "faithfulness"] > 0.85
    assert same.loc["uniform", "high"] < same.loc["circuit", "low"]
    minimal = tables["minimality"].set_index("node")
    assert minimal.loc["a0.h1", "share"] > 0.5  # the model card's previous-token head
    assert minimal.loc["a0.h1", "low"] > 0
    words = " ".join(run.section("circuit").summary)
    assert "On held-out prompts: The circuit of" in words
    assert "random ones with the same degrees" in words
    assert "sets, looked for on the prompts it is of (" in words
    assert np.isfinite(tables["completeness"]["gap"]).all()


def test_figures_and_limits_are_on_the_page(run):
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "The circuit: is it faithful, complete and minimal?" in page
    assert "prompts that the circuit was not made from" in page


def test_each_head_of_the_circuit_shows_its_attention(run):
    section = run.section("joined")
    table = section.tables["heads"].set_index("name")
    chosen = circuits.load_circuit(run.path / "circuits/induction.json")
    names = {f"L{node[1]}H{node[-1]}" for node in chosen.nodes if node.startswith("a")}
    assert set(table.index) == names
    np.testing.assert_allclose(
        table["full"], table["pattern"] + table["value"] + table["interaction"], atol=1e-6
    )
    assert table["previous_token"].idxmax() == "L0H1"  # the model card's heads
    assert table["induction"].idxmax() == "L1H0"
    assert table.loc["L1H0", "full"] > 0
    assert {"sink_mass", "attends_to", "without_sink"} <= set(table)
    sink = section.tables["sink"]
    assert set(sink["edit"]) == {"excluded", "redistributed"}
    words = " ".join(section.summary)
    assert "more through" in words
    assert f"With the first key redistributed in {len(names)} heads" in words
    assert "report.html" in run.meta["files"]


def test_a_task_without_corrupt_prompts_is_not_split(lens_command, tmp_path, monkeypatch):
    monkeypatch.setitem(STEPS, "circuit", STEPS["circuit"][:3])
    text = tmp_path / "symbols.txt"
    symbols = np.random.default_rng(0).integers(0, 64, 12).tolist() * 10
    text.write_text(" ".join(f"s{one}" for one in symbols))
    words = RUN.replace("--task induction", "--task text --text").split()
    words.insert(words.index("--text") + 1, str(text))
    answer = lens_command(*words, "--set", "analysis.length=12", "--out", tmp_path, "--json")
    assert answer.code == 0, answer.err
    section = open_run(answer.json["path"]).section("joined")
    assert list(section.tables) == ["sink"]
    assert "has no corrupt prompts, so effects were not split" in section.limits[0]


def test_what_two_runs_share_stands_beside_chance(run, lens_command, tmp_path, monkeypatch):
    others = tuple(one for one in STEPS["circuit"] if one.name not in ("joined", "reading"))
    monkeypatch.setitem(STEPS, "circuit", others)
    words = ["--edges", "12", "--seed", "5", "--compare", str(run.path)]
    words += ["--spans", "first=1:26,second=26:51"]
    answer = lens_command(*RUN.split(), *words, "--out", tmp_path, "--json")
    assert answer.code == 0, answer.err
    other = open_run(answer.json["path"])
    assert other.sections == ["edges", "circuit", "positions", "overlap"]
    assert validate(other) == []
    check_places(other)
    section = other.section("overlap")
    mine, its = (
        circuits.load_circuit(one.path / "circuits/induction.json") for one in (other, run)
    )
    measures = section.tables["measures"].set_index("measure")
    either = set(mine.edges) | set(its.edges)
    shared = len(set(mine.edges) & set(its.edges)) / len(either)
    assert measures.loc["edges", "value"] == pytest.approx(shared)
    both = [set(one.nodes) - {"input"} for one in (mine, its)]
    assert measures.loc["heads", "value"] == len(both[0] & both[1]) / len(both[0] | both[1])
    sizes = [
        np.abs(circuits.exports.from_mib(one.path / "circuits/mib/importances.json").values)
        for one in (other, run)
    ]
    ranked = [np.argsort(np.argsort(one)) for one in sizes]
    expected = np.asarray(np.corrcoef(np.stack(ranked)))[0, 1]
    assert measures.loc["rank correlation", "value"] == pytest.approx(expected, abs=0.01)
    assert (measures["chance"] < measures["value"]).all()
    assert section.configuration["with"] == run.id
    assert "so this says how well a circuit comes back" in " ".join(section.limits)
    page = (other.path / "report.html").read_text(encoding="utf-8")
    assert "Overlap: what it shares with the circuit of another run" in page


def check_places(run):
    section = run.section("positions")
    assert section.configuration["spans"] == ["first", "second", "rest"]
    sizes = section.tables["sizes"].set_index(["by", "share"])
    assert sizes.loc[("places and ways", 0.2), "faithfulness"] > 0.85
    assert sizes.loc[("random places and ways", 0.2), "high"] < 0.2
    scores = section.tables["scores"].set_index(["edge", "span", "key_span"])["value"]
    # the previous-token head works in the first copy, and the induction head looks there from the second
    assert scores["input->a0.h1<v>", "first", ""] > 2 * abs(scores["input->a0.h1<v>", "second", ""])
    assert scores["a1.h0<v>", "second", "first"] > 10 * abs(scores["a1.h0<v>", "second", "second"])
    assert "the rest cut" in section.headlines[0].text
    assert "Where in the prompt: edges at places" in (run.path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("spans", "match"),
    [
        ("marks", "has no marks; give spans"),
        ("a=1:60", "must lie within the"),
        ("first", "must be marks, each, or names"),
        ("a=1,a=2", "names a 2 times"),
    ],
)
def test_places_that_are_none_are_refused_before_work(spans, match, lens_command, tmp_path):
    answer = lens_command(*RUN.split(), "--spans", spans, "--out", tmp_path)
    assert answer.code == 2
    assert match in answer.err
    assert [*tmp_path.iterdir()] == []


def test_a_circuit_without_a_head_is_unsupported(lens_command, tmp_path):
    answer = lens_command(*RUN.split(), "--edges", "1", "--out", tmp_path, "--json")
    reasons = open_run(answer.json["path"]).unsupported
    assert "make no circuit that goes through a head" in reasons.pop("edges")
    assert reasons == dict.fromkeys(
        ("circuit", "joined", "reading"), "needs the section edges, which is unsupported"
    )


def test_more_edges_than_there_are_are_refused_before_work(lens_command, tmp_path):
    answer = lens_command(*RUN.split(), "--edges", "1000", "--out", tmp_path)
    assert answer.code == 2
    assert "edges must be 1 to 81, as many as induction-2l has; got 1,000" in answer.err
    assert [*tmp_path.iterdir()] == []


def test_another_model_or_a_run_without_a_circuit_is_no_comparison(run, lens_command, tmp_path):
    words = RUN.replace("induction-2l", "text-lm-3l").split()
    answer = lens_command(*words, "--compare", str(run.path), "--out", tmp_path)
    assert answer.code == 2
    assert "heads of two models are not the same heads" in answer.err
    plain = lens_command(
        *["run", "--model", "induction-2l", "--copied", "1"], "--out", tmp_path / "plain", "--json"
    )
    answer = lens_command(*RUN.split(), "--compare", plain.json["path"], "--out", tmp_path)
    assert answer.code == 2
    assert "has 0 circuits and one is compared" in answer.err
    assert [folder.name for folder in tmp_path.iterdir()] == ["plain"]  # before the profile
