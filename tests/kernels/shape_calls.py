"""Calls of the kernels' public functions with right and with wrong shapes, for test_shapes.py."""

import doctest
import importlib
from dataclasses import replace

import numpy as np
import torch
from lens_kernels import (
    AttentionGroups,
    AttentionMask,
    AttentionResult,
    AttentionState,
    AttentionStatistics,
    attention,
    decode,
    explain,
    merge,
    patch_effects,
    redistribute,
    tile,
)
from lens_kernels.redistribution import Mask, Redistribution

from tests.kernels.helpers import CASES, case_problem, everything, tensors

EXAMPLES = (
    "api",
    "decoding",
    "patching",
    "rectangles",
    "redistribution",
    "states",
    "types",
    "weighted",
)

Q, K, V = tensors(2, 4, 2, 7, 11, 8, 6)
NAMES = ("batch", "heads", "queries", "keys")
STATE = AttentionState(torch.zeros(2, 4, 7, 6), torch.zeros(2, 4, 7))
LABELS = [(torch.arange(7) % 3, torch.arange(22).view(2, 11) % 3)]


def examples(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"lens_kernels.{name}"), verbose=False)
    assert outcome.attempted > 1
    assert outcome.failed == 0


def all_of(case) -> None:
    case_problem(case, "cpu")
    query, key, value = tensors(2, 4, 2, case.queries, case.keys, 16, 24)
    mask = case.mask(4, case.queries, case.keys)
    options = everything(case.keys, case.queries, 4, "cpu")
    groups = torch.arange(2 * case.keys).view(2, -1) % 3
    attention(query, key, value, mask=mask, groups=groups, backend="torch", **options)


def numpy_tile() -> None:
    q, k = np.zeros((4, 7, 8)), np.zeros((2, 11, 8))
    tile(q, k, np.zeros((4, 7)), (0, 3), (2, 5), allowed=np.ones((7, 11), dtype=bool))


def everything_else() -> None:
    attention(Q, K, V, match=LABELS, statistics=("match_mass",), sink_logits=torch.zeros(4))
    blocks = torch.ones(1, 4, 1, 1, dtype=torch.bool)
    decode(Q, K, V, block_mask=blocks, key_weights=torch.ones(2, 2, 11))
    explain(Q, K, V, groups=torch.zeros(2, 11, dtype=torch.int32))
    attention(Q, K, V).state()
    redistribute([merge(STATE, replace(STATE), sink_logits=torch.zeros(4)), STATE], Mask([0]))


RIGHT = {
    **{f"examples of {name}": lambda name=name: examples(name) for name in EXAMPLES},
    **{f"mask {case.name}": lambda case=case: all_of(case) for case in CASES},
    "numpy": numpy_tile,
    "everything else": everything_else,
}
WRONG = {
    "attention: query": lambda: attention(Q[0], K, V),
    "attention: value": lambda: attention(Q, K, V[:, :, 1:]),
    "attention: batch": lambda: attention(Q, K[:1], V[:1]),
    "attention: head_dim": lambda: attention(Q, K[..., 1:], V),
    "attention: dtype": lambda: attention(Q.long(), K, V),
    "attention: sink_logits": lambda: attention(Q, K, V, sink_logits=torch.zeros(2)),
    "attention: groups": lambda: attention(Q, K, V, groups=torch.zeros(11, dtype=torch.int64)),
    "attention: block_mask": lambda: attention(Q, K, V, block_mask=torch.ones(1, 1).bool()),
    "attention: key_weights": lambda: attention(Q, K, V, key_weights=torch.ones(2, 3, 11)),
    "attention: match": lambda: attention(Q, K, V, match=[LABELS[0][::-1]]),
    "decode: key": lambda: decode(Q, K[:, :, 1:], V),
    "explain: key": lambda: explain(Q, K[:, 0], V),
    "patch_effects: output_gradient": lambda: patch_effects(Q, K, V, V),
    "patch_effects: patched_key": lambda: patch_effects(Q, K, V, Q[..., :6], patched_key=V),
    "merge: sink_logits": lambda: merge(STATE, sink_logits=torch.zeros(1, 4)),
    "redistribute: output": lambda: redistribute([STATE], Mask([0]), output=torch.zeros(7).long()),
    "redistribute: sinks": lambda: redistribute([STATE], Mask([0]), sink_logits=torch.ones(2, 4)),
    "tile: key": lambda: tile(Q, K[..., 1:], Q[..., 0], (0, 1), (0, 1)),
    "tile: lse": lambda: tile(Q, K, Q[:, :, 1:, 0], (0, 1), (0, 1)),
    "AttentionMask: key_padding": lambda: AttentionMask(key_padding=torch.ones(11).bool()),
    "AttentionMask: key_lengths": lambda: AttentionMask(
        key_lengths=torch.tensor([3, 5]), key_start=torch.tensor([1])
    ),
    "AttentionMask: bias": lambda: AttentionMask(bias=torch.ones(7, 11).bool()),
    "AttentionState: lse": lambda: AttentionState(Q, Q[:, :, 1:, 0]),
    "AttentionGroups: lse": lambda: AttentionGroups(torch.zeros(3, 2, 4, 7, 6), STATE.lse),
    "AttentionResult: output": lambda: AttentionResult(
        Q[0], AttentionStatistics({}, block_size=(64, 64)), None, "torch"
    ),
    "Redistribution: mass": lambda: Redistribution(
        Q, Q[..., 0], torch.ones(2, 2, 4, 9), torch.ones(2, 2, 4, 7), Q[..., 0] > 0
    ),
}
CALLS = RIGHT | WRONG
