"""Seconds that the statistics of a large model take: groups of its heads, and agreement of measures.

    python tests/benchmarks/many_heads.py [--heads 1024] [--prompts 8] [--measures 12]

Random numbers stand for the prompts: only the statistics are timed, not the model. The goals, for 1,024
heads on one core: clusters with their stability over 200 draws in 10 s, agreement of 12 measures (66
pairs, tau-b and overlap over 300 draws) in 5 s. On a shared machine the CPU time is the number to read.
"""

import argparse
import sys
import time

import numpy as np

from lens.common.head_ids import HeadId
from lens.heads import agreement
from lens.heads.likeness.head_similarity import HeadSimilarity
from lens.heads.measures.scores import HeadScores, Intervention


def main() -> None:
    """Measure and print one line per analysis."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--measures", type=int, default=12)
    asked = parser.parse_args()
    random = np.random.default_rng(0)
    similar = _similarity(asked.heads, asked.prompts, random)
    measures = [
        _scores(asked.heads, asked.prompts, f"measure {number}", random)
        for number in range(asked.measures)
    ]
    agreement(*(_scores(3, 2, name, random) for name in "ab"), resamples=1)  # loads what is lazy
    for name, step, goal in (
        ("clusters", lambda: similar.clusters(), 10),
        ("agreement", lambda: agreement(*measures), 5),
        ("redundancy", lambda: similar.redundancy(), None),
        ("table of similarity", similar.table, None),
    ):
        start, busy = time.perf_counter(), time.process_time()
        step()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        wanted = f", goal {goal} s" if goal and asked.heads == 1024 else ""
        sys.stdout.write(f"{seconds:8.1f} s {busy:8.1f} s of CPU  {name}{wanted}\n")
        sys.stdout.flush()


def _similarity(heads: int, prompts: int, random: np.random.Generator) -> HeadSimilarity:
    """Heads scattered around 20 centres, a little elsewhere on each prompt."""
    places = random.normal(size=(20, 5))[random.integers(20, size=heads)]
    places = places + 0.3 * random.normal(size=(prompts, heads, 5))
    squares = ((places[:, :, None] - places[:, None]) ** 2).sum(-1) / 100
    return HeadSimilarity(
        squares * 64,
        np.full_like(squares, 64),
        "js",
        False,
        "exact",
        tuple(HeadId(0, at) for at in range(heads)),
        "random",
    )


def _scores(heads: int, prompts: int, name: str, random: np.random.Generator) -> HeadScores:
    values = random.normal(size=(1, heads, prompts))
    made = Intervention("mean")
    return HeadScores(values, np.zeros(prompts), name, made, "loss", -1, "random", "random")


if __name__ == "__main__":
    main()
