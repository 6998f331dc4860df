"""What results on the behaviour of heads say, word by word, and what they say where it would be the opposite."""

from dataclasses import replace

import numpy as np

from lens.heads.behaviour.patterns import PatternClasses
from lens.heads.behaviour.retrieval import RetrievalScores


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
        "Heads that fetch the needle (score above 0.1): L1H1 L0H1 L1H0; 2 of 3 needles came back.",
    )
    assert replace(found, per_trial=per_trial * 0).findings() == (
        "Heads that fetch the needle (score above 0.1): none; 2 of 3 needles came back.",
    )
