"""`lens heads`, `sinks`, `redistribute` and `circuit` on labelled pictures and texts: the task comes with the prompts."""

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from lens_analyses.config import make_config
from lens_analyses.inputs import plan, read_sources
from lens_analyses.steps.subject import analysed, labelled_task
from PIL import Image

import lens
from lens.common.errors import LensError
from lens.common.results import of_kind
from lens.runs import open_run
from lens.runs.validation import validate
from tests.lens.test_tasks_classification import bert, texts_of, tokenizer

__all__ = ["bert", "tokenizer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label in (0, 4, 9):
        (place / str(label)).mkdir()
        for number in range(3):
            picture = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(picture).save(place / str(label) / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def run(lens_command, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    flags = ("--n", "8", "--measures", "ablation/zero", "--out", out, "--json")
    answer = lens_command("heads", "--model", "vit-digits", "--images", folder, *flags)
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


def test_labelled_pictures_are_the_task_and_some_are_profiled(run, folder):
    assert validate(run) == []
    assert run.sections == [*("importance", "classes", "similarity", "pruning", "layers", "heads")]
    assert set(run.unsupported) == {"roles", "patterns", "retrieval", "stability"}
    assert all("the prompts are pictures" in reason for reason in run.unsupported.values())
    assert set(run.prompts["kind"]) == {"picture"}
    assert run.prompts["title"].tolist()[:2] == ["0: 0.png", "0: 1.png"]
    assert "--images" in run.meta["command"]
    assert run.meta["warnings"] == [
        "Of the labelled prompts some are left out: 1 more than the 8 prompts taken: 1 of 9."
    ]
    model = lens.load("vit-digits")
    task = lens.tasks.classification(model, folder, n=8)
    scores = lens.heads.importance(model, task, baseline="zero", progress=False)
    table = run.section("importance").tables["scores"]
    assert table["ablation (zero)"].to_numpy() == pytest.approx(scores.values.ravel(), abs=1e-5)


def test_classes_stand_beside_chance(run, folder):
    section = run.section("classes")
    model = lens.load("vit-digits")
    task = lens.tasks.classification(model, folder, n=8)
    own = lens.heads.pruning.metrics(model, task, progress=False)
    rows = section.tables["classes"].query("metric == 'js'")
    for label, values in own.by_class("js").items():
        found = rows[rows["class"] == label]["value"].to_numpy()
        assert found == pytest.approx(values.ravel(), abs=1e-6)
    assert section.configuration["chance"] == pytest.approx(3 / 8)
    said = own.findings()
    assert {one.text for one in said} <= set(section.summary)
    (accuracy,) = of_kind(said, "accuracy")
    assert accuracy.endswith(
        "of 8 examples rightly; always naming the most frequent of 3 classes would 37.5%."
    )
    assert {"classes", "probability", "js"} <= set(section.figures)
    names = section.tables["classes"][["class", "label"]].drop_duplicates()
    known = model.model.config.id2label
    assert names["label"].tolist() == [known[number] for number in names["class"]]


def test_another_picture_is_noticed(lens_command, run, folder, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text((run.path / "config.toml").read_text().replace('sha256 = "', 'sha256 = "0'))
    answer = lens_command("heads", "-c", config, "--out", tmp_path)
    assert answer.code == 2
    assert "changed since the run was configured" in answer.err


def test_labelled_texts_are_a_task_too(bert, tmp_path):
    rows = pd.DataFrame({"text": texts_of([9] * 6), "label": [0, 1, 2, 0, 1, 2]})
    rows.to_csv(tmp_path / "reviews.csv", index=False)
    prompts, analysis = {"labelled": str(tmp_path / "reviews.csv")}, {"n": 4, "length": 8}
    asked = make_config({"what": "heads", "prompts": prompts, "analysis": analysis})
    config, sources = read_sources(asked)
    planned = plan(bert, config, sources)
    assert [one.text for one in planned] == rows["text"].tolist()[:4]
    assert {one.kind for one in planned} == {"text"}
    task = labelled_task(bert, config)
    assert task.clean.shape == (4, 8)
    assert task.correct[:, 0].tolist() == [0, 1, 2, 0]
    ids, windows = analysed(config, bert, planned)
    assert (list(map(len, ids)), windows) == ([8] * 4, [])
    assert "--labelled" in config.command()


@pytest.fixture(scope="module")
def reviews(bert, tmp_path_factory):
    """A model of texts on disk, and a table of labelled ones of one length."""
    place = tmp_path_factory.mktemp("texts")
    bert.model.save_pretrained(place / "classifier")
    bert.tokenizer.save_pretrained(place / "classifier")
    rows = pd.DataFrame({"text": texts_of([6] * 6), "label": [0, 1, 2] * 2})
    rows.to_csv(place / "reviews.csv", index=False)
    return "--model", place / "classifier", "--labelled", place / "reviews.csv", "--json"


@pytest.mark.exhaustive
def test_heads_of_a_classifier_of_texts_are_measured_by_the_command(
    lens_command, reviews, bert, tmp_path
):
    flags = ("--measures", "ablation/zero", "--out", tmp_path)
    answer = lens_command("heads", *reviews, *flags)
    assert answer.code == 0, answer.err
    found = open_run(answer.json["path"])
    assert validate(found) == []
    assert {"importance", "classes", "similarity", "pruning", "layers", "heads"} <= set(
        found.sections
    )
    task = lens.tasks.classification(bert, str(reviews[3]))
    scores = lens.heads.importance(bert, task, baseline="zero", progress=False)
    table = found.section("importance").tables["scores"]
    assert table["ablation (zero)"].to_numpy() == pytest.approx(scores.values.ravel(), abs=1e-5)
    own = lens.heads.pruning.metrics(bert, task, progress=False)
    rows = found.section("classes").tables["classes"].query("metric == 'loss'")
    for label, values in own.by_class("loss").items():
        of_label = rows[rows["class"] == label]["value"].to_numpy()
        assert of_label == pytest.approx(values.ravel(), abs=1e-5)
    curve = found.section("pruning").tables["curve"]
    assert curve["removed"].min() == 0
    assert curve["removed"].max() == len(bert.info.every_head)


@pytest.mark.exhaustive
def test_sinks_are_looked_for_in_labelled_texts(lens_command, reviews, bert, tmp_path):
    flags = ("--edits", "mask", "--amounts", "0,1", "--out", tmp_path)
    answer = lens_command("sinks", *reviews, *flags)
    assert answer.code == 0, answer.err
    found = open_run(answer.json["path"])
    assert validate(found) == []
    task = lens.tasks.classification(bert, str(reviews[3]))
    eager = transformers.AutoModelForSequenceClassification.from_pretrained(
        reviews[1], attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        maps = eager(task.clean, output_attentions=True).attentions
    alpha = np.stack([one[..., 0].mean((0, 2)).numpy() for one in maps]).ravel()
    heads = found.section("detection").tables["heads"].sort_values(["layer", "head"])
    assert heads["alpha"].to_numpy() == pytest.approx(alpha, abs=1e-5)
    table = found.section("effects").tables["edits"]
    own = table[((table["condition"] == "edit") & (table["edit"] == "mask")).to_numpy()]
    masked = lens.effect(bert, task, lens.edits.Mask("first"), progress=False).table()
    assert own["delta_loss"].iloc[0] == pytest.approx(masked["delta_loss"].iloc[0], abs=1e-5)


def test_a_circuit_is_found_for_labelled_texts(lens_command, reviews, tmp_path):
    flags = ("--edges", "40", "--steps", "1", "--out", tmp_path)
    answer = lens_command("circuit", *reviews, *flags)
    assert answer.code == 0, answer.err
    found = open_run(answer.json["path"])
    assert validate(found) == []
    assert {"edges", "circuit", "joined"} <= set(found.sections)
    whole = found.section("circuit").tables["faithfulness"]
    full = whole[(whole["share"] == 1).to_numpy()]["faithfulness"]
    assert full.to_numpy() == pytest.approx(np.ones(2), abs=1e-4)


@pytest.mark.exhaustive
def test_a_circuit_is_found_for_labelled_pictures(lens_command, folder, tmp_path):
    flags = ("--n", "4", "--edges", "40", "--steps", "1", "--out", tmp_path, "--json")
    answer = lens_command("circuit", "--model", "vit-digits", "--images", folder, *flags)
    assert answer.code == 0, answer.err
    found = open_run(answer.json["path"])
    assert validate(found) == []
    assert found.sections == ["edges", "circuit", "joined"]
    whole = found.section("circuit").tables["faithfulness"]
    full = whole[(whole["share"] == 1).to_numpy()]["faithfulness"]
    assert full.to_numpy() == pytest.approx(np.ones(2), abs=1e-4)


def test_sinks_of_labelled_pictures_are_found_and_edited_away(lens_command, folder, tmp_path):
    flags = ("--n", "6", "--amounts", "0.5,1", "--edits", "mask,mean_value", "--out", tmp_path)
    answer = lens_command("sinks", "--model", "vit-digits", "--images", folder, *flags, "--json")
    assert answer.code == 0, answer.err
    found = open_run(answer.json["path"])
    assert validate(found) == []
    assert found.sections == ["detection", "effects", "dose", "redistribution"]
    assert set(found.unsupported) == {"mechanism", "kinds", "first_token", "streaming", "spectrum"}
    model = lens.load("vit-digits")
    task = lens.tasks.classification(model, folder, n=6)
    # alpha of [CLS] and its removal, by torch alone
    eager = lens.load("vit-digits").model
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = eager(task.clean, output_attentions=True).attentions
        hidden = lens.edit(model, lens.edits.Mask("first"))
        clean = model.model(task.clean).logits.log_softmax(-1)
        with hidden:
            edited = model.model(task.clean).logits.log_softmax(-1)
    alpha = np.stack([one[..., 0].mean((0, 2)).numpy() for one in maps]).ravel()
    heads = found.section("detection").tables["heads"].sort_values(["layer", "head"])
    assert heads["alpha"].to_numpy() == pytest.approx(alpha, abs=1e-5)
    lost = (clean - edited).gather(1, task.correct).mean()
    table = found.section("effects").tables["edits"]
    own = table[((table["condition"] == "edit") & (table["edit"] == "mask")).to_numpy()]
    assert own["delta_loss"].to_numpy() == pytest.approx([float(lost)], abs=1e-5)
    assert "size" in set(table["condition"])
    for name in ("effects", "dose", "redistribution"):  # one loss a picture, and none a token
        section = found.section(name)
        assert "nats per prompt" in " ".join(section.summary) or name == "dose"
        said = [*section.summary, *section.columns.values()]
        said += [str((one.text, one.unit)) for one in section.headlines]
        assert not any("token" in one and "nats" in one for one in said)
    limits = "".join(found.section("effects").limits)
    assert "The edit mean_value is not made: layer 0 has no plain causal mask" in limits


def test_attention_is_redistributed_on_labelled_pictures(lens_command, folder, tmp_path):
    flags = ("--n", "8", "--amounts", "1", "--out", tmp_path, "--json")
    answer = lens_command("redistribute", "--model", "vit-digits", "--images", folder, *flags)
    assert answer.code == 0, answer.err
    found = open_run(answer.json["path"])
    assert validate(found) == []
    assert found.sections == ["dose", "search"]
    model = lens.load("vit-digits")
    task = lens.tasks.classification(model, folder, n=8)
    with lens.edit(model, lens.edits.Move("first")):
        moved = task.evaluate(model)
    gain = float((moved - task.evaluate(model)).mean())
    response = found.section("dose").tables["response"]
    assert response["gain"].to_numpy() == pytest.approx([gain], abs=1e-5)
    assert "predicts no text" in "".join(found.section("dose").limits)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--images", "FOLDER", "--task", "ioi"),
            "labelled prompts are a task of their own, 'labels'",
        ),
        (("--task", "labels", "--copied", "1"), "give --images FOLDER or --labelled TABLE"),
        (("--images", "FOLDER", "--text-name", "moby-dick"), "labelled prompts stand alone"),
        (("--labelled", "FOLDER"), "holds pictures; give it as --images"),
        (("--images", "nowhere"), "is no folder and no table"),
        (
            ("--images", "FOLDER", "--copied", "9"),
            "--copied is not read, since there are no copied prompts beside",
        ),
        (
            ("--images", "FOLDER", "--tokens", "9"),
            "--tokens is not read, since pictures are not cut",
        ),
        (("--images", "FOLDER", "--length", "9"), "--length is of texts, and pictures have none"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(
    lens_command, folder, tmp_path, flags, said
):
    given = [str(folder) if flag == "FOLDER" else flag for flag in flags]
    answer = lens_command("heads", "--model", "vit-digits", *given, "--out", tmp_path)
    assert answer.code == 2, answer.err
    assert said in answer.err
    assert not list(tmp_path.iterdir())


def test_a_rule_of_causal_models_is_refused_before_any_work(lens_command, folder, tmp_path):
    flags = ("--n", "8", "--rule", "act", "--out", tmp_path)
    answer = lens_command("redistribute", "--model", "vit-digits", "--images", folder, *flags)
    assert (answer.code, "ACT is defined for causal models" in answer.err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_circuit_notices_a_change_of_the_prompts_that_it_is_tried_on(tmp_path):
    table = tmp_path / "a.csv"
    rows = [f"w{number} w2,{number % 2}" for number in range(8)]
    table.write_text("\n".join(["text,label", *rows]) + "\n")
    given = {"what": "circuit", "prompts": {"labelled": str(table)}, "analysis": {"n": 2}}
    known, _ = read_sources(make_config(given))
    rows[3] = "other w2,1"  # the fourth of the 4 that `halves` takes
    table.write_text("\n".join(["text,label", *rows]) + "\n")
    with pytest.raises(LensError, match="changed since the run was configured"):
        read_sources(known)


def test_a_language_model_has_no_labels(lens_command, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nw1 w2,1\nw3 w4,0\n")
    answer = lens_command("heads", "--labelled", tmp_path / "a.csv", "--out", tmp_path / "runs")
    assert answer.code == 2
    assert "is no classifier of whole prompts" in answer.err
