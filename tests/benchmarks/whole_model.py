"""A whole model captured with all statistics against its own forward pass, without its output layer.

    python tests/benchmarks/whole_model.py [--model smollm2-135m] [--rounds 11]

prints and writes WHOLE_MODEL.md. Both sides run in one process, in turn, on random tokens: the model's own pass
with the attention it was loaded with (SDPA), and `lens.capture`. Prompts that run together are held against
the same prompts captured one after the other, and their traces against each other. `make models` installs the model.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lens
from lens.passes.sessions import base

sys.path[:0] = [str(Path(__file__).parents[2])]

from tests.benchmarks.measure import interval_of_median  # noqa: E402

GOALS = {512: 1.05, 2048: 0.95}
_BATCHES = {"16 of 32 to 36 tokens": range(36, 32, -1), "16 of 128 tokens": (128,)}
_PROMPTS = 16


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(2)
    model = lens.load(given.model)
    lines = [
        "# A whole model",
        "",
        f"`python tests/benchmarks/whole_model.py --rounds {given.rounds}`: `{given.model}`, float32, {torch.get_num_threads()} threads, in turn in one",
        "process; medians, `ratio` of the two in the same round with the 95 % interval of its median. `seconds of CPU` are of",
        "all threads: on a machine with other work they say more than the clock (load average at the end: {load:.1f}).",
        "",
        "| | own | captured | ratio | goal | ratio of seconds of CPU |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for tokens, goal in GOALS.items():
        lines.append(_forward_row(model, tokens, goal, given.rounds))
        print(lines[-1], file=sys.stderr, flush=True)
    lines += [
        "",
        "| prompts | one by one | together | ratio | ratio of seconds of CPU | largest difference |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, lengths in _BATCHES.items():
        lines.append(_batch_row(model, name, list(lengths), given.rounds))
        print(lines[-1], file=sys.stderr, flush=True)
    page = "\n".join([*lines, ""]).replace("{load:.1f}", f"{os.getloadavg()[0]:.1f}")
    Path(__file__).with_name("WHOLE_MODEL.md").write_text(page, encoding="utf-8")
    print(page)


def _forward_row(model: Any, tokens: int, goal: float, rounds: int) -> str:
    ids = torch.randint(0, model.info.vocab, (tokens,), generator=torch.Generator().manual_seed(0))

    def own() -> None:
        with torch.no_grad():
            base(model)(input_ids=ids[None])

    def captured() -> None:
        trace = lens.capture(model, ids, progress=False)
        if abs(float(trace.received.sum()) / trace.lse.size - 1) > 1e-3:
            raise SystemExit("wrong result: received mass does not sum to the number of rows")

    wall, work = _in_turn({"own": own, "captured": captured}, rounds)
    seconds = [statistics.median(wall[name]) for name in ("own", "captured")]
    ratios = [_ratio(times["captured"], times["own"]) for times in (wall, work)]
    return (
        f"| {tokens:,} tokens | {seconds[0]:.2f} s | {seconds[1]:.2f} s | {ratios[0]} | {goal:.2f} | "
        f"{ratios[1]} |"
    )


def _batch_row(model: Any, name: str, lengths: list[int], rounds: int) -> str:
    draw = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, model.info.vocab, (lengths[number % len(lengths)],), generator=draw)
        for number in range(_PROMPTS)
    ]
    found: dict[str, Any] = {}

    def apart() -> None:
        found["apart"] = [lens.capture(model, one, progress=False) for one in prompts]

    def together() -> None:
        found["together"] = lens.capture(model, prompts, progress=False)

    wall, work = _in_turn({"apart": apart, "together": together}, rounds)
    error = max(
        float(np.nanmax(np.abs(one.dataset[variable] - other.dataset[variable])))
        for one, other in zip(found["apart"], found["together"], strict=True)
        for variable in ("received", "block_mass", "entropy")
    )
    seconds = [statistics.median(wall[way]) for way in ("apart", "together")]
    ratios = [_ratio(times["together"], times["apart"]) for times in (wall, work)]
    return f"| {name} | {seconds[0]:.2f} s | {seconds[1]:.2f} s | {ratios[0]} | {ratios[1]} | {error:.0e} |"


def _in_turn(
    ways: dict[str, Callable[[], None]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each round on the clock, and of all threads; the first round is not counted."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start, worked = time.perf_counter(), time.process_time()
            way()
            wall[name].append(time.perf_counter() - start)
            work[name].append(time.process_time() - worked)
    cut = ({name: one[1:] for name, one in times.items()} for times in (wall, work))
    return next(cut), next(cut)


def _ratio(mine: list[float], other: list[float]) -> str:
    """The median over rounds, with its interval where there are rounds enough."""
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    low, high = interval_of_median(ratios)
    told = f"{statistics.median(ratios):.2f}"
    return told if math.isnan(low) else f"{told} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
