"""`lens diffusion`: runs of a denoiser's attention, a prompt a step, with maps of words and a slider of steps."""

import base64
import json
import os
import shlex
import signal
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from lens_analyses import denoised
from lens_analyses.denoised import load, run_steps
from lens_dashboards.library import Library
from lens_dashboards.views import render

import lens
from lens.common.errors import LensError
from lens.figures.rows import COLORS
from lens.runs import commands, open_run
from lens.runs.validation import validate

pytest.importorskip("diffusers")

from tests.lens.denoisers import pixart, sd3, unet
from tests.lens.pipelines import dit as dit_pipeline
from tests.lens.pipelines import pixart as pixart_pipeline
from tests.lens.pipelines import sd3 as sd3_pipeline
from tests.lens.pipelines import stable_diffusion
from tests.tiers import later


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
        assert "success after" in (run.path / "log.txt").read_text()
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
    assert joint.figures["entropy"].layout.colorway == COLORS
    report = json.loads((runs[1].path / "report.json").read_text())
    assert report["setup"]["bos"] is None  # latents begin with no token
    html = (runs[1].path / "report.html").read_text()
    assert "BOS absent" not in html
    assert report["headlines"] == []  # and yet a picture stands on the first screen
    assert html.count('data-picture="summary"') == 1
    page = str(render(Library(runs[1].path.parent), f"/run/{runs[1].id}/analysis/denoising", ""))
    assert "Attention over denoising steps" in page


def test_a_run_that_is_stopped_is_partial_and_the_same_command_makes_it(
    folder, tmp_path, lens_command, monkeypatch
):
    command = ["diffusion", "--model", folder, "--steps", "2", "--out", tmp_path, "--json"]

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with monkeypatch.context() as patch:
        patch.setattr(denoised, "section", stop)
        stopped = lens_command(*command)
    assert (stopped.code, stopped.json["status"]) == (3, "partial")
    assert "stopped" in Path(stopped.json["path"], "log.txt").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(denoised, "run_steps", stop)
        assert lens_command(*command).code == 1
    run = open_run(stopped.json["path"])
    told = commands.again(run.path, run.meta)
    assert told in lens_command("list", tmp_path).out.replace("\n", "")
    with pytest.raises(LensError, match="takes no diffusion model"):
        commands.analysis(run.path, run.config, "heads")
    again = lens_command(*shlex.split(told)[1:], "--json")
    assert (again.code, again.json["status"]) == (0, "success")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_where_runs_should_be_is_told_before_any_step(
    folder, tmp_path, lens_command, monkeypatch
):
    monkeypatch.setattr(denoised, "load", lambda _: pytest.fail("the model is loaded"))
    (tmp_path / "file").touch()
    answer = lens_command("diffusion", "--model", folder, "--out", tmp_path / "file")
    assert answer.code == 2
    assert "is a file where a folder should be" in " ".join(answer.err.split())


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
def test_other_denoisers_are_read_too(make, parts):
    model, given = make()[0], {"steps": 2, "seed": 0, "prompt": "", "size": None}
    with torch.no_grad(), lens.traces.denoising(model, steps=[1]) as found:
        run_steps(model, given)
    assert {part.split()[0] for part in found[0].parts} == parts
    assert found[0].steps == (1,)


PROMPT = "a red cube on a ball"


def by_prompt(lens_command, folder, out, *more):
    found = lens_command(
        "diffusion", "--model", folder, "--prompt", PROMPT, "--steps", "3", "--capture", "0,2", "--out", out, "--json", *more
    )  # fmt: skip
    assert found.code == 0, found.err
    runs = [open_run(path) for path in (*found.json["beside"], found.json["path"])]
    assert all(validate(run) == [] for run in runs)
    return runs


def test_a_pipeline_draws_its_prompt_and_words_have_maps(lens_command, tmp_path):
    pipeline = stable_diffusion()
    pipeline.save_pretrained(tmp_path / "sd")
    run = by_prompt(lens_command, tmp_path / "sd", tmp_path / "r", "--words", "cube,ball")[-1]
    assert run.meta["model"]["part"] == "cross"
    assert run.prompts["text"].tolist() == [PROMPT] * 2
    tokens = ["<s>", *PROMPT.split(), "</s>", *["<pad>"] * 4]
    assert run.trace("p000").tokens == tokens
    # by hand: queries and keys of each cross-attention, in the row of the batch that has the prompt
    kept, maps = [], []
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k")):
            module.register_forward_hook(lambda *given: kept.append(given[-1][-1]))
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    pipeline(PROMPT, num_inference_steps=3, generator=draw, output_type="latent")
    for query, key in zip(kept[::2], kept[1::2], strict=True):
        q, k = (one.unflatten(-1, (4, -1)).transpose(0, 1) for one in (query, key))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        maps.append(weights[..., tokens.index("ball")].mean(0).detach().numpy())
    layers = len(maps) // 3
    drawn = run.section("denoising").figures["word_1"]
    assert len(drawn.layout.sliders[0].steps) == 2
    for number, step in enumerate((0, 2)):
        own = np.mean(maps[layers * step : layers * (step + 1)], 0)
        assert np.allclose(numbers(drawn.data[number].z).ravel(), own, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "part", "words"),
    [
        later(pixart_pipeline, "cross", 300),
        (sd3_pipeline, "joint", 268),
        (dit_pipeline, "self", 0),
    ],
)
def test_pipelines_of_transformers_run_by_prompt(make, part, words, lens_command, tmp_path):
    make().save_pretrained(tmp_path / "m")
    run = by_prompt(lens_command, tmp_path / "m", tmp_path / "r")[-1]
    assert run.meta["model"]["part"] == part
    text = run.trace("p001").attrs["text"]
    assert (text[1] - text[0] if text else 0) == words
    if text:
        tokens = run.trace("p001").tokens[slice(*text)]
        assert tokens[:8] == ["<s>", *PROMPT.split(), "</s>"]
        section = run.section("denoising")
        assert "word_0" in section.figures
        assert section.configuration["words"] == PROMPT.split()[:4], "not its begin and padding"


def test_words_that_no_text_has_are_refused_before_the_first_step(
    lens_command, tmp_path, monkeypatch
):
    stable_diffusion().save_pretrained(tmp_path / "sd")
    called = []
    own = diffusers.UNet2DConditionModel.forward
    monkeypatch.setattr(
        diffusers.UNet2DConditionModel,
        "forward",
        lambda self, *a, **k: called.append(1) or own(self, *a, **k),
    )
    found = lens_command(
        "diffusion", "--model", tmp_path / "sd", "--prompt", PROMPT, "--steps", "3", "--words", "cube,bal", "--out",
        tmp_path / "r",
    )  # fmt: skip
    assert (found.code, called) == (2, [])
    assert "no position of the text is called 'bal'; there are " in found.err
    assert not (tmp_path / "r").exists()


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
