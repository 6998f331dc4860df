"""What results on the behaviour of heads say, word by word, and what they say where it would be the opposite."""

from dataclasses import replace

import numpy as np
import pytest

from lens.heads.behaviour.patterns import PatternClasses
from lens.heads.behaviour.retrieval import RetrievalScores, _at_random, fetched
from lens.tasks.needles import Trial


def test_patterns():
    kept = np.array([[0.9, 0.2], [0.9, 0.9], [0.5, 0.3]]).reshape(3, 1, 2, 1)
    found = PatternClasses(kept, np.full((3, 1), 0.2), 0.25, 0.8, 0.02, 4, (0,), "small")
    assert found.findings() == (
        "With 25% of the visible pairs, of 2 heads 1 a-shape, 1 vertical-slash (a class must keep 80% of the mass, and a simpler one wins that keeps at most 0.02 less; on 1 prompt).",
    )
    twice = replace(found, kept=np.repeat(kept, 2, -1), enough=0.95)
    assert twice.findings() == (
        "With 25% of the visible pairs, of 2 heads 2 diffuse (a class must keep 95% of the mass, and a simpler one wins that keeps at most 0.02 less; on 2 prompts).",
    )


def test_retrieval():
    per_trial = np.array([[[0.0, 0.1], [0.5, 0.7]], [[0.05, 0.2], [1.0, 0.9]]])
    found = RetrievalScores(per_trial, np.array([1.0, 1.0, 0.2]), 0.5, "small")
    assert found.findings() == (
        "3 of 4 heads score above 0.1 in fetching the needle: L1H1 0.95 [0.00, 1.00], L0H1 0.60 [0.00, 1.00], L1H0 0.12 "
        "[0.00, 1.00]; 2 of 3 needles came back.",
    )
    assert replace(found, per_trial=per_trial / 100, random=0.04).findings() == (
        "None of 4 heads score above 0.1 in fetching the needle, the highest: L1H1 0.01 [0.00, 0.03]; a key at random scores "
        "0.04; 2 of 3 needles came back.",
    )
    (said,) = replace(found, per_trial=np.full((2, 5, 1), 0.5)).findings()
    assert "10 of 10 heads" in said
    assert "L0H0 0.50, " in said
    assert " and 4 more; 1 of 3 needles came back." in said


def test_a_key_at_random_fetches_what_the_mean_of_draws_does():
    trial = Trial((5, 7, 7, 8, 9, 4), (1, 4), (7, 7, 8))
    answer = [7, 8, 7]
    drawn = np.random.default_rng(0)
    keys = np.stack([drawn.integers(6 + step, size=(100, 400)) for step in range(3)], -1)
    found = fetched(keys, trial, answer).mean()
    assert found == pytest.approx(_at_random(trial, answer), abs=0.004)
