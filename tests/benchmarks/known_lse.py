"""Block mass from the LSE of an earlier step: the error that it makes, and the time it takes.

Queries and keys are those of an embedded model on a real text; a step moves them by noise of some share of
their size. Masses come from the LSE before the step and are held against those of the step's own softmax.

    python tests/benchmarks/known_lse.py [--tokens 4096]    (tokens of the timing, random inputs)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lens_kernels import AttentionMask, attention, masses_from_lse  # noqa: E402

import lens  # noqa: E402

BLOCK, TOP = 16, 3
CAUSAL = AttentionMask(causal=True)


def errors(query: Tensor, key: Tensor, share: float) -> tuple[float, float, float]:
    """Mean absolute drift of the LSE, RMS error ratio of block mass, share of the top blocks that are kept."""
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor + share * tensor.std() * noise

    asked = ("lse", "block_mass", "top_keys")
    options = {"mask": CAUSAL, "block_size": BLOCK, "top_k": TOP}
    old = attention(query, key, key, statistics=("lse",), **options).statistics.lse
    now = moved(query), moved(key)
    true = attention(*now, now[1], statistics=asked, **options).statistics
    found = masses_from_lse(*now, old, statistics=("block_mass", "top_keys"), **options)
    difference = found.statistics.block_mass - true.block_mass
    ratio = float(difference.square().mean().sqrt() / true.block_mass.square().mean().sqrt())
    same = (found.statistics.top_keys[..., None] == true.top_keys[..., None, :]).any(-1)
    return float(found.drift.abs().mean()), ratio, float(same[:, :, TOP:].float().mean())


def fastest(call: Callable[[], object], rounds: int = 5) -> float:
    """Milliseconds of the fastest of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main(tokens: int) -> None:
    model = lens.load("text-lm-3l")
    ids = lens.tasks.take(model, lens.tasks.text("moby-dick"), 128)
    trace = lens.capture(model, ids, statistics=["lse"], keep_qk=True)
    query, key = (torch.from_numpy(trace.dataset[name].values) for name in ("q", "k"))
    print("| step | mean drift of the LSE | error of block mass | top blocks kept |")
    print("|--:|--:|--:|--:|")
    for share in (0.0, 0.01, 0.03, 0.1, 0.3):
        drift, ratio, kept = errors(query, key, share)
        print(f"| {share:.0%} | {drift:.1e} | {ratio:.1e} | {kept:.1%} |")
    query, key = torch.randn(1, 8, tokens, 64), torch.randn(1, 8, tokens, 64)
    lse = attention(query, key, key, mask=CAUSAL).statistics.lse
    known = fastest(lambda: masses_from_lse(query, key, lse, mask=CAUSAL))
    plain = fastest(lambda: attention(query, key, key, mask=CAUSAL, statistics=("block_mass",)))
    print(
        f"\n{tokens:,} tokens, 8 heads of 64: {known:.0f} ms from a known LSE, {plain:.0f} ms without"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="of the timing")
    main(parser.parse_args().tokens)
