"""Every result about sinks says what it found and draws its own numbers."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lens
from lens.common.results import of_kind
from lens.edits import Ablate, Activation, Bias, Drop, Mask
from lens.edits._others import keys_of_mass
from lens.edits.clean_runs import CleanRuns
from lens.edits.controls import OfCoordinates
from lens.edits.effect_results import Effect
from lens.figures.sink_heads import reach_points
from lens.sinks import bands, gates
from lens.stats import over_units
from lens.stats.verdicts import verdict
from tests.lens.architectures import build

IDS = torch.randint(3, 97, (2, 29), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model():
    return lens.load(build("llama"))


@pytest.fixture(scope="module")
def clean(model):
    return CleanRuns(model)


def _drawn(result: Any) -> Any:
    return result.plot().data


def test_dose_in_words(model, clean):
    result = lens.effect(model, IDS, Mask(), amounts=(0.5, 1.0), controls=("mass",), clean=clean)
    found = {sentence.kind: str(sentence) for sentence in result.findings()}
    half, whole = result.values["edit"]["delta_loss"].mean(1)
    assert f"0.5: {half:+.4f}" in found["dose"]
    assert f"1: {whole:+.4f}" in found["dose"]
    steps = np.diff(result.values["edit"]["delta_loss"], axis=0).T
    ends = (float(end[0]) for end in over_units(steps, np.ones_like(steps), result.seed))
    way = {"above": "grows", "below": "falls"}.get(verdict(*ends), "is not told to grow or to fall")
    assert found["trend"] == f"The loss {way} with every step of the amount."
    assert "the control of equal mass" in found["mass"]
    kinds = {one.kind for one in lens.effect(model, IDS, Mask(), clean=clean).findings()}
    assert not kinds & {"dose", "trend"}


def test_reaches_are_drawn(model, clean):
    reaches = {"head": Mask(heads=["L1H4"]), "from_layer": Mask(layers=[1, 2])}
    tables = [
        lens.effect(model, IDS, one, controls=("mass",), clean=clean).table().assign(reach=name)
        for name, one in reaches.items()
    ]
    table: Any = pd.concat(tables, ignore_index=True)
    sources, mass = reach_points(table).data
    table = table.set_index("condition")
    assert sources.x.tolist() == table.loc["edit", "delta_loss"].tolist()
    assert mass.x.tolist() == table.loc["mass", "delta_loss"].tolist()
    assert tuple(sources.y) == ("L1H4 (head)", "layers 1 to 2 (from_layer)")


def test_gates_and_bands_are_drawn(model):
    found = gates(model, IDS)
    drawn = {trace.name: trace.y.tolist() for trace in _drawn(found)}
    for mechanism, rows in found.rows.groupby("mechanism"):
        assert drawn[mechanism] == rows["gate"].tolist()
    spectrum = bands(model, IDS, count=3)
    assert spectrum.losses is not None
    assert _drawn(spectrum.losses)[0].y.tolist() == spectrum.losses.table()["delta_loss"].tolist()
    lines = {trace.name: trace.y.sum() for trace in _drawn(spectrum)}
    whole = dict.fromkeys(("query", "key", "value", "output", "by chance"), 1)
    assert lines == pytest.approx(whole)


def test_a_mass_control_that_holds_too_little_is_no_comparison():
    def effect(mass):
        shown = {"delta_loss": 0.2, "kl": 0.1, "flip_rate": 0.5, "keys": 1.0}
        values = {
            name: {key: np.full((1, 3), value) for key, value in (shown | {"mass": held}).items()}
            for name, held in (("edit", 0.9), ("mass", mass))
        }
        values["mass"]["delta_loss"] = np.array([[0.1, 0.2, 0.3]])
        nothing = pd.DataFrame({"other_before": [0.0], "other_after": [0.0]})
        return Effect(values, nothing, (), "Mask first", (1.0,), "L1H0", (9, 9, 9), "added", 0)

    assert any(
        "not clearly unlike the control of equal mass" in text for text in effect(0.8).findings()
    )
    said = effect(0.1).findings()
    assert any(
        "no control of equal mass to compare with" in text and "10.0%" in text for text in said
    )
    assert not any("unlike the control of equal mass" in text for text in said)
    small = replace(
        effect(0.18), values=effect(0.18).values | {"edit": effect(0.02).values["mass"]}
    )
    said = " ".join(small.findings())
    assert "those nearest to 2.0% hold too much, 18.0% of the attention together" in said
    assert "unlike the control of equal mass" not in said


def test_keys_of_equal_mass_leave_out_those_that_hold_too_much():
    drawn, mass = np.array([0, 1, 2, 3]), np.array([0.18, 0.01, 0.03, 0.012])
    assert keys_of_mass(drawn, mass, 0.02) == [1, 3]  # the first holds nine times that
    assert keys_of_mass(drawn, mass, 0.045) == [1, 2]
    assert keys_of_mass(drawn, mass, 0.048) == [1, 2, 3]  # 0.012 more are nearer than 0.008 less
    assert keys_of_mass(drawn, mass, 0.9) == [0, 1, 2, 3]
    assert keys_of_mass(drawn, mass, 0.004) == [1]  # none brings it nearer than nothing does


def test_an_effect_is_told_at_the_amount_furthest_from_what_changes_nothing(model):
    found = lens.effect(model, IDS, Bias("first", -2.0), amounts=[0, -4, -2], controls=())
    (said,) = of_kind(found.findings(), "effect")
    row = found.table().iloc[0]
    assert row["amount"] == -4
    assert row["delta_loss"] != 0
    assert f"(amount -4) of all heads changes the loss by {row['delta_loss']:.4f}" in said
    assert not of_kind(found.findings(), "moved")[0].startswith("In 0 of 8")
    both = lens.effect(model, IDS, Bias("first", -2.0), amounts=[-2, 1], controls=())
    assert "(amount -2)" in both.findings()[0]


def test_edits_that_differ_by_prompt_and_in_amount_are_said_one_by_one(model):
    def last(prompt):
        return Mask([len(prompt.ids) - 3])

    found = lens.effect(model, [IDS[0], IDS[1][:20]], last, controls=())
    assert found.edit == f"Mask [{len(IDS[0]) - 3}] or Mask [17] by prompt"
    assert "by prompt (amount 1) of all heads" in found.findings()[0]
    same = lens.effect(model, [IDS[0], IDS[1]], last, controls=())
    assert same.edit == f"Mask [{len(IDS[0]) - 3}]"
    several = lens.effect(model, IDS, [Mask("first", 0.5), Drop([3], 1.0)], controls=())
    assert several.findings()[0].startswith(
        "Edit Mask first (amount 0.5) and Drop [3] (amount 1) of all heads"
    )
    assert np.isnan(several.table()["amount"]).all()
    alike = lens.effect(model, IDS, [Mask("first", 0.5), Drop([3], 0.5)], controls=())
    assert alike.findings()[0].startswith("Edit Mask first and Drop [3] (amount 0.5) of all heads")
    without = lens.effect(model, IDS, Ablate("L1H0"), controls=())
    assert without.findings()[0].startswith("Edit Ablate to zero of L1H0")


def test_a_printed_result_is_its_name_and_first_findings(model):
    found = gates(model, IDS)
    lines = repr(found).split("\n")
    assert lines[0] == "EffectiveGates"
    assert tuple(line.strip() for line in lines[1:]) == found.findings()
    result = lens.effect(model, IDS, Mask(), controls=("mass",))
    lines = repr(result).split("\n")
    assert lines[1].strip() == result.findings()[0]
    assert lines[-1].strip() == f"... {len(result.findings()) - 4} more in .findings()"


def a_whole_effect(**fields):
    """Two amounts on three prompts: twice as much, and a mass control that does more."""
    one = np.ones((1, 3))
    amounts = np.array([[1.0], [2.0]])
    edit = {"delta_loss": amounts * [0.19, 0.2, 0.21], "kl": amounts * one * 0.05}
    edit |= {
        "flip_rate": amounts * one * 0.25,
        "keys": amounts * 0 + one,
        "mass": 0 * amounts + 0.5,
    }
    values = {"edit": edit, "mass": edit | {"delta_loss": edit["delta_loss"] + 0.4}}
    moved = pd.DataFrame({"other_before": [0.1, 0.1, 0.4], "other_after": [0.3, 0.1, 0.4]})
    given = {"edit": "Mask first", "amounts": (0.5, 1.0), "scope": "L1H0", "tokens": (9, 9, 12)}
    given |= {"bos": "added", "seed": 0, "alphas": (), "migration": moved, "values": values}
    return Effect(**(given | fields))


def test_the_sentences_of_an_effect():
    said = a_whole_effect(missing={"norm": "keys have no dimension"}).findings()
    assert [(one.kind, one.text) for one in said] == [
        (
            "effect",
            "Edit Mask first (amount 1) of L1H0 changes the loss by 0.4000 [0.3462, 0.4538] nats per token.",
        ),
        (
            "prediction",
            "The prediction moves by a KL of 0.1000 [0.1000, 0.1000] nats, and 50.0% of the most likely "
            "tokens change; 50% of the edited heads' attention lay there.",
        ),
        (
            "dose",
            "By amount the loss changes by (nats per token) 0.5: +0.2000 [+0.1731, +0.2269]; "
            "1: +0.4000 [+0.3462, +0.4538].",
        ),
        ("trend", "The loss grows with every step of the amount."),
        ("norm", "There is no norm control: keys have no dimension."),
        (
            "mass",
            "That is less than the control of equal mass (50% of the attention): the difference is "
            "-0.4000 [-0.4000, -0.4000] nats.",
        ),
        ("moved", "In 1 of 3 heads another key's alpha rose by more than 0.1."),
        (
            "limit",
            "Attention moved to the next sink, so a small change of loss does not show that sinks are of no "
            "use.",
        ),
        (
            "limit",
            "Measured on 3 prompts of 9 to 12 tokens, BOS added; intervals are 95 % over prompts.",
        ),
    ]


def test_heads_whose_attention_after_is_not_known_are_not_counted_as_unmoved():
    moved = pd.DataFrame({"other_before": [0.1, 0.1], "other_after": [0.12, np.nan]})
    said = {one.kind: str(one) for one in a_whole_effect(migration=moved).findings()}
    assert said["moved"] == (
        "In 0 of 1 heads another key's alpha rose by more than 0.1. In 1 others it is not known."
    )


@pytest.mark.parametrize("condition", ["size", "position"])
def test_controls_of_an_activation_set_its_value_elsewhere(model, condition):
    one = Activation(1, [0, 1], [3, 8], 20.0)
    kind = OfCoordinates(model, [one])
    case: Any = SimpleNamespace(
        random=np.random.default_rng(0),
        before=SimpleNamespace(received=torch.zeros(*kind.chosen.shape, 29)),
        free=torch.zeros(3, 29, dtype=torch.bool),
    )
    (control,) = kind.trial(condition, case).edits
    assert isinstance(control, Activation)
    assert control.value == 20
    moved = condition == "position"
    assert list(control.places) == ([2, 3] if moved else [0, 1])
    assert (set(control.dims) == {3, 8}) == moved


def test_the_sentences_of_an_effect_follow_the_data():
    """A loss that falls, a control that does less, no other key that rises, no mass to speak of."""
    whole = a_whole_effect()
    turned = {name: dict(values) for name, values in whole.values.items()}
    turned["edit"]["delta_loss"] = -turned["edit"]["delta_loss"]
    turned["mass"]["delta_loss"] = turned["edit"]["delta_loss"] - 1
    for values in turned.values():
        values["mass"] = values["mass"] * np.nan
    still = pd.DataFrame({"other_before": [0.1], "other_after": [0.15]})
    said = {one.kind: str(one) for one in a_whole_effect(values=turned, migration=still).findings()}
    assert said["trend"] == "The loss falls with every step of the amount."
    assert said["mass"].startswith(
        "That is more than the control of equal mass: the difference is 1.0000"
    )
    assert "attention lay there" not in said["prediction"]
    assert said["moved"].endswith("rose by more than 0.1; no other key took their place.")
