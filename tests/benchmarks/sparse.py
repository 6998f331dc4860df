"""Block-sparse attention against dense, at densities 0.5, 0.25 and 0.1: ratios of one process, alternating.

    python tests/benchmarks/sparse.py [--tokens 4096] [--heads 9] [--dim 64] [--block 64] [--repeats 7] [--threads 1]

One causal layer, float32, random q, k and v. Per row of blocks the first block, the query's own, and as many others
drawn at random as make the density. Times are CPU seconds of the process, medians of the repeats; the runs of all
columns alternate, so that a slower moment of the machine meets all of them. "choice" is the time of the policy that
finds the blocks, the pooled map of `BlockSparse`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from lens.passes.blocks import BlockView
from lens.passes.calls import LayerCall
from lens.passes.structures import MaskStructure
from lens.policies import BlockSparse, RandomBlocks

DENSITIES = (0.5, 0.25, 0.1)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, asked.heads, asked.tokens, asked.dim, generator=generator) for _ in range(3)
    )
    call = LayerCall(q, k, v, MaskStructure(causal=True), scale=asked.dim**-0.5)
    view = BlockView(call, asked.block, asked.block)
    masks = {}
    for share in DENSITIES:
        blocks = RandomBlocks(share=share, ends=True).keep(view).blocks & view.visible
        masks[float(blocks.sum() / view.visible.sum())] = blocks
    runs: dict[str, Callable[[], object]] = {
        "torch SDPA": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "dense": lambda: view.attended(statistics=()),
        "choice": lambda: BlockSparse(share=0.25).keep(BlockView(call, asked.block, asked.block)),
        **{
            f"{density:.3f}": lambda blocks=blocks: view.attended(blocks, statistics=())
            for density, blocks in masks.items()
        },
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(asked.repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:  # the first one warms up
                seconds[name].append(time.process_time() - start)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        f"{asked.tokens:,} tokens, {asked.heads} heads of {asked.dim}, blocks of {asked.block}, float32, "
        f"{asked.threads} thread(s), {asked.repeats} repeats.\n",
        "| attention | CPU s | against dense | against torch SDPA |",
        "|---|---|---|---|",
    ]
    for name, value in middle.items():
        words = f"blocks, density {name}" if name[0].isdigit() else name
        lines.append(
            f"| {words} | {value:.3f} | {value / middle['dense']:.2f} | {value / middle['torch SDPA']:.2f} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
