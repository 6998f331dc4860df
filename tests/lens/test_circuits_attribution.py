"""Scores of edges: identities that hold exactly, and what the hand-built induction transformer shows."""

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lens
from lens.circuits import score_edges
from lens.circuits.graph.activations import read_activations
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.known import induction_transformer
from lens.circuits.scores.attribution import _Meeting
from lens.circuits.scores.methods import EapIg
from lens.circuits.scores.scoring import METHODS
from lens.common.errors import LensError
from tests.lens.circuit_models import KINDS, ROWS, error, small_model, small_task, stepped
from tests.tiers import later

QUERY, OUT = "input->a1.h0<q>", "a1.h0->logits"


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return small_model(request.param)


def by_masks(model, task, kv="head", alphas=(0.0,)):
    """Scores [edges] from the gradient by the masks, averaged over alphas on all edges together."""
    nodes = find_nodes(model, kv=kv)
    _, reference = read_activations(nodes, task.corrupt_or_refuse())
    total = np.zeros(nodes.graph.n)
    for alpha in alphas:
        masks = torch.full((1, *nodes.graph.allowed.shape), alpha, dtype=torch.float64)
        masks.requires_grad_()
        logits = masked_logits(nodes, task.clean, reference, masks)[0]
        value = task.measure(logits, torch.arange(task.n)).mean()
        total = total + torch.autograd.grad(value, masks)[0][0].numpy()[nodes.graph.allowed]
    return -total / len(alphas)


def value(scores, edge):
    return scores.values[scores.graph.find([edge])[0]]


@pytest.mark.parametrize("kv", ["head", "group"])
def test_eap_is_the_gradient_by_the_masks(model, kv):
    task = small_task()
    found = score_edges(model, task, method="eap", kv=kv, batch_size=2)
    assert error(found.values, by_masks(model, task, kv)) < 1e-11


def test_a_smaller_loss_is_better(model):
    task = small_task().with_metric("loss")
    found = score_edges(model, task, method="eap")
    assert error(found.values, -by_masks(model, task)) < 1e-11


@pytest.mark.parametrize(
    "method", ["eap", "eap-ig", "clean-corrupted", "eap-ig-activations", "eap-ig-stages"]
)
def test_scores_depend_neither_on_batches_nor_on_the_order(method):
    model, task = small_model("gpt2"), small_task()
    whole = score_edges(model, task, method=stepped(method, 2), batch_size=ROWS)
    order = torch.tensor([3, 1, 4, 0, 2])
    turned = replace(
        task,
        clean=task.clean[order],
        corrupt=task.corrupt_or_refuse()[order],
        correct=task.correct[order],
        wrong=None if task.wrong is None else task.wrong[order],
    )
    parts = score_edges(model, turned, method=stepped(method, 2), batch_size=2)
    assert error(parts.per_prompt, whole.per_prompt[order.numpy()]) < 1e-11


def test_input_cut_of_eap_ig_is_the_whole_effect():
    model, task = small_model("gpt2"), small_task()
    fine = score_edges(model, task, method=EapIg(16))
    rough = score_edges(model, task, method=EapIg(16, "left"))
    change = (task.evaluate(model) - task.evaluate(model, corrupt=True)).mean().item()
    assert fine.total == pytest.approx(change, rel=1e-9)
    cut = fine.values[fine.graph.ends[1] == 0].sum()
    assert cut - change == pytest.approx(fine.residual, abs=1e-9)
    assert fine.residual is not None
    assert rough.residual is not None
    assert abs(fine.residual) < 0.02 * abs(change)
    assert abs(rough.residual) > 3 * abs(fine.residual)


def test_all_masks_together_sum_to_the_whole_effect():
    model, task = small_model("gpt2"), small_task()
    change = (task.evaluate(model) - task.evaluate(model, corrupt=True)).mean().item()
    errors = [
        abs(by_masks(model, task, alphas=(np.arange(n) + 0.5) / n).sum() - change) for n in (3, 24)
    ]
    assert errors[1] < 0.02 * abs(change) < errors[0]


def test_clean_corrupted_is_the_mean_of_both_gradients(model):
    task = small_task()
    turned = replace(task, clean=task.corrupt, corrupt=task.clean)
    there = score_edges(model, task, method="eap").values
    back = score_edges(model, turned, method="eap").values
    found = score_edges(model, task, method="clean-corrupted").values
    assert error(found, (there - back) / 2) < 1e-10


def test_clean_corrupted_needs_what_its_baseline_needs():
    """It asked for corrupt prompts with any baseline, and took none of them."""
    model, task = small_model("gpt2"), small_task()
    for baseline in ("zero", "mean"):
        asked: Any = {"method": "clean-corrupted", "baseline": baseline, "progress": False}
        alone = score_edges(model, replace(task, corrupt=None), **asked).values
        assert error(alone, score_edges(model, task, **asked).values) < 1e-12
    with pytest.raises(LensError, match="has no corrupt prompts"):
        score_edges(model, replace(task, corrupt=None), method="clean-corrupted")


def test_group_scores_are_sums_over_the_heads_of_the_group():
    model, task = small_model("llama"), small_task()
    alone = score_edges(model, task, method="eap")
    shared = score_edges(model, task, method="eap", kv="group")
    parts = sum(value(alone, f"a0.h2->a2.h{head}<v>") for head in (3, 4, 5))
    assert value(shared, "a0.h2->a2.kv1<v>") == pytest.approx(parts, rel=1e-10)


def test_exact_is_one_masked_run_per_edge():
    model, task = small_model("gpt2"), small_task(rows=3)
    found = score_edges(model, task, method="exact", batch_size=2)
    nodes = find_nodes(model)
    _, reference = read_activations(nodes, task.corrupt_or_refuse())
    clean = task.evaluate(model).numpy()
    for edge in (0, 17, nodes.graph.n - 1):
        mask = torch.zeros(1, *nodes.graph.allowed.shape)
        mask[0, nodes.graph.ends[0][edge], nodes.graph.ends[1][edge]] = 1
        with torch.no_grad():
            logits = masked_logits(nodes, task.clean, reference, mask)[0]
        expected = clean - task.measure(logits, torch.arange(3)).numpy()
        assert error(found.per_prompt[:, edge], expected) < 1e-9


@pytest.mark.parametrize(
    ("beta", "eap", "exact", "left"),
    [later(4, 0.64550, 1.66655, 1.65300), (8, 0.02690, 1.99458, 1.91049), later(30, 0, 2, 0.11839)],
)
def test_what_gradients_see_of_the_induction_transformer(beta, eap, exact, left):
    """Golden values were computed independently in float64."""
    known = induction_transformer(beta, dtype="float64")

    def scored(**options):
        return score_edges(known.model, known.task, **options)

    assert value(scored(method="eap"), QUERY) == pytest.approx(eap, abs=1e-5)
    assert value(scored(method="exact"), QUERY) == pytest.approx(exact, abs=1e-5)
    assert value(scored(method=EapIg(5, "left")), QUERY) == pytest.approx(left, abs=1e-5)
    fine = scored(method=EapIg(40))
    assert value(fine, QUERY) == pytest.approx(exact, abs=0.02)
    assert value(fine, OUT) == pytest.approx(value(scored(method="exact"), OUT), abs=1e-9)
    assert set(scored(method="exact").top(2).edges) == {QUERY, OUT}


def test_the_residual_tells_that_five_left_steps_fail():
    known = induction_transformer(30, dtype="float64")
    found = score_edges(known.model, known.task, method=EapIg(rule="left"))
    assert found.residual == pytest.approx(0.11839 - 2, abs=1e-5)
    fine = score_edges(known.model, known.task, method=EapIg(30))
    assert fine.residual == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("beta", [4, 30])
def test_steps_are_doubled_until_the_whole_effect_is_there(beta):
    known = induction_transformer(beta, dtype="float64")
    found = score_edges(known.model, known.task, method=EapIg("auto"))
    assert found.residual is not None
    assert found.total is not None
    assert found.total == pytest.approx(1.66527 if beta == 4 else 2, abs=1e-5)
    assert abs(found.residual) < 0.01 * found.total
    assert found.steps is not None
    if found.steps > 5:
        before = score_edges(known.model, known.task, method=EapIg(found.steps // 2))
        assert before.residual is not None
        assert abs(before.residual) >= 0.01 * found.total
    assert (found.steps > 5) == (beta == 30)


def test_steps_that_never_suffice_are_refused(monkeypatch):
    monkeypatch.setattr("lens.circuits.scores.scoring._MOST", 10)
    known = induction_transformer(30, dtype="float64")
    with pytest.raises(LensError, match=r"after 10 steps \d+\.\d% of the effect is still missing"):
        score_edges(known.model, known.task, method=EapIg("auto", "left"))
    with pytest.raises(LensError, match="steps='auto' belongs to over='inputs', got 'stages'"):
        EapIg("auto", over="stages")


def test_differences_are_kept_at_a_sixth_of_the_naive_size():
    import transformers

    import lens

    config = transformers.GPT2Config(vocab_size=29, n_positions=8, n_embd=24, n_layer=12, n_head=12)
    nodes = find_nodes(lens.load(transformers.GPT2LMHeadModel(config).eval()))
    _, found = read_activations(nodes, torch.tensor([[3, 4, 5], [6, 7, 8]]))
    naive = 2 * 3 * len(nodes.graph.writers) * 24  # rows, tokens, writers, d_model
    assert naive / found.numbers() == pytest.approx(157 / 25)


def test_flat_and_undifferentiable_metrics_are_refused():
    model, task = small_model("gpt2"), small_task()
    kl = task.with_kl(model)
    nn.Module.float(model.model)  # in float32 the gradient is rounding, and not 0
    for method in ("eap", "atp*", "atp*-together", "atp*-grad-drop", "relp", "relp-values"):
        with pytest.raises(LensError, match=r"flat at the clean prompts.*use method='eap-ig'"):
            score_edges(model, kl, method=method)
    assert np.abs(score_edges(model, kl, method="eap-ig").values).max() > 1e-3
    published = EapIg(
        steps=1, rule="left", over="activations"
    )  # one step after the reference: clean
    with pytest.raises(LensError, match="takes its gradient there alone, so that its scores are"):
        score_edges(model, kl, method=published)
    two = score_edges(model, kl, method=replace(published, steps=2))
    assert np.abs(two.values).max() > 1e-3
    with pytest.raises(LensError, match="the metric has no gradient"):
        score_edges(model, task.with_metric("accuracy"), method="eap")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "guess"}, "method must be one of 'exact', 'eap'.*got 'guess'"),
        ({"batch_size": True}, "batch_size must be a positive integer, got True"),
        ({"baseline": "noise"}, "baseline must be one of 'counterfactual'.*got 'noise'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(LensError, match=message):
        score_edges(small_model("gpt2"), small_task(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "right"}, "rule must be one of 'midpoint', 'left', got 'right'"),
        ({"over": "edges"}, "over must be one of 'inputs', 'activations', 'stages', got 'edges'"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 2.5}, "steps must be a positive integer, got 2.5"),
    ],
)
def test_wrong_steps_are_refused(options, message):
    with pytest.raises(LensError, match=message):
        EapIg(**options)


def test_a_task_without_corrupt_prompts():
    model, task = small_model("gpt2"), replace(small_task(), corrupt=None)
    with pytest.raises(LensError, match="has no corrupt prompts"):
        score_edges(model, task, method="eap")
    assert score_edges(model, task, method="eap", baseline="zero").per_prompt.any()


@pytest.mark.parametrize("method", ["eap", "eap-ig-activations"])
def test_nothing_of_a_backward_pass_stays_in_memory(method):
    """Of 30 layers, 305 passes kept 10 GB: a hook on several tensors holds the graph that it hangs on."""
    score_edges(small_model(KINDS[0]), small_task(), method=method)
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is _Meeting]


@pytest.fixture(scope="module")
def rounded():
    """The same small model and task in both precisions."""
    pair = [lens.load("induction-2l", dtype=dtype) for dtype in ("float32", "bfloat16")]
    return pair, lens.tasks.induction(pair[0], n=2, length=8)


@pytest.mark.parametrize("method", METHODS)
def test_edges_of_a_model_in_bfloat16_are_scored(rounded, method):
    """Numpy has no bfloat16: most methods ended with its TypeError."""
    (exact, half), task = rounded
    full, found = (
        score_edges(one, task, method=method, progress=False).values for one in (exact, half)
    )
    assert found.dtype == full.dtype
    assert np.corrcoef(full, found)[0, 1] > 0.9
