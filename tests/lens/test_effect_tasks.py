"""`lens.effect` of a task: its metric beside the loss, at each amount."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import lens
from lens import edits
from lens.common.errors import LensError
from lens.edits.effect_results import Effect
from lens.heads.measures import baselines, optimal
from lens.passes import calls, head_outputs
from lens.passes.head_outputs import mean_heads
from lens.tasks.task import Task
from tests.lens.architectures import build
from tests.lens.test_tasks_classification import strong
from tests.lens.test_windows import built

AMOUNTS = (1.0, 0.0, 0.4)  # not in order


def a_setting():
    torch.manual_seed(0)
    model = lens.load(build("llama"))
    return model, torch.randint(3, 97, (5, 17), generator=torch.Generator().manual_seed(2))


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
def test_gains_are_those_of_the_task_beside_the_loss_of_its_prompts(metric):
    model, ids = a_setting()
    mask = edits.Mask("first")
    found = lens.effect(model, a_task(ids, metric), mask, amounts=AMOUNTS, controls=("size",))
    texts = lens.effect(model, ids[:, :-1], mask, amounts=AMOUNTS, controls=("size",))
    assert found.amounts == (0.0, 0.4, 1.0)
    for condition, values in texts.values.items():
        for name, numbers in values.items():
            assert np.array_equal(found.values[condition][name], numbers)
    own = model.model(ids[:, :-1]).logits[:, -1].detach()
    with lens.edit(model, mask), torch.no_grad():
        edited = model.model(ids[:, :-1]).logits[:, -1]
    if metric == "loss":
        own, edited = own.log_softmax(-1), edited.log_softmax(-1)
    change, after = (
        logits.gather(1, ids[:, -1:])[:, 0]
        - (logits.gather(1, ids[:, :1])[:, 0] if metric == "logit_difference" else 0)
        for logits in (edited - own, edited)
    )
    gains = found.values["edit"]["gain"]
    assert gains[2] == pytest.approx(change.numpy(), abs=1e-5)
    sign = 1 if metric == "logit_difference" else -1
    assert found.values["edit"]["metric"][2] == pytest.approx(sign * after.numpy(), abs=1e-5)
    assert (gains[0] == 0).all()
    assert np.abs(gains[2]).max() > 1e-4
    table = found.table()
    rows = table[table["condition"] == "edit"]
    assert rows["gain"].tolist() == pytest.approx(gains.mean(1).tolist())
    assert ((rows["gain_low"] <= rows["gain"]) & (rows["gain"] <= rows["gain_high"])).all()
    more = (gains - found.values["size"]["gain"]).mean(1)
    beside = table[table["condition"] == "size"]
    assert beside["excess_gain"].tolist() == pytest.approx(more.tolist())
    figure = found.plot("gain")
    assert list(figure.data[0].y) == pytest.approx(rows["gain"].tolist())


def an_effect(gains, metrics=None):
    """Three amounts of an edit on three prompts of a task; the control gains nothing."""
    nothing = np.zeros((3, 3))
    values = {
        "edit": dict.fromkeys(("delta_loss", "kl", "flip_rate", "mass", "metric"), nothing)
        | {"gain": gains, "keys": nothing + 1},
        "size": dict.fromkeys(("delta_loss", "kl", "flip_rate", "mass", "metric"), nothing)
        | {"gain": nothing, "keys": nothing + 1},
    }
    empty = pd.DataFrame({"other_before": [0.0], "other_after": [0.0]})
    return Effect(
        values, empty, (), "Mask first", (0.25, 0.5, 1.0), "L1H0", (9, 9, 9), "added", 0,
        metric="accuracy", task="toy",
    )  # fmt: skip


def test_the_sentences_name_the_amount_that_gains_most_and_what_the_last_one_does():
    """The middle amount gains most, the last loses."""
    gains = np.array([[0.1, 0.1, 0.1], [0.5, 0.7, 0.6], [-0.2, -0.4, -0.3]])
    said = {one.kind: str(one) for one in an_effect(gains).findings()}
    assert said["best"] == (
        "Of 3 amounts 0.5 is best in accuracy of toy: it goes better by 0.6000 [0.3311, 0.8689]. It was chosen on "
        "these prompts, which flatters it."
    )
    assert said["gain"] == (
        "toy goes worse by 0.3000 [0.0311, 0.5689] in accuracy, which is then 0.0000."
    )
    assert "and -0.3000 [-0.5689, -0.0311] in accuracy." in said["size"]


@pytest.mark.parametrize(
    ("per", "most_likely"), [("token", "tokens"), ("answer", "tokens"), ("prompt", "labels")]
)
def test_sentences_say_what_has_one_loss(per, most_likely):
    found = replace(an_effect(np.zeros((3, 3))), per=per)
    said = {one.kind: str(one) for one in found.findings()}
    assert said["effect"].endswith(f" nats per {per}.")
    assert f"(nats per {per})" in said["dose"]
    assert f"of the most likely {most_likely} change" in said["prediction"]


@pytest.mark.parametrize(
    ("losses", "grows"),
    [((0.1, 0.3, 0.2), "does not grow"), ((0.1, 0.2, 0.3), "grows"), ((0.3, 0.2, 0.1), "falls")],
)
def test_a_loss_grows_where_every_step_of_the_amount_adds_to_it(losses, grows):
    found = an_effect(np.zeros((3, 3)))
    found.values["edit"]["delta_loss"] = np.repeat(np.array(losses)[:, None], 3, 1)
    said = {one.kind: str(one) for one in found.findings()}
    assert said["trend"] == f"The loss {grows} with every step of the amount."
    assert [f"{loss:+.4f} [{loss:+.4f}, {loss:+.4f}]" in said["dose"] for loss in losses] == [
        True
    ] * 3


def test_a_loss_is_not_told_to_grow_by_a_step_whose_interval_holds_0():
    """By the means it grows with every step."""
    found = an_effect(np.zeros((3, 3)))
    found.values["edit"]["delta_loss"] = np.array([[0.1] * 3, [0.5, -0.2, 0.2], [0.6, 0.7, 0.8]])
    (said,) = [str(one) for one in found.findings() if one.kind == "trend"]
    assert said == "The loss is not told to grow or to fall with every step of the amount."


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ((0.2, 0.4, 0.3), "toy goes better by 0.3000 [0.0311, 0.5689]"),
        ((-0.2, 0.4, 0.0), "the interval holds 0"),
        ((0.2, -0.2, 0.0), "toy goes better by 0.0000 [-0.5377, 0.5377]"),
        ((-3e-6, -1e-6, -2e-6), "toy goes neither better nor worse by 0.0001 in"),
    ],
)
def test_a_gain_is_judged_by_its_interval(last, words):
    gains = np.array([[0.1] * 3, [0.2] * 3, last])
    said = {one.kind: str(one) for one in an_effect(gains).findings()}
    assert words in said["gain"]


def test_heads_of_a_task_are_compared_with_as_many_others():
    model, ids = a_setting()
    found = lens.effect(model, a_task(ids, "loss"), edits.Ablate(["L1H3"], "mean"), draws=2)
    importance = lens.heads.importance(
        model, a_task(ids, "loss"), method="ablation", progress=False
    )
    drop = float(importance.values[1, 3])
    assert abs(drop) > 1e-4
    assert found.values["edit"]["gain"].mean() == pytest.approx(-drop, abs=1e-5)
    assert list(found.values) == ["edit", "size", "mass", "layer"]


def test_a_number_of_controls_is_draws_of_the_usual_ones():
    model, ids = a_setting()
    given = (model, ids[:, :-1], edits.Ablate("L1H0", "zero"))
    by_number, by_draws = lens.effect(*given, controls=3), lens.effect(*given, draws=3)
    pd.testing.assert_frame_equal(by_number.table(), by_draws.table())
    assert not by_number.table().equals(lens.effect(*given, controls=2).table())
    one = lens.effect(*given, controls="size").table()
    pd.testing.assert_frame_equal(one, lens.effect(*given, controls=["size"]).table())
    for bad, said in (
        ({"controls": 0}, "controls must be a positive integer, got 0"),
        ({"controls": 3, "draws": 2}, "give one"),
        ({"controls": "sise"}, "controls must be"),
    ):
        with pytest.raises(lens.LensError, match=said):
            lens.effect(*given, **bad)


def of_pictures():
    """A classifier of 3 labels, with pictures and their labels: 9 patches behind one more position."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=12, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=24, num_labels=3,
        num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    model = lens.load(strong(transformers.ViTForImageClassification(config)))
    pixels = torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    return model, lens.tasks.classification(model, pixels, [0, 1, 2, 0, 1])


def test_a_mean_at_each_position_of_a_sub_layer_is_refused():
    with pytest.raises(LensError, match="the mean at each position is defined for heads"):
        edits.Ablate("L0.mlp", "mean")


@pytest.mark.parametrize(
    ("what", "baseline"), [("L1H0", "mean"), ("L1H0", "pooled_mean"), ("L0.mlp", "pooled_mean")]
)
def test_a_mean_over_pictures_is_put_in_for_a_head_or_a_sub_layer(what, baseline):
    model, task = of_pictures()
    layer = model.model.vit.layers[0 if "mlp" in what else 1]
    module, width = (layer.mlp, 16) if "mlp" in what else (layer.attention.o_proj, 8)
    given: list[torch.Tensor] = []

    def keep(_, inputs, output):
        given.append(output if "mlp" in what else inputs[0])

    with module.register_forward_hook(keep), torch.no_grad():
        clean = model.model(task.clean).logits.log_softmax(-1)
    (rows,) = given
    mean = rows.mean((0, 1) if baseline == "pooled_mean" else 0)[..., :width]

    def replace_input(_, inputs):
        changed = inputs[0].clone()
        changed[..., :width] = mean
        return (changed,)

    hook = (
        module.register_forward_hook(lambda *_: mean.expand_as(rows))
        if "mlp" in what
        else module.register_forward_pre_hook(replace_input)
    )
    with hook, torch.no_grad():
        edited = model.model(task.clean).logits.log_softmax(-1)
    found = lens.effect(model, task, edits.Ablate(what, baseline), controls=(), progress=False)
    change = (clean - edited).gather(1, task.correct)[:, 0]
    assert change.abs().max() > 1e-3
    assert found.values["edit"]["delta_loss"][0] == pytest.approx(change.numpy(), abs=1e-5)


def test_a_mean_is_that_of_an_importance_by_pictures():
    model, task = of_pictures()
    found = lens.effect(model, task, edits.Ablate("L1H1", "mean"), controls=(), progress=False)
    importance = lens.heads.importance(model, task, method="ablation", progress=False)
    assert found.values["edit"]["gain"].mean() == pytest.approx(-float(importance.values[1, 1]))


def test_effects_on_pictures_are_said_of_patches():
    model, task = of_pictures()
    found = lens.effect(model, task, edits.Mask("first"), controls=(), progress=False)
    assert (found.bos, found.tokens, found.patches) == ("", (10,) * 5, (9,) * 5)
    assert str(found.findings()[-1]) == (
        "Measured on 5 pictures of 9 patches; intervals are 95 % over pictures."
    )
    rate = lens.sinks.rate(lens.capture(model, task.clean, progress=False))
    assert (rate.samples.bos, "T = 10, n = 5)" in str(rate.findings()[0])) == ("", True)
    said = {one.kind: str(one) for one in replace(found, patches=()).findings()}
    assert said["limit"].startswith("Measured on 5 prompts of 10 positions; intervals")
    assert found.plot().layout.title.text == "Edit Mask first of all heads (n = 5)"
    several = lens.effect(
        model, task, edits.Mask("first"), amounts=(0.5, 1), controls=(), progress=False
    )
    assert several.plot().layout.title.text == "Edit Mask first (n = 5)"


def test_a_mean_at_each_position_of_windows_is_that_position_s():
    """The mean of two pictures that are one changes nothing, shifted windows with padding included."""
    root, inputs = built("swin")
    model = lens.load(root).part("stage0")
    other = {"pixel_values": inputs["pixel_values"].flip(-1)}
    with torch.no_grad():
        clean = model.model(**inputs).last_hidden_state
        for over, same in (([inputs, inputs], True), ([other, other], False)):
            edit = edits.Ablate(["L0H0", "L1H1"], "mean", over=over)
            with lens.edit(model, edit) as (done,):
                edited = model.model(**inputs).last_hidden_state
            assert done.calls == 2
            assert torch.allclose(edited, clean, atol=1e-4) == same


@pytest.mark.parametrize("name", ["vitdet", "sam"])
def test_a_mean_over_positions_of_windows_is_one_of_patches(name):
    """A layer in windows that padding fills up, and one that sees all: the mean of z at the patches of two pictures."""
    root, inputs = built(name)
    model = lens.load(root)
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values"].flip(-1) ** 2])
    given: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    layers = root.encoder.layer if name == "vitdet" else root.vision_encoder.layers
    for number, layer in enumerate(layers):
        projection = layer.attention.proj if name == "vitdet" else layer.attn.proj
        projection.register_forward_pre_hook(lambda _, args, n=number: given[n].append(args[0]))
    down = (torch.arange(3)[:, None] * 2 + torch.arange(2)).repeat_interleave(3, 0)
    across = (torch.arange(3)[:, None] * 2 + torch.arange(2)).repeat(3, 1)
    real = (down < 5)[:, :, None] & (across < 5)[:, None]  # [windows, rows, columns] of 5 by 5
    with torch.no_grad():
        for one in pixels:
            root(pixel_values=one[None])
    expected = []
    for number, rows in given.items():
        z = torch.stack([one.reshape(-1, 24) for one in rows])
        kept = real.flatten() if number == 0 else slice(None)
        expected.append(z[:, kept].mean((0, 1)).view(3, 1, 8))
    found = mean_heads(model, pixels, False)
    for mine, own in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, own.double(), atol=1e-5, rtol=1e-5)
    with pytest.raises(LensError, match=r"L0\.attention attends in windows that padding fills up"):
        edits.Ablate("L0.attention", "pooled_mean", over=pixels).start(model, "auto")
    edits.Ablate("L1.attention", "pooled_mean", over=pixels).start(model, "auto")
    if name == "vitdet":  # takes pictures of any size
        sizes = [{"pixel_values": one} for one in (pixels[:1], pixels[:1, :, :32])]
        with pytest.raises(LensError, match="grids of several sizes"):
            mean_heads(model, sizes, True)


@pytest.mark.parametrize("baseline", ["pooled_mean", "optimal"])
def test_importance_by_windows_puts_in_a_mean_of_patches(baseline, monkeypatch):
    """What stands at the padding of windows, large or not, does not reach the mean."""
    config = built("swin")[0].config
    config.num_labels = 3
    torch.manual_seed(0)
    model = lens.load(strong(transformers.SwinForImageClassification(config))).part("stage0")
    pixels = torch.randn(4, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    task = lens.tasks.classification(model, pixels, [0, 1, 2, 0])
    seen: list[dict[int, torch.Tensor]] = [{}, {}]
    for spoilt in (False, True):

        def attended(call, spoilt=spoilt, **asked):
            result = calls.attend(call, **asked)
            result.output[:, :, 80:] += 100.0 * spoilt
            return result

        monkeypatch.setattr(head_outputs, "attend", attended)
        if baseline == "optimal":
            means, spreads = optimal._moments(model, task, torch.arange(4))
            seen[spoilt] = means | {10 + layer: one for layer, one in spreads.items()}
        else:
            seen[spoilt] = baselines.task_means(model, task, keep_positions=False)
    for layer, one in seen[0].items():
        torch.testing.assert_close(one, seen[1][layer])
