"""Every result about sinks says what it found and draws its own numbers."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lens
from lens.edits import Mask
from lens.edits.clean_runs import CleanRuns
from lens.edits.effect_results import Effect
from lens.figures.sink_heads import reach_points
from lens.sinks import (
    band_losses,
    effective_gate,
    mechanism,
)
from tests.lens.architectures import build
from tests.lens.test_sinks import parked
from tests.lens.traces import trace_of

IDS = torch.randint(3, 97, (2, 29), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model():
    return lens.load(build("llama"))


@pytest.fixture(scope="module")
def clean(model):
    return CleanRuns(model)


def _drawn(result: Any) -> Any:
    return result.plot().data


def test_rate_keys_and_profile_in_words():
    traces = [trace_of(parked(67, mass, key=13), bos="added") for mass in (0.4, 0.5)]
    rate = lens.sinks.rate(traces, key=13)
    assert rate.findings()[0] == (
        "Key 13 is a sink in 100.0% [100.0%, 100.0%] of heads (ε = 0.3, T = 67, BOS added, n = 2)."
    )
    assert "[" not in lens.sinks.rate(traces[0], key=13).findings()[0]  # one prompt: no interval
    found = lens.sinks.find(traces[1])
    assert found.findings()[0].startswith("Sinks: 1 key in 1 head, from layer 0 on")
    alpha = (1 + 53 * 0.5) / 54
    assert f"Key 13 ('t3') is a sink in 1 head, with α up to {alpha:.2f}." in found.findings()
    assert "15 pairs" in found.findings()[-1]
    none = lens.sinks.find(trace_of(np.eye(67)[None, None]))
    assert none.findings()[0].startswith("No key is a sink in any head")
    assert "heads: position 13 (" in lens.sinks.profile(traces).findings()[0]
    plain = lens.sinks.profile(trace_of(np.eye(67)[None, None])).findings()
    assert plain[0].startswith("No position is a sink in more than 25% of heads")
    assert plain[1] == "15 positions near the end were not judged."


def test_mechanism_in_words_and_figure(model):
    result = mechanism(model, IDS)
    assert "no mechanism to explain" in result.findings()[0]
    assert np.array_equal(_drawn(result)[0].y, result.rows["drain"])
    rows: Any = result.rows.assign(alpha=0.9, key_norm=0.25, drain=0.125, contribution=0.5)
    found = type(result)(rows, "added", 2).findings()
    assert found[0].startswith("18 of 18 heads park on the sources")
    assert "0.25 times as long" in found[1]
    assert "write 0.12 times as much" in found[4]
    unknown = type(result)(rows.assign(drain=np.nan), "added", 2).findings()
    assert len(unknown) == len(found) - 1


def test_dose_in_words(model, clean):
    result = lens.effect(model, IDS, Mask(), amounts=(0.5, 1.0), controls=("mass",), clean=clean)
    found = {sentence.kind: str(sentence) for sentence in result.findings()}
    half, whole = result.values["edit"]["delta_loss"].mean(1)
    assert f"0.5: {half:+.4f}" in found["dose"]
    assert f"1: {whole:+.4f}" in found["dose"]
    rises = "grows" if whole > half else "falls"
    assert found["trend"] == f"The loss {rises} with every step of the amount."
    assert "the mass control" in found["mass"]
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
    assert sources.y == ("L1H4 (head)", "layers 1 to 2 (from_layer)")


def test_gates_and_bands_are_drawn(model):
    gates = effective_gate(model, IDS)
    drawn = {trace.name: trace.y.tolist() for trace in _drawn(gates)}
    for mechanism_name, rows in gates.rows.groupby("mechanism"):
        assert drawn[mechanism_name] == rows["gate"].tolist()
    bands = band_losses(model, IDS, count=3)
    assert _drawn(bands)[0].y.tolist() == bands.table()["delta_loss"].tolist()


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

    assert any("not clearly unlike the mass control" in text for text in effect(0.8).findings())
    said = effect(0.1).findings()
    assert any("no mass control to compare with" in text and "10%" in text for text in said)
    assert not any("unlike the mass control" in text for text in said)


def test_a_printed_result_is_its_name_and_first_findings(model):
    gates = effective_gate(model, IDS)
    lines = repr(gates).split("\n")
    assert lines[0] == "EffectiveGates"
    assert [line.strip() for line in lines[1:]] == gates.findings()
    result = lens.effect(model, IDS, Mask(), controls=("mass",))
    lines = repr(result).split("\n")
    assert lines[1].strip() == result.findings()[0]
    assert lines[-1].strip() == f"... {len(result.findings()) - 4} more in .findings()"


def a_whole_effect(**fields):
    """Two amounts on three prompts: twice as much, and a mass control that does more."""
    one = np.ones((1, 3))
    amounts = np.array([[1.0], [2.0]])
    edit = {"delta_loss": amounts * [0.1, 0.2, 0.3], "kl": amounts * one * 0.05}
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
            "Edit Mask first (amount 1) of L1H0 changes the loss by 0.4000 [0.2000, 0.6000] nats per token.",
        ),
        (
            "prediction",
            "The prediction moves by a KL of 0.1000 [0.1000, 0.1000] nats, and 50.0% of the most likely "
            "tokens change; 50% of the edited heads' attention lay there.",
        ),
        (
            "dose",
            "By amount the loss changes by (nats per token) 0.5: +0.2000 [+0.1000, +0.3000]; "
            "1: +0.4000 [+0.2000, +0.6000].",
        ),
        ("trend", "The loss grows with every step of the amount."),
        ("norm", "There is no norm control: keys have no dimension."),
        (
            "mass",
            "That is less than the mass control (50% of the attention): the difference is "
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
    assert said["mass"].startswith("That is more than the mass control: the difference is 1.0000")
    assert "attention lay there" not in said["prediction"]
    assert said["moved"].endswith("rose by more than 0.1; no other key took their place.")
