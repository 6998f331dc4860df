"""Time and peak memory of edge attribution on `stories260k`: 64 examples of 32 tokens, 2 threads.

python tests/benchmarks/circuits.py [method]
"""

import resource
import sys
import time

import torch

import lens
from lens.circuits import score_edges
from lens.tasks import Task

_EXAMPLES, _TOKENS = 64, 32


def main(method: str) -> None:
    """Print wall time, CPU time and the peak of this process."""
    torch.set_num_threads(2)
    model = lens.load("stories260k")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(3, 400, shape, generator=generator)

    task = Task(
        "drawn",
        draw(_EXAMPLES, _TOKENS),
        torch.full((_EXAMPLES, 1), _TOKENS - 1),
        draw(_EXAMPLES, 1),
        "logit_difference",
        draw(_EXAMPLES, _TOKENS),
        wrong=draw(_EXAMPLES, 1),
    )
    wall, cpu = time.perf_counter(), time.process_time()
    scores = score_edges(model, task, method=method)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{method}, {scores.graph.n:,} edges: {wall:.1f} s, {cpu:.1f} s CPU, peak {peak:.2f} GiB")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "eap")
