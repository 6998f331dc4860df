"""The embedded models' known heads: which measure finds them, and which one cannot.

Numbers come from the models' own pages, measured on another sample of prompts: losses agree within a
tenth of a nat where they are below 1, else within a fifth.
"""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.heads import agreement, importance
from lens.heads.pruning import ablate
from lens.tasks import induction, language_modelling

INDUCTION_HEADS = ("L1H0", "L1H2", "L1H3")
LOSS_WITHOUT = {  # loss on the second copy: by zero, by the mean over prompts
    "L0H1": (4.156, 4.160),
    "L0H0": (0.144, 0.144),
    "L0H2": (0.487, 0.506),
    "L0H3": (0.142, 0.142),
    "L1H0": (0.191, 0.205),
    "L1H1": (0.410, 0.146),
    "L1H2": (0.362, 0.396),
    "L1H3": (0.717, 0.391),
}


@pytest.fixture(scope="module")
def toy():
    return lens.load("induction-2l")


@pytest.fixture(scope="module")
def copying(toy):
    return induction(toy, n=64, seed=0)


@pytest.fixture(scope="module")
def by_mean(toy, copying):
    return importance(toy, copying, baseline="mean", progress=False)


@pytest.fixture(scope="module")
def by_zero(toy, copying):
    return importance(toy, copying, baseline="zero", progress=False)


def close(loss):
    return pytest.approx(loss, abs=0.1 if loss < 1 else 0.2)


def losses(scores):
    """Loss without each head, by name."""
    without = scores.clean.mean() + scores.values
    return dict(zip(scores.names, without.ravel(), strict=True))


def test_the_losses_without_each_head_of_induction_2l(by_zero, by_mean):
    for column, scores in enumerate((by_zero, by_mean)):
        found = losses(scores)
        assert {head: found[head] for head in LOSS_WITHOUT} == {
            head: close(known[column]) for head, known in LOSS_WITHOUT.items()
        }


def test_l1h1_matters_by_zero_and_not_by_mean(by_zero, by_mean):
    assert by_zero.values[1, 1] > 0.2 > 20 * by_zero.stderr[1, 1]
    assert abs(by_mean.values[1, 1]) < 0.02


def test_the_previous_token_head_comes_first_by_every_ablation(toy, copying, by_zero, by_mean):
    others = [
        importance(toy, copying, baseline=name, progress=False)
        for name in ("pooled_mean", "resample", "counterfactual")
    ]
    for scores in (by_zero, by_mean, *others):
        assert str(scores.top(1)[0]) == "L0H1"
        assert abs(scores.values[0, 3]) < 0.01  # the head that does nothing


def test_the_gradient_misses_the_previous_token_head(toy, copying):
    """The softmax of the induction heads is saturated: a small change of L0H1 changes nothing.

    It is worth 4 nats by ablation, and less than a fiftieth by first order, for zero as for the
    counterfactual.
    """
    for by in ("gradient", "attribution"):
        scores = importance(toy, copying, method=by, progress=False)
        assert abs(scores.values[0, 1]) < 0.08


def test_induction_heads_hide_each_other(toy, copying, by_mean):
    """Alone each costs at most 0.25 nats; together they cost all of copying."""
    together = ablate(toy, copying, heads=INDUCTION_HEADS, baseline="mean", progress=False)
    assert together.ablated.mean() == close(4.271)
    alone = [by_mean.values[head] for head in together.heads]
    assert max(alone) < 0.3
    assert together.interaction(by_mean) == pytest.approx(together.value - sum(alone))
    assert together.interaction(by_mean) > 3
    low, high = together.interval()
    assert 3.5 < low < together.value < high < 4.5
    assert repr(together).startswith(
        "GroupAblation(L1H0+L1H2+L1H3 by mean on 'induction', induction-2l: loss 0.137 -> "
    )


def test_one_prompt_tells_nothing_of_a_group_beside_its_heads(toy, copying):
    one = copying.take(torch.tensor([0]))
    together = ablate(toy, one, heads=INDUCTION_HEADS, baseline="zero", progress=False)
    alone = importance(toy, one, method="ablation", baseline="zero", progress=False)
    (said,) = together.findings(alone)
    assert said.endswith("one prompt tells nothing of single heads beside the group.")


def test_the_four_heads_of_the_circuit_copy_alone(toy, copying):
    rest = ["L0H0", "L0H2", "L0H3", "L1H1"]
    without = ablate(toy, copying, heads=rest, baseline="mean", progress=False)
    assert without.ablated.mean() == close(0.993)
    right = ablate(
        toy, copying.with_metric("accuracy"), heads=rest, baseline="mean", progress=False
    )
    assert right.ablated.mean() == pytest.approx(0.852, abs=0.05)
    assert right.value == pytest.approx(right.clean.mean() - right.ablated.mean())
    assert right.value > 0  # less accuracy is worse, as more loss is


def test_a_group_of_one_is_the_head_alone(toy, copying, by_mean):
    single = ablate(toy, copying, heads=["L1H2"], baseline="mean", progress=False)
    np.testing.assert_allclose(single.per_prompt, by_mean.per_prompt[1, 2], atol=1e-5)
    assert abs(single.interaction(by_mean)) < 1e-6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero", "differ in intervention"),
        ("gradient", "differ in method"),
        ("other", "differ in clean"),
    ],
)
def test_a_group_is_not_compared_with_other_measurements(toy, copying, by_zero, name, message):
    together = ablate(toy, copying, heads=["L1H0", "L1H2"], baseline="mean", progress=False)
    if name == "zero":
        other = by_zero
    elif name == "gradient":
        other = importance(toy, copying, method="gradient", progress=False)
    else:
        other = importance(toy, induction(toy, n=64, seed=1), progress=False)
    with pytest.raises(LensError, match=message):
        together.interaction(other)


def test_what_matters_depends_on_the_task():
    """text-lm-3l: L1H3 is needed for copying and not for text; L1H0, the strongest sink, for neither."""
    model = lens.load("text-lm-3l")
    copying = induction(model, n=32, length=50)
    held_out = lens.tasks.text("moby-dick")
    text = language_modelling(model, held_out, length=96, n=8)
    on_copies = importance(model, copying, progress=False)
    on_text = importance(model, text, progress=False)
    found = losses(on_copies)
    known = {"L0H0": 6.13, "L0H1": 5.05, "L0H2": 5.42, "L0H4": 1.23, "L1H0": 0.323,
             "L1H2": 1.77, "L1H3": 5.12, "L1H5": 2.43}  # fmt: skip
    assert {head: found[head] for head in known} == {
        head: pytest.approx(loss, abs=0.35) for head, loss in known.items()
    }
    assert on_copies.values[1, 3] > 4
    assert abs(on_text.values[1, 3]) < 0.03
    assert abs(on_copies.values[1, 0]) < 0.02
    assert abs(on_text.values[1, 0]) < 0.02
    assert on_text.values[0, 2] == pytest.approx(4.73 - 2.93, abs=0.35)
    assert np.abs(on_text.values[1:]).max() < 0.1 < on_text.values[0].min()
    together = agreement(on_copies, on_text).table().iloc[0]
    assert together["tau"] < 0.6
