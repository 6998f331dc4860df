"""AtP*: against a whole probability matrix, on a saturated softmax, with one layer's gradient blocked."""

import numpy as np
import pytest
import torch

import lens
from lens.circuits.known import induction_transformer
from lens.common.errors import LensError
from lens.heads import AtP, importance
from lens.heads.measures.atp import _scores
from lens.passes.head_outputs import read_calls, with_gradients
from lens.passes.sublayers import sublayers
from lens.tasks import Task, induction
from tests.lens.architectures import VOCAB, build
from tests.lens.naive import rms_ratio

PROMPTS, LENGTH, LAYERS = 3, 13, 3


def some_task():
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(3, VOCAB, (2, PROMPTS, LENGTH), generator=generator)
    answers = torch.tensor([[12, 5], [12, 7], [12, 9]])
    return Task("random", clean, answers, torch.tensor([[4, 9], [50, 2], [9, 33]]), "loss", corrupt)


def seen(model, layer):
    """[queries, keys] which keys a query of the layer sees: causal, and the window where there is one."""
    config = model.model.config
    window = getattr(config, "sliding_window", None) or LENGTH
    if "full_attention" in [(getattr(config, "layer_types", None) or [""] * LAYERS)[layer]]:
        window = LENGTH
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return (distance >= 0) & (distance < window)


def attended(call, query, key, value, allowed):
    """z [rows, heads, queries, dim] by a whole matrix, float64."""
    repeat = call.query.shape[1] // call.key.shape[1]
    key, value = (x.double().repeat_interleave(repeat, 1) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2"])
def test_every_position_patched_alone_equals_a_whole_matrix(name):
    model, task = lens.load(build(name)), some_task()
    gradients = with_gradients(
        model, task.clean, lambda logits: -task.measure(logits, torch.arange(PROMPTS))
    )
    donors = read_calls(model, task.corrupt)
    for layer, (gradient, donor) in enumerate(zip(gradients, donors, strict=True)):
        call, slope, allowed = gradient.call, gradient.slope.double(), seen(model, layer)
        before = attended(call, call.query, call.key, call.value, allowed)
        expected = {letter: [] for letter in "qkv"}
        for at in range(LENGTH):
            for letter, part in zip("qkv", ("query", "key", "value"), strict=True):
                parts = {n: getattr(call, n).clone() for n in ("query", "key", "value")}
                parts[part][:, :, at] = getattr(donor, part)[:, :, at]
                after = attended(call, *parts.values(), allowed)
                expected[letter].append(((after - before) * slope).sum((2, 3)))
        for letter, effects in expected.items():
            effects = torch.stack(effects)  # [positions, rows, heads]
            found = _scores(gradient, donor, letter, None)
            assert rms_ratio(found, -effects.sum(0).T) < 1e-5
            assert rms_ratio(
                _scores(gradient, donor, letter, "token"), effects.abs().sum(0).T
            ) < 1e-5  # fmt: skip


@pytest.mark.parametrize("reads", ["q", "k"])
def test_a_saturated_softmax_hides_from_the_slope_and_not_from_atp_star(reads):
    """beta = 30: the slope by L1H0's query and key is 0, the effect is 2, as by ablation."""
    known = induction_transformer(beta=30, dtype="float64")
    task = list(known.tasks.values())["qk".index(reads)]
    ablated = importance(known.model, task, baseline="counterfactual", progress=False)
    exact = importance(known.model, task, method=AtP(reads), progress=False)
    assert ablated.values[1, 0] == pytest.approx(2, abs=1e-6)
    assert exact.values[1, 0] == pytest.approx(ablated.values[1, 0], abs=1e-6)
    assert abs(exact.values[1, 1]) < 1e-12
    (gradient,) = with_gradients(
        known.model, task.clean, lambda logits: task.measure(logits, torch.tensor([0]))
    )[1:]
    call, donor = gradient.call, read_calls(known.model, task.corrupt)[1]
    parts = {n: getattr(call, n).clone().requires_grad_() for n in ("query", "key")}
    allowed = torch.ones(call.query.shape[2], call.key.shape[2]).tril().bool()
    z = attended(call, *parts.values(), call.value, allowed)
    part = "query" if reads == "q" else "key"
    (slope,) = torch.autograd.grad((z * gradient.slope).sum(), parts[part])
    plain = (slope * (getattr(donor, part) - getattr(call, part))).sum()
    assert abs(float(plain)) < 1e-6


def test_grad_drop_is_the_mean_over_passes_without_one_layer():
    model, task = lens.load(build("llama")), some_task()
    found = importance(model, task, method=AtP(grad_drop=True), progress=False)
    donors = read_calls(model, task.corrupt)
    total = np.zeros_like(found.per_prompt)
    for dropped, parts in enumerate(sublayers(model)):
        gradients = with_gradients(
            model,
            task.clean,
            lambda logits: -task.measure(logits, torch.arange(PROMPTS)),
            blocked=parts,
        )
        assert gradients[dropped].slope.abs().max() == 0
        assert all(g.slope.norm() > 0 for at, g in enumerate(gradients) if at != dropped)
        for layer, (gradient, donor) in enumerate(zip(gradients, donors, strict=True)):
            total[layer] += _scores(gradient, donor, "qkv", "token").numpy() / (LAYERS - 1)
    assert rms_ratio(found.per_prompt, total) < 1e-5
    assert found.intervention.grad_drop
    assert found.absolute == "token"
    assert found.intervention.granularity.startswith("query and key and value of the head")


def test_blocking_a_layer_is_what_detaching_its_outputs_does():
    """The slope by z of layer 0 when layer 1 is blocked: autograd through the residual stream alone."""
    model, task = lens.load(build("llama")), some_task()
    objective = lambda logits: task.measure(logits, torch.arange(PROMPTS))  # noqa: E731
    blocked = sublayers(model)[1]
    dropped = with_gradients(model, task.clean, objective, blocked=blocked)[0].slope
    whole = with_gradients(model, task.clean, objective)[0].slope
    assert rms_ratio(dropped, whole) > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reads": "qz"}, "reads must be some of 'q', 'k' and 'v'"),
        ({"reads": "qq"}, "reads must be some of"),
        ({"reads": ""}, "reads must be some of"),
        ({"absolute": "head"}, "absolute must be one of 'prompt', 'token', got 'head'"),
        ({"grad_drop": True, "absolute": "prompt"}, "absolute='token' or None"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(LensError, match=message):
        AtP(**arguments)


def test_a_word_is_the_method_with_its_usual_arguments():
    model = lens.load("induction-2l")
    task = induction(model, n=2)
    word = importance(model, task, method="atp", progress=False)
    np.testing.assert_array_equal(
        word.per_prompt, importance(model, task, method=AtP(), progress=False).per_prompt
    )
    assert word.label == "atp (counterfactual)"
    with pytest.raises(LensError, match="take counterfactual or resample"):
        importance(model, task, method=AtP("q"), baseline="mean", progress=False)
