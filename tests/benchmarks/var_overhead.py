"""What VAR adds to the forward pass of a captured model: 30 layers, 9 heads, 4,096 tokens, on the CPU.

The model has the shape of SmolLM2-135M with random weights; 4 positions carry a massive activation, so
that every layer has sinks. The prompt is 35 system tokens, an image of 576 tokens or of more, and text.
The captured model is the same model with its attention in the kernel: with nothing asked for but the
received attention, and, in brackets, with all statistics. Runs alternate; ratios are of medians, of the
wall clock and of this process's CPU time: on a machine with other load only the second means anything,
with one thread (OMP_NUM_THREADS=1), because waiting threads count.

    python tests/benchmarks/var_overhead.py [--layers 30] [--tokens 4096] [--image 2880] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

GOAL = 1.15
SYSTEM = 35


def measure(layers: int, tokens: int, image: int, repeats: int) -> dict[str, float]:
    """Median seconds of each way to run the model, "... CPU" of its CPU time, and what VAR edited."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lens

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1000,
        max_position_embeddings=tokens,
    )
    model = lens.load(LlamaForCausalLM(config).eval())
    sinks = [0, SYSTEM + 7, SYSTEM + image // 2, SYSTEM + image - 3]

    def plant(_: object, args: tuple) -> tuple:
        hidden = args[0].clone()
        if hidden.shape[1] > sinks[-1]:
            hidden[:, sinks, 13] = 100.0
        return (hidden, *args[1:])

    model.model.model.layers[0].register_forward_pre_hook(plant)
    ids = torch.randint(0, 1000, (1, tokens))
    keys = list(range(SYSTEM, SYSTEM + image))
    var = {"dims": [13], "rho": 0.5, "least_visual": 0.0}
    edited = []

    def run_var() -> None:
        with lens.edit(model, lens.edits.Var(keys, **var)) as (edit,):
            model.model.model(input_ids=ids)
        edited.append(edit)

    def run_captured(names: list[str] | str) -> Callable[[], None]:
        def run() -> None:
            with lens.traces.capturing(model, statistics=names):
                model.model.model(input_ids=ids)

        return run

    ways = {
        "captured": run_captured(["received"]),
        "all statistics": run_captured("all"),
        "var": run_var,
    }
    seconds: dict[str, list[float]] = {name + clock: [] for name in ways for clock in ("", " CPU")}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for name, run in ways.items():
                start, start_cpu = time.perf_counter(), time.process_time()
                run()
                if repeat:  # the first round only warms up
                    seconds[name].append(time.perf_counter() - start)
                    seconds[name + " CPU"].append(time.process_time() - start_cpu)
    if edited[-1].calls != layers - 1 or not edited[-1].edited_rows:
        raise SystemExit(f"wrong result: VAR edited {edited[-1].calls} of {layers - 1} layers")
    found = {name: statistics.median(times) for name, times in seconds.items()}
    return found | {"rows": float(edited[-1].edited_rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--image", type=int, default=2880)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    found = measure(given.layers, given.tokens, given.image, given.repeats)
    ratio, cpu = (found["var" + of] / found["captured" + of] for of in ("", " CPU"))
    print(
        f"{given.layers} layers, 9 heads, {given.tokens} tokens, image of {given.image}: captured "
        f"{found['captured']:.2f} s ({found['all statistics']:.2f} s with all statistics), VAR "
        f"{found['var']:.2f} s, {found['rows']:,.0f} rows edited; ratio {ratio:.3f} "
        f"({found['var'] / found['all statistics']:.3f}); CPU time {found['captured CPU']:.2f} s and "
        f"{found['var CPU']:.2f} s, ratio {cpu:.3f}; goal {GOAL}: "
        f"{'met' if max(ratio, cpu) <= GOAL else 'missed'}"
    )


if __name__ == "__main__":
    main()
