"""Calls of lens.passes with right and with wrong shapes, for test_room_shapes.py."""

import torch

import lens
from lens.common.head_ids import HeadId
from lens.passes import head_outputs, keys, logits, stream
from lens.passes.inputs import read_prompts

MODEL = lens.load("induction-2l")
IDS = torch.arange(3, 13).reshape(2, 5)
AT = torch.arange(5).expand(2, -1)


def zero(_, z):
    return torch.zeros_like(z)


def at(positions=AT, tokens=IDS):
    return keys.KeysAt(0, 0, positions, tokens)


RIGHT = {
    "logits_of": lambda: logits.logits_of(MODEL, IDS),
    "stream": lambda: stream.stream(MODEL, read_prompts(MODEL, IDS[0].tolist())[0][0]),
    "read_calls": lambda: head_outputs.read_calls(MODEL, IDS),
    "read_heads": lambda: head_outputs.read_heads(MODEL, IDS, lambda *_: None),
    "edited_logits": lambda: head_outputs.edited_logits(MODEL, IDS, [[HeadId(0, 1)]] * 3, [zero] * 3),
    "with_gradients": lambda: head_outputs.with_gradients(MODEL, IDS, lambda y: y.square().sum((1, 2))),
    "KeysAt": lambda: [at(), at(tokens=None)],
    "members": lambda: [keys.members("keys", one, at()) for one in ("first", [1, 3], lambda at: at.positions > 2)],
}  # fmt: skip
WRONG = {
    "logits_of one prompt": lambda: logits.logits_of(MODEL, IDS[0]),
    "logits_of embeddings": lambda: logits.logits_of(MODEL, torch.rand(2, 5)),
    "read_calls of one prompt": lambda: head_outputs.read_calls(MODEL, IDS[0]),
    "edited_logits of copies": lambda: head_outputs.edited_logits(MODEL, IDS[None], [[]], [zero]),
    "KeysAt of other tokens": lambda: at(tokens=IDS[:, 1:]),
    "KeysAt of one row": lambda: at(AT[0]),
}
CALLS = RIGHT | WRONG
