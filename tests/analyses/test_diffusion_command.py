"""`lens diffusion`: runs of a denoiser's attention, a prompt a step, with maps of words and a slider of steps."""

import base64
import json

import numpy as np
import pytest
import torch
from lens_analyses.denoised import load, run_steps
from lens_dashboards.library import Library
from lens_dashboards.views import render

import lens
from lens.runs import open_run
from lens.runs.validation import validate
from tests.lens.denoisers import pixart, sd3, unet

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random SD3 transformer as diffusers saves it."""
    folder = tmp_path_factory.mktemp("models") / "sd3"
    sd3()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answer(folder, tmp_path_factory, lens_command):
    out = tmp_path_factory.mktemp("runs")
    found = lens_command(
        "diffusion", "--model", folder, "--steps", "4", "--capture", "0,3", "--words", "text 1,text 5", "--out", out, "--json"
    )  # fmt: skip
    assert found.code == 0, found.err
    return found


def numbers(given):
    """Of a figure that was read from a file."""
    if isinstance(given, dict):
        return np.frombuffer(base64.b64decode(given["bdata"]), given["dtype"])
    return np.asarray(given)


def test_each_part_is_a_run_whose_prompts_are_the_steps(folder, answer):
    given = {"steps": 4, "seed": 0, "prompt": "", "size": None}
    model = load(folder)
    with torch.no_grad(), lens.traces.denoising(model, steps=[0, 3], keep_qk=True) as found:
        run_steps(model, given)
    own = found[0]
    runs = [open_run(path) for path in (*answer.json["beside"], answer.json["path"])]
    assert [run.meta["model"]["part"] for run in runs] == ["self", "joint"]
    for run in runs:
        assert validate(run) == []
        part = run.meta["model"]["part"]
        titles = run.prompts["title"].tolist()
        assert [title[:12] for title in titles] == ["step 0 of 4,", "step 3 of 4,"]
        for number, step in enumerate((0, 3)):
            expected = own.trace(part, step)
            mine = run.trace(f"p00{number}")
            assert mine.tokens == expected.tokens
            assert np.allclose(mine.block_mass, expected.block_mass, atol=1e-5)
    joint = runs[1].section("denoising")
    assert [name for name in joint.figures if name.startswith("word_")] == ["word_0", "word_1"]
    drawn = joint.figures["word_1"]
    maps = own.maps("text 5", "joint")
    assert len(drawn.layout.sliders[0].steps) == len(drawn.data) == 2
    assert np.allclose(numbers(drawn.data[1].z).ravel(), maps[1].ravel(), atol=1e-5)
    table = own.table()
    mean = table[table["part"] == "joint"].groupby("step")["image_to_text"].mean()
    steps = joint.tables["steps"].set_index("step")["image_to_text"]
    assert np.allclose(steps, mean, atol=1e-6)
    line = next(one for one in joint.figures["quadrants"].data if one.name == "picture to text")
    assert np.allclose(numbers(line.y), mean, atol=1e-6)
    heads = joint.tables["heads"].set_index("name")["entropy_change"]
    ends = [
        table[(table["part"] == "joint") & (table["step"] == step)].set_index("name")
        for step in (0, 3)
    ]
    change = ends[1]["entropy"] - ends[0]["entropy"]
    assert np.allclose(heads, change[heads.index], atol=1e-5)
    page = str(render(Library(runs[1].path.parent), f"/run/{runs[1].id}/analysis/denoising", ""))
    assert "Attention over denoising steps" in page


def test_the_same_command_finds_its_run(folder, answer, lens_command):
    again = lens_command(
        "diffusion", "--model", folder, "--steps", "4", "--capture", "0,3", "--words", "text 1,text 5", "--out",
        open_run(answer.json["path"]).path.parent, "--json",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert (again.json["computed"], again.json["id"]) == (False, answer.json["id"])


@pytest.mark.parametrize(
    ("make", "parts"), [(pixart, {"self", "cross"}), (unet, {"self", "cross"})]
)
def test_other_denoisers_are_read_too(make, parts, lens_command, tmp_path):
    make()[0].save_pretrained(tmp_path / "m")
    found = lens_command(
        "diffusion", "--model", tmp_path / "m", "--steps", "2", "--capture", "1", "--out", tmp_path / "r", "--json"
    )  # fmt: skip
    assert found.code == 0, found.err
    runs = [open_run(path) for path in (*found.json["beside"], found.json["path"])]
    assert {run.meta["model"]["part"].split()[0] for run in runs} == parts
    assert all(validate(run) == [] for run in runs)
    assert "cross" in runs[-1].meta["model"]["part"]


def test_what_is_no_diffusion_model_is_refused(folder, lens_command, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"_class_name": "Path"}))
    for words, said in [
        (("--model", tmp_path), "holds no diffusion model"),
        (("--model", tmp_path / "other"), "names no model of diffusers, but 'Path'"),
        (("--model", folder, "--steps", "2", "--capture", "2"), "different numbers of 0 to 1"),
        (("--model", folder, "--steps", "2", "--words", "cube"), "no position of the text is called 'cube'"),
    ]:  # fmt: skip
        found = lens_command("diffusion", *words, "--out", tmp_path / "r")
        assert found.code != 0
        assert said in found.err
        assert not (tmp_path / "r").exists()
