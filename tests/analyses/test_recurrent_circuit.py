"""`lens circuit` of a model of mixers alone: a run without traces, whose numbers are the library's."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from lens_dashboards.library import Library
from lens_dashboards.views import render

import lens
from lens.runs import open_run
from lens.runs.validation import validate

ASSETS = Path(lens.__file__).parent / "assets/models/stories260k"
COMMAND = "circuit --task induction --n 2 --copied 1 --set analysis.length=6 --edges 8 --set analysis.steps=2"
SIZES = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    own = {"num_heads": 2, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}
    folder = tmp_path_factory.mktemp("model") / "mamba2"
    transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**SIZES, **own)).save_pretrained(
        folder
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder)
    return folder


def test_a_model_of_mixers_alone_has_a_run_of_its_circuit(folder, tmp_path, lens_command):
    asked = [*COMMAND.split(), "--model", folder, "--json"]
    planned = lens_command(*asked, "--dry-run")
    assert (planned.code, "profile" in planned.json["steps"]) == (0, False), planned.err
    said = lens_command(*asked[:-1], "--dry-run").out
    assert ("time " in said, "prompts" in said) == (True, False)
    answer = lens_command(*asked, "--out", tmp_path / "runs")
    assert answer.code == 0, answer.err
    run = open_run(answer.json["path"])
    assert (run.sections, run.traces, validate(run)) == (["edges", "circuit"], [], [])
    assert set(run.unsupported) == {"joined", "reading"}
    assert "are of mixers" in run.unsupported["joined"]
    assert "has no softmax attention" in run.unsupported["reading"]
    task = lens.tasks.induction(lens.load(str(folder)), 4, 0).take(torch.arange(0, 4, 2))
    expected = lens.circuits.score_edges(
        lens.load(str(folder)), task, method=lens.circuits.EapIg(steps=2), progress=False
    )
    scores = lens.circuits.exports.from_mib(run.path / "circuits/mib/importances.json")
    assert scores.graph == expected.graph
    assert scores.values == pytest.approx(expected.values, rel=1e-4, abs=1e-7)
    assert lens.circuits.load_circuit(run.path / "circuits/induction.json").n <= 8
    report = (run.path / "report.html").read_text()
    assert "2 layers of mixers, none with softmax attention" in report
    assert "2 prompts of induction" in report
    limits = report.partition('id="limits"')[2]
    assert "over prompts" in limits
    assert "lens.mixers.Ablate takes one out" not in limits  # that is of what heads make of values
    assert (
        run.meta["title"] == f"A circuit of induction in {run.meta['model']['name']} (mixers alone)"
    )
    shown = str(render(Library(tmp_path / "runs"), f"/run/{run.id}/circuits", ""))
    assert "L0H1 (mixer)" in shown
    assert "/head/" not in shown
    again = lens_command(*asked, "--out", tmp_path / "runs")
    assert (again.json["computed"], again.json["findings"]) == (False, answer.json["findings"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("circuit --task text --text-name lily", "has no profile, whose text --task text is"),
        (COMMAND.replace("--edges 8", "--edges 99"), "edges must be 1 to 9"),
        ("heads --text-name lily", "a model of mixers alone (Mamba, RWKV) is for `lens mixers` and `lens circuit`"),
    ],
)  # fmt: skip
def test_what_such_a_run_cannot_have_leaves_no_folder(given, said, folder, tmp_path, lens_command):
    answer = lens_command(*given.split(), "--model", folder, "--out", tmp_path / "no")
    assert (answer.code, said in answer.err) == (2, True), answer.err
    assert not (tmp_path / "no").exists()
