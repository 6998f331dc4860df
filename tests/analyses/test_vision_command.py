"""`lens vision`: pictures in, a run with overlays, distances and structure, in a report."""

import functools

import numpy as np
import pytest
import torch
import transformers
from lens_analyses.boxes import read_boxes
from lens_analyses.steps import STEPS
from PIL import Image

import lens
from lens.common.errors import LensError
from lens.runs import open_run
from lens.runs.validation import validate
from tests.lens.test_vision_pictures import vlm
from tests.lens.vision_models import planted

ZERO = ["..####..", ".##..##.", ".#....#.", ".#....#.", ".#....#.", ".#....#.", ".##..##.", "..####.."]  # fmt: skip


def train_less(patch):
    """Groups of patterns stand on a few steps and draws: how good they are is not looked at here."""
    fewer = functools.partial(lens.vision.patterns, steps=30, draws=4)
    patch.setattr(lens.vision, "patterns", fewer)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    zero = np.array([[255 * (cell == "#") for cell in row] for row in ZERO], np.uint8)
    for name, array in (("zero", zero), ("turned", zero.T[::-1])):
        Image.fromarray(np.ascontiguousarray(array)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def run(lens_command, pictures, tmp_path_factory):
    files = f"{pictures / 'zero.png'},{pictures / 'turned.png'}"
    out = tmp_path_factory.mktemp("vision")
    boxes = pictures / "boxes.csv"
    boxes.write_text("picture,left,top,right,bottom\nzero.png,0,0,4,3\nzero.png,5,5,8,8\n")
    given = ("--image", files, "--boxes", boxes)
    with pytest.MonkeyPatch.context() as patch:
        train_less(patch)
        answer = lens_command("vision", "--model", "vit-digits", *given, "--out", out, "--json")
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


def test_the_sections_are_there_and_the_folder_is_whole(run):
    assert run.sections == [
        "overlays",
        "grounding",
        "rings",
        "pattern_summary",
        "structure",
        "similarity",
    ]
    assert validate(run) == []
    assert run.status == "success"
    assert "reads no text" in run.unsupported["chain"]
    assert "no labels; --images FOLDER" in run.unsupported["classes"]
    assert run.prompts["kind"].tolist() == ["picture", "picture"]
    assert run.prompts["title"].tolist() == ["zero.png", "turned.png"]
    assert run.prompts["token_strings"][0].tolist()[:3] == ["[CLS]", "0,0", "0,1"]


def test_the_numbers_are_those_of_the_library(run, pictures):
    model = lens.load("vit-digits")
    trace = lens.capture(model, pictures / "zero.png", keep_qk=True, progress=False)
    rings = lens.vision.rings(trace).table()
    table = run.section("rings").tables["rings"].query("prompt_id == 'p000'")
    assert np.allclose(table["mass"], rings["mass"], atol=1e-6)
    maps = run.section("overlays").tables["maps"].query("prompt_id == 'p000' and variant == 'raw'")
    own = trace.overlay("L2H1", query="[CLS]").values.ravel()
    assert np.allclose(maps[maps["map"] == "L2H1"]["value"], own, atol=1e-6)
    segments = run.section("structure").tables["segments"].query("prompt_id == 'p000'")
    assert (
        segments["patches"].tolist() == lens.vision.cluster(trace, "L2").table()["patches"].tolist()
    )


def test_heads_are_scored_by_the_boxes_of_a_table_beside_the_middle_of_the_picture(run, pictures):
    section = run.section("grounding")
    trace = lens.capture(
        lens.load("vit-digits"), pictures / "zero.png", keep_qk=True, progress=False
    )
    overlay = trace.overlay([str(head) for head in trace.every_head], query="[CLS]")
    own = lens.vision.grounding(overlay, [(0, 0, 4, 3), (5, 5, 8, 8)]).table()
    table = section.tables["heads"]
    assert table["name"].tolist() == own["map"].tolist()
    assert np.allclose(
        table[["iou", "iou_middle", "pointing"]], own[["iou", "iou_middle", "pointing"]]
    )
    (headline,) = section.headlines
    assert headline.value == pytest.approx(own["iou"].max())
    assert headline.baseline == max(own["iou_middle"][0], own["iou_whole"][0])
    assert section.tables["boxes"]["prompt_id"].tolist() == ["p000"] * 2
    assert "1 pictures have no box" in " ".join(section.limits)
    assert len(section.figures["p000"].layout.shapes) == 2


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("picture,left,top,right\n", "has no column bottom"),
        ("picture,left,top,right,bottom\n", "has no box"),
        ("picture,left,top,right,bottom\nzero.png,4,0,4,3\n", "row 1 of .* is no box"),
        ("picture,left,top,right,bottom\nzero.png,a,0,4,3\n", "is no box: .* got a, 0, 4, 3"),
        ("picture,left,top,right,bottom\nother.png,0,0,4,3\n", "boxes of other.png, which the run"),
    ],
)
def test_a_table_that_holds_no_boxes_of_the_pictures_is_refused(tmp_path, rows, said):
    table = tmp_path / "boxes.csv"
    table.write_text(rows)
    with pytest.raises(LensError, match=said):
        read_boxes(table, ["zero.png", "turned.png"])


def test_the_report_has_the_pictures_inside(run):
    page = (run.path / "report.html").read_text()
    assert "What was looked at by vit-digits" in page
    assert page.count("data:image/png;base64,") > 10
    assert "http-equiv" in page
    assert "Copied prompts" not in page


def test_the_same_command_finds_the_run_and_another_picture_is_noticed(
    lens_command, run, pictures, tmp_path
):
    files = f"{pictures / 'zero.png'},{pictures / 'turned.png'}"
    command = (
        "vision",
        "--model",
        "vit-digits",
        "--image",
        files,
        "--boxes",
        pictures / "boxes.csv",
        "--out",
        run.path.parent,
        "--json",
    )
    assert lens_command(*command).json["computed"] is False
    config = tmp_path / "config.toml"
    config.write_text((run.path / "config.toml").read_text().replace('sha256 = "', 'sha256 = "0'))
    answer = lens_command("vision", "-c", config, "--out", tmp_path)
    assert answer.code == 2
    assert "zero.png, turned.png changed since the run was configured" in answer.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "which picture? --image FILE"),
        (["--image", "nowhere.png"], "no picture "),
        (["--image", "ZERO", "--tau", "-1"], "must be a number of nats from 0 on"),
        (["--image", "ZERO", "--text", "what is this"], "reads pictures alone"),
        (["--image", "ZERO", "--edits", "move"], "unknown edit 'move'; known: var, act, pasta"),
        (["--image", "ZERO", "--amounts", "0,1"], "must be numbers from 0 to below 1"),
        (["--images", "ZERO", "--boxes", "ZERO"], "boxes lie on pictures that are named"),
        (["--image", "ZERO", "--boxes", "ZERO"], "is no table of boxes; give a .csv"),
        (["--image", "ZERO", "--images", "ZERO"], "--image) or labelled ones (--images), not both"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    lens_command, pictures, tmp_path, flags, said
):
    given = [str(pictures / "zero.png") if flag == "ZERO" else flag for flag in flags]
    answer = lens_command("vision", "--model", "vit-digits", *given, "--out", tmp_path)
    assert answer.code == 2, answer.err
    assert said in answer.err
    assert not list(tmp_path.iterdir())


def test_a_question_brings_the_chain_of_a_vision_language_model(
    lens_command, pictures, tmp_path, monkeypatch
):
    model = vlm()
    train_less(monkeypatch)
    monkeypatch.setattr("lens_analyses.runner.load_model", lambda config: model)
    command = ("vision", "--model", "vit-digits", "--image", pictures / "zero.png", "--json")
    question = (
        "--text",
        "w6 w7 what is this",
        "--emphasise",
        "w6 w7",
        "--phi",
        "4",
        "--out",
        tmp_path,
    )
    with planted(model.model, 7, [2, 7]):
        answer = lens_command(*map(str, (*command, *question)))
    assert answer.code == 0, answer.err
    run = open_run(answer.json["path"])
    assert validate(run) == []
    assert run.sections[-1] == "chain"
    assert {"overlays", "rings", "pattern_summary", "structure"} <= set(run.sections)
    chain = run.section("chain")
    assert chain.configuration["dims"][0] == 7
    assert chain.tables["segments"]["kind"].tolist() == ["image", "text"]
    assert chain.tables["pasta"].query("condition == 'edit'")["kl"].max() > 0
    made = {"segments", "sinks", "flow", "knock_out", "var", "act", "pasta", "image_centric"}
    assert set(chain.tables) == made | {f"{name}_decoding" for name in ("var", "act", "pasta")}
    assert not any(one.startswith("No ") for one in chain.limits)


def test_a_model_of_several_grids_makes_a_run_of_each_stage(
    lens_command, pictures, tmp_path, monkeypatch
):
    few = ("overlays", "rings", "structure")
    monkeypatch.setitem(STEPS, "vision", tuple(one for one in STEPS["vision"] if one.name in few))
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "window_size": 4}
    config = transformers.SwinConfig(depths=[2, 1], num_heads=[2, 4], **sizes)
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path / "swin")
    given = ("vision", "--model", tmp_path / "swin", "--image", pictures / "zero.png", "--json")
    answer = lens_command(*given, "--out", tmp_path / "runs")
    assert answer.code == 0, answer.err
    (beside,) = answer.json["beside"]
    for path, part, heads in ((beside, "stage0", 4), (answer.json["path"], "stage1", 4)):
        run = open_run(path)
        assert validate(run) == []
        assert run.meta["model"]["part"] == part
        assert (run.path / "report.html").exists()
        assert len(run.trace("p000").every_head) == heads
        assert set(run.sections) >= set(few)
        assert len(run.section("overlays").tables["maps"]["map"].unique()) >= 3
        assert not run.unsupported
        assert {"flow", "rates", "segments", "tree"} == set(run.section("structure").tables)
    bare = lens_command(*given, "--no-keep-qk", "--part", "stage0", "--out", tmp_path / "bare")
    assert bare.code == 0, bare.err
    overlays = open_run(bare.json["path"]).section("overlays")
    assert overlays.headlines == ()
    assert "which patch stands out is not told: " in overlays.summary[0]
    again = lens_command(*given, "--part", "stage7", "--out", tmp_path / "others")
    assert again.code != 0
    assert "part must be one of 'stage0', 'stage1'" in again.err
    refused = lens_command("run", "--model", tmp_path / "swin", "--text-name", "lily")
    assert refused.code == 2
    assert "`lens vision` makes a run of each stage" in " ".join(refused.err.split())
