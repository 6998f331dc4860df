"""Gain and side effects of an edit over its amount: those of the functions that measure one of them."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.edits.doses import Dose
from lens.edits.side_effects import SideEffects
from lens.tasks.task import Task
from tests.lens.architectures import build

AMOUNTS = (1.0, 0.0, 0.4)  # not in order


def a_setting():
    torch.manual_seed(0)
    model = lens.load(build("llama"))
    ids = torch.randint(3, 97, (5, 17), generator=torch.Generator().manual_seed(2))
    held_out = [row.tolist() for row in ids[:3, :13]]

    def edit(amount):
        return lens.edit(model, lens.edits.Mask("first", amount))

    return model, ids, held_out, edit


def a_task(ids, metric):
    return Task(
        name="next",
        clean=ids[:, :-1],
        positions=torch.full((5, 1), 15),
        correct=ids[:, -1:],
        wrong=ids[:, :1] if metric == "logit_difference" else None,
        metric=metric,
    )


@pytest.mark.parametrize("metric", ["loss", "logit_difference"])
def test_gains_are_those_of_the_task_and_costs_those_of_held_out_text(metric):
    model, ids, held_out, edit = a_setting()
    task = a_task(ids, metric)
    found = lens.edits.dose(model, task, edit, held_out=held_out, amounts=AMOUNTS)
    side = lens.edits.side_effects(model, held_out, edit, amounts=AMOUNTS)
    assert found.amounts == (0.0, 0.4, 1.0)
    for name, values in side.values.items():
        assert np.array_equal(found.held_out.values[name], values)
    own = model.model(ids[:, :-1]).logits[:, -1].detach()
    with edit(1.0), torch.no_grad():
        edited = model.model(ids[:, :-1]).logits[:, -1]
    if metric == "loss":
        own, edited = own.log_softmax(-1), edited.log_softmax(-1)
    change = edited - own
    expected = change.gather(1, ids[:, -1:])[:, 0]
    if metric == "logit_difference":
        expected = expected - change.gather(1, ids[:, :1])[:, 0]
    assert found.gains[2] == pytest.approx(expected.numpy(), abs=1e-5)
    assert (found.gains[0] == 0).all()
    assert np.abs(found.gains[2]).max() > 1e-4
    table = found.table()
    assert table["gain"].tolist() == pytest.approx(found.gains.mean(1).tolist())
    assert table["n"].tolist() == [5] * 3
    assert table["held_out_n"].tolist() == [3] * 3
    assert ((table["gain_low"] <= table["gain"]) & (table["gain"] <= table["gain_high"])).all()
    assert f"gains most in {metric} of next" in found.findings()[0]
    assert "On 3 held-out prompts" in found.findings()[1]
    figure = found.plot("kl")
    assert list(figure.data[0].y) == pytest.approx(table["gain"].tolist())
    assert list(figure.data[1].y) == pytest.approx(table["kl"].tolist())
    with pytest.raises(
        LensError, match="measure must be one of delta_loss, kl, flip_rate, got 'x'"
    ):
        found.plot("x")


def test_of_prompts_the_loss_is_the_metric():
    model, ids, held_out, edit = a_setting()
    prompts = [row.tolist() for row in ids]
    found = lens.edits.dose(model, prompts, edit, held_out=held_out, amounts=(0.5, 1.0))
    known = lens.edits.side_effects(model, prompts, edit, amounts=(0.5, 1.0))
    assert np.array_equal(found.gains, -known.values["delta_loss"])
    assert found.gains.shape == (2, 5)
    assert found.metric == "loss"
    with pytest.raises(LensError, match=r"at least one; got \[1, 1\]"):
        lens.edits.dose(model, prompts, edit, held_out=held_out, amounts=(1, 1))


def test_the_sentence_names_the_amount_that_gains_most_and_what_that_one_costs():
    """The middle amount gains most; the last gains least and costs most."""
    gains = np.array([[0.1, 0.1, 0.1], [0.5, 0.7, 0.6], [-0.2, -0.4, -0.3]])
    costs = np.array([[0.01, 0.01], [0.02, 0.04], [0.9, 0.9]])
    values = {"delta_loss": costs, "kl": costs, "flip_rate": costs}
    side = SideEffects(
        amounts=(0.25, 0.5, 1.0), values=values, tokens=(9, 9), model="made-up", seed=0
    )
    gain, cost = Dose(gains, side, "accuracy", "toy").findings()
    assert (gain.kind, cost.kind) == ("gain", "cost")
    assert gain == (
        "Of 3 amounts 0.5 gains most in accuracy of toy: +0.6000 [+0.5000, +0.7000] on 3 prompts (above 0). "
        "It was chosen on these prompts, which flatters it."
    )
    assert cost == (
        "On 2 held-out prompts that amount changes the loss by +0.0300 [+0.0200, +0.0400] nats per token and "
        "3.0% of the top tokens."
    )
