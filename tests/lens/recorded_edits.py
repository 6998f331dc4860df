"""Recorded numbers of sinks and of edits to attention; recorded_numbers.py says what they are for."""

from typing import Any

import pandas as pd
import torch

import lens
from lens.sinks.detection.conditions import bos_pair
from tests.lens.recorded_inputs import Numbers, by_head, cells, reader, reading, symbols
from tests.lens.vision_models import QUESTION, SYSTEM, build, planted


def sinks() -> Numbers:
    """Where sinks are and what they are made of."""
    model, prompts, traces = reader()
    room = lens.sinks
    found: Numbers = {}
    for epsilon in (0.1, 0.3, 0.5):
        rate = room.rate(traces, epsilon=epsilon)
        for name in ("value", "low", "high"):
            found[f"sinks.rate.{epsilon}.{name}"] = getattr(rate, name)
    found |= cells("sinks.rate", by_head(rate.table()), "alpha", "L1H0 L2H4")
    table = room.rate(traces).curve((0.2, 0.4)).table().set_index("epsilon")
    found |= cells("sinks.sensitivity", table, "rate low high", [0.2, 0.4])
    table = by_head(room.find(traces[0]).table())
    found |= cells("sinks.find", table, "key alpha", "L1H0 L2H4")
    table = room.find(traces).profile.table().set_index("key")
    found |= cells("sinks.profile", table, "rate alpha largest_alpha", [0, 2])
    windows = torch.as_tensor(prompts[:2]).tolist()
    table = by_head(
        lens.heads.activity(model, {"a": windows}, heads=["L1H0"], progress=False).table()
    )
    table = table.rename(columns=lambda name: name.replace("loss", "off"))
    found |= cells("sinks.activity", table, "off off_low off_high", "L1H0")
    table = room.massive(model, prompts, ratio=30, magnitude=1).table()
    table = table.set_index(["dimension", "position"])
    found |= cells("sinks.massive", table, "value ratio prompts emergence", [(88, 0)])
    table = by_head(room.mechanism(model, prompts).table())
    columns = "alpha key_norm value_norm cosine cosine_others drain contribution"
    found |= cells("sinks.mechanism", table, columns, "L1H0")
    table = by_head(room.gates(model, prompts).table())
    table = table.set_index("mechanism", append=True)
    at = [("L1H0", "keys"), ("L1H0", "off_by_one")]
    found |= cells("sinks.effective_gate", table, "gate low high", at)
    table = by_head(room.bands(model, count=4).table())
    table = table.set_index(["weight", "band"], append=True)
    at = [("L1H0", "query", 0), ("L2H4", "output", 3)]
    found |= cells("sinks.band_energies", table, "energy", at)
    bounds = by_head(room.block_bounds(symbols()[2][0]).table())
    found |= cells("sinks.block_bounds", bounds, "alpha_lower_bound alpha_upper_bound", "L1H0")
    table = room.emergence(model, prompts).table().set_index(["condition", "layer"])
    at = [("text", 1), ("text", 2), ("random", 1)]
    return found | cells("sinks.emergence", table, "rate alpha", at)


def sink_effects() -> Numbers:
    """What edits of sinks change, beside controls."""
    model, prompts, _ = reader()
    room = lens.sinks
    columns = (
        "mass delta_loss delta_loss_low delta_loss_high kl kl_low kl_high flip_rate excess_low "
        "excess_high excess"
    )
    own = "mass delta_loss delta_loss_low delta_loss_high kl flip_rate"
    found: Numbers = {}

    def add(name: str, table: pd.DataFrame, *controls: str) -> None:
        table = table.set_index("condition").rename(index={"edit": "sources"})
        found.update(cells(f"sinks.{name}", table, own, ["sources"]))
        found.update(cells(f"sinks.{name}", table, columns, controls))

    mask = lens.edits.Mask("first")
    whole = lens.effect(model, prompts, mask, controls=("size", "mass", "position"))
    add("effect.mask", whole.table(), "mass", "position")
    migration = by_head(whole.migration)
    moved = "source_before source_after other_before other_after"
    found |= cells("sinks.effect.migration", migration, moved, "L2H4")
    drop = lens.edits.Drop("first", heads=["L1H0"])
    dropped = lens.effect(model, prompts, drop, controls=("mass",))
    add("effect.drop", dropped.table(), "mass")
    off = lens.effect(model, prompts, lens.edits.Ablate("L1H0"), controls=("size", "mass"))
    add("head_effect", off.table(), "mass")
    massive = room.massive(model, prompts, ratio=30, magnitude=1).edits()
    add("massive_effect", lens.effect(model, prompts, massive).table(), "norm")
    reaches = {
        "head": {"heads": ["L1H0"]},
        "layer": {"layers": [1]},
        "from_layer": {"layers": [1, 2]},
    }
    for reach, where in reaches.items():
        one = lens.edits.Mask("first", **where)
        add(f"by_scope.{reach}", lens.effect(model, prompts, one, controls=("size",)).table())
    bare = bos_pair(model, prompts)["without BOS"]
    add("by_bos.without", lens.effect(model, bare, mask, controls=("size",)).table())
    doses = lens.effect(model, prompts, mask, amounts=(0.5, 1.0), controls=("mass",)).table()
    add("dose_response.0.5", doses[doses["amount"] == 0.5], "mass")
    policies = [
        lens.heads.streaming(model, prompts, first=n, last=8, progress=False) for n in (0, 2)
    ]
    table = pd.concat([one.summary() for one in policies]).set_index("first")
    table = table.rename(columns=lambda name: name.replace("rms_error", "error"))
    kept = "kept least_kept error largest_error delta_loss delta_loss_low delta_loss_high"
    found |= cells("sinks.streaming", table, kept, [0, 2])
    losses = room.bands(model, prompts, count=4).losses
    assert losses is not None
    table = losses.table().set_index("band")
    return found | cells("sinks.band_losses", table, "delta_loss low high", [0, 3])


def redistribution() -> Numbers:
    """Losses under every rule and recipe, doses, side effects, dimensions."""
    model, prompts, _ = reader()
    room, ids = lens.edits, prompts[0]

    def loss(edit: Any = None) -> float:
        if edit is None:
            return lens.tasks.loss(model, ids)
        with edit:
            return lens.tasks.loss(model, ids)

    found = {"redistribute.none": loss()}
    rules = {"transfer": room.Move, "mask": room.Mask, "drop": room.Drop, "logit_bias": room.Bias}
    for rule, kind in rules.items():
        found[f"redistribute.{rule}"] = loss(lens.edit(model, kind("first", amount=0.5)))
    found |= {
        "redistribute.targets": loss(
            lens.edit(model, room.Move("first", range(2, 6), 0.5, heads=["L1H0", "L2H4"]))
        ),
        "redistribute.learned_sink": loss(lens.edit(model, room.LearnedSink(0.5, layers=[1]))),
        "redistribute.off_by_one": loss(lens.edit(model, room.LearnedSink())),
        "redistribution.act": loss(lens.edit(model, room.Act(beta=0.4, threshold=0.1))),
        "redistribution.pasta": loss(lens.edit(model, room.Pasta([(5, 9)]))),
        "redistribution.var": loss(
            lens.edit(model, room.Var(range(5, 30), dims=[3], tau=2.0, rho=0.1, least_visual=0.0))
        ),
    }

    columns = "delta_loss delta_loss_low delta_loss_high kl kl_low kl_high flip_rate"
    move = room.Move("first")
    side = lens.effect(model, prompts, move, amounts=(0.5, 1.0), controls=()).table()
    found |= cells("redistribution.side_effects", side.set_index("amount"), columns, [0.5])
    dose = lens.effect(model, reading(), move, amounts=(0.5, 1.0), controls=()).table()
    found |= cells(
        "redistribution.dose", dose.set_index("amount"), "gain gain_low gain_high", [0.5]
    )
    dims = lens.sinks.dims(model, {"input_ids": torch.tensor(prompts)}, tau=3.0)
    table = dims.table().set_index("dim")
    return found | cells("redistribution.find_sink_dims", table, "largest tokens layers", [8, 88])


def vision() -> Numbers:
    """A small model of random weights with a planted activation: its segments, edges knocked out."""
    network, inputs, _ = build("llava")
    model = lens.load(network)
    segments = lens.vision.segments(model, inputs).table().set_index("kind")
    found = cells("vision.segments", segments, "start tokens", "image text")
    assert found["vision.segments.start.image"] == SYSTEM
    assert found["vision.segments.tokens.text"] == QUESTION
    with planted(network, 7, [0, SYSTEM + 2, SYSTEM + 7]):
        knocked = lens.vision.knock_out(model, [inputs], layers=[0], dims=[7], tau=4.0)
    for name, condition in (("sinks", "edit"), ("mass", "mass")):
        for column in ("delta_loss", "kl"):
            value = knocked.values[condition][column].mean()
            found[f"vision.knock_out.{name}.{column}"] = float(value)
    return found
