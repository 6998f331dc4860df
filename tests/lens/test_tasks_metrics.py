"""Metrics of answer sets and distributions: against a definition spelled out token by token."""

import math

import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.heads import importance
from lens.tasks import Task, induction
from lens.tasks.metrics import METRICS, AnswerSets
from tests.lens.architectures import build

N, LENGTH, ANSWERS, VOCAB = 3, 7, 2, 11
SETS = AnswerSets(
    right=torch.tensor([[[1, 2], [3, -1]], [[4, 5], [6, 7]], [[8, -1], [9, 10]]]),
    wrong=torch.tensor(
        [[[3, 4, 5], [0, -1, -1]], [[0, 1, -1], [2, 3, 10]], [[7, 6, 5], [4, -1, -1]]]
    ),
)


@pytest.fixture(scope="module")
def toy():
    return lens.load("induction-2l")


def make(metric="probability_difference", **changes):
    fields = {
        "name": "made",
        "clean": torch.arange(N * LENGTH).reshape(N, LENGTH),
        "positions": torch.tensor([[2, 6], [0, 3], [5, 1]]),
        "correct": SETS.right[..., 0],
        "metric": metric,
        "sets": SETS,
    }
    return Task(**fields | changes)


def ids(row):
    return [index for index in row.tolist() if index >= 0]


def spelled_out(read, right, wrong):
    """Every metric of one answer, by loops."""
    weights = [math.exp(value) for value in read.tolist()]
    shares = [weight / sum(weights) for weight in weights]
    return {
        "probability_difference": sum(shares[i] for i in right) - sum(shares[i] for i in wrong),
        "max_logit_difference": max(float(read[i]) for i in right)
        - max(float(read[i]) for i in wrong),
        "loss": -math.log(sum(shares[i] for i in right)),
        "accuracy": float(max(range(VOCAB), key=lambda i: shares[i]) in right),
    }


def test_metrics_of_sets_equal_their_definition():
    logits = torch.randn(N, LENGTH, VOCAB, generator=torch.Generator().manual_seed(2)).double()
    logits[1, 0, 5] = 6  # a right token, not the first of its set, is the most likely
    order = torch.tensor([2, 0, 1])
    for metric in ("probability_difference", "max_logit_difference", "loss", "accuracy"):
        task = make(metric)
        expected = []
        for row in order.tolist():
            parts = [
                spelled_out(
                    logits[row, task.positions[row, answer]],
                    ids(SETS.right[row, answer]),
                    ids(SETS.wrong[row, answer]),
                )[metric]
                for answer in range(ANSWERS)
            ]
            expected.append(sum(parts) / ANSWERS)
        found = task.measure(logits[order], order)
        assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert metric == "accuracy" or found.dtype == torch.float64
        assert task.sign == METRICS[metric] == (-1 if metric == "loss" else 1)
    assert expected[2] >= 0.5


@pytest.mark.parametrize("metric", ["probability_difference", "max_logit_difference", "loss"])
def test_metrics_of_sets_can_be_differentiated(metric):
    logits = torch.randn(N, LENGTH, VOCAB, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: make(metric).measure(x, torch.arange(N)), logits, eps=1e-6
    )


def test_kl_is_zero_and_flat_at_the_model_and_equals_its_definition_elsewhere(toy):
    task = induction(toy, n=5, seed=1, length=7).with_kl(toy)
    assert task.is_flat
    assert not task.with_metric("loss").is_flat
    assert task.sign == -1
    assert task.evaluate(toy).abs().max() < 1e-6
    rows = torch.arange(task.n)
    logits = toy.model(task.clean).logits.detach()
    other = (
        logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    ).double()
    expected = torch.stack(
        [
            torch.nn.functional.kl_div(
                other[row, place].log_softmax(-1),
                logits[row, place].double().log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
            for row, place in enumerate(task.positions)
        ]
    )
    torch.testing.assert_close(task.measure(other, rows), expected, rtol=1e-5, atol=1e-7)
    assert (expected > 0.1).all()
    logits.requires_grad_()
    at_model = torch.autograd.grad(task.measure(logits, rows).sum(), logits)[0].norm()
    other.requires_grad_()
    elsewhere = torch.autograd.grad(task.measure(other, rows).sum(), other)[0].norm()
    assert at_model < 1e-5 < 0.1 < elsewhere


def test_kl_of_an_ablation_is_never_negative_and_finds_the_known_head(toy):
    task = induction(toy, n=6, seed=0).with_kl(toy)
    scores = importance(toy, task, baseline="zero", progress=False)
    assert scores.per_prompt.min() > -1e-5
    assert str(scores.top(1)[0]) == "L0H1"
    for by in ("gradient", "attribution"):
        with pytest.raises(LensError, match=f"'kl' is at its best .* method='{by}' says nothing"):
            importance(toy, task, method=by, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sets": None}, "'probability_difference' compares sets of answers; give sets"),
        (
            {"sets": AnswerSets(SETS.right[:2], SETS.wrong[:2])},
            r"sets must be of the \[3, 2\] prompts and answers; got \[2, 2\]",
        ),
        ({"metric": "kl"}, r"make such a task with task.with_kl\(model\)"),
        ({"reference": torch.zeros(N, ANSWERS, VOCAB)}, "belongs to the metric 'kl' and to no"),
        ({"marks": {"end": torch.tensor([0, 1])}}, "the mark 'end' must be one position of 0 to 6"),
        ({"marks": {"end": torch.tensor([0, 1, 7])}}, "the mark 'end' must be one position"),
    ],
)
def test_tasks_that_lack_something_are_refused(changes, message):
    with pytest.raises(LensError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ([[[1]]], [[[2]], [[3]]], r"wrong has the shape \[2, 1, 1\]"),
        ([[1]], [[[2]]], r"right has the shape \[1, 1\]"),
        ([[[-1]]], [[[2]]], "every answer needs a right token"),
        ([[[1]]], [[[-1, -1]]], "every answer needs a wrong token"),
        ([[[1, 2]]], [[[3, 2]]], "among the right and among the wrong answers"),
    ],
)
def test_sets_that_are_none_are_refused(right, wrong, message):
    with pytest.raises(LensError, match=message):
        AnswerSets(torch.tensor(right), torch.tensor(wrong))


@pytest.mark.parametrize("answer", [-1, -100, 10**6])
def test_answers_that_are_no_tokens_are_refused(toy, answer):
    """-100 is what PyTorch's loss passes over: every prompt had a loss of 0."""
    clean = torch.arange(6).reshape(2, 3)
    task = Task("made", clean, torch.full((2, 1), 2), torch.tensor([[1], [answer]]), "loss")
    with pytest.raises(LensError, match=f"has the answer {answer}, and token ids"):
        task.evaluate(toy)


def test_other_refusals(toy, monkeypatch):
    task = induction(toy, n=2, length=5)
    with pytest.raises(LensError, match=r"make it anew: task.with_kl\(model\)"):
        task.with_kl(toy).measure(torch.zeros(2, task.length, 9), torch.arange(2))
    with pytest.raises(LensError, match="reads no tokens"):
        task.with_kl(lens.load(build("vit")))
    monkeypatch.setattr("lens.tasks.task._REFERENCE", 400)
    with pytest.raises(LensError, match=r"8 answers over 65 tokens are too many .* at most 6"):
        task.with_kl(toy)
