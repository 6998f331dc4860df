"""Head search with held-out prompts, and the figures of redistribution."""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.edits.searching import HeadSearch
from lens.edits.selection import HeadSelection
from lens.models.loaded import LoadedModel
from lens.tasks.metrics import AnswerSets
from tests.lens.traces import sizes


@pytest.fixture(scope="module")
def induction():
    model = lens.load("induction-2l")
    return model, lens.tasks.induction(model, n=14, seed=0)


def test_the_search_chooses_on_some_prompts_and_judges_on_the_others(induction):
    model, task = induction
    edited = []

    def edit(heads):
        return lens.edit(model, lens.edits.Mask("first", heads=heads))

    def seen(model, one):
        edited.append(one.heads)
        return lens.edit(model, one)

    mask = lens.edits.Mask("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens.edits.searching.run", seen)
        found = lens.edits.search_heads(model, task, mask, most=3, validation=0.6, seed=1)
    layers, heads = model.info.layers, model.info.heads
    everyone = [HeadId(layer, head) for layer in range(layers) for head in range(heads)]
    assert found.gains.shape == (layers, heads, 8)
    assert edited[: len(everyone)] == [(head,) for head in everyone]
    order = np.random.default_rng(1).permutation(14)
    clean = task.evaluate(model).double().numpy()
    for head in everyone:
        with lens.edit(model, lens.edits.Mask("first", heads=[head])):
            alone = task.sign * (task.evaluate(model).double().numpy() - clean)
        assert found.gains[head] == pytest.approx(alone[np.sort(order[:8])], abs=1e-5)
    means = found.gains.mean(-1)
    best = sorted(everyone, key=lambda head: -means[head])[:3]
    assert found.chosen == tuple(head for head in best if means[head] > 0)
    with edit(everyone):
        everywhere = task.sign * (task.evaluate(model).double().numpy() - clean)
    assert found.everywhere == pytest.approx(everywhere[np.sort(order[8:])], abs=1e-5)
    assert len(found.test) == 6
    assert found.bias == pytest.approx(found.validation.mean() - found.test.mean())
    assert found.table()["chosen"].sum() == len(found.chosen)
    assert found.summary()["n"].tolist() == [8, 6, 6]
    assert len(found.plot().data[1].x) == len(found.chosen)


def test_choosing_among_noise_flatters_and_the_report_says_so():
    """Heads whose gains are pure noise: the chosen ones look good only where they were chosen."""
    model = LoadedModel(torch.nn.Identity(), None, "noise", None, sizes(5, 7))
    random = np.random.default_rng(0)
    state = {"heads": ()}

    class Task:
        n, sign, metric, name = 40, 1, "accuracy", "coin flips"

        def __init__(self, rows):
            self.rows, self.n = rows, len(rows)

        def take(self, rows):
            return Task(rows.numpy())

        def evaluate(self, _):
            if not state["heads"]:
                return torch.zeros(self.n)
            return torch.tensor(effects[list(state["heads"])][:, self.rows].mean(0))

    class Editing(nullcontext):
        def __exit__(self, *_):
            state["heads"] = ()

    effects = random.normal(size=(35, 40))

    def edit(_, one):
        state["heads"] = tuple(layer * 7 + head for layer, head in one.heads)
        return Editing()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens.edits.searching.run", edit)
        found = lens.edits.search_heads(model, Task(np.arange(40)), lens.edits.Mask(), most=5)
    assert len(found.chosen) == 5
    assert found.validation.mean() > 0.2
    assert found.bias > 0.2
    said = {one.kind: str(one) for one in found.findings()}
    assert "these prompts do not show that the chosen heads help" in said["verdict"]
    assert f"choosing flatters by {found.bias:.4f}" in said["gain"]


def test_a_search_that_finds_no_head_says_so_and_bad_splits_are_refused(induction):
    model, task = induction
    nothing = HeadSearch(
        -np.ones((2, 3, 4)), (), np.zeros(4), np.zeros(5), np.zeros(5), "loss", "t", "m", 0
    )
    assert "No head of m helps 't'" in nothing.findings()[0]
    assert "largest gain of 6 heads on 4 validation prompts is -1.0000" in nothing.findings()[0]
    for match, options in (
        ("most must be at least one head, got 0", {"most": 0}),
        ("validation must lie between 0 and 1, got ", {"validation": float("nan")}),
        ("leaves 13 to choose with and 1 to judge by; each side needs two", {"validation": 0.95}),
    ):
        with pytest.raises(LensError, match=match):
            lens.edits.search_heads(model, task, lens.edits.Mask(), **options)
    for match, edit in (
        (
            "search_heads tries an edit of attention, such as lens.edits.Mask",
            lens.edits.Ablate("L0H0"),
        ),
        ("chooses the heads itself: leave heads and layers", lens.edits.Mask(layers=[0])),
    ):
        with pytest.raises(LensError, match=match):
            lens.edits.search_heads(model, task, edit)


def test_figures_show_the_numbers():
    text, visual = np.full((2, 3), 10), np.full((2, 3), 7)
    edited = np.array([[True] * 3, [False] * 3])
    selection = HeadSelection(text, visual, np.array([[4, 0, 1], [0, 0, 0]]), edited, "m")
    assert selection.share[0].tolist() == [0.4, 0.0, 0.1]
    assert np.isnan(selection.share[1]).all()
    assert selection.table()["head"].tolist() == [0, 2, 1]
    assert (
        "2 of 3 heads were image-centric in some row: 5 of 30 rows (16.7%)"
        in selection.findings()[0]
    )
    assert np.asarray(selection.plot().data[0].z)[0].tolist() == [0.4, 0.0, 0.1]


def test_the_sentences_of_a_search():
    """Chosen heads gain 0.6 where they were chosen and 0.2 elsewhere; all heads lose."""
    gains = np.zeros((2, 3, 4))
    gains[1, 2], gains[0, 1] = 0.9, 0.3
    chosen = (HeadId(1, 2), HeadId(0, 1))
    found = HeadSearch(
        gains, chosen, np.full(4, 0.6), np.full(5, 0.2), np.full(5, -0.5), "accuracy", "t", "m", 0
    )
    assert [(one.kind, one.text) for one in found.findings()] == [
        ("chosen", "2 of 6 heads were chosen on 4 validation prompts: L1H2, L0H1."),
        (
            "gain",
            "Edited together they gain 0.2000 [0.2000, 0.2000] in accuracy on 5 test prompts and "
            "0.6000 [0.6000, 0.6000] on those that chose them: choosing flatters by 0.4000. All heads "
            "together gain -0.5000 [-0.5000, -0.5000].",
        ),
        ("verdict", "The gain on the test prompts is above 0."),
    ]
    table = found.table()
    assert table[["layer", "head", "name"]].to_numpy().tolist()[:2] == [
        [1, 2, "L1H2"],
        [0, 1, "L0H1"],
    ]
    assert table["gain"].tolist()[:3] == pytest.approx([0.9, 0.3, 0.0])


def test_a_search_takes_all_that_a_task_has_to_both_sides():
    """Sets of answers and marks go with their prompts."""
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, n=8, seed=0)
    rights = task.correct[..., None]
    sets = AnswerSets(rights, (rights + 1) % model.info.vocab)
    many = dataclasses.replace(task, metric="probability_difference", sets=sets, wrong=None)
    found = lens.edits.search_heads(model, many, lens.edits.Mask("first"), most=2, seed=3)
    order = np.random.default_rng(3).permutation(8)
    clean = many.evaluate(model).double().numpy()
    with lens.edit(model, lens.edits.Mask("first", heads=["L1H0"])):
        alone = many.evaluate(model).double().numpy() - clean
    assert found.gains[1, 0] == pytest.approx(alone[np.sort(order[:4])], abs=1e-5)
