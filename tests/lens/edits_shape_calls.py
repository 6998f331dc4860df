"""Calls of lens.edits with right and with wrong shapes, for test_room_shapes.py."""

import numpy as np
import torch

import lens
from lens.edits import (
    Ablate,
    Act,
    Activation,
    Force,
    Freeze,
    Mask,
    Move,
    Sparse,
    Subspace,
    Value,
    _keyed,
    _others,
    _parts,
    _phi,
    _rows,
    base,
    clean_runs,
    effects,
    freezing,
    losses,
    subspaces,
)
from lens.edits._gathered import gathered_states
from lens.edits.running import edit
from lens.passes.calls import LayerCall
from lens.passes.inputs import read_prompts
from lens.passes.keys import KeysAt
from lens.passes.structures import MaskStructure

HIDDEN = torch.randn(2, 5, 7)
GUESSES, TARGET = torch.randn(5, 11).log_softmax(-1), torch.arange(5)
HEADS, MASS = torch.eye(3, 4).bool(), torch.rand(3, 4)
KEYS, SHARES = np.arange(9) < 2, np.full(9, 0.1)
ALPHA, SOURCE = torch.rand(3, 4, 9), torch.zeros(3, 1, 9, dtype=torch.bool)
RANDOM = np.random.default_rng(0)
MODEL = lens.load("induction-2l")
IDS = [3, 4, 5, 6, 7]
CALL = LayerCall(*(torch.rand(2, heads, 5, 8) for heads in (4, 2, 2)), MaskStructure(True), 1.0)
AT = KeysAt(0, 0, torch.arange(5).expand(2, -1), None)
GROUPS = torch.arange(5).expand(2, -1) % 2
STATES = torch.rand(2, 1, 4, 5), torch.rand(2, 1, 4, 5, 8)
BASIS = torch.linalg.qr(torch.randn(MODEL.info.head_dim, 2)).Q


def masked():
    """A pass with a mask of the first key in one layer."""
    with edit(MODEL, Mask("first", layers=[1])):
        return MODEL.logits(IDS)


def together(*edits):
    """A pass with several edits, and what `effect` finds of the first beside its controls."""
    with edit(MODEL, *edits):
        MODEL.logits(IDS)
    return effects.effect(MODEL, [IDS], edits[0], progress=False)


def rows(sinks=None):
    return _rows.Rows.of(*STATES, sinks)


def clean(rows=None):
    return clean_runs.CleanRuns(MODEL).run(read_prompts(MODEL, IDS)[0][0], rows)


RIGHT = {
    "phi": lambda: [_phi.phi(HIDDEN), _phi.phi(HIDDEN[0], [3])],
    "changes_of": lambda: losses.changes_of(GUESSES, GUESSES, TARGET),
    "control_keys": lambda: _others.control_keys("mass", KEYS, SHARES, RANDOM, ~KEYS),
    "other_heads": lambda: _others.other_heads("mass", HEADS, RANDOM, MASS),
    "moved": lambda: effects.moved(ALPHA, ALPHA, SOURCE),
    "an edit": masked,
    "many edits": lambda: together(Move("first"), Value([1], "mean"), Force([4], [1])),
    "edits of directions": lambda: together(Subspace(BASIS, heads=["L1H0"])),
    "a held pattern and blocks": lambda: [
        together(one) for one in (Freeze(IDS), Sparse(lens.policies.AShape(1, 2), 2))
    ],
    "what is out": lambda: [
        together(one)
        for one in (
            Ablate(["L1H0"], "mean", [IDS, IDS]),
            Ablate("L0.attention"),
            Activation(0, 3, 1),
        )
    ],
    "a recipe": lambda: together(Act(heads=["L1H0"])),
    "Rows": lambda: [
        rows().output(),
        rows(torch.rand(4)).mass([0]),
        rows().where(rows().seen, rows()),
    ],
    "Rows revalued": lambda: _rows.revalued(rows(), [0], 1.0, STATES[1][0])[0].seen,
    "taken_out": lambda: [
        subspaces.taken_out(torch.rand(*size, len(BASIS)), BASIS) for size in ((), (3,), (2, 3))
    ],
    "gathered_states": lambda: gathered_states(CALL, GROUPS, 2, GROUPS > 0, "auto"),
    "CleanRuns.run": lambda: [clean(), clean(torch.arange(5) > 2)],
    "queries_at": lambda: base.queries_at(CALL, AT),
    "part_of": lambda: base.part_of(CALL, torch.tensor([1, 3]), 2),
    "grouped": lambda: [base.grouped(CALL, GROUPS, "auto", only=one) for one in (None, GROUPS > 0)],
}
WRONG = {
    "changes_of another vocabulary": lambda: losses.changes_of(GUESSES, GUESSES[:, 1:], TARGET),
    "changes_of fewer targets": lambda: losses.changes_of(GUESSES, GUESSES, TARGET[1:]),
    "control_keys of other masses": lambda: _others.control_keys("size", KEYS, SHARES[1:], RANDOM),
    "other_heads turned round": lambda: _others.other_heads("mass", HEADS, RANDOM, MASS.mT),
    "moved with sources of one layer": lambda: effects.moved(ALPHA, ALPHA, SOURCE[0]),
    "Rows with sinks of key heads": lambda: rows(torch.rand(2)),
    "Rows of other groups": lambda: _rows.Rows.of(STATES[0], STATES[1][:1], None),
    "taken_out of another width": lambda: subspaces.taken_out(torch.rand(3, len(BASIS) - 1), BASIS),
    "gathered_states with rows of numbers": lambda: gathered_states(
        CALL, GROUPS, 2, GROUPS, "auto"
    ),
    "CleanRuns.run with rows of numbers": lambda: clean(torch.arange(5)),
    "part_of heads that are marked": lambda: base.part_of(CALL, torch.ones(4, dtype=torch.bool)),
    "_check_seen of keys alone": lambda: _keyed._check_seen(CALL, GROUPS > 0, GROUPS[0] > 0),
    "HeadsOut of one mean": lambda: _parts.HeadsOut([torch.rand(8)], HEADS, "auto"),
    "SubLayersOut with means of tokens": lambda: _parts.SubLayersOut({}, {"L0.mlp": HIDDEN}),
    "_at one row of places": lambda: freezing._at(STATES[1][0], torch.arange(5)),
    "grouped by one row": lambda: base.grouped(CALL, GROUPS[0], "auto"),
    "grouped with other keys": lambda: base.grouped(CALL, GROUPS, "auto", only=GROUPS[:, 1:] > 0),
}
CALLS = RIGHT | WRONG
