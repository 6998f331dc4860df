"""The smallest transformer that does induction, written by hand.

The residual stream has four parts: token | position | previous token | answer. L0H0 looks one position
back and copies the token there into "previous token"; L1H0 looks for the place whose previous token is
the token at hand and copies the token there into "answer"; the unembedding reads "answer". L0H1 and
L1H1 attend (to themselves, and to earlier copies of their token) and write nothing.
"""

from typing import Any

import torch

from lens.circuits.known.circuit import KnownCircuit
from lens.circuits.known.making import last_token_task, loaded
from lens.circuits.known.program import ProgramConfig, ProgramModel
from lens.common.choices import is_number
from lens.common.errors import LensError
from lens.models.words import WordTokenizer

_VOCAB, _CONTEXT = 7, 8
_TOKEN = range(_VOCAB)
_POSITION = range(_VOCAB, _VOCAB + _CONTEXT)
_PREVIOUS = range(_VOCAB + _CONTEXT, 2 * _VOCAB + _CONTEXT)
_ANSWER = range(2 * _VOCAB + _CONTEXT, 3 * _VOCAB + _CONTEXT)
_HEAD_DIM = _CONTEXT

_PROMPT = "0 1 2 3 4 2 0"  # after BOS; 0 was followed by 1
_TASKS = {  # corrupt prompt, wrong answer, edges whose ablation shows
    "last token": ("0 1 2 3 4 2 3", "4", ("input->a1.h0<q>", "a1.h0->logits")),
    "first token": (
        "3 1 2 0 4 2 0",
        "4",
        ("input->a0.h0<v>", "a0.h0->a1.h0<k>", "a1.h0->logits"),
    ),
    "successor": ("0 5 2 3 4 2 0", "5", ("input->a1.h0<v>", "a1.h0->logits")),
}
_EDGES = (
    "input->a0.h0<q>",
    "input->a0.h0<k>",
    "input->a0.h0<v>",
    "input->a1.h0<q>",
    "a0.h0->a1.h0<k>",
    "input->a1.h0<v>",
    "a1.h0->logits",
)


def induction_transformer(beta: float = 8.0, *, dtype: str = "float32") -> KnownCircuit:
    """The induction transformer, its seven edges and three kinds of corrupt prompts.

    The prompt is `BOS 0 1 2 3 4 2 0`, the answer 1. `tasks` change its last token (to 3), the first of
    the two equal tokens, or what followed it: each shows two or three of the edges, and none shows that
    L0H0 finds its place by position alone.

    Args:
        beta: how sharply both heads attend. At 30 the softmax is saturated: gradients see nothing and
            ablations see everything.
        dtype: "float32" or "float64".

    Raises:
        LensError: a beta that is not positive, or an unknown dtype.

    Reference: Olsson et al., In-context Learning and Induction Heads, 2022, arXiv 2209.11895.

    Example:
        >>> known = induction_transformer(beta=30)
        >>> known.task.evaluate(known.model).item()
        1.0
    """
    if not (is_number(beta) and 0 < beta < float("inf")):
        raise LensError(f"beta must be a positive number, got {beta}")
    tokenizer = WordTokenizer([*map(str, range(_VOCAB - 1)), "BOS"], "BOS")
    model = ProgramModel(
        ProgramConfig(
            vocab_size=_VOCAB,
            hidden_size=_ANSWER.stop,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=_HEAD_DIM,
            max_position_embeddings=_CONTEXT,
        )
    )
    with torch.no_grad():
        _write(model, beta)
    tasks = {
        name: last_token_task(
            tokenizer, f"induction, {name} changed", [_PROMPT], [corrupt], ["1"], [wrong]
        )
        for name, (corrupt, wrong, _) in _TASKS.items()
    }
    return KnownCircuit(
        name="induction transformer",
        model=loaded(
            model, tokenizer, f"induction transformer, beta {beta:g}", "Apache-2.0", dtype
        ),
        tasks=tasks,
        edges=_EDGES,
        inactive=("a0.h1", "a1.h1"),
        visible={name: edges for name, (_, _, edges) in _TASKS.items()},
    )


def _write(model: Any, beta: float) -> None:
    """All weights that are not 0."""
    _connect(model.embed.weight.T, _TOKEN, range(_VOCAB))
    _connect(model.pos_embed.weight.T, _POSITION, range(_CONTEXT))
    _connect(model.unembed.weight, range(_VOCAB), _ANSWER)
    first, second = (block.attn for block in model.blocks)
    previous = _slots(0, _CONTEXT - 1)
    _connect(first.q.weight, previous, _POSITION[1:], beta)  # position i asks for i - 1
    _connect(first.k.weight, previous, _POSITION[:-1])
    _connect(first.v.weight, _slots(0, _VOCAB), _TOKEN)
    _connect(first.o.weight, _PREVIOUS, _slots(0, _VOCAB))
    _connect(second.q.weight, _slots(0, _VOCAB), _TOKEN, beta)
    _connect(second.k.weight, _slots(0, _VOCAB), _PREVIOUS)
    _connect(second.v.weight, _slots(0, _VOCAB), _TOKEN)
    _connect(second.o.weight, _ANSWER, _slots(0, _VOCAB))
    for attention, read in ((first, _POSITION), (second, _TOKEN)):  # attend, and write nothing
        _connect(attention.q.weight, _slots(1, len(read)), read, beta)
        _connect(attention.k.weight, _slots(1, len(read)), read)


def _slots(head: int, size: int) -> range:
    """The first `size` dimensions of a head."""
    return range(head * _HEAD_DIM, head * _HEAD_DIM + size)


def _connect(weight: torch.Tensor, to: range, since: range, size: float = 1.0) -> None:
    """`size` from each dimension of `since` to its partner in `to`; the weight is [to, since]."""
    for row, column in zip(to, since, strict=True):
        weight[row, column] = size
