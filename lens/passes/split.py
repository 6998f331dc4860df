"""One prompt over several processes: each runs the model on its own tokens, attention goes round.

All that a model does beside attention it does to each token by itself, so a process needs only its own tokens
and their positions. Whether that is so is tried on the first tokens of each prompt, split and whole.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lens_kernels import AttentionGroups, AttentionResult, AttentionStatistics
from lens_kernels.distributed import Layout, Processes, ring_attention
from torch import Tensor

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.check import tolerance_of
from lens.passes.inputs import Prompt
from lens.passes.pieces import check_length_matters_not, ids_alone
from lens.passes.sessions import base, listening, run

_PROBE = 36
_ROWS = ("lse", "max_logit", "entropy", "concentration", "distance", "prefix_mass", "match_mass")


class Split:
    """A prompt of one process's part of the tokens, and the attention of all of them.

    Attributes:
        inputs: what this process gives to the model.
        layout: which tokens each process has.
        links: of this process.
    """

    def __init__(self, ids: Sequence[int], block: int, links: Processes, device: Any) -> None:
        """Raises LensError: too few blocks for so many processes."""
        try:
            self.layout = Layout(len(ids), links.size, block)
        except ValueError as error:
            raise LensError(f"group=: {error}") from error
        self.links = links
        positions = self.layout.positions(links.rank)
        own = torch.tensor([list(ids)])[:, positions].to(device)
        self.inputs: dict[str, Any] = {
            "input_ids": own,
            "position_ids": positions[None].to(device),
            "attention_mask": torch.ones_like(own),  # else a gap would read as two sequences
            "use_cache": False,
        }

    def whole(self, call: LayerCall, ids: Tensor, keep_qk: bool) -> LayerCall:
        """The call as it would be with all tokens in one process; tensors without content unless kept."""
        found = {}
        for name in ("query", "key", "value"):
            own = getattr(call, name)
            if keep_qk and name != "value":
                found[name] = self._gathered(own, 2)
            else:
                shape = (*own.shape[:2], self.layout.length, own.shape[3])
                found[name] = own.new_zeros(1, 1, 1, 1).expand(shape)
        return replace(call, **found, tokens=ids.to(call.key.device), before=None)

    def attend(
        self,
        call: LayerCall,
        *,
        statistics: Iterable[str] = (),
        match: Sequence[tuple[Tensor, Tensor]] | None = None,
        groups: Tensor | None = None,
        group_outputs: bool = False,
        prefix: int = 4,
        block_size: int | None = None,
        backend: str = "auto",
    ) -> AttentionResult:
        """The output of this process's queries, and statistics of the whole sequence.

        Args:
            call: of this process's own tokens.
            statistics, prefix, backend: as `lens_kernels.attention` takes them.
            match, groups: of the whole sequence.
            group_outputs: False alone: no process has those of the others.
            block_size: that of the layout.

        Raises:
            LensError: a layer whose mask or bias cannot be split, or a backend that cannot do it.
        """
        self._check(call)
        names = set(statistics)
        layout, links, batch = self.layout, self.links, len(call.query)
        pairs = None
        if match is not None:
            pairs = [(self._own(one, batch), self._own(other, batch)) for one, other in match]
        try:
            result = ring_attention(
                call.query,
                call.key,
                call.value,
                layout,
                links,
                causal=call.mask.causal,
                window=call.mask.window,
                scale=call.scale,
                softcap=call.softcap,
                sink_logits=call.sink_logits,
                statistics=names,
                match=pairs,
                prefix=prefix,
                groups=None if groups is None else self._own(groups, batch),
                backend=backend,
            )
        except (TypeError, ValueError) as error:
            raise LensError(str(error)) from error
        found = {name: self._joined(name, part) for name, part in result.statistics.items()}
        states = None
        if result.groups:
            lses = torch.stack([self._gathered(state.lse, 2) for state in result.groups])
            carried = {
                name: torch.stack(
                    [self._gathered(state.statistics[name], 2) for state in result.groups]
                )
                for name in result.groups[0].statistics
            }
            states = AttentionGroups(lses[..., :0], lses, carried)
        block = (layout.block, layout.block)
        start = 0 if call.mask.causal else 1 - layout.length
        kept = AttentionStatistics(found, block_size=block, diagonal_start=start)
        return AttentionResult(result.output, kept, states, f"ring of {links.size}")

    def _check(self, call: LayerCall) -> None:
        mask = call.mask
        plain = mask.allowed is None and mask.padding is None and not mask.start
        if call.cross or not plain or call.position_bias is not None:
            what = "adds a bias to its logits" if call.position_bias is not None else "has a mask"
            raise LensError(
                f"layer {call.layer} {what} that cannot be split over processes (causal masks, windows and "
                "none can); leave group out"
            )

    def _own(self, labels: Tensor, batch: int) -> Tensor:
        """This process's part of [tokens] or [batch, tokens]."""
        return self.layout.take(labels, self.links.rank, labels.dim() - 1).expand(batch, -1)

    def _joined(self, name: str, part: Tensor) -> Tensor:
        if name == "diagonal":
            return part
        return self._gathered(part, 2, self.layout.block if name.startswith("block") else 1)

    def _gathered(self, part: Tensor, dim: int, block: int = 1) -> Tensor:
        """The whole of what every process has, along the tokens."""
        shapes = []
        for rank in range(self.layout.ranks):
            shape = list(part.shape)
            shape[dim] = self.layout.size(rank, block)
            shapes.append(shape)
        return self.layout.join(self.links.gather(part, shapes), dim, block)


class _Told(Processes):
    lost = LensError


def processes(group: Any) -> Processes:
    """The links of a process group.

    Raises:
        LensError: torch.distributed was not started, or the group is not of this process.
    """
    try:
        return _Told(group)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise LensError(f"group=: {error}") from error


def check_split(model: LoadedModel, prompt: Prompt, links: Processes) -> None:
    """Raises LensError, on every process, unless the prompt may be split over them."""
    name = model.info.class_name
    whole_ids = ids_alone(prompt, "group")
    if model.info.twice:
        raise LensError(f"layers of {name} attend twice, which group= does not do; leave group out")
    if "position_ids" not in inspect.signature(base(model).forward).parameters:
        raise LensError(
            f"{name} takes no position_ids, so its tokens cannot be split over processes; leave group out"
        )
    check_length_matters_not(model, len(whole_ids), "group=")
    _check_same(whole_ids, links, model.device)
    ids = whole_ids[: max(_PROBE, 4 * links.size)]
    split = Split(ids, 1, links, model.device)
    with torch.no_grad():
        with listening(model, lambda call: attend(call, statistics=()).output):
            whole = _hidden(run(model, {"input_ids": torch.tensor([ids], device=model.device)}))
        with listening(model, lambda call: split.attend(call).output):
            own = _hidden(run(model, split.inputs, "its part of a prompt (leave group out)"))
    mine = whole[:, split.layout.positions(links.rank).to(whole.device)]
    difference = (own - mine).abs().max() / whole.abs().max().clamp(min=1e-30)
    worst = float(torch.stack(links.gather(difference, [()] * links.size)).max())  # NaN if any is
    if not worst <= tolerance_of(model.precision):
        raise LensError(
            f"{name} computes something else when its tokens are split over processes: on the first "
            f"{len(ids)} tokens its output differs by {worst:.1e} (a layer that reads other tokens without "
            "attention); leave group out"
        )


def _check_same(ids: Sequence[int], links: Processes, device: torch.device) -> None:
    digest = hashlib.sha256(repr(list(ids)).encode()).digest()
    own = torch.tensor([len(ids), int.from_bytes(digest[:7], "big")], device=device)
    if any(not torch.equal(one, own) for one in links.gather(own, [own.shape] * links.size)):
        raise LensError("group=: the processes were given different prompts; give all the same")


def _hidden(output: Any) -> Tensor:
    return output[0].double()
