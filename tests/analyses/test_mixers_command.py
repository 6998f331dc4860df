"""`lens mixers`: heads of mixers and of softmax attention in one section of a run, in its report and on its page."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers
from lens_analyses.exporting import export_run
from lens_dashboards.library import Library
from lens_dashboards.selection import PAGES
from lens_dashboards.views import render

import lens
from lens.figures.mixers import block_masses
from lens.runs import open_run
from lens.runs.contents import section_problems
from lens.runs.validation import validate
from tests.lens.hybrids import hybrid

ASSETS = Path(lens.__file__).parent / "assets/models/stories260k"
COMMAND = "mixers --text-name moby-dick --tokens 32 --windows 3 --n 3 --copied 0 --length 32 --json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random OLMo-hybrid: gated DeltaNet in layers 0 and 2, softmax attention in 1 and 3."""
    folder = tmp_path_factory.mktemp("model") / "olmo_hybrid"
    hybrid("olmo_hybrid", vocab_size=512).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder)
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory, lens_command):
    out = tmp_path_factory.mktemp("runs")
    answer = lens_command(*COMMAND.split(), "--model", folder, "--out", out)
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


def test_the_section_is_whole_and_in_the_report(run):
    assert run.sections == ["mixers"]
    assert run.unsupported == {}
    assert validate(run) == []
    report = (run.path / "report.html").read_text()
    assert "Mixers beside softmax heads in" in report
    assert "gated_delta: 8 heads in 2 layers; beside 8 softmax heads" in report
    said = " ".join(run.section("mixers").summary)
    assert "uniform attention 7.8" in said, "tokens back: 31 / 4"
    means = run.section("mixers").tables["heads"].groupby("mixer")["distance"].mean()
    for kind, own in means.items():
        name = "softmax heads" if kind == "softmax" else f"{kind} looks"
        assert re.search(rf"{name} {own:.1f} \[[\d.]+, [\d.]+\]", said), (kind, own)
    assert float(re.search(r"output to (\S+) of", said)[1]) < 1e-5  # pyright: ignore[reportOptionalSubscript]


def test_the_map_counts_blocks_and_every_column_of_the_page_is_named(run):
    shown = block_masses(np.ones((4, 4)), "L0H0").layout
    assert shown.xaxis.tickvals == shown.yaxis.tickvals == (0, 1, 2, 3)
    page = json.dumps(
        render(Library(run.path.parent), f"/run/{run.id}/mixers", ""),
        default=lambda one: one.to_plotly_json() if hasattr(one, "to_plotly_json") else str(one),
    )
    assert "mean over windows" in page
    assert '{\\"text\\": \\"\\"}' not in page


def test_the_headline_is_the_head_that_looks_least_far(run):
    (one,) = run.section("mixers").headlines
    heads = run.section("mixers").tables["heads"].query("mixer == 'gated_delta'")
    assert (one.value, one.baseline) == (heads["distance"].min(), 31 / 4)
    assert heads.loc[heads["distance"].idxmin(), "name"] in one.text


def test_the_numbers_are_those_of_the_library(run, folder):
    model = lens.load(str(folder))
    texts = [list(map(int, ids)) for ids in run.prompts["token_ids"]]
    tables, phis = [], []
    for ids in texts:
        found = lens.mixers.capture(model, ids, block=8, progress=False)
        trace = lens.capture(model, ids, block_size=8, progress=False)
        tables.append(found.table(trace))
        phis.append((found, trace))
    heads = run.section("mixers").tables["heads"]
    assert heads["mixer"].value_counts().to_dict() == {"gated_delta": 8, "softmax": 8}
    for name in ("mass", "negative_share", "entropy", "distance", "first_share", "rank"):
        mean = np.mean([one[name] for one in tables], 0)
        assert np.allclose(heads[name], mean, atol=1e-6, equal_nan=True), name
    assert (heads["distance_low"] <= heads["distance"]).all()
    found, trace = phis[0]
    whole = found.phi(2).tile((0, 32), (0, 32))[3].numpy()
    maps = run.section("mixers").tables["maps"]
    cell = maps[(maps["name"] == "L2H3") & (maps["query_block"] == 3) & (maps["key_block"] == 1)]
    assert cell["signed"].item() == pytest.approx(whole[24:, 8:16].sum(1).mean(), abs=1e-6)
    assert cell["absolute"].item() == pytest.approx(
        np.abs(whole[24:, 8:16]).sum(1).mean(), abs=1e-6
    )
    soft = maps[(maps["name"] == "L3H1") & (maps["query_block"] == 2) & (maps["key_block"] == 0)]
    assert soft["signed"].item() == pytest.approx(
        trace.block_mass.sel(layer=3, head=1).values[2, 0], abs=1e-6
    )
    rows = run.section("mixers").tables["profiles"]
    rows = rows[(rows["name"] == "L2H3") & (rows["tokens_back"] == 5)]
    assert rows["signed"].item() == pytest.approx(np.diagonal(whole, -5).mean(), abs=1e-6)


def test_its_page_shows_one_head_of_either_kind(run):
    library = Library(run.path.parent)
    page = str(render(library, f"/run/{run.id}/mixers", "?head=L2H3 gated_delta&shown=absolute"))
    assert "L2H3: gated_delta, absolute mass" in page
    assert "L2H3: weights by distance" in page
    soft = str(render(library, f"/run/{run.id}/mixers", "?head=L3H1 softmax"))
    assert "L3H1: softmax, signed mass" in soft
    assert "on their own pages" in soft
    wrong = str(render(library, f"/run/{run.id}/mixers", "?head=L9H9"))
    assert "This run has no head" in wrong
    assert f"/run/{run.id}/mixers" in str(render(library, f"/run/{run.id}", ""))


def test_heads_that_the_model_has_not_got_are_seen(run):
    section, model = run.section("mixers"), run.meta["model"]
    table = section.tables["heads"]
    assert [*section_problems(section, model)] == []
    for name, column, value, said in [
        ("L3H1", "head", 7, "column head has numbers outside of 0 to 3"),
        ("L2H1", "layer", 9, "column layer has numbers outside of 0 to 3"),
    ]:
        wrong = table.copy()
        wrong.loc[wrong["name"] == name, column] = value
        found = replace(section, tables={**section.tables, "heads": wrong})
        assert any(said in one for one in section_problems(found, model))


def test_a_model_of_softmax_heads_alone_has_none(lens_command, tmp_path):
    answer = lens_command(*COMMAND.split(), "--model", "text-lm-3l", "--out", tmp_path)
    assert answer.code == 0, answer.err
    run = open_run(answer.json["path"])
    assert run.sections == []
    assert "has no mixer that is known here" in run.unsupported["mixers"]
    assert "Mixers" not in str(render(Library(tmp_path), f"/run/{run.id}", ""))


def test_a_model_of_mixers_alone_has_a_run_without_traces(folder, lens_command, tmp_path):
    model = tmp_path / "mamba2"
    sizes = {
        "vocab_size": 512,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_heads": 4,
        "head_dim": 8,
    }
    transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**sizes, n_groups=1, state_size=4)
    ).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, model)
    planned = lens_command(*COMMAND.split(), "--model", model, "--dry-run")
    assert list(planned.json["steps"]) == ["mixers"]  # and no profile
    answer = lens_command(*COMMAND.split(), "--model", model, "--out", tmp_path / "runs")
    assert answer.code == 0, answer.err
    run = open_run(answer.json["path"])
    assert (run.sections, run.traces, len(run.heads), validate(run)) == (["mixers"], [], 0, [])
    section = run.section("mixers")
    text = lens.tasks.text("moby-dick")
    own = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    ids = transformers.AutoTokenizer.from_pretrained(model)(text).input_ids[:32]
    expected = lens.mixers.capture(own, ids, block=8).phi(0).tile((0, 32), (0, 32))[2].numpy()
    cells = section.tables["maps"].query("name == 'L0H2' and query_block == 3 and key_block == 1")
    assert cells["signed"].item() == pytest.approx(expected[24:, 8:16].sum(1).mean(), abs=1e-6)
    assert "mamba2: 4 heads in 1 layer. Phi v" in section.summary[0]
    assert not any("softmax" in one for one in section.summary)
    report = (run.path / "report.html").read_text()
    assert "1 layer of mixers, none with softmax attention" in report
    assert 'id="heads"' not in report
    assert "None" not in report.partition('id="section-mixers"')[0]
    again = lens_command(*COMMAND.split(), "--model", model, "--out", tmp_path / "runs")
    assert (again.json["computed"], again.json["findings"]) == (False, answer.json["findings"])
    library = Library(tmp_path / "runs")
    for page, said in (
        ("", "no scores of heads"),
        ("/heads", "no scores of heads"),
        ("/mixers", "L0H2"),
    ):
        assert said in str(render(library, f"/run/{run.id}{page}", ""))
    files = export_run(run, "csv", tmp_path / "tables").files
    assert {"mixers-heads.csv", "mixers-maps.csv"} <= set(files)
    assert "heads.csv" not in files
    own_numbers = lens.runs.add(run, "mine", {"L0H3": 0.4, "L0H0": 0.1}, "What I counted.")
    assert len(own_numbers.tables["heads"]) == 4
    assert validate(open_run(run.path)) == []
    with pytest.raises(lens.LensError, match=r"there is no L0H4: the model has heads 0 to 3"):
        lens.runs.add(run, "mine", {"L0H4": 0.4}, "What I counted.")
    asked = [*COMMAND.split(), "--model", model]
    other = lens_command(*asked, "--seed", 1, "--out", tmp_path / "runs")
    assert other.code == 0, other.err
    compared = str(render(library, "/compare", f"?a={run.id}&b={other.json['id']}"))
    assert "Heads of attention are not compared: the runs of" in compared
    for page in ("head/0/0", "maps", "atlas"):
        assert "the page Mixers has its heads" in str(render(library, f"/run/{run.id}/{page}", ""))
    for name in PAGES:
        shown = str(render(library, f"/run/{run.id}/{name}", ""))
        assert "complete it" not in shown, name
    for given, said in (
        (f"{COMMAND} --part cross", "is no encoder-decoder and has no stages"),
        (COMMAND.replace("--copied 0", "--copied 1000000"), "a run makes at most"),
    ):
        refused = lens_command(*given.split(), "--model", model, "--out", tmp_path / "no")
        assert (refused.code, said in refused.err) == (2, True), refused.err
    refused = lens_command(
        "heads", "--text-name", "lily", "--model", model, "--out", tmp_path / "no"
    )
    assert refused.code == 2
    assert "a model of mixers alone (Mamba, RWKV) is for `lens mixers`" in refused.err
    assert not (tmp_path / "no").exists()
