"""Attention of one sequence split over processes, with its statistics, exactly.

    layout = Layout(length, ranks, block)               which tokens each process holds
    links = Processes(group)                            torch.distributed: gloo, nccl
    result = ring_attention(q, k, v, layout, links)     each process its own queries, keys, values

Two rotations: in the first every process attends from its queries to all keys, part by part, and merges
the states `(output, LSE, row statistics)`; in the second, with the LSE known, what is summed over rows.
"""

from lens_kernels.distributed.layout import Layout
from lens_kernels.distributed.links import Links, Message, Processes, Simulated, Traffic, traffic
from lens_kernels.distributed.ring import RingResult, ring_attention

__all__ = [
    "Layout",
    "Links",
    "Message",
    "Processes",
    "RingResult",
    "Simulated",
    "Traffic",
    "ring_attention",
    "traffic",
]
