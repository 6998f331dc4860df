"""Time of each Triton kernel on this GPU: `python tests/benchmarks/profile_gpu.py [--length 8192]`.

Causal bfloat16, 32 heads x 128: a line for each kernel of each set of statistics, with its time and
what part of the call it is, written to profile.csv in `--out` as it is found. Where there is no GPU
it says so and ends with 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

SETS = ("lse", "rows", "rows + blocks", "rows + blocks + columns", "all", "lse + attribution")
TITLES = ("statistics", "kernel", "calls", "ms", "share")


def kernels_of(call: Callable[[], object], rounds: int) -> list[tuple[str, int, float]]:
    """Name, launches a call and milliseconds a call of each kernel on the device."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
    found = [
        (event.key, round(event.count / rounds), event.self_device_time_total / rounds / 1000)
        for event in seen.key_averages()
    ]
    return sorted((row for row in found if row[2] > 0), key=lambda row: -row[2])


def shares(
    statistics: str, found: list[tuple[str, int, float]]
) -> Iterator[tuple[str, str, str, str, str]]:
    """Lines of the table; kernels under 1 % of the call together."""
    whole = sum(time for _, _, time in found)
    rest = [row for row in found if row[2] < 0.01 * whole]
    for name, calls, time in (row for row in found if row[2] >= 0.01 * whole):
        yield statistics, name[:60], str(calls), f"{time:.3f}", f"{time / whole:.1%}"
    if rest:
        calls, time = sum(row[1] for row in rest), sum(row[2] for row in rest)
        yield statistics, "others", str(calls), f"{time:.3f}", f"{time / whole:.1%}"


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; 0, or 1 without a GPU."""
    from tests.benchmarks.cases import Case, contenders

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA GPU here", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with (options.out / "profile.csv").open("w") as file:
        print(",".join(TITLES), file=file, flush=True)
        for statistics in SETS:
            case = Case(
                "",
                options.length,
                options.length,
                *(32, 32, 128),
                device="cuda",
                dtype="bfloat16",
                backward="attribution" in statistics,
            )
            (ours,) = (one for one in contenders(case) if one.statistics == statistics)
            inputs = case.inputs()
            call = ours.prepare(case, inputs)

            def both(call=call, inputs=inputs):
                output = call()
                return torch.autograd.grad(output, inputs, output)

            try:
                found = kernels_of(both if case.backward else call, options.rounds)
                lines = [*shares(statistics, found)]
            except Exception as error:  # the others are profiled all the same
                failed, said = 1, (str(error).splitlines() or [""])[0].replace(",", ";")[:100]
                lines = [(statistics, f"failed: {type(error).__name__}: {said}", "", "", "")]
            for line in lines:
                print(",".join(line), file=file, flush=True)
                print("  ".join(line), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
