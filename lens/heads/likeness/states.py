"""What every head of a model did on one prompt, kept so that any rows can be recomputed exactly.

Query, key and LSE give `P[i, j] = exp(s_ij - lse_i)` of any rows, so heads can be compared row by row:
memory is that of one chunk of rows, never [heads, N, N].
"""

from dataclasses import dataclass, replace

import torch
from lens_kernels import tile
from torch import Tensor

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.inputs import Prompt
from lens.passes.sessions import base, listening


@dataclass(frozen=True, eq=False)
class HeadStates:
    """Every head on one prompt; heads of all layers stand in one row, layer after layer.

    Attributes:
        layers: per attention layer its call and its LSE [1, heads, queries].
        output: z [heads, queries, value_dim] of all layers, before the output projection.
        sink_excluded: whether the first key is left out of `rows` and `output`, and what remains is
            renormalised; a learned sink is left out too.
    """

    layers: list[tuple[LayerCall, Tensor]]
    output: Tensor
    sink_excluded: bool

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.output.shape[1]

    @property
    def first_row(self) -> int:
        """First query that sees two of the keys compared; the rows before are the same in all heads."""
        if not self.layers[0][0].mask.causal:
            return 0
        return 2 if self.sink_excluded else 1

    def keys_seen(self, rows: slice) -> Tensor:
        """[heads, rows, keys] bool: which of the keys compared each query sees in the layer of each head."""
        at, parts = torch.arange(rows.start, rows.stop), []
        for call, _ in self.layers:
            seen = call.mask.seen_by(at.to(call.key.device), self.length).cpu()
            parts.append(seen.expand(call.query.shape[1], -1, -1))
        return torch.cat(parts)[..., int(self.sink_excluded) :]

    def rows(self, rows: slice) -> Tensor:
        """Probabilities [heads, rows, keys] of queries `rows`, float64, on the CPU.

        A learned sink has a last column of its own. Without the sink the first key's column is gone.
        A row that sees none of the keys compared is 0.
        """
        parts = [self._of_layer(call, lse, rows) for call, lse in self.layers]
        return torch.cat(parts)

    def _of_layer(self, call: LayerCall, lse: Tensor, rows: slice) -> Tensor:
        found = tile(
            call.query[0].double(),
            call.key[0].double(),
            lse[0].double(),
            (rows.start, rows.stop),
            (0, call.key.shape[2]),
            scale=call.scale,
            softcap=call.softcap,
            causal=call.mask.causal,
            window=call.mask.window,
            bias=None if call.position_bias is None else call.position_bias[0],
            allowed=None if call.mask.allowed is None else call.mask.allowed[0],
        ).cpu()
        found = found[..., 1:] if self.sink_excluded else found
        total = found.sum(-1, keepdim=True)
        if call.sink_logits is not None and not self.sink_excluded:
            return torch.cat([found, (1 - total).clamp(min=0)], -1)
        return found / total.where(total > 0, 1)


def read_states(model: LoadedModel, prompt: Prompt, *, sink_excluded: bool) -> HeadStates:
    """Run one prompt and keep the state of every head.

    Raises:
        LensError: attention that capture does not understand, layers of differing sizes, or learned
            sinks in some layers only.
    """
    keeper = _Keeper(sink_excluded)
    with torch.no_grad(), listening(model, keeper.on_layer):
        base(model)(**prompt.inputs)
    if len(keeper.layers) != len(model.info.attending):
        raise LensError(
            f"{model.info.class_name} ran {len(keeper.layers)} attention layers through the registry, "
            f"{len(model.info.attending)} were expected; its heads cannot be compared"
        )
    sizes = {tuple(output.shape[1:]) for output in keeper.outputs}
    learned = {call.sink_logits is None for call, _ in keeper.layers}
    if len(sizes) > 1 or len(learned) > 1:
        raise LensError(
            f"the layers of {model.info.class_name} differ in positions, head size or learned sinks "
            f"({sorted(sizes)}); heads can be compared where they are alike"
        )
    return HeadStates(keeper.layers, torch.cat(keeper.outputs), sink_excluded)


class _Keeper:
    """Keeps call, LSE and output of every layer of one pass."""

    def __init__(self, sink_excluded: bool) -> None:
        self._sink_excluded = sink_excluded
        self.layers: list[tuple[LayerCall, Tensor]] = []
        self.outputs: list[Tensor] = []

    def on_layer(self, call: LayerCall) -> Tensor:
        """See `lens.passes.sessions.listening`."""
        keys = call.key.shape[2]
        groups = None
        if self._sink_excluded:
            groups = (torch.arange(keys, device=call.key.device) > 0).int()[None]
        result = attend(call, statistics=("lse",), groups=groups)
        self.layers.append((replace(call, value=call.value[:, :, :0]), result.statistics["lse"]))
        compared = result.output if result.groups is None else result.groups.output[-1]
        self.outputs.append(compared[0].double().cpu())
        return result.output
