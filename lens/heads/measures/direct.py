"""Direct logit attribution: what each head writes straight into the answer's logits.

Exact for the path from a head to the logits past every later layer, with the size that the last norm
divided by held at its clean value (and, where heads write through a norm, what that divided by). What a head does through later heads or MLPs is not in it: a
previous-token head that only feeds induction heads has none.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.heads.weights import head_weights
from lens.models.loaded import LoadedModel
from lens.models.parts import Norm
from lens.passes.head_outputs import read_heads
from lens.passes.replay import proved
from lens.tasks.task import Task


def direct_effects(model: LoadedModel, task: Task, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Logit difference [rows], and the part [layers, heads, rows] that each head writes directly.

        z W_O (W_U[correct] - W_U[wrong]) / size, the mean over the answers

    with the last norm folded into W_U as in `head_weights`, and `size` what that norm divided by; of logits before a
    softcap.

    Raises:
        LensError: a metric that is not the logit difference, or weights that are not known.
    """
    if task.wrong is None:
        raise LensError(
            f"direct logit attribution needs the metric 'logit_difference', got {task.metric!r}: "
            "only differences of logits are sums over heads"
        )
    layout, weights = proved(model), head_weights(model)
    positions, correct, wrong = (
        tensor[rows] for tensor in (task.positions, task.correct, task.wrong)
    )
    unembedding = weights.unembedding.T
    at = torch.arange(len(rows))[:, None]
    outputs: list[Tensor] = []  # per layer [rows, heads, answers, head_dim]

    def keep(_: int, output: Tensor) -> None:
        outputs.append(output.cpu().transpose(1, 2)[at, positions].transpose(1, 2).float())

    norms = [layout.final_norm, *(block.after for block in layout.blocks)]
    with ExitStack() as stack:
        sizes = [stack.enter_context(_sizes(norm)) for norm in norms]
        logits = read_heads(layout.model, task.clean[rows], keep)
    last, *after = (size[0][at, positions].cpu() if size else torch.ones(1) for size in sizes)
    answers = (unembedding[correct] - unembedding[wrong]) / last  # [rows, answers, d_model]
    effects = [
        torch.einsum("rhak,hkd,rad->hra", z, output, answers / size)
        for z, output, size in zip(outputs, weights.output, after, strict=True)
    ]
    clean = task.measure(logits, rows)
    return clean.double().cpu().numpy(), torch.stack(effects).mean(-1).double().numpy()


@contextmanager
def _sizes(norm: Norm) -> Iterator[list[Tensor]]:
    """What the norm divides by in the passes inside, [rows, tokens, 1]; nothing where there is no norm."""
    found: list[Tensor] = []
    if norm.module is None or not norm.changes:
        yield found
        return
    with norm.module.register_forward_pre_hook(lambda _, args: found.append(norm.size(args[0]))):
        yield found
