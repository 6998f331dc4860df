"""What is drawn for a head, a prompt or a control is the same, whatever else is asked for beside it."""

import numpy as np
import pytest

import lens
from lens.circuits.patches import streams
from lens.edits import Ablate, Mask
from lens.sinks.detection.conditions import control_prompts
from lens.stats.controls import drawing

HEADS = ["L0H0", "L0H1", "L1H2"]


@pytest.fixture(scope="module")
def model():
    return lens.load("induction-2l")


@pytest.fixture(scope="module")
def prompts(model):
    return [lens.tasks.copied(model, 9, seed) for seed in range(3)]


def test_draws_hang_on_seed_and_names_alone():
    first = drawing(3, 1, "mass").random(5)
    assert drawing(3, 1, "mass").random(5) == pytest.approx(first)
    others = [drawing(4, 1, "mass"), drawing(3, 2, "mass"), drawing(3, 1, "size"), drawing(3, 1)]
    assert all(not np.isclose(one.random(5), first).any() for one in others)
    assert drawing(3, np.int64(1), "mass").random(5) == pytest.approx(first)
    nothing = [drawing(3, *[0] * zeros).random() for zeros in range(3)]
    assert len(set(nothing)) == 3


def test_a_text_and_its_ids_have_the_same_draws():
    model = lens.load("text-lm-3l")
    text = "Call me Ishmael. Some years ago"
    asked = {"sizes": [1.0], "draws": 2, "progress": False}
    one, other = (
        lens.reading.perturb(model, prompt, ["L2H1"], **asked)
        for prompt in (text, model.encode(text))
    )
    assert one.random == pytest.approx(other.random, abs=1e-7)
    assert abs(one.random).max() > 1e-4


def test_the_other_row_of_a_head_is_its_own(model, prompts):
    every = lens.reading.adversary(model, prompts, HEADS, draws=3, progress=False)
    alone = lens.reading.adversary(model, prompts[2], HEADS[2:], draws=3, progress=False)
    assert every.other[2][2] == pytest.approx(alone.other[0][0], abs=0)
    assert not np.allclose(every.other[2][2], every.attention[2][2])


@pytest.mark.parametrize("along", ["logits", "pairs"])
def test_random_changes_of_a_head_are_its_own(model, prompts, along):
    asked = {"along": along, "sizes": [1.0], "draws": 2, "progress": False}
    every = lens.reading.perturb(model, prompts, HEADS, **asked)
    alone = lens.reading.perturb(model, prompts[2], HEADS[2:], **asked)
    assert every.random[2, 0, 2] == pytest.approx(alone.random[0, 0, 0], abs=1e-6)
    assert abs(alone.random[0, 0, 0]) > 1e-4


@pytest.mark.parametrize("edit", [Mask([0, 4], heads=["L1H0"]), Ablate("L1H0", "zero")])
def test_controls_of_a_prompt_are_their_own(model, prompts, edit):
    asked = {"draws": 2, "progress": False}
    every = lens.effect(model, prompts, edit, controls=("size", "mass", "layer"), **asked)
    for control in ("size", "mass", "layer"):
        alone = lens.effect(model, prompts[2], edit, controls=control, **asked)
        values = [found.values[control]["delta_loss"][0] for found in (every, alone)]
        assert values[0][2] == pytest.approx(values[1][0], abs=1e-6)


def test_orders_drawn_beside_faithfulness_are_of_their_prompt(model, prompts):
    every, alone = (
        lens.reading.faithfulness(model, one, ["raw"], draws=3, progress=False)
        for one in (prompts, prompts[2])
    )
    assert every.drawn[:, 2] == pytest.approx(alone.drawn[:, 0], abs=1e-6)


def test_heads_masked_at_random_are_those_of_their_number(model):
    trials = lens.tasks.needles.copied(model, n=3, length=24)
    every, alone = (
        lens.reading.retrieval(model, trials, masked=masked, draws=2, needed=0, progress=False)
        for masked in ([1, 2], [2])
    )
    assert every.random[1] == pytest.approx(alone.random[0])


def test_random_control_prompts_are_of_their_prompt(model, prompts):
    every, alone = (control_prompts(model, one)["random"] for one in (prompts, prompts[2:]))
    assert every[2] == alone[0]
    assert every[0] != every[1]


def test_noise_is_the_same_however_many_prompts_run_together(model, monkeypatch):
    task = lens.tasks.induction(model, 4)
    asked = {"positions": "each", "noise": 2.0, "progress": False}
    together = lens.circuits.patch(model, task, "residual", **asked)
    monkeypatch.setattr(streams, "_ROWS", 3)
    apart = lens.circuits.patch(model, task, "residual", **asked)
    assert together.effects == pytest.approx(apart.effects, abs=1e-4)
    assert np.abs(together.effects).max() > 0.1
