"""Time and peak memory of capturing a long prompt through a 2-layer Llama shape with 8 heads of 64.

The model has random weights from its configuration. Run in a process of its own, so that the figure
is that of the whole process, interpreter and libraries included; of 16,384 tokens eager weights alone would
take 17 GB.

    python tests/benchmarks/long_prompt.py [--tokens 16384]
    python tests/benchmarks/long_prompt.py --tokens 131072 --chunk 4096 --block 128    (minutes; under 3 GiB)
    python tests/benchmarks/long_prompt.py --explain [smollm2-135m --tokens 8000]

With `--explain` it is one pair of far tokens that is taken apart (`lens.reading.explain`), of the shape above or of a model that is named, and
what a plain pass of that prompt takes stands beside.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

GOAL_MB = 2000


def random_llama(hidden: int, tokens: int) -> tuple[LoadedModel, list[int]]:
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


def measure(tokens: int, chunk: int | None = None, block: int = 64) -> dict[str, Any]:
    """Seconds of the capture, on the clock and of all threads, and megabytes of the process at its highest point."""
    import lens

    model, ids = random_llama(512, tokens)
    start, worked = time.perf_counter(), time.process_time()
    trace = lens.capture(model, ids, chunk=chunk, block_size=block)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    mass = float(trace.block_mass.sum("key_block").mean())
    if abs(mass - 1) > 1e-4:
        raise SystemExit(f"wrong result: the rows of block_mass sum to {mass}, not 1")
    figures = {"tokens": tokens, "chunk": chunk, "block": block}
    figures |= {"seconds": round(seconds, 2), "processor_seconds": round(worked, 2)}
    return figures | {"peak_mb": round(peak_mb())}


def explained(tokens: int, name: str = "") -> dict[str, Any]:
    """Seconds of taking one pair apart, and megabytes after a plain pass and after it; `error` of the sum of its parts, nats."""
    import torch

    import lens
    from lens.passes.sessions import run

    if name:
        model = lens.load(name)
        ids = model.encode(lens.tasks.text("moby-dick"))[:tokens]
    else:
        model, ids = random_llama(512, tokens)
    with torch.no_grad():
        run(model, {"input_ids": torch.tensor([ids])})
    figures: dict[str, Any] = {"tokens": len(ids), "plain_pass_mb": round(peak_mb())}
    head = f"L{model.info.layers - 1}H1"
    start, worked = time.perf_counter(), time.process_time()
    found = lens.reading.explain(model, ids, head, len(ids) - 1, len(ids) // 2, progress=False)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    figures |= {"seconds": round(seconds, 2), "processor_seconds": round(worked, 2)}
    figures |= {"peak_mb": round(peak_mb()), "parts": len(found.parts[1]), "error": found.error}
    return figures


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
    parser.add_argument("--chunk", type=int, help="tokens of a piece; whole if not given")
    parser.add_argument("--block", type=int, default=64, help="tokens of a block of the maps")
    parser.add_argument(
        "--explain", nargs="?", const="", metavar="MODEL", help="take a pair apart instead"
    )
    given = parser.parse_args()
    if given.explain is None:
        print(json.dumps(measure(given.tokens, given.chunk, given.block)))
    else:
        print(json.dumps(explained(given.tokens, given.explain)))
