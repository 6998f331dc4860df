"""Tasks and needles under policies, paired with dense runs on the same prompts."""

from typing import Any, cast

import numpy as np
import pytest
import torch

import lens
from lens import policies
from lens.common.results import of_kind
from lens.tasks.needles import Trial, answered, copied

NEAR = policies.AShape(2, 8)


@pytest.fixture(scope="module")
def model():
    return lens.load("text-lm-3l")


@pytest.fixture(scope="module")
def task(model):
    ids = model.encode(lens.tasks.text("moby-dick"))
    return lens.tasks.language_modelling(model, [ids[at : at + 64] for at in range(0, 512, 64)])


def test_metric_and_divergence_are_those_of_an_edited_run(model, task):
    found = policies.run(model, task, [NEAR, policies.Full()], block_size=8)
    with lens.edit(model):
        dense = task.evaluate(model)
        reference = task.with_kl(model)
        plain = model.logits(task.prompts[0])
    with lens.edit(model, lens.edits.Sparse(NEAR, 8)) as (done,):
        sparse = task.evaluate(model)
        kl = reference.evaluate(model)
        cut = model.logits(task.prompts[0])
    assert np.array_equal(found.dense, dense)
    assert np.allclose(found.sparse[0], sparse, atol=1e-6)
    assert np.allclose(found.kl[0], kl, atol=1e-6)
    assert found.density[0] == pytest.approx(done.density)
    p, q = plain[:-1].double().log_softmax(-1), cut[:-1].double().log_softmax(-1)
    assert found.kl[0, 0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert np.array_equal(found.sparse[1], found.dense)  # keeping all: bit by bit
    assert (found.kl[1] == 0).all()
    table = found.table()
    assert table["change"][0] == pytest.approx(float((sparse - dense).mean()), abs=1e-6)
    assert table["change_low"][0] <= table["change"][0] <= table["change_high"][0]
    said = of_kind(found.findings(), "change")
    assert said[0].startswith("Under AShape(first=2, last=8), with ")
    assert "(worse)" in said[0]
    assert "(worse)" not in said[1]


def test_one_prompt_is_told_to_tell_nothing_apart(model, task):
    alone = policies.run(model, task.take(torch.tensor([0])), NEAR, block_size=8, progress=False)
    (said,) = of_kind(alone.findings(), "change")
    assert "(one prompt tells nothing apart)" in said


def test_a_context_before_the_question_stays_dense(model, task):
    late = policies.run(model, task, NEAR, block_size=8, question=16)
    whole = policies.run(model, task, NEAR, block_size=8)
    with lens.edit(model, lens.edits.Sparse(NEAR, 8, first_row=48)):
        expected = task.evaluate(model)
    assert np.allclose(late.sparse[0], expected, atol=1e-6)
    assert abs(late.table()["change"][0]) < abs(whole.table()["change"][0])
    assert "The last 16 tokens of each prompt" in of_kind(late.findings(), "limit")[0]
    with pytest.raises(lens.LensError, match="question is 64 tokens, and a prompt has 64"):
        policies.run(model, task, NEAR, question=64)


def test_prompts_of_several_lengths_run_as_they_are_alone(model):
    ids = model.encode(lens.tasks.text("moby-dick"))
    mixed = lens.tasks.Task(
        name="mixed",
        clean=torch.tensor([ids[:40], [*ids[100:130], *[0] * 10]]),
        positions=torch.tensor([[38], [28]]),
        correct=torch.tensor([[ids[39]], [ids[129]]]),
        metric="loss",
        lengths=torch.tensor([40, 30]),
    )
    lines = policies.VerticalSlash(2, 2, first=1, last=1, probe=4)
    found = policies.run(model, mixed, lines, block_size=4)
    for place, own in enumerate((ids[:40], ids[100:130])):
        alone = lens.tasks.Task(
            name="alone", clean=torch.tensor([own]), positions=torch.tensor([[len(own) - 2]]),
            correct=torch.tensor([[own[-1]]]), metric="loss",
        )  # fmt: skip
        assert found.sparse[0, place] == pytest.approx(
            policies.run(model, alone, lines, block_size=4).sparse[0, 0], abs=1e-5
        )


def test_needles_come_back_where_the_policy_lets_heads_see_them():
    model = lens.load("induction-2l")
    trials = copied(model, n=6, length=30, needle=4)
    far = policies.AShape(1, 2)
    found = policies.run(model, trials, [far, policies.Full()], block_size=1)
    assert found.metric == "needle recall"
    assert found.dense.mean() > 0.5
    assert np.array_equal(found.sparse[1], found.dense)
    assert found.sparse[0].mean() < found.dense.mean() - 0.5
    assert np.isnan(found.kl).all()
    assert "KL" not in found.findings()[0]
    heads = lens.heads.retrieval(model, trials, progress=False)
    (best, *_) = heads.heads()
    only = policies.PerHead({best: policies.Full()}, far)
    kept = policies.run(model, trials, only, block_size=1)
    assert kept.density[0] > found.density[0]
    with lens.edit(model, lens.edits.Sparse(far, 1)):
        answer = answered(model, trials[0])
    assert found.sparse[0, 0] == trials[0].recall(answer) < 1


def test_what_is_no_task_is_refused(model):
    for given in ([], ["text"], [Trial((1, 2, 3), (1, 2), 0.5), 3]):
        with pytest.raises(lens.LensError, match="task must be"):
            policies.run(model, cast(Any, given), NEAR)
