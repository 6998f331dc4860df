"""Seconds that each column of the table of heads takes on stories260k with 200 texts.

    python tests/benchmarks/heads_table.py [--texts 200] [--length 64] [--threads 2]

The goal is the whole table in less than three minutes on two cores. Texts are windows of the model's
own stories; each measure runs once, after one warm-up pass. On a shared machine the CPU time is the
number to read.
"""

import argparse
import sys
import time

import torch

import lens
from lens.heads import agreement, importance, roles, similarity
from lens.tasks import Task

MEASURES: tuple[tuple[str, str | None], ...] = (
    ("ablation", "zero"),
    ("ablation", "mean"),
    ("ablation", "pooled_mean"),
    ("ablation", "resample"),
    ("ablation", "counterfactual"),
    ("ablation", "optimal"),
    ("gradient", None),
    ("gate", None),
    ("attribution", None),
    ("atp", None),
)
_GOAL = 180


def main() -> None:
    """Measure and print one line per measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = lens.load("stories260k")
    ids = _stories(model, asked.texts, asked.length)
    positions = torch.arange(asked.length - 1).expand(asked.texts, -1)
    task = Task("stories", ids, positions, ids[:, 1:], "loss", corrupt=ids.roll(1, 0))
    task.evaluate(model)
    total, found = 0.0, []
    for by, baseline in MEASURES:
        start, busy = time.perf_counter(), time.process_time()
        found.append(importance(model, task, method=by, baseline=baseline, progress=False))
        seconds = time.perf_counter() - start
        total += seconds
        busy = time.process_time() - busy
        sys.stdout.write(f"{seconds:8.1f} s {busy:8.1f} s of CPU  {found[-1].label}\n")
        sys.stdout.flush()
    for name, step in (
        ("role scores", lambda: roles(model, ids.tolist(), progress=False)),
        ("similarity (js)", lambda: similarity(model, ids[:8].tolist(), progress=False)),
        ("agreement", lambda: agreement(*found)),
    ):
        start, busy = time.perf_counter(), time.process_time()
        step()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        total += seconds
        sys.stdout.write(f"{seconds:8.1f} s {busy:8.1f} s of CPU  {name}\n")
    sys.stdout.write(f"{total:8.1f} s  whole table, goal {_GOAL} s\n")


def _stories(model: lens.models.LoadedModel, texts: int, length: int) -> torch.Tensor:
    """[texts, length]: sampled from the model itself, so that no file is needed."""
    torch.manual_seed(0)
    start = torch.full((texts, 1), model.bos_id or 1)
    return model.model.generate(
        start, max_new_tokens=length - 1, min_new_tokens=length - 1, do_sample=True, pad_token_id=0
    )


if __name__ == "__main__":
    main()
