"""Importance of heads: against hooks on eager attention, on models with known answers, and refusals."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

import lens
from lens.common.errors import LensError
from lens.heads import importance
from lens.heads.measures import methods
from lens.heads.measures.scores import HeadScores, Intervention
from lens.heads.pruning import ablate
from lens.passes.head_outputs import read_heads, with_gradients
from lens.stats.intervals import longer
from lens.tasks import Task, induction, language_modelling
from tests.lens.architectures import VOCAB, build
from tests.tiers import first

DECODERS = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "llama4"]
PROMPTS, LENGTH, LAYERS, HEADS, DIM = 5, 17, 3, 6, 8
BASELINES = ("zero", "mean", "pooled_mean", "resample", "counterfactual")


def rms_ratio(found, expected):
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


def test_the_error_ratio_sees_a_swapped_axis():
    values = np.arange(9.0).reshape(3, 3)
    assert rms_ratio(values, values) == 0
    assert rms_ratio(values.T, values) > 0.1


def some_task(metric="loss"):
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(3, VOCAB, (2, PROMPTS, LENGTH), generator=generator)
    return Task(
        name="random",
        clean=clean,
        corrupt=corrupt,
        positions=torch.tensor([[5, 16], [11, 7], [16, 9], [4, 12], [8, 8]]),
        correct=torch.tensor([[4, 10], [50, 7], [9, 2], [33, 71], [90, 1]]),
        wrong=torch.tensor([[1, 2], [3, 5], [6, 8], [11, 12], [13, 14]])
        if metric == "logit_difference"
        else None,
        metric=metric,
    )


def projections(model):
    """The output projection of each attention layer, whose input is z of all heads side by side."""
    return [
        module
        for name, module in model.named_modules()
        if name.endswith((".o_proj", "attn.c_proj", "attn.o"))
    ]


class Eager:
    """The same numbers by hooks on the projections of a model with eager attention."""

    def __init__(self, model: nn.Module, task: Task):
        self.model, self.task = model, task
        self.layers = projections(model)
        assert len(self.layers) == LAYERS

    def run(self, ids, edit=None):
        """Logits and z [layers, prompts, tokens, heads, dim]; `edit(layer, z)` changes z in place."""
        seen = []

        def hook(_, inputs):
            z = inputs[0].unflatten(-1, (HEADS, DIM)).clone()
            if edit is not None:
                edit(len(seen), z)
            seen.append(z)
            return (z.flatten(-2),)

        handles = [layer.register_forward_pre_hook(hook) for layer in self.layers]
        try:
            logits = self.model(ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen

    def benefit(self, logits):
        return self.task.sign * self.task.measure(logits, torch.arange(PROMPTS))

    def replacement(self, name, order):
        """z [layers, prompts, tokens, heads, dim] that a baseline puts in."""
        with torch.no_grad():
            z = torch.stack(self.run(self.task.clean)[1])
            if name == "zero":
                return torch.zeros_like(z)
            if name == "mean":
                return z.mean(1, keepdim=True).expand_as(z)
            if name == "pooled_mean":
                return z.mean((1, 2), keepdim=True).expand_as(z)
            if name == "resample":
                return z[:, order]
            return torch.stack(self.run(self.task.corrupt)[1])

    def without(self, heads, instead):
        """Benefit [prompts] with `heads` replaced."""

        def edit(layer, z):
            for at, head in heads:
                if at == layer:
                    z[:, :, head] = instead[layer][:, :, head]

        with torch.no_grad():
            return self.benefit(self.run(self.task.clean, edit)[0])


@pytest.fixture(scope="module", params=first(DECODERS, "gpt2", "gpt_oss", "llama4"))
def pair(request):
    """A loaded model, and the same weights with eager attention."""
    twin = build(request.param)
    twin.set_attn_implementation("eager")
    return lens.load(build(request.param)), twin


def donors(seed):
    from lens.heads.measures.baselines import other_rows

    return other_rows(PROMPTS, seed)


@pytest.mark.parametrize("baseline", BASELINES)
def test_ablation_equals_hooks_on_the_output_projection(pair, baseline):
    model, twin = pair
    task = some_task()
    eager = Eager(twin, task)
    instead = eager.replacement(baseline, donors(5))
    with torch.no_grad():
        clean = eager.benefit(eager.run(task.clean)[0])
    scores = importance(model, task, baseline=baseline, seed=5, progress=False)
    assert rms_ratio(scores.clean, task.sign * clean) < 1e-5
    expected = np.array(
        [
            [(clean - eager.without([(layer, head)], instead)).numpy() for head in range(HEADS)]
            for layer in range(LAYERS)
        ]
    )
    assert scores.per_prompt.shape == (LAYERS, HEADS, PROMPTS)
    assert rms_ratio(scores.per_prompt, expected) < 1e-4
    group = [(0, 1), (0, 4), (2, 5)]
    together = ablate(model, task, heads=group, baseline=baseline, seed=5, progress=False)
    assert rms_ratio(together.per_prompt, clean - eager.without(group, instead)) < 1e-4
    assert rms_ratio(together.ablated, task.sign * eager.without(group, instead)) < 1e-5


def test_gradient_importance_equals_autograd_on_eager_attention(pair):
    """The kernel's `dO . O` per head and token, and all that is made of it."""
    model, twin = pair
    task = some_task("logit_difference")
    eager = Eager(twin, task)
    logits, z = eager.run(task.clean)
    slopes = torch.autograd.grad(eager.benefit(logits).sum(), z)
    per_token = torch.stack([(a * b).sum(-1) for a, b in zip(z, slopes, strict=True)]).detach()
    per_token = per_token.permute(0, 3, 1, 2)  # [layers, heads, prompts, tokens]
    found = with_gradients(model, task.clean, lambda out: task.measure(out, torch.arange(PROMPTS)))
    rows = torch.stack([layer.attribution for layer in found]).transpose(1, 2)
    assert rms_ratio(rows, per_token) < 1e-5
    expected = {
        None: per_token.sum(-1),
        "prompt": per_token.sum(-1).abs(),
        "token": per_token.abs().sum(-1),
    }
    for absolute, values in expected.items():
        scores = importance(model, task, method=lens.heads.Gradient(absolute), progress=False)
        assert rms_ratio(scores.per_prompt, values) < 1e-5
    instead = eager.replacement("counterfactual", None)
    for layer in range(LAYERS):
        change = (z[layer] - instead[layer]) * slopes[layer]
        expected_layer = change.sum((1, 3)).T.detach()
        scores = importance(model, task, method="attribution", progress=False)
        assert rms_ratio(scores.per_prompt[layer], expected_layer) < 1e-5


def test_attribution_by_zero_is_the_gradient():
    model = lens.load(build("qwen3"))
    task = some_task()
    zero = importance(model, task, method="attribution", baseline="zero", progress=False)
    gradient = importance(model, task, method="gradient", progress=False)
    assert rms_ratio(zero.per_prompt, gradient.per_prompt) < 1e-5


def test_a_small_change_is_what_the_gradient_says():
    """Sign and size: moving z by a thousandth towards zero changes the metric as predicted."""
    model, twin = lens.load(build("llama")), build("llama")
    task = some_task()
    twin.set_attn_implementation("eager")
    eager = Eager(twin.double(), task)
    predicted = importance(model, task, method="gradient", progress=False).values
    with torch.no_grad():
        clean = eager.benefit(eager.run(task.clean)[0])
        z = eager.run(task.clean)[1]
        shrunk = [0.999 * layer for layer in z]
        moved = np.array(
            [
                [
                    1000 * float((clean - eager.without([(layer, head)], shrunk)).mean())
                    for head in range(HEADS)
                ]
                for layer in range(LAYERS)
            ]
        )
    assert rms_ratio(moved, predicted) < 2e-2


def test_one_forward_pass_or_many_give_the_same(monkeypatch):
    model, task = lens.load(build("llama")), some_task()
    whole = {
        by: importance(model, task, method=by, progress=False) for by in ("ablation", "attribution")
    }
    monkeypatch.setattr("lens.tasks.task._LOGITS", 2 * 2048 * LENGTH)
    assert task.rows_at_once(model) == 2
    for by, scores in whole.items():
        again = importance(model, task, method=by, progress=False)
        assert rms_ratio(again.per_prompt, scores.per_prompt) < 1e-4
        assert rms_ratio(again.clean, scores.clean) < 1e-5


def test_everything_is_put_back_and_no_weight_gets_a_gradient():
    model, task = lens.load(build("llama")), some_task()
    before = model.model(task.clean).logits
    for by in ("ablation", "gradient", "attribution"):
        importance(model, task, method=by, progress=False)
    assert torch.equal(model.model(task.clean).logits, before)
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_frozen_weights_and_no_grad_make_no_difference():
    model, task = lens.load(build("llama")), some_task()
    expected = importance(model, task, method="gradient", progress=False)
    model.model.requires_grad_(False)
    with torch.no_grad():
        found = importance(model, task, method="gradient", progress=False)
    assert rms_ratio(found.per_prompt, expected.per_prompt) < 1e-6


def test_a_long_prompt_has_a_gradient_too():
    """At 4,099 tokens one prompt is enough for a score, not for its error."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=4099,
    )  # fmt: skip
    torch.manual_seed(0)
    model = lens.load(LlamaForCausalLM(config).eval())
    window = torch.randint(3, VOCAB, (1, 4099), generator=torch.Generator().manual_seed(1))
    scores = importance(
        model, language_modelling(model, window.tolist()), method="gradient", progress=False
    )
    assert np.isfinite(scores.values).all()
    assert np.abs(scores.values).min() > 0
    assert np.isnan(scores.stderr).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "magic"},
            "method must be one of 'ablation', 'gradient', 'attribution', 'atp', 'gate', 'direct', got 'magic'",
        ),
        (
            {"baseline": "none"},
            "baseline must be one of 'zero', 'mean', 'pooled_mean', .* got 'none'",
        ),
        (
            {"method": "gradient", "baseline": "mean"},
            "method='gradient' compares with zero alone, got the baseline 'mean'",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    model = lens.load("induction-2l")
    with pytest.raises(LensError, match=message):
        importance(model, induction(model, n=2), progress=False, **arguments)


def test_absolute_values_are_of_a_token_or_a_prompt():
    with pytest.raises(LensError, match="absolute must be one of 'prompt', 'token', got 'head'"):
        lens.heads.Gradient("head")


def test_what_a_baseline_or_a_gradient_cannot_do_is_refused():
    model = lens.load("induction-2l")
    one = induction(model, n=1)
    with pytest.raises(LensError, match="the mean over one prompt is that prompt"):
        importance(model, one, progress=False)
    with pytest.raises(LensError, match="resample needs at least two prompts"):
        importance(model, one, baseline="resample", progress=False)
    text = language_modelling(model, one.clean.tolist())
    with pytest.raises(LensError, match="has no corrupt prompts"):
        importance(model, text, method="attribution", progress=False)
    with pytest.raises(LensError, match="the metric has no gradient"):
        importance(model, one.with_metric("accuracy"), method="gradient", progress=False)
    with pytest.raises(LensError, match="the metric is flat here"):
        with_gradients(model, one.clean, lambda logits: (0 * logits).sum((1, 2)))
    with pytest.raises(LensError, match="token ids of induction-2l go from 0 to 64"):
        importance(model, some_task(), progress=False)


def test_layers_that_do_not_ask_the_registry_are_refused():
    model = lens.load("induction-2l")
    object.__setattr__(model.info, "attending", (0, 1, 2))
    with pytest.raises(LensError, match="ran 2 attention layers through the registry, 3 were"):
        read_heads(model, torch.tensor([[64, 1, 2]]), lambda *_: None)


def test_heads_of_a_group_are_checked():
    model = lens.load("induction-2l")
    task = induction(model, n=2)
    with pytest.raises(LensError, match="no heads were given"):
        ablate(model, task, heads=[])
    with pytest.raises(LensError, match="L1H0 is named twice"):
        ablate(model, task, heads=["L1H0", (1, 0)])
    with pytest.raises(LensError, match="there is no L1H4"):
        ablate(model, task, heads=["1.4"])
    with pytest.raises(LensError, match=r"a list such as \['L1H0'\], got the string 'L0H1'"):
        ablate(model, task, heads="L0H1")


def made(values, **changes):
    fields = {
        "per_prompt": np.asarray(values, float),
        "clean": np.zeros(np.asarray(values).shape[2]),
        "method": "ablation",
        "intervention": Intervention("mean"),
        "metric": "loss",
        "sign": -1,
        "task": "made",
        "model": "toy",
    }
    return HeadScores(**fields | changes)


def test_scores_are_means_with_errors_over_prompts():
    scores = made([[[1, 2, 6], [0, 0, 0]], [[-3, -4, -5], [9, 9, 9]], [[4, 4, 4], [2, 2, 5]]])
    assert scores.values.tolist() == [[3, 0], [-4, 9], [4, 3]]
    assert scores.stderr[0, 0] == pytest.approx(np.sqrt(7 / 3))
    assert [str(head) for head in scores.top(3)] == ["L1H1", "L2H0", "L0H0"]
    table = scores.table()
    assert table["name"].tolist() == ["L1H1", "L2H0", "L0H0", "L2H1", "L0H1", "L1H0"]
    assert table["value"].tolist() == [9, 4, 3, 3, 0, -4]
    assert (table["layer"].tolist(), table["head"].tolist()) == (
        [1, 2, 0, 2, 0, 1],
        [1, 0, 0, 1, 1, 0],
    )
    row = table[table["name"] == "L0H0"].iloc[0]
    assert (row["low"], row["high"]) == pytest.approx((0, 3 + 3 * longer(3)))  # drawn again, 1 to 6
    assert repr(scores) == (
        "HeadScores(ablation (mean) on 'made', toy: 3 × 2 heads, 3 prompts, loss 0 clean; "
        "top L1H1 9, L2H0 4, L0H0 3)"
    )
    for count in (0, 7):
        with pytest.raises(LensError, match="top takes 1 to 6 heads of toy"):
            scores.top(count)
    with pytest.raises(LensError, match=r"per_prompt must be \[layer, head, prompt\]"):
        made(np.zeros((2, 2, 3)), clean=np.zeros(2))


def test_the_figure_shows_the_values_where_they_belong():
    scores = made([[[1, 2, 6], [0, 0, 0]], [[-3, -4, -5], [9, 9, 9]], [[4, 4, 4], [2, 2, 5]]])
    figure = scores.plot()
    heatmap = figure.data[0]
    assert heatmap.z.tolist() == scores.values.tolist()
    assert (heatmap.zmin, heatmap.zmid, heatmap.zmax) == (-9, 0, 9)
    assert figure.layout.yaxis.autorange == "reversed"
    assert "± 1.5 (standard error, 3 prompts)" in heatmap.text[0][0]
    assert figure.layout.title.text == "Ablation (mean) on made: most at L1H1, 9 [9, 9] (loss)"
    assert scores.plot(title="mine", width=300, theme="dark").layout.title.text == "mine"
    single = made(np.zeros((1, 2, 1))).plot().data[0]
    assert (single.zmin, single.zmax) == (-1, 1)
    assert single.text[0][0] == ""


def test_resampling_draws_every_other_prompt_once():
    drawn = [donors(seed).tolist() for seed in range(5)]
    assert all(sorted(rows) == list(range(PROMPTS)) for rows in drawn)
    assert all(row != other for rows in drawn for row, other in enumerate(rows))
    assert len({tuple(rows) for rows in drawn}) > 1


@pytest.mark.parametrize("method", get_args(methods.Method))
def test_a_method_knows_the_baselines_of_the_table_and_no_others(method):
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, n=2, length=4, metric="loss")
    assert set(methods.BASELINES) == set(get_args(methods.Method))
    for baseline in set(get_args(methods.Baseline)) - set(methods.BASELINES[method]):
        with pytest.raises(LensError, match=f"method='{method}' .*, got the baseline '{baseline}'"):
            importance(model, task, method=method, baseline=baseline, progress=False)
