"""Ways across spans: in the rows of one span, a head's queries, keys or values of another's keys come from the corrupt run.

With c_p(s, t) = 1 where the way by part p from the keys of span t to the queries of span s is cut, row i in span s gets

    logit_ij = (q_i + c_q (q'_i - q_i)) (k_j + c_k (k'_j - k_j)),    o_i = sum over j of A_ij (v_j + c_v (v'_j - v_j))

with t the span of key j. One kernel call for each span of queries that something is cut for; no N×N matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lens.circuits.graph.activations import Activations, Reading
from lens.circuits.graph.nodes import Nodes, visit
from lens.passes.calls import LayerCall, attend, of_heads

PARTS = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class Ways:
    """What is cut in several copies of some prompts.

    Attributes:
        cut: bool [copies, parts, layers, heads, query spans, key spans].
        where: bool [spans, rows, tokens].
        corrupt: of each layer the call of the corrupt prompts, keys and values by query head.
    """

    cut: Tensor
    where: Tensor
    corrupt: list[LayerCall]

    def output(self, call: LayerCall, z: Tensor) -> Tensor:
        """What the heads of a layer give in all copies, [copies * rows, heads, tokens, head_dim]; `z` is that without cuts."""
        copies, own, where = len(self.cut), by_head(call), self.where.to(z.device)
        parts = ("query", "key", "value")
        corrupt = self.corrupt[call.layer]
        other = replace(
            corrupt, **{name: getattr(corrupt, name).repeat(copies, 1, 1, 1) for name in parts}
        )
        for span, rows in enumerate(where):
            cut = self.cut[:, :, call.layer, :, span].to(z.device)  # [copies, parts, heads, spans]
            if not bool(cut.any()):
                continue
            at = torch.einsum("cpht,trj->pcrhj", cut.int(), where.int()).bool().flatten(1, 2)
            patched = attend(replaced(own, other, *at), statistics=()).output.to(z)
            z = torch.where(rows[:, None, :, None].repeat(copies, 1, 1, 1), patched, z)
        return z


def replaced(clean: LayerCall, corrupt: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> LayerCall:
    """The clean call with what is corrupt in the logits or values of some keys, bool [rows, heads or 1, keys] each."""
    key = torch.where(k[..., None], corrupt.key, clean.key)
    value = torch.where(v[..., None], corrupt.value, clean.value)
    if not bool(q.any()):
        return replace(clean, key=key, value=value)
    # (q + q' - q) k in the logits of these keys, q k in the others: in twice as many dimensions.
    query = torch.cat([clean.query, corrupt.query - clean.query], -1)
    return replace(clean, query=query, key=torch.cat([key, key * q[..., None]], -1), value=value)


def by_head(call: LayerCall) -> LayerCall:
    """With keys and values of each query head."""
    return replace(call, key=of_heads(call, call.key), value=of_heads(call, call.value))


def calls_of(nodes: Nodes, ids: Tensor) -> list[LayerCall]:
    """What the heads of each layer work with, keys and values by query head."""
    return read_both(nodes, ids)[1]


def read_both(nodes: Nodes, ids: Tensor) -> tuple[Activations, list[LayerCall]]:
    """What every writer writes in a plain run, and `calls_of` the same run."""
    reading = _Calling(nodes)
    with torch.no_grad():
        visit(nodes, ids, reading)
    return reading.found, reading.calls


class _Calling(Reading):
    """Keeps what every head works with, too."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__(nodes)
        self.calls: list[LayerCall] = []

    def attention(self, layer: int, call: LayerCall) -> None:
        self.calls.append(by_head(call))
