"""The optimal constant: a closed form, what an idle head scores, the split, and refusals."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.heads import importance
from lens.heads.measures.optimal import split
from lens.heads.pruning import ablate
from lens.models.attention_only import AttentionOnlyConfig, AttentionOnlyModel
from lens.tasks import Task, induction

LABELS = torch.tensor([5, 5, 5, 9, 5, 12, 9, 5, 5, 12, 5])


def one_head_decides(seed=3):
    """One layer of two heads, of which the second writes nothing; prompts all end in one token.

    With a constant for the first head every prompt gives the same logits at its end, so that the
    least loss on the fitted prompts is the entropy of their labels.
    """
    torch.manual_seed(seed)
    config = AttentionOnlyConfig(
        vocab_size=13, hidden_size=22, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.7
    )  # fmt: skip
    model = AttentionOnlyModel(config).eval()
    with torch.no_grad():
        model.get_parameter("blocks.0.attn.o.weight")[:, 11:] = 0
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 12, (len(LABELS), 7), generator=generator)
    clean[:, -1] = 4
    positions = torch.full((len(LABELS), 1), 6)
    return lens.load(model), Task("labels", clean, positions, LABELS[:, None], "loss")


def test_the_best_constant_predicts_the_frequencies_of_the_labels():
    model, task = one_head_decides()
    fitted_on, scored = split(task.n, 1)
    found = importance(model, task, baseline="optimal", seed=1, steps=300, progress=False)
    labels = LABELS[fitted_on]
    share = torch.stack([(labels == label).float().mean() for label in labels])
    entropy = float(-share.log().mean())
    from lens.common.head_ids import HeadId
    from lens.heads.measures.optimal import Constants, _source

    group = [[HeadId(0, 0)]]
    constants = Constants(model, task, fitted_on, 300, 1)
    (best,) = constants.fit(group)
    value = best(0, torch.zeros(1, 2, 7, 11))[0, 0, 0]
    reached = float(constants._mean_losses(group, [[value]]))
    mean = float(constants._mean_losses(group, [[constants._mean[0][0]]]))
    assert entropy <= reached + 1e-5  # a lower bound for any constant
    assert reached == pytest.approx(entropy, abs=0.02)
    assert reached < mean - 0.1
    by_hand = constants._losses(group, [[value]], scored[:1])
    assert found.clean[0] + found.per_prompt[0, 0, 0] == pytest.approx(float(by_hand[0]), abs=1e-5)
    assert _source(group[0], [value])(1, torch.ones(1, 2, 7, 11)).abs().sum() == 0


def test_a_head_that_writes_nothing_scores_exactly_zero():
    model, task = one_head_decides()
    found = importance(model, task, baseline="optimal", progress=False)
    assert np.abs(found.per_prompt[0, 1]).max() == 0
    assert np.abs(found.per_prompt[0, 0]).min() > 0


def test_the_split_is_said_and_the_fitted_prompts_are_not_scored():
    model, task = one_head_decides()
    found = importance(model, task, baseline="optimal", seed=2, steps=2, progress=False)
    fitted_on, scored = split(task.n, 2)
    assert found.intervention.fitted_on == tuple(fitted_on.tolist())
    assert found.intervention.steps == 2
    assert found.n == len(scored) == 6
    assert sorted([*fitted_on.tolist(), *scored.tolist()]) == list(range(11))
    np.testing.assert_allclose(found.clean, task.evaluate(model)[scored], atol=1e-5)
    together = ablate(model, task, heads=["L0H0"], baseline="optimal", seed=2, progress=False)
    assert together.n == 6
    assert found.label == "ablation (optimal)"


def test_the_constant_breaks_less_than_zero_and_the_mean_on_the_known_circuit():
    """Li and Janson: the optimal constant leaves the least loss; the previous-token head still leads."""
    model = lens.load("induction-2l")
    task = induction(model, n=24, seed=0)
    optimal = importance(model, task, baseline="optimal", steps=25, progress=False)
    rows = split(24, 0)[1].numpy()
    for name in ("zero", "pooled_mean"):
        other = importance(model, task, baseline=name, progress=False)
        lost = other.per_prompt[:, :, rows].mean(-1)
        assert (optimal.values < lost + 0.05).all()
    assert str(optimal.top(1)[0]) == "L0H1"
    assert optimal.values[0, 1] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "mean", "steps": 3}, "steps belong to baseline='optimal', got .* 'mean'"),
        ({"baseline": "optimal", "steps": 0}, "steps must be a positive integer, got 0"),
        ({"baseline": "optimal", "method": "attribution"}, "is fitted to the real ablation"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    model, task = one_head_decides()
    with pytest.raises(LensError, match=message):
        importance(model, task, progress=False, **arguments)


def test_metrics_without_a_best_value_and_single_prompts_are_refused():
    model, task = one_head_decides()
    with pytest.raises(LensError, match="'accuracy' has no gradient to fit a constant by"):
        importance(model, task.with_metric("accuracy"), baseline="optimal")
    difference = Task(
        "d", task.clean, task.positions, task.correct, "logit_difference", wrong=0 * task.correct
    )
    with pytest.raises(LensError, match="'logit_difference' has no best value"):
        importance(model, difference, baseline="optimal")
    one = Task("one", task.clean[:1], task.positions[:1], task.correct[:1], "loss")
    with pytest.raises(LensError, match="takes at least two; got 1"):
        importance(model, one, baseline="optimal")
