"""What the mask and the tokens of a layer decide: labels, groups of keys, which queries see a key.

It is the same at every layer of a pass that looks through the same mask, and made once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lens.passes.calls import LayerCall
from lens.passes.structures import MaskStructure
from lens.traces.labels import MATCH_RULES, PREFIX, Labels
from lens.traces.layouts import partition


@dataclass(frozen=True, eq=False)
class Shared:
    """What layers with the same tokens and mask share.

    Attributes:
        mask: of the layers.
        sizes: batch, queries and keys.
        tokens, before: of the calls.
        match: labels of queries and keys, for `match_mass`, or None.
        groups: [batch, keys], 0 for the first key of each prompt and 1 for the others, or None.
        visible: int32 [batch, keys] on the CPU, how many queries see each key.
        seen, partition: see `LayerRecord`.
    """

    mask: MaskStructure
    sizes: tuple[int, int, int]
    tokens: torch.Tensor | None
    before: torch.Tensor | None
    match: list[tuple[torch.Tensor, torch.Tensor]] | None
    groups: torch.Tensor | None
    visible: torch.Tensor
    seen: torch.Tensor | None
    partition: torch.Tensor | None

    def serves(self, call: LayerCall) -> bool:
        """Whether it is that of this call too: masks are made anew in each pass."""
        return (
            call.mask is self.mask
            and _sizes(call) == self.sizes
            and _are_equal(call.tokens, self.tokens)
            and _are_equal(call.before, self.before)
        )


def make_shared(
    call: LayerCall, variables: Iterable[str], labels: Sequence[Labels], grouped: bool
) -> Shared:
    """Of a call whose trace has these variables; `grouped`: the first key apart from the others."""
    _, queries, keys = sizes = _sizes(call)
    match, moved = None, prefix_is_moved(call, variables)
    if "match_mass" in variables or moved:
        match = [*_rules(call), *(_own(label, call) for label in labels)]
    if match is not None and moved:
        place = _places(call)
        inside = (place >= 0) & (place < PREFIX)
        match.append((torch.zeros_like(place[:, keys - queries :]), inside.int() - 1))
    ranges = call.mask.ranges()
    return Shared(
        mask=call.mask,
        sizes=sizes,
        tokens=call.tokens,
        before=call.before,
        match=match,
        groups=(_places(call) != 0).int() if grouped else None,
        visible=call.mask.visible(*sizes).to("cpu", torch.int32),
        seen=ranges,
        partition=partition(call.mask) if ranges is None else None,
    )


def prefix_is_moved(call: LayerCall, variables: Iterable[str]) -> bool:
    """The prefix of the kernel begins with the first key, of which a window's cache has dropped some."""
    return "prefix_mass" in variables and call.mask.start > 0


def _sizes(call: LayerCall) -> tuple[int, int, int]:
    return len(call.query), call.query.shape[2], call.key.shape[2]


def _are_equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _places(call: LayerCall) -> torch.Tensor:
    """[batch, keys]: where each key stands in its prompt, 0 for the first real token."""
    first = call.mask.first_token(len(call.query)).to(call.key.device)
    return torch.arange(call.key.shape[2], device=call.key.device) - first[:, None]


def _own(labels: Labels, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(query labels, key labels) of the positions of this call, by the user's own labels."""
    queries, keys, start = call.query.shape[2], call.key.shape[2], call.mask.start
    if call.cross or len(labels.key) < start + keys:
        labels.check(start + keys)
    query, key = (torch.from_numpy(one).to(call.key.device) for one in (labels.query, labels.key))
    return query[start + keys - queries : start + keys], key[start : start + keys]


def _rules(call: LayerCall) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(query labels, key labels) for each of `MATCH_RULES`; -1 never matches."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    key_position = torch.arange(keys, device=call.key.device)
    if call.cross:  # nothing to compare
        nothing = torch.zeros(queries, dtype=torch.long, device=call.key.device)
        return [(nothing, torch.full_like(key_position, -1))] * len(MATCH_RULES)
    position = key_position[keys - queries :]
    tokens = torch.full_like(key_position, -1)[None] if call.tokens is None else call.tokens
    own = tokens[:, keys - queries :].expand(len(call.query), -1)
    tokens = tokens.expand(len(call.query), -1)
    before = torch.full_like(tokens[:, :1], -1) if call.before is None else call.before[:, None]
    token_before = torch.cat([before.expand(len(tokens), -1), tokens[:, :-1]], 1)
    pairs = {
        "current_token_position": (position, key_position),
        "previous_token": (position - 1, key_position),
        "same_token": (own, tokens),
        "induction": (own, token_before),
    }
    return [pairs[rule] for rule in MATCH_RULES]
