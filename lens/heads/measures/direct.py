"""Direct logit attribution: what each head writes straight into the answer's logits.

Exact for the path from a head to the logits past every later layer, with the size that the last norm
divided by held at its clean value. What a head does through later heads or MLPs is not in it: a
previous-token head that only feeds induction heads has none.
"""

import numpy as np
import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.heads.weights import head_weights, last_norm
from lens.models.loaded import LoadedModel
from lens.passes.head_outputs import read_heads
from lens.tasks.task import Task


def direct_effects(model: LoadedModel, task: Task, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Logit difference [rows], and the part [layers, heads, rows] that each head writes directly.

        z W_O (W_U[correct] - W_U[wrong]) / size, the mean over the answers

    with the last norm folded into W_U as in `head_weights`, and `size` what that norm divided by.

    Raises:
        LensError: a metric that is not the logit difference, or weights that are not known.
    """
    if task.wrong is None:
        raise LensError(
            f"direct logit attribution needs the metric 'logit_difference', got {task.metric!r}: "
            "only differences of logits are sums over heads"
        )
    weights = head_weights(model)
    positions, correct, wrong = (
        tensor[rows] for tensor in (task.positions, task.correct, task.wrong)
    )
    at = torch.arange(len(rows))[:, None]
    outputs: list[Tensor] = []  # per layer [rows, heads, answers, head_dim]

    def keep(_: int, output: Tensor) -> None:
        outputs.append(output.cpu().transpose(1, 2)[at, positions].transpose(1, 2).float())

    sizes: list[Tensor] = []  # [rows, tokens]
    hook = last_norm(model).register_forward_hook(
        lambda norm, inputs, output: sizes.append(_size(norm, inputs[0], output).cpu())
    )
    try:
        logits = read_heads(model, task.clean[rows], keep)
    finally:
        hook.remove()
    answers = weights.unembedding.T[correct] - weights.unembedding.T[wrong]  # [rows, answers, d]
    answers = answers / sizes[0][at, positions][..., None]
    effects = torch.einsum("lrhak,lhkd,rad->lhra", torch.stack(outputs), weights.output, answers)
    clean = task.measure(logits, rows)
    return clean.double().cpu().numpy(), effects.mean(-1).double().numpy()


def _size(norm: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[rows, tokens] that a norm divided by, from what went in and what came out."""
    x, y = x.float(), y.float()
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
        y = y if norm.bias is None else y - norm.bias
    return (x * norm.get_parameter("weight")).norm(dim=-1) / y.norm(dim=-1)
