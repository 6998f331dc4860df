"""Heads that rest in one domain and work in another."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.heads import activity, roles
from lens.heads.behaviour.activity import HeadActivity


@pytest.fixture(scope="module")
def model():
    return lens.load("text-lm-3l")


@pytest.fixture(scope="module")
def found(model):
    copied = [lens.tasks.copied(model, 31, seed=seed) for seed in range(8)]
    domains = {"text": lens.tasks.text("moby-dick"), "copied": copied}
    return activity(model, domains, length=63, n=8, tolerance=0.02, progress=False)


def test_the_strongest_sink_rests_on_text_and_not_on_copies(model):
    """Its page: L1H0 has no effect on text under mean ablation; on random tokens it looks elsewhere."""
    copied = [lens.tasks.copied(model, 31, seed=seed) for seed in range(8)]
    domains = {"text": lens.tasks.text("moby-dick"), "copied": copied}
    found = activity(
        model, domains, length=63, n=8, tolerance=0.01, baseline="mean", progress=False
    )
    table = found.table().set_index(["domain", "name"])
    assert table.loc["text"]["activity"].idxmin() == "L1H0"
    assert "L1H0" in [str(head) for head in found.dormant("text")]
    assert found.dormant("copied") == []
    assert (table["activity_low"] <= table["activity"]).all()
    assert (table["n"] == 8).all()
    assert table["dormant"].sum() == len(found.dormant("text"))
    assert "dormant on text: L1H0" in repr(found)
    assert "copied: none" in repr(found)


def test_a_constant_output_is_missed_under_zero_ablation(found):
    """L1H0 rests on BOS, yet the model counts on the vector that it adds there."""
    text = found.table().query("domain == 'text'").set_index("name")
    assert text.loc["L1H0", "activity"] < 0.2
    assert text.loc["L1H0", "loss_low"] > found.tolerance
    assert found.dormant("text") == []


def test_activity_and_loss_are_those_of_the_model_itself(model, found):
    """From eager attention, and by a projection whose columns of the head are zero."""
    ids = torch.tensor([lens.tasks.copied(model, 31, seed=2)])
    module = model.model.model.layers[1].self_attn.o_proj

    def loss():
        logits = model.model(ids).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model.model(ids, output_attentions=True).attentions
    model.model.set_attn_implementation("sdpa")
    expected = 1 - torch.stack(attentions)[:, 0, :, 1:, 0].double().mean(-1)
    np.testing.assert_allclose(found.activity["copied"][..., 2], expected, atol=1e-6)
    before = module.weight.detach().clone()
    with torch.no_grad():
        clean = loss()
        module.weight[:, 3 * 16 : 4 * 16] = 0
        without = loss()
        module.weight.copy_(before)
    assert found.loss["copied"][1, 3, 2] == pytest.approx(without - clean, rel=1e-3)


def test_sink_heads_by_the_rule_of_two_entropies(model):
    text = lens.tasks.take(model, lens.tasks.text("lily"), 128)
    result = roles(model, text, progress=False)
    names = [str(head) for head in result.sink_heads(rows_below=0.25, column_above=0.9)]
    assert names == ["L1H0", "L1H5"]  # its page: the two strongest sinks
    assert result.sink_heads(rows_below=0.0, column_above=0.9) == []
    assert result.sink_heads(rows_below=1.0, column_above=1.0) == []


def test_what_has_no_domain_is_said(model, found):
    with pytest.raises(LensError, match="needs at least one domain"):
        activity(model, {})
    with pytest.raises(LensError, match="unknown domain 'code'; known: text, copied"):
        found.dormant("code")


def test_activity_leaves_query_0_out_and_keeps_its_sign():
    """By hand: rows 1 to 3 give key 0 a half, a quarter and nothing, so activity is 1 - 0.75 / 3."""
    first = np.array([[[1.0, 0.5, 0.25, 0.0]]])
    assert HeadActivity.of_first_mass(first) == pytest.approx(0.75)
    assert HeadActivity.of_first_mass(np.array([[[1.0, 1.0, 1.5]]])) == pytest.approx(-0.25)


def test_findings_say_which_heads_switch():
    quiet, loss = np.array([[[0.1, 0.1], [0.9, 0.9]]]), np.zeros((1, 2, 2))
    busy = np.array([[[0.5, 0.5], [0.9, 0.9]]])
    found = HeadActivity(
        {"prose": quiet, "code": busy}, {"prose": loss, "code": loss}, 0.2, 1e-3, "zero", "made"
    )
    one = {"prose": loss[..., :1], "code": loss[..., :1]}
    single = HeadActivity({"prose": quiet, "code": busy}, one, 0.2, 1e-3, "zero", "made").findings()
    assert (
        single[0]
        == "On prose 1 of 2 heads taken out are dormant: L0H0 (1 window, which has no interval)."
    )
    assert single[2] == "L0H0: dormant on one domain and not on another."
    assert [(one.kind, one.text) for one in found.findings()] == [
        (
            "dormant",
            "On prose 1 of 2 heads taken out are dormant: L0H0; 1 of them by their whole intervals (2 windows).",
        ),
        ("dormant", "On code 0 of 2 heads taken out are dormant (2 windows)."),
        (
            "switching",
            "L0H0: dormant on one domain and not on another; 1 of 1 by their whole intervals.",
        ),
        (
            "limit",
            "Dormant means activity below 0.2 and a loss that changes by less than 0.001 nats per token with "
            "zero in the head's place; heads were taken out one at a time, so heads that stand in for each "
            "other may all look dormant.",
        ),
    ]


def test_heads_that_only_their_means_call_dormant_are_told_from_others():
    """One window in which the head works, or is missed, and no whole interval says that it rests."""
    rests, works, loss = np.array([[[0.1, 0.1]]]), np.array([[[0.05, 0.3]]]), np.zeros((1, 1, 2))
    for busy, lost, sure in (
        (works, loss, 0),
        (rests, np.array([[[0.0, 1.5e-3]]]), 0),
        (rests, loss, 1),
    ):
        found = HeadActivity({"a": busy}, {"a": lost}, 0.2, 1e-3, "zero", "made")
        assert f"dormant: L0H0; {sure} of them" in found.findings()[0].text
    missed = np.array(
        [[[1e-3, 4e-3]]]
    )  # on the second domain, where one window alone would spare it
    some = HeadActivity(
        {"a": rests, "b": rests}, {"a": loss, "b": missed - 5e-4}, 0.2, 1e-3, "zero", "made"
    )
    assert "L0H0: dormant on one domain and not on another; 0 of 1" in some.findings()[2].text


def test_only_the_heads_that_are_named_are_taken_out(model, found):
    copied = [lens.tasks.copied(model, 31, seed=seed) for seed in range(8)]
    some = activity(model, {"copied": copied}, heads=["L1H3"], length=63, n=8, progress=False)
    loss = some.loss["copied"]
    np.testing.assert_allclose(loss[1, 3], found.loss["copied"][1, 3], atol=1e-6)
    assert np.isnan(np.delete(loss.reshape(-1, 8), 1 * loss.shape[1] + 3, 0)).all()
    np.testing.assert_array_equal(some.activity["copied"], found.activity["copied"])
    with pytest.raises(LensError, match="heads is empty"):
        activity(model, {"copied": copied}, heads=[], progress=False)
    assert list(some.plot().data[0].text) == ["L1H3"]


def test_a_head_that_the_model_is_better_without_is_not_dormant():
    """The change of loss counts by its size: -0.5 is no rest."""
    quiet = np.full((1, 2, 3), 0.05)
    loss = np.stack([np.full(3, -0.5), np.full(3, -0.0004)])[None]
    found = HeadActivity({"prose": quiet}, {"prose": loss}, 0.2, 1e-3, "zero", "made")
    assert [str(head) for head in found.dormant("prose")] == ["L0H1"]
