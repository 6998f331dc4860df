"""Folders and tables of labelled pictures and texts, and what is measured on them: heads, pruning, circuits."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image

import lens
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.graph.references import References
from lens.common.errors import LensError
from lens.tasks import classification
from lens.tasks.labelled import read_labelled
from tests.lens.test_tasks_classification import SIZES, a_task, bert, strong, tokenizer, vit

__all__ = ["bert", "tokenizer", "vit"]


@pytest.fixture(scope="module")
def digits():
    return lens.load("vit-digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of noise under the labels 0 to 2, five each; of other things beside them."""
    place, random = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    for label in range(3):
        (place / str(label)).mkdir()
        for number in range(5):
            picture = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(picture).save(place / str(label) / f"{number}.png")
        (place / str(label) / "notes.txt").write_text("no picture")
    (place / ".hidden").mkdir()
    return place


def pixels_of(model, paths):
    arrays = [np.asarray(Image.open(path)) for path in paths]
    return model.processor([one[..., None] for one in arrays], return_tensors="pt")["pixel_values"]


def test_a_folder_a_table_and_a_list_of_pictures_are_the_same_task(digits, folder, tmp_path):
    paths = sorted(folder.glob("*/*.png"))
    labels = [int(path.parent.name) for path in paths]
    rows = [{"path": str(path), "label": label} for path, label in zip(paths, labels, strict=True)]
    pd.DataFrame(rows).to_csv(tmp_path / "all.csv", index=False)
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    near = [{"path": path.relative_to(folder).as_posix(), "label": path.parent.name} for path in paths]  # fmt: skip
    (folder / "near.jsonl").write_text("\n".join(map(json.dumps, near)))
    expected = pixels_of(digits, paths)
    arrays = [np.asarray(Image.open(path)) for path in paths]
    for given in [
        (folder,), (str(folder),), (tmp_path / "all.csv",), (tmp_path / "all.jsonl",), (folder / "near.jsonl",),
        (pd.DataFrame(rows),), (arrays, labels), (paths, [f"LABEL_{label}" for label in labels]), (expected, labels),
    ]:  # fmt: skip
        task = classification(digits, *given)
        torch.testing.assert_close(task.clean, expected)
        assert task.correct[:, 0].tolist() == labels
    assert str(task) == str(classification(digits, folder))


def test_some_are_taken_evenly_over_the_labels(digits, folder):
    task = classification(digits, folder, n=7)
    assert torch.bincount(task.correct[:, 0]).tolist() == [3, 2, 2]
    first = [path for label in range(3) for path in sorted(folder.glob(f"{label}/*.png"))[: 3 - (label > 0)]]  # fmt: skip
    torch.testing.assert_close(task.clean, pixels_of(digits, first))
    assert task.dropped == ("8 more than the 7 prompts taken: 2 of 0, 3 of 1, 3 of 2",)
    assert classification(digits, folder, n=15).dropped == ()


def test_a_row_that_stands_twice_counts_where_it_is_left_out():
    rows = pd.DataFrame({"text": ["w1", "w1", "w1", "w2"], "label": ["1", "1", "1", "0"]})
    assert read_labelled(rows, most=2).left == {"1": 2}


def test_texts_come_from_a_table_too(bert, tmp_path):
    rows = pd.DataFrame({"text": ["w1 w2", "w3 w4", "w5 w6"], "label": ["2", "LABEL_0", "1"]})
    rows.to_csv(tmp_path / "reviews.csv", index=False)
    task = classification(bert, tmp_path / "reviews.csv")
    assert task.correct[:, 0].tolist() == [2, 0, 1]
    assert task.clean.tolist() == [bert.encode(text) for text in rows["text"]]


def test_what_holds_no_labelled_prompts_is_refused(digits, bert, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("path,label\nmissing.png,1\n")
    (tmp_path / "b.csv").write_text("path,name\nmissing.png,1\n")
    (tmp_path / "c.csv").write_text("path,label\n,1\n")
    (tmp_path / "d.csv").write_text("path,label\n")
    (tmp_path / "e.jsonl").write_text("[1, 2]\n")
    (tmp_path / "f.csv").write_text("path,text,label\na,b,1\n")
    for given, said in [
        (tmp_path / "empty", "has no sub-folder with pictures"),
        (tmp_path / "nowhere", "is no folder and no table"),
        (tmp_path / "a.csv", r"no picture .*missing\.png"),
        (tmp_path / "b.csv", "either text or path of each; got path, name"),
        (tmp_path / "c.csv", "lacks its path or its label"),
        (tmp_path / "d.csv", "has no row"),
        (tmp_path / "e.jsonl", "a line that is no JSON object"),
        (tmp_path / "f.csv", "either text or path"),
        ([1, 2], "a folder with a sub-folder per label, or a table"),
    ]:
        with pytest.raises(LensError, match=said):
            classification(digits, given)
    with pytest.raises(LensError, match="n must be a positive integer, got 0"):
        classification(digits, folder, n=0)
    with pytest.raises(LensError, match="n takes some of a folder or a table"):
        classification(digits, torch.zeros(1, 1, 8, 8), [0], n=1)
    with pytest.raises(LensError, match="has no processor, so it cannot read pictures"):
        classification(bert, folder)


def test_pictures_of_several_sizes_are_refused(folder):
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=4, **SIZES)
    processor = transformers.ViTImageProcessorPil(
        do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    model = lens.load(strong(transformers.ViTForImageClassification(config)), processor=processor)
    pictures = [np.zeros((size, 16, 3), np.uint8) for size in (16, 20)]
    with pytest.raises(LensError, match=r"several sizes \(3 × 16 × 16, 3 × 20 × 16\)"):
        classification(model, pictures, [0, 1])


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_head_of_the_graph_is_the_head_that_ablation_takes_away(kind, request):
    model = request.getfixturevalue(kind)
    task = a_task(model)
    found = lens.heads.importance(model, task, baseline="mean", progress=False).per_prompt
    nodes = find_nodes(model)
    graph, rows = nodes.graph, torch.arange(task.n)
    reference = References(nodes, task, Ablation("mean")).of(rows)
    masks = torch.zeros(len(model.info.every_head), *graph.allowed.shape)
    for number, (layer, head) in enumerate(model.info.every_head):
        masks[number, :, graph.heads_of(layer).start + head] = 1
    with torch.no_grad():
        clean = task.measure(masked_logits(nodes, task.clean, reference, 0 * masks[:1])[0], rows)
        torch.testing.assert_close(clean, task.evaluate(model), atol=1e-5, rtol=1e-5)
        for number, head in enumerate(model.info.every_head):
            logits = masked_logits(nodes, task.clean, reference, masks[number : number + 1])[0]
            change = (clean - task.measure(logits, rows)).numpy()
            assert change == pytest.approx(found[head], abs=1e-5)
    assert abs(found).max() > 1e-2


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_circuits_of_a_classifier_are_found_and_evaluated(kind, request):
    model = request.getfixturevalue(kind)
    task = a_task(model)
    found = lens.circuits.find(model, task, edges=60, progress=False)
    whole = lens.circuits.evaluate(model, task, found.scores, draws=2, progress=False)
    assert whole.signed.faithfulness()[-1] == pytest.approx(1)
    assert lens.circuits.scores.hisp(model, task, baseline="zero", progress=False).n == task.n


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_pruning_metrics_of_a_task_are_those_of_its_prompts(kind, request):
    model = request.getfixturevalue(kind)
    task = a_task(model)
    name = "input_ids" if kind == "bert" else "pixel_values"
    options = {"progress": False}
    found = lens.heads.pruning.metrics(model, task, **options)
    own = lens.heads.pruning.metrics(model, {name: task.clean}, task.correct[:, 0], **options)
    for metric, values in own.per_example.items():
        assert found.per_example[metric] == pytest.approx(values, abs=1e-12)
    assert sorted(found.by_class("js")) == [0, 1, 2]


def test_what_a_class_loses_stands_beside_as_many_examples_of_any(vit):
    random = torch.Generator().manual_seed(3)
    pictures = torch.randn(40, 3, 16, 16, generator=random)
    pictures[:10] += 2
    labels = [1] * 10 + [0] * 15 + [2] * 15
    found = lens.heads.pruning.metrics(vit, classification(vit, pictures, labels), progress=False)
    table = found.classes(draws=400)
    rows = table[(table["metric"] == "probability") & (table["class"] == 1)]
    values = found.per_example["probability"].reshape(8, 40)
    assert rows["name"].tolist() == [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    assert rows["value"].to_numpy() == pytest.approx(values[:, :10].mean(1))
    assert rows["all"].to_numpy() == pytest.approx(values.mean(1))
    assert set(rows["n"]) == {10}
    # of a mean of 10 of 40 without putting back: within two standard errors of the mean of all
    error = values.std(1, ddof=1) * np.sqrt((1 - 10 / 40) / 10)
    for end, sign in (("chance_low", -1), ("chance_high", 1)):
        away = (rows[end].to_numpy() - values.mean(1)) / error
        assert away == pytest.approx(sign * 1.96, abs=0.5)
    assert (rows["value"] > rows["chance_high"]).any() or (rows["value"] < rows["chance_low"]).any()
    figure = found.plot("js")
    assert np.array_equal(figure.data[0].z, found.values("js"))
    with pytest.raises(LensError, match="several answers each"):
        replace(found, labels=None).classes()
