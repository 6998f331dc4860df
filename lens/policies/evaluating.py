"""`lens.policies.evaluate`: what policies keep, miss and cost, head by head, beside what was possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import Seed, check_counts
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.common.results import numbered
from lens.edits.running import edit
from lens.edits.sparse import Sparse
from lens.models.loaded import LoadedModel
from lens.passes.blocks import BlockView, check_block_size
from lens.passes.calls import LayerCall
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.replay import proved
from lens.passes.sessions import base, listening
from lens.policies.base import Policy, several
from lens.policies.measures import Dense, measure, ranked
from lens.policies.scores import COLUMNS, PolicyScores
from lens.tasks.prompts import token_losses


def evaluate(
    model: LoadedModel,
    prompts: Any,
    policy: Policy | Sequence[Policy],
    *,
    block_size: int | tuple[int, int] | None = None,
    loss: bool = False,
    first_row: int = 0,
    seed: Seed = 0,
    progress: bool = True,
) -> PolicyScores:
    """What each head keeps under a policy: recall, the gap to the best choice, output error, and the loss.

    Everything but the loss is exact at the inputs of the model as it is: q, k and v are those of a dense
    pass. The loss is that of a run in which all heads follow the policy, so that errors add up.

    Memory beyond a forward pass: masses of single rows, queries * keys / key_block numbers a head.

    Args:
        model: as `lens.load` returns it.
        prompts: as those of `lens.capture`.
        policy: one, or several, which are measured in the same pass.
        block_size: tokens, one number or (query_block, key_block); None: each policy's own.
        loss: also run the model with each policy (a language model).
        first_row: recall, errors and budgets are those of rows from this position on (density is of all):
            early rows see little, and any policy keeps it.
        seed: of the intervals.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: what is no policy or block size; prompts as of `lens.capture`, or without such a row; for
            the loss, prompts of fewer than two tokens, or a model that predicts none.

    Example:
        >>> found = lens.policies.evaluate(model, texts, lens.policies.AShape(first=16, last=16), block_size=16)
        >>> found.table()[["name", "density", "recall", "oracle_recall", "output_error"]]
    """
    policies = several("policy", policy)
    sizes = [
        check_block_size(one.block_size if block_size is None else block_size) for one in policies
    ]
    read, _ = read_prompts(model, prompts)
    if not read:
        raise LensError("no prompts; give at least one")
    if model.info.twice:
        raise LensError(
            f"{model.name} attends twice in layers {list(model.info.twice)}; what a policy keeps of two maps "
            "that are subtracted is not defined here"
        )
    for one in policies:
        one.check(model)
    check_counts(0, first_row=first_row)
    for prompt in read:
        if prompt.ids is not None:
            _check_first(first_row, len(prompt.ids))
    layers = model.info.attending
    projections, reason = _projections(model)
    values = np.full(
        (len(policies), len(COLUMNS), len(layers), model.info.heads, len(read)), np.nan
    )
    losses = np.full((len(policies) + 1, len(read)), np.nan)
    lengths = []
    with advancing(f"{model.name}: prompts", len(read), progress) as advance:
        for place, prompt in enumerate(read):
            measuring = _Measuring(
                policies, sizes, projections, values[..., place], layers, first_row
            )
            with torch.no_grad(), listening(model, measuring.on_layer):
                base(model)(**prompt.inputs)
            lengths.append(measuring.positions if prompt.ids is None else len(prompt.ids))
            if loss:
                losses[:, place] = _losses(model, prompt, policies, sizes)
            advance(1)
    return PolicyScores(
        values=values,
        dense_loss=losses[0],
        sparse_loss=losses[1:],
        policies=numbered(policies),
        references=tuple(one.is_reference for one in policies),
        layers=layers,
        block_sizes=tuple(sizes),
        tokens=tuple(lengths),
        unprojected=reason,
        seed=seed,
        model=model.name,
    )


class _Measuring:
    """Measures every policy at each layer; the model goes on as it is."""

    def __init__(
        self,
        policies: Sequence[Policy],
        sizes: Sequence[tuple[int, int]],
        projections: list[Tensor] | None,
        values: np.ndarray,
        layers: Sequence[int],
        first_row: int,
    ) -> None:
        self._layers, self._first_row = layers, first_row
        self._policies, self._sizes, self._projections = policies, sizes, projections
        self._values = values  # [policies, columns, layers, heads], filled here
        self.positions = 0  # of the longest call so far

    def on_layer(self, call: LayerCall) -> Tensor:
        """See `lens.passes.sessions.listening`."""
        layer = self._layers.index(call.layer)
        self.positions = max(self.positions, call.query.shape[2])
        _check_first(self._first_row, call.query.shape[2])
        projection = None if self._projections is None else self._projections[layer]
        dense = None
        for size in dict.fromkeys(self._sizes):
            view = BlockView(call, *size)
            dense = Dense(view.attended().output, projection) if dense is None else dense
            ranks = [ranked(view, head, self._first_row) for head in range(view.shape[1])]
            for place, policy in enumerate(self._policies):
                if self._sizes[place] == size:
                    kept = policy.choose(view)
                    cost = policy.cost(view)
                    found = measure(view, kept, cost, dense, ranks)
                    for head, numbers in enumerate(found):
                        self._values[place, :, layer, head] = [numbers[name] for name in COLUMNS]
        assert dense is not None
        return dense.output


def _projections(model: LoadedModel) -> tuple[list[Tensor] | None, str]:
    """W_O [heads, head_dim, d_model] of each layer, or why they are not known."""
    try:
        return [block.output for block in proved(model).blocks], ""
    except LensError as error:
        return None, str(error)


def _losses(
    model: LoadedModel,
    prompt: Prompt,
    policies: Sequence[Policy],
    sizes: Sequence[tuple[int, int]],
) -> list[float]:
    """Mean next-token loss, nats: dense, then with each policy in all heads."""
    if prompt.ids is None or len(prompt.ids) < 2:
        raise LensError("loss needs prompts of at least two tokens; leave loss out for others")
    found = [float(token_losses(model, prompt.ids).double().mean())]
    for policy, size in zip(policies, sizes, strict=True):
        (sparse,) = losses_under(model, policy, size, [prompt.ids])
        found.append(float(sparse.mean()))
    if not all(map(math.isfinite, found)):
        raise LensError(
            f"the loss of {model.name} is not finite on a prompt of {len(prompt.ids)} tokens"
        )
    return found


def losses_under(
    model: LoadedModel, policy: Policy, size: tuple[int, int], prompts: Sequence[list[int]]
) -> list[np.ndarray]:
    """Next-token losses [tokens - 1] of each prompt with the policy in all heads, nats.

    Under `Full` they are those of a dense run with our attention, bit by bit, so that what differs from
    them is the policy's.
    """
    with edit(model, Sparse(policy, size)):
        return [token_losses(model, ids).double().numpy() for ids in prompts]


def _check_first(first_row: int, length: int) -> None:
    if first_row and length <= first_row:
        raise LensError(
            f"first_row is {first_row}, and a prompt has {length} tokens: give longer prompts"
        )
