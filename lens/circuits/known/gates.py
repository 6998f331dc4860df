"""Logic gates: two heads write a and b, an MLP joins them, and the logits read what it says.

Where two inputs stand in for each other (OR), taking one away changes nothing, so that neither a
gradient nor any ablation of one thing at a time sees them. Where both are needed (AND), each counts for
the whole. The sum is the gate on which every method is right.
"""

from typing import Any

import torch

from lens.circuits.known.circuit import KnownCircuit
from lens.circuits.known.making import last_token_task, loaded
from lens.circuits.known.program import ProgramConfig, ProgramModel
from lens.common.choices import check_choice
from lens.models.words import WordTokenizer

GATES = {  # sign of a + b inside the ReLU, bias inside, sign of the ReLU, bias outside
    "and": (1, -1, 1, 0),
    "or": (-1, 1, -1, 1),
    "sum": (1, 0, 1, 0),
}
"""`relu(a + b - 1)`, `1 - relu(1 - (a + b))` and `relu(a + b)`, as coefficients."""

_A, _B, _LEFT, _RIGHT, _OUT = range(5)  # the residual stream
_WORDS = ["neither", "left", "right", "both", "BOS", "yes", "no"]


def logic_gate(gate: str, *, dtype: str = "float32") -> KnownCircuit:
    """A gate of two heads, at a = b = 1; corrupt prompts have a = b = 0, which equals zero ablation.

    The prompt is `BOS both`, the corrupt one `BOS neither` (`left` and `right` set one input alone);
    the metric is the logit of `yes`, which is the gate's output, minus that of `no`, which is 0.

    Args:
        gate: "and", "or" or "sum".
        dtype: "float32" or "float64".

    Raises:
        LensError: an unknown gate or dtype.

    Reference: the logic gates of ACDC's tests (Conmy et al., Towards Automated Circuit Discovery for
        Mechanistic Interpretability, 2023, arXiv 2304.14997).

    Example:
        >>> known = logic_gate("and")
        >>> known.task.evaluate(known.model).item(), known.task.evaluate(known.model, corrupt=True).item()
        (1.0, 0.0)
    """
    check_choice("gate", gate, GATES)
    tokenizer = WordTokenizer(_WORDS, "BOS")
    model = ProgramModel(
        ProgramConfig(
            vocab_size=len(_WORDS),
            hidden_size=5,
            num_hidden_layers=1,
            num_attention_heads=2,
            head_dim=1,
            mlp_size=1,
            max_position_embeddings=2,
        )
    )
    with torch.no_grad():
        for word, part in (("left", _A), ("right", _B), ("both", _A), ("both", _B)):
            model.embed.weight[tokenizer.id(word), part] = 1
        block: Any = model.blocks[0]
        attention, mlp = block.attn, block.mlp
        for head, (read, write) in enumerate(((_A, _LEFT), (_B, _RIGHT))):
            attention.v.weight[head, read] = 2  # each of the two tokens gets half of the attention
            attention.o.weight[write, head] = 1
        inside, bias, outside, base = GATES[gate]
        mlp.fc_in.weight[0, [_LEFT, _RIGHT]] = inside
        mlp.fc_in.bias[:] = bias
        mlp.fc_out.weight[_OUT, 0] = outside
        mlp.fc_out.bias[_OUT] = base
        model.unembed.weight[tokenizer.id("yes"), _OUT] = 1
    task = last_token_task(tokenizer, f"{gate} gate", ["both"], ["neither"], ["yes"], ["no"])
    reading = tuple(f"input->a0.h{head}<v>" for head in (0, 1))
    joining = tuple(f"a0.h{head}->m0" for head in (0, 1))
    shown = () if gate == "or" else (*reading, *joining)
    return KnownCircuit(
        name=f"{gate} gate",
        model=loaded(model, tokenizer, f"{gate} gate", "Apache-2.0", dtype),
        tasks={"both inputs": task},
        edges=(*reading, *joining, "m0->logits"),
        inactive=(),
        visible={"both inputs": (*shown, "m0->logits")},
    )
