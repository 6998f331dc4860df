"""Information-flow routes: what each state of the residual stream is made of, followed down from the answer.

No corrupt prompt and no metric: a part of a sum counts as far as it brings the rest nearer to the sum.
Starting where the answer is read, only parts above a threshold are followed, so the rest of the model is
never looked at. Routes say what a state is made of. Whether the task needs it, only an intervention says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.circuits.graph.activations import PlainVisitor
from lens.circuits.graph.nodes import Nodes, find_nodes, visit
from lens.common.choices import is_number
from lens.common.errors import LensError
from lens.common.head_ids import HeadId, head_columns, head_id
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, counted
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.stats.intervals import columns
from lens.stats.verdicts import of_many_told
from lens.tasks.task import Task

THRESHOLD = 0.04
_COLUMNS = ("prompt", "layer", "sum", "part", "query", "key", "importance")
_Edge = tuple[int, int, str, str, int, int, float]


@dataclass(frozen=True, repr=False, eq=False)
class FlowRoutes(Result):
    """The edges that were followed down from where each prompt's answer is read.

    Attributes:
        edges: one row per edge: `prompt`, `layer`, `sum` that it goes into ("attention", "mlp", or "block"
            where both are added at once), `part` ("residual", "mlp" or a head such as "L3H5"), positions
            `query` it goes to and `key` it comes from, `importance` (share of the sum, see
            `flow_routes`).
        per_prompt: [layer, head, prompt], summed importance of the head's edges in the routes; 0 = none
            of them is in the routes.
        tokens: of each prompt.
        threshold: least importance of an edge.
        task, model: their names.
    """

    edges: pd.DataFrame
    per_prompt: np.ndarray
    tokens: tuple[tuple[str, ...], ...]
    threshold: float
    task: str
    model: str

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.per_prompt.shape[2]

    @property
    def values(self) -> np.ndarray:
        """[layer, head] mean over the prompts."""
        return self.per_prompt.mean(-1)

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per head, most important first.

        Columns: `name`, `layer`, `head`, `value`, `low`, `high` (95 % bootstrap interval over prompts,
        NaN for one), `used` (share of the prompts with an edge of the head in the routes), `n`.
        """
        table = pd.DataFrame(
            {
                **head_columns(list(np.ndindex(self.values.shape))),
                **columns("value", self.per_prompt, seed, plain=True, shares=False),
                "used": (self.per_prompt > 0).mean(-1).ravel(),
                "n": self.n,
            }
        )
        return table.sort_values("value", ascending=False, kind="stable", ignore_index=True)

    def findings(self) -> tuple[Sentence, ...]:
        """The heads that routes pass most through, beside the median head ("routes"), and what that does not say ("limit")."""
        table = self.table()
        used = table[table["used"] > 0]
        a_prompt, several = f"{len(self.edges) / self.n:.0f}", self.n > 1
        edges = f"{a_prompt} edge{'s' * (a_prompt != '1')} a prompt from a share of {self.threshold:g} on"
        prompts = counted(self.n, "prompt")
        if not len(used):
            text = f"No head is on the routes to the answers of {self.task} ({prompts}, {edges})."
            return (Sentence(text, kind="routes"),)
        best = [
            f"{row['name']} {of_many_told(row, 'value', '.2g', len(table), self.n, plain=True, least=0)}"
            + f" in {row['used']:.0%} of the prompts" * several
            for row in used.head(3).to_dict("records")
        ]
        joined = ", ".join(best)
        text = (
            f"Routes to the answers of {self.task} ({prompts}, {edges}) pass most through {joined}, the median head "
            f"{table['value'].median():.2g} (summed importance{'; intervals as of the largest of all' * several})."
        )
        limit = "Routes say what a state is made of; whether the task needs it, only an intervention says."
        return Sentence(text, kind="routes"), Sentence(limit, kind="limit")

    def __repr__(self) -> str:
        best = ", ".join(f"{row.name} {row.value:.2g}" for row in self.table().head(3).itertuples())
        return (
            f"FlowRoutes({self.task!r}, {self.model}: {self.n} prompts, {len(self.edges) / self.n:.0f} edges "
            f"each from {self.threshold:g} on; most through {best})"
        )


def flow_routes(
    model: LoadedModel,
    task: Task,
    *,
    at: str | None = None,
    threshold: float = THRESHOLD,
    progress: bool = True,
) -> FlowRoutes:
    """Follow each prompt's answer down to the tokens, along edges that make up enough of a state.

    The state after attention is the sum of the state before, one vector `P_ij v_j W_O` per head and key,
    and the bias; the state after the MLP is that sum and the MLP's output. With y the sum and t a part,

        importance(t) = proximity(t) / sum over parts of proximity,
        proximity(t) = max(0, |y|_1 - |y - t|_1)

    An edge from `threshold` on is followed to the state that it comes from. The bias has its share and
    goes nowhere. Only rows of states that are reached are computed: no [queries, keys].

    Args:
        model: as `lens.load` returns it.
        task: its clean prompts; nothing is corrupted.
        at: mark to start from; None: where the last answer is read.
        threshold: above 0 and below 0.5; a state whose parts are all below it ends the route.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: a threshold that is none, a mark that the task has not got, or a model whose states are
            no such sums (`find_nodes`: unknown blocks, norms between heads and stream).

    Reference: Ferrando, Voita, Information Flow Routes, 2024, arXiv 2403.00824. The authors' tool takes
        1e-5 where a proximity is 0 or less, here it is 0.

    Example:
        >>> lens.circuits.scores.flow_routes(model, task).table().head()
    """
    if not is_number(threshold) or not 0 < threshold < 0.5:
        raise LensError(f"threshold is a share above 0 and below 0.5, got {threshold!r}")
    if at is not None and at not in [*task.marks]:
        raise LensError(
            f"the task {task.name!r} has no mark {at!r}; it has {', '.join(task.marks) or 'none'}"
        )
    task.check(model)
    task.refuse_lengths("flow_routes")
    nodes = find_nodes(model, sums="flow_routes")
    starts = task.positions.max(1).values if at is None else task.marks[at]
    found: list[_Edge] = []
    with advancing(f"{model.name}: flow routes", task.n, progress) as advance:
        for prompt, start in enumerate(starts.tolist()):
            streams = _Streams(nodes)
            with torch.no_grad():
                visit(nodes, task.clean[prompt, None], streams)
                found += _routes(streams, prompt, start, threshold)
            advance(1)
    edges = pd.DataFrame(found, columns=pd.Index(_COLUMNS))
    per_prompt = np.zeros((nodes.graph.layers, nodes.graph.heads, task.n))
    for prompt, _, _, part, _, _, importance in found:
        if part not in ("residual", "mlp"):
            per_prompt[*head_id(part), prompt] += importance
    tokens = tuple(tuple(model.token_strings(ids)) for ids in task.clean.tolist())
    return FlowRoutes(edges, per_prompt, tokens, float(threshold), task.name, model.name)


def proximity(parts: Tensor, whole: Tensor) -> Tensor:
    """[...] of parts [..., d] of a whole [d]: how much nearer to 0 it is without the part, at least 0."""
    return (whole.abs().sum(-1) - (whole - parts).abs().sum(-1)).clamp(min=0)


class _Streams(PlainVisitor):
    """Keeps the states of the residual stream of one prompt, and what attention is made from."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__(nodes)
        self.before: list[Tensor] = []  # what each layer's attention reads, then the logits
        self.between: list[Tensor] = []  # per layer what its MLP reads
        self.mlps: list[Tensor] = []
        self.calls: list[LayerCall] = []

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.before.append(residual[0])
        return super().project(layer, residual)

    def attention(self, layer: int, call: LayerCall) -> None:
        self.calls.append(call)

    def mlp_input(self, layer: int, residual: Tensor) -> Tensor:
        self.between.append(residual[0])
        return residual

    def mlp(self, layer: int, output: Tensor) -> Tensor:
        self.mlps.append(output[0])
        return output

    def final(self, residual: Tensor) -> Tensor:
        self.before.append(residual[0])
        return residual


def _routes(streams: _Streams, prompt: int, start: int, threshold: float) -> list[_Edge]:
    """Edges of one prompt, from the last layer down."""
    graph = streams.nodes.graph
    reached, found = {start}, []
    for layer in reversed(range(graph.layers)):
        if not reached:  # no part of any state is above the threshold
            break
        after, before = streams.before[layer + 1], streams.before[layer]
        mlp = streams.mlps[layer] if graph.mlps else None
        if mlp is not None and not graph.parallel:
            for place in sorted(reached):  # the MLP and what it is added to come from one state
                parts = torch.stack([streams.between[layer][place], mlp[place]])
                near = proximity(parts, after[place])
                shares = (near / near.sum()).tolist()
                for name, share in zip(("residual", "mlp"), shares, strict=True):
                    if share >= threshold:
                        found.append((prompt, layer, "mlp", name, place, place, share))
            after, mlp = streams.between[layer], None
        written = _written(streams, layer, max(reached))
        kind, below = "attention" if mlp is None else "block", set()
        for place in sorted(reached):
            alone = [("residual", before[place])]
            alone += [] if mlp is None else [("mlp", mlp[place])]
            for name, key, share in _shares(streams, layer, place, after[place], alone, written):
                if share >= threshold:
                    found.append((prompt, layer, kind, name, place, key, share))
                    below.add(key)
        reached = below
    return found


def _written(streams: _Streams, layer: int, last: int) -> Tensor:
    """[heads, keys, d_model], `v W_O` of the keys up to the last one."""
    output = streams.nodes.layers[layer].block.output
    value = streams.calls[layer].value[0, :, : last + 1]
    return value.repeat_interleave(len(output) // len(value), 0) @ output


def _shares(
    streams: _Streams,
    layer: int,
    place: int,
    whole: Tensor,
    alone: list[tuple[str, Tensor]],
    written: Tensor,
) -> list[tuple[str, int, float]]:
    """Name, position and importance of each part of a state: those alone, and one per head and key."""
    masses = _row(streams.calls[layer], place)  # [heads, keys]
    near, rest = [], whole.clone()
    for head, mass in enumerate(masses):
        parts = mass[:, None] * written[head, : place + 1]
        near.append(proximity(parts, whole))
        rest -= parts.sum(0)
    others = torch.stack([part for _, part in alone])
    bias = rest - others.sum(0)
    beside = proximity(others, whole)
    total = torch.stack(near).sum() + beside.sum() + proximity(bias, whole)
    if not total:
        return []
    found = [
        (name, place, float(share / total)) for (name, _), share in zip(alone, beside, strict=True)
    ]
    shares = (torch.stack(near) / total).tolist()
    for head, keys in enumerate(shares):
        name = str(HeadId(layer, head))
        found += [(name, key, share) for key, share in enumerate(keys)]
    return found


def _row(call: LayerCall, place: int) -> Tensor:
    """[heads, keys up to the query], its probabilities."""
    bias, mask = call.position_bias, call.mask
    until = place + 1
    if bias is not None:
        bias = bias[:, :, place:until, :until]
    if mask.allowed is not None:
        mask = mask.with_allowed(mask.allowed[:, :, place:until, :until])
    alone = replace(
        call,
        query=call.query[:, :, place:until],
        key=call.key[:, :, :until],
        value=call.value[:, :, :until],
        mask=replace(mask, padding=None),
        position_bias=bias,
        tokens=None,
    )
    result = attend(alone, statistics=("block_mass",), block_size=(1, 1))
    return result.statistics["block_mass"][0, :, 0].to(call.value.dtype)
