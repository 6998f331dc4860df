"""What passes between processes that share a sequence, and what each holds: simulated links, then on paper.

Bytes are those of messages that ranks of this process handed to each other, sent over links of a ring and over
direct ones; pieces of memory are those of tensors that a rank had. From these, and from how each grows, follows
what up to a million tokens take.

    python tests/benchmarks/split_sequence.py
    python tests/benchmarks/split_sequence.py --peak    peak memory of four ranks beside what the pieces say
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lens_kernels.distributed import (  # noqa: E402
    Layout,
    RingResult,
    Simulated,
    Traffic,
    ring_attention,
    traffic,
)

HEADS, DIM = 8, 64
ROWS = ("lse", "max_logit", "entropy", "concentration", "distance", "prefix_mass")
EVERYTHING = (*ROWS, "received", "diagonal", "block_mass", "block_max")
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Pieces:
    """Bytes of one rank, measured.

    Attributes:
        inputs: queries, keys and values, per own token.
        payload: what goes round, per token of it.
        states: output and row statistics, with both groups, per own token.
        maps: block maps, per pair of blocks.
    """

    inputs: float
    payload: float
    states: float
    maps: float

    def memory(self, tokens: int, ranks: int, block: int) -> float:
        """Bytes of a rank at its highest point: its inputs, two payloads (the one that is used, the one that
        comes), states twice (old, new) and five outputs while one of them is merged, block maps twice (parts,
        joined), diagonals and received mass with their parts.
        """
        own = tokens / ranks
        maps = self.maps * own / block * tokens / block
        line = HEADS * FLOAT * (2 * tokens + 2 * own)
        merging = 5 * HEADS * DIM * FLOAT
        rounds = 2 * self.payload if ranks > 1 else 0
        held = self.inputs + rounds + 2 * self.states + merging
        return own * held + 2 * maps + line

    def sent(self, tokens: int, ranks: int) -> float:
        """Bytes that a rank sends in both rotations, keys going round."""
        own = tokens / ranks
        second = HEADS * DIM * FLOAT + HEADS * FLOAT  # keys, received mass
        return (ranks - 1) * own * (self.payload + second)


def run(
    tokens: int, ranks: int, block: int, kv_heads: int = HEADS, **options: Any
) -> list[tuple[Simulated, RingResult]]:
    """Every rank's links and result, of random inputs."""
    layout = Layout(tokens, ranks, block)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, tokens, DIM, generator=generator)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    groups = (torch.arange(tokens) != 0).int()[None]

    def rank(links: Simulated) -> tuple[Simulated, RingResult]:
        own = [layout.take(tensor, links.rank, 2) for tensor in (query, key, value)]
        kept = layout.take(groups, links.rank, 1) if "block_mass" in options["statistics"] else None
        return links, ring_attention(own[0], own[1], own[2], layout, links, groups=kept, **options)

    return Simulated.run(ranks, rank)


def passing(tokens: int, ranks: int, wiring: Any, **options: Any) -> Traffic:
    """What passes over the links."""
    found = run(tokens, ranks, 16, **options)
    return traffic([message for links, _ in found for message in links.messages], ranks, wiring)


def transfers(tokens: int = 1024) -> None:
    """The table of both transfers: bytes per token of the sequence."""
    print(
        "| ranks | key heads | goes round | wiring | steps | sent | busiest link | one after another |"
    )
    print("|--:|--:|---|---|--:|--:|--:|--:|")
    for ranks in (2, 4, 8):
        for kv_heads in (8, 2):
            for transfer in ("keys", "queries"):
                for wiring in ("ring", "direct"):
                    options = {"kv_heads": kv_heads, "transfer": transfer, "statistics": ("lse",)}
                    found = passing(tokens, ranks, wiring, **options)
                    double = passing(2 * tokens, ranks, wiring, **options)
                    assert double.total == 2 * found.total, "bytes grow with the tokens"
                    numbers = (found.total, found.busiest, found.critical)
                    cells = " | ".join(f"{number / tokens:,.0f}" for number in numbers)
                    print(
                        f"| {ranks} | {kv_heads} | {transfer} | {wiring} | {found.steps} | {cells} |"
                    )


def measured(tokens: int = 1024, ranks: int = 4, block: int = 32) -> Pieces:
    """The pieces of a rank, of all statistics and both groups."""
    links, result = run(tokens, ranks, block, statistics=EVERYTHING)[0]
    own = Layout(tokens, ranks, block).size(0)
    first = sum(m.bytes for m in links.messages if m.step == 0)
    rows = sum(result.statistics[name].nbytes for name in ROWS)
    states = sum(
        state.output.nbytes + state.lse.nbytes + sum(t.nbytes for t in state.statistics.values())
        for state in result.groups
    )
    maps = result.statistics["block_mass"].nbytes + result.statistics["block_max"].nbytes
    return Pieces(
        inputs=3 * HEADS * DIM * FLOAT,
        payload=first / own,
        states=(result.output.nbytes + rows + states) / own,
        maps=maps / (own // block * tokens // block),
    )


def growth(pieces: Pieces) -> None:
    """What a rank holds and sends, up to a million tokens, for one layer."""
    print("| tokens | block | ranks | a rank holds | of it block maps | a rank sends |")
    print("|--:|--:|--:|--:|--:|--:|")
    for tokens, block in ((2**14, 128), (2**17, 128), (2**20, 1024)):
        for ranks in (1, 4, 16, 64):
            maps = 2 * pieces.maps * tokens / ranks / block * tokens / block
            held, sent = pieces.memory(tokens, ranks, block), pieces.sent(tokens, ranks)
            sizes = " | ".join(f"{size / 2**20:,.0f} MiB" for size in (held, maps, sent))
            print(f"| {tokens:,} | {block:,} | {ranks} | {sizes} |")


def peak(pieces: Pieces) -> None:
    """Peak memory of four ranks in this process, above what there was before, beside the pieces."""
    for tokens, block in ((4096, 128), (8192, 128)):
        run(1024, 4, 128, statistics=EVERYTHING)  # what is loaded and compiled at first use
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run(tokens, 4, block, statistics=EVERYTHING)
        found, said = _resident("VmHWM") - before, 4 * pieces.memory(tokens, 4, block)
        whole = 3 * HEADS * DIM * FLOAT * tokens  # the whole sequence, from which ranks take theirs
        whole += pieces.payload * tokens  # what is on its way between threads
        print(
            f"{tokens:,} tokens on 4 ranks: {found / 2**20:,.0f} MiB, {found / (said + whole):.2f} times what "
            f"the pieces say ({(said + whole) / 2**20:,.0f} MiB)"
        )


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])  # pyright: ignore


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", action="store_true", help="measure peak memory too (Linux)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transfers()
    found = measured()
    print(
        f"\none rank, bytes: inputs {found.inputs:,.0f} a token, payload {found.payload:,.0f} a token, states "
        f"{found.states:,.0f} a token, block maps {found.maps:,.0f} a pair of blocks\n"
    )
    growth(found)
    if given.peak:
        peak(found)
