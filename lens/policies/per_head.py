"""A policy of its own for each head, as MInference and DuoAttention choose them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId, head_id
from lens.models.loaded import LoadedModel
from lens.passes.blocks import BlockView
from lens.policies.base import Full, Kept, Policy


@dataclass(frozen=True, eq=False)
class PerHead(Policy):
    """Each head has its own policy.

    Attributes:
        policies: head ("L3H5") -> policy.
        default: of heads that are not named.

    Raises:
        LensError: what is no head or no policy.

    Example:
        >>> streaming = lens.policies.PerHead({"L0H1": lens.policies.AShape(16, 64)})
    """

    policies: Mapping[Any, Policy]
    default: Policy = field(default_factory=Full)

    def __post_init__(self) -> None:
        if not isinstance(self.policies, Mapping):
            raise LensError(
                f"PerHead takes a mapping such as {{'L0H1': AShape(16, 64)}}, got {type(self.policies).__name__}"
            )
        for policy in (*self.policies.values(), self.default):
            if not isinstance(policy, Policy):
                raise LensError(f"PerHead takes policies, got {policy!r}")
        named = {head_id(head): policy for head, policy in self.policies.items()}
        object.__setattr__(self, "policies", named)

    def check(self, model: LoadedModel) -> None:
        """See `Policy`."""
        super().check(model)
        for head, policy in self.policies.items():
            model.info.head(head)
            policy.check(model)

    def of(self, head: AnyHead) -> Policy:
        """The policy of a head."""
        return self.policies.get(head_id(head), self.default)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`; each policy sees the whole layer, as where all heads have it, and its heads are taken."""
        blocks = torch.zeros(view.shape, dtype=torch.bool, device=view.query.device)
        predicted = torch.full(view.shape[:2], torch.nan, device=view.query.device)
        for policy, heads in self._groups(view):
            found = policy.choose(view)
            blocks[:, heads] = found.blocks[:, heads]
            if found.predicted is not None:
                predicted[:, heads] = found.predicted[:, heads].float()
        return Kept(blocks, predicted)

    def cost(self, view: BlockView) -> float:
        """See `Policy`: mean over the heads."""
        costs = [policy.cost(view) * len(heads) for policy, heads in self._groups(view)]
        return sum(costs) / view.shape[1]

    def _groups(self, view: BlockView) -> list[tuple[Policy, torch.Tensor]]:
        found: list[tuple[Policy, list[int]]] = []
        for head in range(view.shape[1]):
            policy = self.of(HeadId(view.call.layer, head))
            same = next(
                (heads for other, heads in found if other is policy or other == policy), None
            )
            if same is None:
                found.append((policy, [head]))
            else:
                same.append(head)
        device = view.query.device
        return [(policy, torch.tensor(heads, device=device)) for policy, heads in found]

    def __str__(self) -> str:
        kinds = sorted(
            {type(policy).__name__ for policy in (*self.policies.values(), self.default)}
        )
        return f"PerHead({len(self.policies)} heads: {', '.join(kinds)})"
