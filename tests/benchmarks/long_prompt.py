"""Peak memory of capturing a long prompt: 16,384 tokens, a 2-layer Llama shape with 8 heads.

The model has random weights from its configuration. Run in a process of its own, so that the figure
is that of the whole process, interpreter and libraries included; eager weights alone would take 17 GB.

    python tests/benchmarks/long_prompt.py [--tokens 16384]
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lens

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

GOAL_MB = 2000


def random_llama(hidden: int, tokens: int) -> tuple[lens.models.LoadedModel, list[int]]:
    """A Llama of 2 layers of 8 heads with random weights, and a prompt of random tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lens

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
        max_position_embeddings=tokens,
    )
    model = lens.load(LlamaForCausalLM(config).eval())
    ids = torch.randint(0, 1000, (tokens,)).tolist()
    return model, ids


def measure(tokens: int) -> dict[str, float]:
    """Seconds of the capture and megabytes of the process at its highest point."""
    import lens

    model, ids = random_llama(512, tokens)
    start = time.perf_counter()
    trace = lens.capture(model, ids, progress=False)
    seconds = time.perf_counter() - start
    mass = float(trace.block_mass.sum("key_block").mean())
    if abs(mass - 1) > 1e-4:
        raise SystemExit(f"wrong result: the rows of block_mass sum to {mass}, not 1")
    return {"tokens": tokens, "seconds": round(seconds, 2), "peak_mb": round(peak_mb())}


def peak_mb() -> float:
    """Megabytes of this process at its highest point.

    Not `ru_maxrss` where there is /proc: it starts from the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10  # pyright: ignore
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    print(json.dumps(measure(parser.parse_args().tokens)))
