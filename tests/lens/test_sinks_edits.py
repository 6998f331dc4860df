"""Every edit that `lens.effect` watches equals its naive twin on whole probabilities; identities of 1.9."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lens
from lens import edits
from lens.common.errors import LensError
from lens.edits._keyed import KeyedEdit
from lens.edits._others import scope_of
from lens.edits.watching import Watch
from lens.passes.calls import LayerCall
from lens.passes.structures import MaskStructure
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio

EDITS = {
    "mask": lambda keys, amount: edits.Mask(keys, amount),
    "drop": lambda keys, amount: edits.Drop(keys, amount),
    "mean_value": lambda keys, amount: edits.Value(keys, "mean", amount),
    "zero_value": lambda keys, amount: edits.Value(keys, "zero", amount),
    "move": lambda keys, amount: edits.Move(None, keys, amount),
    "transfer": lambda keys, amount: edits.Move(keys, None, amount),
}
HEADS, KV_HEADS, LENGTH, DIM = 6, 2, 29, 8
IDS = torch.randint(3, 97, (1, 37), generator=torch.Generator().manual_seed(5))


def a_call(window: int | None = None) -> LayerCall:
    random = torch.Generator().manual_seed(4)
    query = torch.randn(1, HEADS, LENGTH, DIM, generator=random)
    key, value = (torch.randn(1, KV_HEADS, LENGTH, DIM, generator=random) for _ in range(2))
    return LayerCall(query, key, value + 0.7, MaskStructure(True, window), scale=0.41)


def probabilities(call: LayerCall) -> np.ndarray:
    """[heads, queries, keys] in float64."""
    key = call.key[0].double().repeat_interleave(HEADS // KV_HEADS, 0)
    logits = (call.query[0].double() @ key.mT * call.scale).numpy()
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    sees = (j <= i) & (i - j < (call.mask.window or LENGTH))
    p = np.where(sees, np.exp(logits), 0)
    return p / p.sum(-1, keepdims=True)


def twin(call, sources, amount, rule) -> tuple[np.ndarray, np.ndarray]:
    """The output [heads, queries, dim] and the edited attention, row by row."""
    p = probabilities(call)
    value = call.value[0].double().repeat_interleave(HEADS // KV_HEADS, 0).numpy()
    output, edited = np.zeros((HEADS, LENGTH, DIM)), p.copy()
    others = [j for j in range(LENGTH) if j not in sources]
    for head in range(HEADS):
        for row in range(LENGTH):
            a, v = p[head, row].copy(), value[head].copy()
            before = [j for j in others if 0 <= row - j < (call.mask.window or LENGTH)]
            if rule == "mask" and a[others].sum() > 0:
                a[sources] *= 1 - amount
                a /= a.sum()
            elif rule == "drop":
                a[sources] *= 1 - amount
            elif rule == "zero_value":
                v[sources] *= 1 - amount
            elif rule == "mean_value" and before:
                v[sources] += amount * (v[before].mean(0) - v[sources])
            elif rule == "move" and a[sources].sum() > 0:
                to = np.where(np.isin(np.arange(LENGTH), sources), a, 0)
                a += amount * (to / to.sum() - a)
            elif rule == "transfer" and a[others].sum() > 0:
                given = amount * a[sources].sum()
                a[sources] *= 1 - amount
                a[others] += given * a[others] / a[others].sum()
            output[head, row] = a @ v
            edited[head, row] = a
    return output, edited


def run(call, sources, amount, rule, spare_own=False) -> tuple[np.ndarray, Watch]:
    heads = torch.ones(1, HEADS, dtype=torch.bool)
    plan = EDITS[rule](sources, amount).plan()
    if spare_own:
        plan = replace(plan, queries=[i for i in range(LENGTH) if i not in sources])
    edit = Watch(KeyedEdit(plan, heads, "auto"), record=not spare_own)
    return edit.on_layer(call)[0].numpy(), edit


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("sources", "amount"), [([0], 1.0), ([0, 5, 11], 0.35), ([3, 4], 1.0)])
@pytest.mark.parametrize("rule", EDITS)
def test_output_and_received_mass_equal_the_naive_twin(rule, sources, amount, window):
    call = a_call(window)
    found, edit = run(call, sources, amount, rule)
    output, p = twin(call, sources, amount, rule)
    assert rms_ratio(found, output) < 1e-5
    assert rms_ratio(edit.received[0], p.sum(1)) < 1e-5
    assert rms_ratio(found, twin(call, sources, 0, rule)[0]) > 1e-2


@pytest.mark.parametrize("rule", EDITS)
def test_an_edit_of_no_key_gives_the_same_bits(rule):
    call = a_call()
    plain, _ = run(call, [0], 0.0, rule)
    for sources in ([], [LENGTH + 3]):
        assert np.array_equal(run(call, sources, 1.0, rule)[0], plain)


def test_masking_and_zeroing_differ_by_the_renormalisation_factor():
    call, sources = a_call(), [0, 6]
    mass = probabilities(call)[:, 1:, sources].sum(-1, keepdims=True)
    masked, zeroed, dropped = (
        run(call, sources, 1.0, rule)[0][:, 1:] for rule in ("mask", "zero_value", "drop")
    )
    assert rms_ratio(masked * (1 - mass), zeroed) < 1e-5
    assert rms_ratio(zeroed, dropped) < 1e-5


def test_what_masking_takes_off_equals_the_closed_form_of_partials():
    """I3: `m / (1 - m) (o - mean value of S)`."""
    call, sources = a_call(), [0, 6]
    p, value = probabilities(call), call.value[0].double().repeat_interleave(3, 0).numpy()
    mass = p[:, 1:, sources].sum(-1, keepdims=True)
    mean = p[:, 1:, sources] @ value[:, sources] / mass
    plain = (p @ value)[:, 1:]
    found = run(call, sources, 1.0, "mask")[0][:, 1:] - plain
    assert rms_ratio(found, mass / (1 - mass) * (plain - mean)) < 1e-4


@pytest.mark.parametrize("rule", EDITS)
def test_sparing_own_rows_changes_nothing_but_those(rule):
    call, sources = a_call(), [2, 9]
    found, spared = (run(call, sources, 1.0, rule, spare_own=own)[0] for own in (False, True))
    plain = twin(call, sources, 0.0, rule)[0]
    assert rms_ratio(spared[:, sources], plain[:, sources]) < 1e-6
    rest = [i for i in range(LENGTH) if i not in sources]
    assert np.array_equal(spared[:, rest], found[:, rest])
    assert rms_ratio(found[:, sources], plain[:, sources]) > 1e-3


@pytest.mark.parametrize("edit", EDITS)
def test_each_edit_runs_in_a_model_and_says_what_it_did(edit):
    network = build("llama")
    torch.nn.init.normal_(network.lm_head.weight, std=0.7)
    model = lens.load(network)
    one = replace(EDITS[edit]("first", 1.0), heads=["L0H1"])
    result = lens.effect(model, [IDS[0], IDS[0, :31]], one)
    assert abs(result.values["edit"]["delta_loss"]).min() > 0
    assert [maps.shape for maps in result.alphas] == [(2, 3, 6, 37), (2, 3, 6, 31)]
    before, after = result.alphas[0]
    same = np.ones(6, bool)
    same[1] = False
    assert np.array_equal(before[0][same], after[0][same], equal_nan=True)
    if edit == "move":
        assert after[0, 1, 0] == pytest.approx(1, abs=1e-5)
    text = " ".join(result.findings())
    assert f"Edit {one.words} (amount 1) of L0H1" in text
    assert "2 prompts of 31 to 37 tokens, BOS absent" in text
    assert text.count("control") == 4
    maps: Any = lens.figures.migration_maps(result, 1).data
    assert [drawn.z.shape for drawn in maps] == [(3, 31)] * 3
    points: Any = result.plot("excess").data[0]
    assert list(points.y) == [
        "size",
        "mass",
        "position",
        "self",
    ]
    with pytest.raises(LensError, match="measure must be one of 'delta_loss'"):
        result.plot("loss")


def test_one_prompt_has_no_interval_and_says_so():
    result = lens.effect(lens.load(build("llama")), IDS[0], edits.Mask(), controls=())
    assert "there is none for one prompt" in result.findings()[-1]
    assert "[" not in result.findings()[0]


def test_where_mass_moves_beside_a_learned_sink_is_not_watched():
    model = lens.load(build("gpt_oss"))
    for rule in ("move", "transfer"):
        result = lens.effect(model, IDS[0], EDITS[rule]("first", 1.0), controls=())
        assert np.isnan(result.alphas[0][1]).all()
        assert abs(result.values["edit"]["kl"]).min() > 0


def test_scopes_in_words():
    chosen = torch.zeros(4, 3, dtype=torch.bool)
    chosen[1, 2] = True
    assert scope_of(chosen) == "L1H2"
    chosen[1] = True
    assert scope_of(chosen) == "layer 1"
    chosen[3] = True
    assert scope_of(chosen) == "layers 1, 3"
    chosen[2] = True
    assert scope_of(chosen) == "layers 1 to 3"
    chosen[0, :2] = True
    assert scope_of(chosen) == "11 heads"
    assert scope_of(torch.ones(2, 2, dtype=torch.bool)) == "all heads"
