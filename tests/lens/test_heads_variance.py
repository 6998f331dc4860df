"""Shares of variance: closed forms, a regression twin, real traces of several lengths, refusals."""

import numpy as np
import pytest

import lens
from lens.common.errors import LensError
from lens.traces.variance import SOURCES, shares_of, variance
from tests.lens.traces import probabilities, trace_of


@pytest.mark.parametrize("source", list(SOURCES))
def test_a_single_effect_gets_the_whole_share(source):
    random = np.random.default_rng(1)
    axes = SOURCES[source]
    shape = [size if axis in axes else 1 for axis, size in enumerate((3, 5, 7))]
    effect = random.normal(size=shape)
    for axis in axes:  # a pure effect has mean 0 along each of its axes
        effect = effect - effect.mean(axis, keepdims=True)
    found = shares_of(np.broadcast_to(effect, (3, 5, 7)) + 4)
    expected = [float(name == source) for name in SOURCES]
    assert found == pytest.approx(expected, abs=1e-12)


def test_shares_are_those_of_nested_regressions():
    values = np.random.default_rng(2).normal(size=(3, 5, 7)) + np.arange(7)
    total = ((values - values.mean()) ** 2).sum()
    grid = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), -1).reshape(-1, 3)

    def explained(axes):
        """Sum of squares that dummies of the cells of these axes explain."""
        cells = np.unique(grid[:, axes], axis=0, return_inverse=True)[1].ravel()
        dummies = np.eye(cells.max() + 1)[cells]
        fitted = dummies @ np.linalg.lstsq(dummies, values.ravel(), rcond=None)[0]
        return ((fitted - values.mean()) ** 2).sum()

    single = {axis: explained([axis]) for axis in range(3)}
    expected = [*single.values()]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        expected.append(explained([a, b]) - single[a] - single[b])
    expected.append(total - sum(expected))
    found = shares_of(values)
    assert found == pytest.approx(np.array(expected) / total)
    assert found.sum() == pytest.approx(1)


def test_the_same_traces_twice_leave_nothing_to_the_condition():
    traces = [trace_of(probabilities(1, 3, 37, seed)) for seed in range(4)]
    found = variance({"a": traces, "b": traces})
    assert found.shares["condition"] == pytest.approx(0, abs=1e-12)
    assert found.shares["condition × head"] == pytest.approx(0, abs=1e-12)
    table = found.table().set_index("source")
    assert (table["low"] <= table["high"]).all()
    assert (table["n"] == 4).all()


def test_heads_differ_more_than_lengths_do():
    model = lens.load("text-lm-3l")
    text = lens.tasks.text("moby-dick")
    starts = (0, 2000, 5000)
    traces = {
        f"{tokens} tokens": lens.capture(
            model, [lens.tasks.take(model, text[start:], tokens) for start in starts]
        )
        for tokens in (48, 96)
    }
    found = variance(traces, metric="first_token")
    assert found.values.shape == (2, 3, 18)
    profile = lens.profile(traces["96 tokens"][2])
    assert found.values[1, 2] == pytest.approx(profile["first_token"].to_numpy())
    assert found.shares["head"] > 0.5
    assert "first_token (raw) over 2 conditions, 3 prompts, 18 heads" in repr(found)


def test_one_prompt_has_no_interval():
    found = variance(
        {name: [trace_of(probabilities(1, 3, 37, seed))] for seed, name in enumerate("ab")}
    )
    assert found.table()["low"].isna().all()


def test_what_cannot_be_split_is_refused():
    one, other = (trace_of(probabilities(1, 2, 33, seed)) for seed in (0, 1))
    wide = trace_of(probabilities(1, 3, 33, 0))
    unscored = trace_of(probabilities(1, 2, 33, 0), ids=list(range(33)))
    uniform = trace_of(np.tril(np.ones((1, 2, 33, 33))) / np.arange(1, 34)[:, None])
    cases = [
        (lambda: variance({"a": [one]}), "at least two conditions"),
        (lambda: variance({"a": [one], "b": [one, other]}), "equally many traces"),
        (lambda: variance({"a": [one], "b": [wide]}), "same layers × heads"),
        (lambda: variance({"a": [one], "b": [other]}, metric="magic"), "no metric 'magic'"),
        (
            lambda: variance({"a": [one], "b": [unscored]}, metric="induction"),
            "not scored for L0H0: ",
        ),
        (lambda: variance({"a": [uniform], "b": [uniform]}), "everywhere, so it has no variance"),
    ]
    for call, message in cases:
        with pytest.raises(LensError, match=message):
            call()
