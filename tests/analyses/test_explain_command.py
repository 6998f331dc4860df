"""`lens explain`: sections in the folder of a profile, with the numbers of the library."""

import numpy as np
import pytest
from lens_analyses.config.listed import EXPLAIN_SECTIONS

import lens
from lens.passes.loading import load
from lens.runs import open_run
from lens.runs.validation import validate

COMMAND = "explain --model induction-2l --task induction --n 2 --copied 2"


@pytest.fixture(scope="module")
def run(lens_command, tmp_path_factory):
    out = tmp_path_factory.mktemp("explain")
    answer = lens_command(*COMMAND.split(), "--heads", "L1H2", "--out", out, "--json")
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


def test_the_sections_are_there_and_the_folder_is_whole(run):
    assert run.sections == list(EXPLAIN_SECTIONS)
    assert validate(run) == []
    assert run.section("explain").configuration["heads"] == ["L1H2"]
    html = (run.path / "report.html").read_text()
    assert "Why heads attend in induction-2l" in html
    assert "without what L0H1 wrote on the key side" in html


def test_the_numbers_are_those_of_the_library(run):
    model = load("induction-2l")
    prompts = lens.tasks.induction(model, 2).prompts
    found = lens.reading.explain_pairs(model, prompts, "L1H2", progress=False)
    section = run.section("explain")
    rows = section.tables["sides"].query("name == 'L1H2' and side == 'key'")
    assert rows["part"].tolist() == found.side("key")["part"].tolist()
    assert rows["part"].iloc[0] == "L0H1"
    assert np.allclose(rows["share"], found.side("key")["share"])
    assert set(found.findings()) <= set(section.summary)
    table = run.section("removal").tables["removal"].query("name == 'L1H2'")
    again = lens.reading.removal(
        model, prompts, "L1H2", parts=table["part"].tolist(), progress=False
    )
    assert np.allclose(table["measured"], again.table()["measured"])


def test_scores_of_tokens_stand_beside_random_order(run):
    section = run.section("faithfulness")
    table = section.tables["faithfulness"]
    assert {"raw", "rollout", "attnlrp", "leave_one_out", "random"} <= set(table["method"])
    prompts = lens.tasks.induction(load("induction-2l"), 2).prompts
    found = lens.reading.faithfulness(load("induction-2l"), prompts, draws=5, progress=False)
    assert np.allclose(table["sufficiency"], found.table()["sufficiency"])
    assert section.summary[0] == found.findings()[0]


def test_groups_controls_and_changes_are_those_of_the_library(run):
    model = load("induction-2l")
    prompts, heads = lens.tasks.induction(model, 2).prompts, ["L1H2"]
    groups = run.section("groups").tables["groups"].query("name == 'L1H2' and side == 'key'")
    found = lens.reading.explain_pairs(model, prompts, "L1H2", by="offset", progress=False)
    rows = groups[groups["by"] == "offset"]
    assert rows["group"].tolist() == list(found.groups)
    assert np.allclose(rows["lead"], found.leading("key")["lead"])
    assert set(found.findings()) <= set(run.section("groups").summary)
    assert groups[groups["by"] == "class"]["group"].tolist() == ["word → word"]
    table = run.section("subspace").tables["subspace"].query("name == 'L1H2'")
    found = lens.reading.subspace(model, prompts, "L1H2", progress=False)
    assert np.allclose(table["mass"], found.table()["mass"])
    assert set(found.findings()) <= set(run.section("subspace").summary)
    table = run.section("adversary").tables["adversary"].query("name == 'L1H2'")
    found = lens.reading.adversary(model, prompts, heads, draws=1, progress=False)
    assert np.allclose(table["uniform_change"], found.table()["uniform_change"])
    table = run.section("perturbation").tables["perturbation"].query("name == 'L1H2'")
    found = lens.reading.perturb(model, prompts, heads, draws=1, progress=False)
    assert np.allclose(table[table["along"] == "logits"]["worst"], found.table()["worst"])
    assert table["size"].tolist() == [0.5, 1, 2] * 2


def test_mixing_is_that_of_the_library(run):
    model = load("induction-2l")
    found = lens.reading.mixing(model, lens.tasks.induction(model, 2).prompts, progress=False)
    section = run.section("mixing")
    assert np.allclose(section.tables["mixing"]["ratio"], found.table()["ratio"])
    assert tuple(section.summary) == found.findings()


def test_sizes_and_groups_that_are_none_are_refused(lens_command, tmp_path):
    for given, told in (
        (("--sizes", "0,1"), "must be numbers above 0 with commas"),
        (("--by", "colour"), "must be some of offset, class, with commas"),
        (("--sections", "sums"), "must be some of explain, groups, removal, subspace"),
    ):
        answer = lens_command(*COMMAND.split(), *given, "--out", tmp_path)
        assert answer.code == 2
        assert told in answer.err
    assert not list(tmp_path.iterdir())


def test_heads_that_are_none_are_refused_before_any_work(lens_command, tmp_path):
    answer = lens_command(*COMMAND.split(), "--heads", "head 3", "--out", tmp_path)
    assert answer.code == 2
    assert "a head is written 'L3H5'" in answer.err
    assert not list(tmp_path.iterdir())


def test_the_heads_that_do_it_are_chosen_where_none_are_named(lens_command, tmp_path):
    answer = lens_command(*COMMAND.split(), "--sections", "explain", "--out", tmp_path, "--json")
    section = open_run(answer.json["path"]).section("explain")
    assert sorted(section.configuration["heads"]) == ["L1H0", "L1H2", "L1H3"]
    assert set(section.tables["sides"]["name"]) == {"L1H0", "L1H2", "L1H3"}


def test_chosen_heads_and_pairs(lens_command, tmp_path):
    chosen = ("--heads", "L1H1", "--pairs", "duplicate", "--sections", "explain")
    answer = lens_command(*COMMAND.split(), *chosen, "--out", tmp_path, "--json")
    run = open_run(answer.json["path"])
    assert run.sections == ["explain"]
    section = run.section("explain")
    assert section.configuration["heads"] == ["L1H1"]
    assert section.summary[0].startswith("L1H1 on 'duplicate' pairs")
