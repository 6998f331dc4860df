"""`lens.policies.maps`: which blocks each policy keeps of one prompt, beside the exact masses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId, head_columns, head_id
from lens.common.results import Result, Sentence, numbered
from lens.models.loaded import LoadedModel
from lens.passes.blocks import BlockView, check_block_size
from lens.passes.calls import LayerCall
from lens.passes.inputs import read_prompts
from lens.passes.sessions import base, listening
from lens.policies.base import Policy, several

MOST_POLICIES = 62
"""Whose choices fit one number of the table."""


@dataclass(frozen=True, repr=False, eq=False)
class PolicyMaps(Result):
    """Kept blocks and exact masses of one prompt.

    Attributes:
        kept: bool [policies, layers, heads, query_blocks, key_blocks], visible ones alone.
        masses: [layers, heads, query_blocks, key_blocks], mean over the rows of each block.
        visible: bool of the same shape.
        policies: as they write themselves.
        layers: the model's numbers.
        block_size: (query_block, key_block).
        tokens: length of the prompt.
        model: its name.
    """

    kept: np.ndarray
    masses: np.ndarray
    visible: np.ndarray
    policies: tuple[str, ...]
    layers: tuple[int, ...]
    block_size: tuple[int, int]
    tokens: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per head and visible block: `layer`, `head`, `name`, `query_block`, `key_block`, `mass`, and
        `kept`, a number whose bit i says whether policy i keeps it."""
        at = np.argwhere(self.visible)
        heads = [HeadId(self.layers[layer], head) for layer, head in at[:, :2].tolist()]
        bits = sum(one.astype(np.int64) << number for number, one in enumerate(self.kept))
        own = tuple(at.T)
        return pd.DataFrame(
            head_columns(heads)
            | {"query_block": at[:, 2], "key_block": at[:, 3]}
            | {"mass": self.masses[own].astype(np.float32), "kept": np.asarray(bits)[own]}
        )

    def of(self, head: AnyHead, policy: str) -> tuple[np.ndarray, np.ndarray]:
        """Masses (NaN where nothing is seen) and kept blocks of a head, [query_blocks, key_blocks] each.

        Raises:
            LensError: a head or a policy that is not there.
        """
        layer, number = head_id(head)
        if layer not in self.layers or not number < self.masses.shape[1]:
            raise LensError(f"there is no {HeadId(layer, number)} with attention in {self.model}")
        if policy not in self.policies:
            raise LensError(f"policy must be one of {', '.join(self.policies)}; got {policy!r}")
        place = self.layers.index(layer)
        seen = self.visible[place, number]
        masses = np.where(seen, self.masses[place, number], np.nan)
        return masses, self.kept[self.policies.index(policy), place, number]

    def findings(self) -> tuple[Sentence, ...]:
        """Of each policy the share of the visible blocks and of their mass ("policy"); one prompt has no interval."""
        visible, mass = self.visible.sum(), self.masses[self.visible].sum()
        return tuple(
            Sentence(
                f"{policy} keeps {kept.sum() / visible:.1%} of the visible blocks, with {self.masses[kept].sum() / mass:.1%} of "
                f"their mass in one prompt of {self.tokens} tokens.",
                kind="policy",
            )
            for policy, kept in zip(self.policies, self.kept, strict=True)
        )

    def __repr__(self) -> str:
        return f"PolicyMaps({self.model}: {len(self.policies)} policies, {self.tokens} tokens)"


def maps(
    model: LoadedModel,
    prompt: Any,
    policy: Policy | Sequence[Policy],
    *,
    block_size: int | tuple[int, int] = 64,
) -> PolicyMaps:
    """The blocks that policies keep of a prompt, and what the model gives each block, in one dense pass.

    Args:
        model: as `lens.load` returns it.
        prompt: one, as for `lens.capture`.
        policy: one or several, at most 62.
        block_size: of all of them, tokens.

    Raises:
        LensError: what is no policy or block size, more than one prompt.

    Example:
        >>> found = lens.policies.maps(model, texts[0], lens.policies.AShape(4, 8), block_size=4)
        >>> figure = found.plot("L1H3", "AShape(first=4, last=8)")
    """
    policies = several("policy", policy)
    if len(policies) > MOST_POLICIES:
        raise LensError(f"at most {MOST_POLICIES} policies, got {len(policies)}")
    size = check_block_size(block_size)
    for one in policies:
        one.check(model)
    read, _ = read_prompts(model, prompt, whole=True)
    if len(read) != 1:
        raise LensError(f"maps are of one prompt, got {len(read)}")
    found: dict[int, tuple[np.ndarray, ...]] = {}
    positions: list[int] = []

    def on_layer(call: LayerCall) -> torch.Tensor:
        view = BlockView(call, *size)
        kept = [(one.choose(view).blocks & view.visible)[0].cpu().numpy() for one in policies]
        parts = (
            np.stack(kept),
            view.masses[0].float().cpu().numpy(),
            view.visible[0].cpu().numpy(),
        )
        found[call.layer] = parts
        positions.append(view.queries)
        return view.attended().output

    with torch.no_grad(), listening(model, on_layer):
        base(model)(**read[0].inputs)
    layers = tuple(sorted(found))
    kept, masses, visible = (
        np.stack([found[layer][part] for layer in layers]) for part in range(3)
    )
    return PolicyMaps(
        kept=np.moveaxis(kept, 1, 0),
        masses=np.where(visible, masses, 0),
        visible=visible,
        policies=numbered(policies),
        layers=layers,
        block_size=size,
        tokens=max(positions) if read[0].ids is None else len(read[0].ids),
        model=model.name,
    )
