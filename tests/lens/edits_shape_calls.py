"""Calls of lens.edits with right and with wrong shapes, for test_room_shapes.py."""

import numpy as np
import torch

from lens.edits import _others, _phi, effects, losses

HIDDEN = torch.randn(2, 5, 7)
GUESSES, TARGET = torch.randn(5, 11).log_softmax(-1), torch.arange(5)
HEADS, MASS = torch.eye(3, 4).bool(), torch.rand(3, 4)
KEYS, SHARES = np.arange(9) < 2, np.full(9, 0.1)
ALPHA, SOURCE = torch.rand(3, 4, 9), torch.zeros(3, 1, 9, dtype=torch.bool)
RANDOM = np.random.default_rng(0)

RIGHT = {
    "phi": lambda: [_phi.phi(HIDDEN), _phi.phi(HIDDEN[0], [3])],
    "changes_of": lambda: losses.changes_of(GUESSES, GUESSES, TARGET),
    "control_keys": lambda: _others.control_keys("mass", KEYS, SHARES, RANDOM, ~KEYS),
    "other_heads": lambda: _others.other_heads("mass", HEADS, RANDOM, MASS),
    "moved": lambda: effects.moved(ALPHA, ALPHA, SOURCE),
}
WRONG = {
    "changes_of another vocabulary": lambda: losses.changes_of(GUESSES, GUESSES[:, 1:], TARGET),
    "changes_of fewer targets": lambda: losses.changes_of(GUESSES, GUESSES, TARGET[1:]),
    "control_keys of other masses": lambda: _others.control_keys("size", KEYS, SHARES[1:], RANDOM),
    "other_heads turned round": lambda: _others.other_heads("mass", HEADS, RANDOM, MASS.mT),
    "moved with sources of one layer": lambda: effects.moved(ALPHA, ALPHA, SOURCE[0]),
}
CALLS = RIGHT | WRONG
