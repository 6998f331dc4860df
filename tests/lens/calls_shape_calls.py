"""Masks and calls of attention with right and with wrong shapes, for test_room_shapes.py."""

from typing import Any

import torch

import lens
from lens.passes import masks
from lens.passes.calls import LayerCall, attend
from lens.passes.sessions import listening

MODEL = lens.load("induction-2l")
IDS = torch.arange(3, 13).reshape(2, 5)
PADDING = torch.tensor([[False, True, True, True, True], [True] * 5])


def run(padding=None):
    """The calls of a forward pass of two prompts."""
    found = []

    def on_layer(call):
        found.append(call)
        return attend(call).output

    with torch.no_grad(), listening(MODEL, on_layer):
        MODEL.model(IDS, attention_mask=None if padding is None else padding.long())
    assert [call.tokens.shape for call in found] == [IDS.shape] * 2


def call(keys: int = 5, tokens: Any = IDS, sinks: Any = None):
    query, key = torch.rand(2, 4, 5, 8), torch.rand(2, 2, keys, 8)
    return LayerCall(query, key, torch.rand(2, 2, 5, 6), masks.MaskStructure(True), 1.0, tokens=tokens, sink_logits=sinks)  # fmt: skip


def mask(padding: Any = PADDING, **more: Any):
    return masks.MaskStructure(True, 3, padding, **more)


ALLOWED = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
RIGHT = {
    "a pass": run,
    "a padded pass": lambda: run(PADDING),
    "LayerCall": lambda: [call(), call(tokens=None), call(sinks=torch.rand(4))],
    "MaskStructure": lambda: [mask(), mask(None), mask(allowed=ALLOWED, first=torch.zeros(2, dtype=torch.long))],
    "seen_by": lambda: [mask().seen_by(torch.arange(3), 5), mask(allowed=ALLOWED).seen_by(torch.arange(3), 5)],
    "pairs": lambda: [mask(p).pairs(3, 5, "cpu") for p in (None, PADDING)] + [mask(allowed=ALLOWED).pairs(5, 5, "cpu")],
    "first_key": lambda: [mask().first_key(2), mask(None).first_key(2), mask().first_token(2)],
    "visible": lambda: [mask(p, **a).visible(2, 5, 5) for p in (None, PADDING) for a in ({}, {"allowed": ALLOWED}, {"cross": True})],
    "structure_of": lambda: [masks.structure_of(one, True, None, 5) for one in (None, ALLOWED, ALLOWED.float().log())],
    "split": lambda: [masks.split(ALLOWED), masks.split(torch.rand(2, 5))],
}  # fmt: skip
WRONG = {
    "LayerCall of other keys": lambda: call(keys=4),
    "LayerCall of other tokens": lambda: call(tokens=IDS[:, 1:]),
    "LayerCall with sinks of key heads": lambda: call(sinks=torch.rand(2)),
    "MaskStructure of one row": lambda: mask(PADDING[0]),
    "MaskStructure of integers": lambda: mask(PADDING.long()),
    "MaskStructure of other keys": lambda: mask(PADDING, allowed=ALLOWED[..., 1:]),
    "MaskStructure by head": lambda: mask(allowed=ALLOWED.expand(2, 4, 5, 5)),
    "seen_by of a table": lambda: mask().seen_by(torch.arange(4).reshape(2, 2), 5),
}
CALLS = RIGHT | WRONG
