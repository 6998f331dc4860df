"""`lens policies`: sections in the folder of a profile, and policies that come back out of it."""

import json
from typing import Any

import numpy as np
import pytest
from lens_analyses.steps import policies as steps
from lens_dashboards.library import Library
from lens_dashboards.pages.policies import advice
from lens_dashboards.views import render

import lens
from lens import policies
from lens.common.results import of_kind
from lens.passes.loading import load
from lens.runs import open_run
from lens.runs.validation import validate

COMMAND = (
    "policies --model text-lm-3l --text-name moby-dick --tokens 64 --windows 3 --n 3 --copied 0 "
    "--set analysis.length=64 --loss 0.05"
)


@pytest.fixture(scope="module")
def run(lens_command, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_NEEDLES", 2)
        answer = lens_command(
            *COMMAND.split(), "--out", tmp_path_factory.mktemp("policies"), "--json"
        )
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


def test_all_sections_are_there_and_the_folder_is_whole(run):
    assert run.sections == ["policies", "running", "stability", "search"]
    assert validate(run) == []
    assert run.section("policies").summary[0].startswith("Of 6 policies in all heads ")


def test_headlines_stand_beside_as_many_random_blocks(run):
    offered = run.section("policies").tables["policies"]
    (one,) = run.section("policies").headlines
    chance = offered[offered["policy"].str.startswith("RandomBlocks")].iloc[0]
    picked = offered[offered["policy"] == "BlockSparse(share=0.25)"].iloc[0]
    assert picked["density"] == pytest.approx(chance["density"])
    assert (one.value, one.baseline) == (picked["loss_change"], chance["loss_change"])
    reuse = run.section("stability").headlines[0]
    rows = run.section("stability").tables["conditions"].set_index("condition").loc["prompt"]
    assert reuse.value == rows["efficiency"]
    assert reuse.baseline == rows["random_recall"] / rows["own_recall"]
    (chosen,) = run.section("search").headlines
    curve = run.section("search").tables["curve"].query("kind == 'random'")
    assert chosen.baseline in curve["loss_change"].tolist()
    assert f"{chosen.value:+.3g} [{chosen.low:+.3g}, {chosen.high:+.3g}]" in chosen.text


def test_the_numbers_are_those_of_the_library(run):
    model = load("text-lm-3l")
    texts = [list(map(int, ids)) for ids in run.prompts["token_ids"]]
    offered = [policies.AShape(2, 8), policies.BlockSparse(share=0.25)]
    found = policies.evaluate(model, texts, offered, block_size=8)
    table = run.section("policies").tables["heads"]
    assert run.section("policies").configuration["block_size"] == 8
    for place, policy in enumerate(offered):
        rows = table[table["policy"] == str(policy)]
        assert np.allclose(rows["recall"], found.of("recall")[place].mean(-1).ravel(), atol=1e-5)


def test_text_and_needles_are_run_in_both_ways(run):
    section = run.section("running")
    table = section.tables["runs"]
    assert len(table) == 4 * 8
    model = load("text-lm-3l")
    texts = [list(map(int, ids)) for ids in run.prompts["token_ids"]]
    task = lens.tasks.language_modelling(model, texts)
    near = policies.AShape(2, 8)
    for rows, question in (("all", None), ("question", 16)):
        found = policies.run(model, task, near, block_size=8, question=question).table()
        asked = (table["task"] == "text") & (table["rows"] == rows)
        (row,) = table[asked & (table["policy"] == str(near))].to_dict("records")
        for column in ("dense", "sparse", "change", "kl", "density"):
            assert row[column] == pytest.approx(found[column][0], rel=1e-4, abs=1e-6)
    needles = table[table["task"] == "needles"]
    assert needles["dense"].between(0, 1).all()
    assert section.summary[0].startswith("Text, all rows sparse, the best of 6: Under ")


def test_claims_are_those_of_the_library(run):
    section = run.section("stability")
    texts = [list(map(int, ids)) for ids in run.prompts["token_ids"]]
    found = policies.stability(load("text-lm-3l"), texts, block_size=8)
    table = section.tables["claims"]
    assert np.allclose(table["value"], found.claims()["value"], atol=1e-5)
    assert section.summary == found.findings()


def test_the_policies_of_the_heads_come_out_of_the_run(run):
    section = run.section("search")
    again = policies.read(run.path / "sections" / "search" / "section.json")
    for _, row in section.tables["heads"].iterrows():
        assert str(again.of((row["layer"], row["head"]))) == row["policy"]
    model = load("text-lm-3l")
    texts = [list(map(int, ids)) for ids in run.prompts["token_ids"]]
    found = policies.search(model, texts, loss=0.05, block_size=8)
    assert section.summary == found.findings()
    assert of_kind(found.findings(), "policy")


def test_sections_are_chosen_and_shown_on_their_page(lens_command, tmp_path):
    """One section alone; of another command the question for sections does not arise."""
    answer = lens_command(
        *["policies", "--model", "text-lm-3l", "--text-name", "lily", "--tokens", "48", "--windows", "2", "--n", "2", "--copied", "2", "--copied-length", "16", "--set", "analysis.length=48", "--sections", "policies", "--json", "--out"], tmp_path
    )  # fmt: skip
    assert answer.code == 0, answer.err
    run = open_run(answer.json["path"])
    assert run.sections == ["policies"]
    section = run.section("policies")
    names = section.configuration["policies"]
    maps = section.tables["maps"]
    model = load("text-lm-3l")
    ids = list(map(int, run.prompts["token_ids"].iloc[0]))
    found = policies.maps(model, ids, policies.BlockSparse(share=0.25), block_size=8)
    kept = (maps["kept"].to_numpy(np.int64) >> names.index("BlockSparse(share=0.25)")) & 1
    assert kept.tolist() == found.table()["kept"].tolist()
    assert np.allclose(maps["mass"], found.table()["mass"], atol=1e-5)
    page = str(render(Library(tmp_path), f"/run/{run.id}/policies", "?head=L1H2&layer=1&shown=gap"))
    assert "L1H2: what to do with it" in page
    assert "the search of this run is missing" in page
    assert "Layer" in page
    wrong = str(render(Library(tmp_path), f"/run/{run.id}/policies", "?head=L9H9"))
    assert "no head" in wrong
    bad = lens_command(*COMMAND.split(), "--sections", "all", "--out", tmp_path)
    assert bad.code == 2
    assert "--sections must be some of policies, running, stability, search" in bad.err


def test_heads_that_a_published_table_streams_are_named(lens_command, tmp_path):
    rows = [{str(head): ["stream_llm", 8, 16, 1.0] for head in range(6)} for _ in range(3)]
    (tmp_path / "published.json").write_text(json.dumps(rows))
    short = [
        "policies",
        "--model",
        "text-lm-3l",
        "--text-name",
        "lily",
        "--tokens",
        "48",
        "--windows",
        "2",
        "--n",
        "2",
        "--copied",
        "0",
        "--set",
        "analysis.length=48",
        "--sections",
        "search",
        "--levels",
        "1",
        "--loss",
        "0.001",
        "--published",
    ]
    answer = lens_command(*short, tmp_path / "published.json", "--out", tmp_path / "runs", "--json")
    assert answer.code == 0, answer.err
    section = open_run(answer.json["path"]).section("search")
    table = section.tables["published"]
    assert (table["published"] == "AShape(first=8, last=16)").all()
    ours = section.tables["heads"]["policy"].str.startswith("AShape(")
    assert ((table["streams"] == "both").to_numpy() == ours.to_numpy()).all()
    assert section.summary[-1].startswith(
        f"The published table streams 18 of 18 heads, of which this search streams {int(ours.sum())}; not "
    )
    (tmp_path / "none.json").write_text("[3]")
    bad = lens_command(*short, tmp_path / "none.json", "--out", tmp_path / "other")
    assert bad.code != 0
    assert "no file of policies in the format 'minference'" in bad.err
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").glob("*/run.json"))


def test_the_card_of_a_head_says_what_to_do(run):
    search, heads = run.section("search").tables["heads"], run.section("policies").tables["heads"]
    for kind in ("Full()", "other"):
        rows = search[(search["policy"] == "Full()") == (kind == "Full()")]
        one = rows.iloc[0].to_dict()
        of_head = heads[heads["name"] == one["name"]]
        said = advice(run, of_head, one)
        assert said.startswith(
            "Keep full: " if kind == "Full()" else f"Sparse: {one['policy']} keeps "
        )
        assert f"needs {of_head['budget_95'].iloc[0]:.0%} of the blocks" in said
    full = search.iloc[0].to_dict() | {"policy": "Full()"}
    spread = heads[heads["name"] == full["name"]].assign(budget_95=0.9)
    assert "spread over the context" in advice(run, spread, full)
    assert "every cheaper candidate" in advice(run, spread.assign(budget_95=0.1), full)


@pytest.mark.parametrize("loss", ["-1", "nan", "much"])
def test_a_loss_that_is_none_is_refused_before_any_work(lens_command, tmp_path, loss):
    answer = lens_command(*COMMAND.split()[:-1], loss, "--out", tmp_path)
    assert answer.code == 2
    assert "--loss must be a number of nats from 0 on" in answer.err
    assert not list(tmp_path.iterdir())


def test_pictures_show_what_was_found():
    model = lens.load("text-lm-3l")
    ids = model.encode(lens.tasks.text("moby-dick"))
    texts = [ids[:64], ids[64:128]]
    found = policies.evaluate(model, texts, [policies.AShape(2, 8), policies.Full()], block_size=8)
    figure: Any = found.plot()
    assert figure.data[-1].y.tolist() == found.summary()["recall"].tolist()
    grid: Any = found.plot("AShape(first=2, last=8)")
    assert np.allclose(grid.data[0].z, found.of("recall")[0].mean(-1))
    with pytest.raises(lens.LensError, match="policy must be one of"):
        found.plot("BShape()")
    searched = policies.search(model, texts, loss=0.1, block_size=8, draws=1)
    curve = searched.curve()
    traces: Any = searched.plot().data
    drawn = {trace.name: trace for trace in traces}
    for kind, name in (
        ("chosen", "chosen"),
        ("oracle", "best blocks"),
        ("random", "random blocks"),
    ):
        assert drawn[name].y.tolist() == curve[curve["kind"] == kind]["loss_change"].tolist()
    assert len(drawn["taken"].x) == 1
