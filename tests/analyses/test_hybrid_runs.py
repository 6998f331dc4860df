"""A run of a model of which only some layers have softmax attention: its numbers in files, reports and pages."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from lens_dashboards.library import Library
from lens_dashboards.server import create_app
from lens_dashboards.views import render

import lens
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
