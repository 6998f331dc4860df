"""A sequence that is split over ranks, for test_distributed.py, and what each of its processes does (tests.ranks)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lens_kernels.distributed import Layout, Links, Processes, ring_attention
from safetensors.torch import save_file
from torch import Tensor

from tests.kernels.helpers import tensors

LENGTH = 83
ROWS = ("lse", "max_logit", "entropy", "concentration", "distance", "prefix_mass", "match_mass")
NAMES = (*ROWS, "value_norm", "mean_value_norm", "received", "diagonal", "block_mass", "block_max")
BLOCK = 8
SINKS = torch.tensor([0.0, 1.5, -2.0, 3.0])


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tensors(2, 4, 2, LENGTH, LENGTH, 16, 24, dtype=dtype)


def labels() -> list[tuple[Tensor, Tensor]]:
    place = torch.arange(LENGTH)
    return [(place % 5, place % 5), (torch.where(place % 7 == 3, -1, place - 1), place)]


def one_rank(
    links: Links, order: str = "zigzag", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Layout, Any]:
    """What one rank computes of its part of the inputs."""
    layout = Layout(LENGTH, links.size, BLOCK, order)  # pyright: ignore
    query, key, value = (layout.take(tensor, links.rank, 2) for tensor in inputs(dtype))
    match = [
        tuple(layout.take(side, links.rank, 0).expand(2, -1) for side in pair) for pair in labels()
    ]
    groups = layout.take((torch.arange(LENGTH) != 0).int()[None].expand(2, -1), links.rank, 1)
    given = {"statistics": NAMES, "match": match, "prefix": 3, "groups": groups} | options
    return layout, ring_attention(query, key, value, layout, links, **given)


def joined(layout: Layout, results: list[Any]) -> dict[str, Tensor]:
    """The whole, from what every rank has."""
    found = {"output": layout.join([one.output for one in results], 2)}
    for name in results[0].statistics:
        parts = [one.statistics[name] for one in results]
        if name == "diagonal":
            assert all(torch.equal(part, parts[0]) for part in parts)
            found[name] = parts[0]
        else:
            block = layout.block if name.startswith("block") else 1
            found[name] = layout.join(parts, 2, block)
    for number in range(len(results[0].groups)):
        states = [one.groups[number] for one in results]
        found[f"group {number} output"] = layout.join([state.output for state in states], 2)
        found[f"group {number} lse"] = layout.join([state.lse for state in states], 2)
        for name in states[0].statistics:
            parts = [state.statistics[name] for state in states]
            found[f"group {number} {name}"] = layout.join(parts, 2)
    return found


def main(folder: Path) -> None:
    """As one of the processes of torch.distributed: alone, in pairs and all together, into files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    alone = [dist.new_group([one]) for one in range(4)]
    for size, group in ((1, alone[rank]), (2, pairs[rank // 2]), (4, None)):
        for transfer in ("keys", "queries"):
            links = Processes(group)
            _, result = one_rank(links, transfer=transfer, sink_logits=SINKS)
            parts = {"output": result.output, **result.statistics}
            for number, state in enumerate(result.groups):
                parts |= {f"group {number} output": state.output, f"group {number} lse": state.lse}
            sent = torch.tensor([[m.step, m.source, m.target, m.bytes] for m in links.messages])
            parts["messages"] = sent.reshape(-1, 4)
            save_file(
                {name: part.contiguous() for name, part in parts.items()},
                folder / f"{size}-{transfer}-{rank}.safetensors",
            )
    dist.destroy_process_group()
