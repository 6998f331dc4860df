"""Calls of lens.passes with right and with wrong shapes, for test_room_shapes.py."""

from dataclasses import replace

import torch

import lens
from lens.circuits.graph.activations import PlainVisitor
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.graph.nodes import visit as visited
from lens.common.head_ids import HeadId
from lens.passes import blocks, head_outputs, keys, logits, pieces, residual, visit
from lens.passes.calls import LayerCall, of_heads
from lens.passes.inputs import read_prompts
from lens.passes.structures import MaskStructure

MODEL = lens.load("induction-2l")
IDS = torch.arange(3, 13).reshape(2, 5)
AT = torch.arange(5).expand(2, -1)


def zero(_, z):
    return torch.zeros_like(z)


def at(positions=AT, tokens=IDS):
    return keys.KeysAt(0, 0, positions, tokens)


CALL = LayerCall(*(torch.rand(2, heads, 5, 8) for heads in (4, 2, 2)), MaskStructure(True), 1.0)


def view(call=CALL):
    """Blocks of two queries and three keys."""
    return blocks.BlockView(call, 2, 3)


def visits(nodes):
    """A pass that asks at every node."""
    return visited(nodes, IDS, PlainVisitor(nodes))


RIGHT = {
    "logits_of": lambda: logits.logits_of(MODEL, IDS),
    "stream": lambda: residual.stream(MODEL, read_prompts(MODEL, IDS[0].tolist())[0][0]),
    "read_calls": lambda: head_outputs.read_calls(MODEL, IDS),
    "read_heads": lambda: head_outputs.read_heads(MODEL, IDS, lambda *_: None),
    "edited_logits": lambda: head_outputs.edited_logits(MODEL, IDS, [[HeadId(0, 1)]] * 3, [zero] * 3),
    "with_gradients": lambda: head_outputs.with_gradients(MODEL, IDS, lambda y: y.square().sum((1, 2))),
    "KeysAt": lambda: [at(), at(tokens=None)],
    "members": lambda: [keys.members("keys", one, at()) for one in ("first", [1, 3], lambda at: at.positions > 2)],
    "BlockView": lambda: [view().visible, view().probabilities(1, 3), view().masses, view().pooled],
    "BlockView of learned sinks": lambda: view(replace(CALL, sink_logits=torch.rand(4))).probabilities(),
    "attended": lambda: [view().attended(one) for one in (None, view().visible, view().visible[:1, :1])],
    "of_heads": lambda: [of_heads(CALL, CALL.key), of_heads(CALL, CALL.query)],
    "a visit": lambda: visits(find_nodes(MODEL)),
    "run_in_pieces": lambda: list(pieces.run_in_pieces(lens.load(), IDS[:1], 2)),
}  # fmt: skip
WRONG = {
    "logits_of one prompt": lambda: logits.logits_of(MODEL, IDS[0]),
    "logits_of embeddings": lambda: logits.logits_of(MODEL, torch.rand(2, 5)),
    "read_calls of one prompt": lambda: head_outputs.read_calls(MODEL, IDS[0]),
    "edited_logits of copies": lambda: head_outputs.edited_logits(MODEL, IDS[None], [[]], [zero]),
    "KeysAt of other tokens": lambda: at(tokens=IDS[:, 1:]),
    "KeysAt of one row": lambda: at(AT[0]),
    "attended over numbers": lambda: view().attended(view().visible.long()),
    "attended over blocks of three prompts": lambda: view().attended(view().visible[None]),
    "of_heads of one prompt": lambda: of_heads(CALL, CALL.key[0]),
    "any_pair of numbers": lambda: view().any_pair(torch.rand(2, 5)),
    "means of three axes": lambda: blocks.means(torch.rand(2, 5, 8), 2),
    "a visitor of one prompt": lambda: visit.Visitor().residual_in(0, torch.rand(5, 8)),
    "run_in_pieces of two prompts": lambda: list(pieces.run_in_pieces(lens.load(), IDS, 2)),
}
CALLS = RIGHT | WRONG
