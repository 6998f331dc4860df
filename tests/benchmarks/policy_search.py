"""The search for a policy of each head on real text at length: time, the frontier, the promise, and whether it held.

    python tests/benchmarks/policy_search.py [--model smollm2-135m] [--texts moby-dick,lily] [--tokens 4096] [--choose 1] [--promise 3]
        [--test 1] [--loss 0.01] [--levels 3] [--draws 1] [--threads 2] [--out heads.json]

Windows of several books in turn: the first ones choose, the next ones promise, and the last ones, which nobody looked
at before, are measured with the file that was written. The goal is 20 minutes on two cores for 4,096 tokens; on a
shared machine the CPU time is the number to read.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import lens
from lens import policies
from lens.models.loaded import LoadedModel
from lens.policies.evaluating import losses_under


def main() -> None:
    """Search, write the file, read it again, measure it on other text, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--texts", default="moby-dick,sherlock-holmes,pride-and-prejudice,shakespeare"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--choose", type=int, default=1)
    parser.add_argument("--promise", type=int, default=3)
    parser.add_argument("--test", type=int, default=1)
    parser.add_argument("--loss", type=float, default=0.01)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = lens.load(asked.model)
    count = asked.choose + asked.promise + asked.test
    windows = _windows(model, asked.texts.split(","), asked.tokens)[:count]
    if len(windows) < count:
        parser.error(
            f"{asked.texts} have {len(windows)} windows of {asked.tokens:,} tokens, not {count}"
        )
    start, busy, load = time.perf_counter(), time.process_time(), os.getloadavg()[0]
    found = policies.search(
        model,
        windows[: asked.choose],
        held_out=windows[asked.choose : asked.choose + asked.promise],
        loss=asked.loss,
        block_size=asked.block,
        levels=asked.levels,
        draws=asked.draws,
        progress=False,
    )
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    path = asked.out or Path(tempfile.mkdtemp()) / "heads.json"
    policies.write(found, path, model)
    sys.stdout.write(
        f"{model.name}, {asked.tokens:,} tokens, blocks of {asked.block}, {asked.choose} + {asked.promise} windows, "
        f"{asked.threads} threads: {seconds / 60:.1f} min, {busy / 60:.1f} min of CPU (load {load:.1f} to "
        f"{os.getloadavg()[0]:.1f})\n"
    )
    sys.stdout.write("\n".join(map(str, found.findings())) + "\n")
    sys.stdout.write(found.curve().round(4).to_string(index=False) + "\n")
    sys.stdout.write(found.table()["policy"].value_counts().to_string() + "\n")
    sys.stdout.flush()
    again = policies.read(path)
    tested = windows[asked.choose + asked.promise :]
    after, before = (
        [one.mean() for one in losses_under(model, policy, found.block_size, tested)]
        for policy in (again, policies.Full())
    )
    change = float(np.mean(after) - np.mean(before))
    low, high = found.promise(more=asked.test)
    sys.stdout.write(
        f"the file on {asked.test} windows that nobody saw: {change:+.4f} nats per token, promised "
        f"[{low:+.4f}, {high:+.4f}]: {'held' if low <= change <= high else 'not held'}\n"
    )


def _windows(model: LoadedModel, texts: list[str], length: int) -> list[list[int]]:
    """The first window of each text, the second of each, and so on."""
    found = []
    for number, text in enumerate(texts):
        ids = model.encode(lens.tasks.text(text))
        for place, at in enumerate(range(0, len(ids) - length + 1, length)):
            found.append((place, number, ids[at : at + length]))
    return [ids for *_, ids in sorted(found)]


if __name__ == "__main__":
    main()
