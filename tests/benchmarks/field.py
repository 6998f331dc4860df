"""A GPT-2-small-shaped model beside the code of others: time, peak memory, same scores.

    python tests/benchmarks/field.py --python PYTHON [--eap FOLDER] [--out FIELD.md]

PYTHON is the interpreter of an environment with TransformerLens 2 (`HookedTransformer`), FOLDER the `src` of a copy
of https://github.com/hannamw/EAP-IG; neither is a dependency of this project. Every case runs in a process of
its own, ours and theirs in turn, and a case whose scores differ is not reported. The model has random weights.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]

_ROWS, _TOKENS, _LONG, _VOCAB, _STEPS, _ROUNDS = 2, 32, 2048, 997, 5, 1
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
_WORDS = {
    "patterns": (
        f"attention of {_LONG:,} tokens",
        "`lens.capture`, all statistics",
        "`run_with_cache`, patterns",
    ),
    "ablation": (
        f"zero for each of 144 heads, {_ROWS} prompts of {_TOKENS}",
        '`lens.heads.importance(method="ablation", baseline="zero")`',
        "a hook and a pass per head",
    ),
    "eap-ig": (
        f"EAP-IG, {_STEPS} steps, 32,491 edges, {_ROWS} prompts of {_TOKENS}",
        '`score_edges(method=EapIg(steps=5, rule="left"))`',
        "EAP-IG's `get_scores_eap_ig`",
    ),
}


def main() -> None:
    """Write the table, or run one of our own cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="interpreter that imports HookedTransformer")
    parser.add_argument("--eap", help="folder that holds the package `eap`")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("FIELD.md"))
    parser.add_argument("--own", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.own:
        return _own(given.own[0], Path(given.own[1]))
    if not given.python:
        parser.error("--python: the interpreter of an environment with TransformerLens 2 is needed")
    cases = [case for case in _WORDS if given.eap or case != "eap-ig"]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        rows = [_row(case, Path(folder), given.python, given.eap) for case in cases]
    page = _page(rows)
    given.out.write_text(page, encoding="utf-8")
    print(page)


def prepare(folder: Path) -> None:
    """The model and what is asked of it, for both sides."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = GPT2Config(vocab_size=_VOCAB, n_positions=_LONG, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(size).save_pretrained(folder)
    draw = np.random.default_rng(0)
    ids = {name: draw.integers(3, _VOCAB, (_ROWS, _TOKENS)) for name in ("clean", "corrupt")}
    answers = {name: draw.integers(3, _VOCAB, _ROWS) for name in ("correct", "wrong")}
    long = draw.integers(3, _VOCAB, (1, _LONG))
    np.savez(folder / "given.npz", **ids, **answers, long=long, steps=_STEPS)


def _own(case: str, folder: Path) -> None:
    from transformers import GPT2LMHeadModel

    import lens
    from tests.benchmarks.long_prompt import peak_mb

    torch.set_num_threads(2)
    given = {name: torch.from_numpy(part) for name, part in np.load(folder / "given.npz").items()}
    loaded = GPT2LMHeadModel.from_pretrained(folder).eval().requires_grad_(False)
    model = lens.load(loaded)
    task = None
    if case != "patterns":
        last = torch.full((_ROWS, 1), _TOKENS - 1)
        answers = {name: given[name][:, None] for name in ("correct", "wrong")}
        task = lens.tasks.Task(
            *("drawn", given["clean"], last, answers["correct"], "logit_difference"),
            given["corrupt"],
            wrong=answers["wrong"],
        )
    start = time.process_time()
    found: dict[str, Any] = {}
    if task is None:
        trace = lens.capture(model, given["long"][0], progress=False)
        found["received"] = trace.received.values
    elif case == "ablation":
        scores = lens.heads.importance(model, task, baseline="zero", progress=False)
        found["heads"] = scores.per_prompt.mean(-1)
    else:
        method = lens.circuits.EapIg(steps=_STEPS, rule="left")
        scores = lens.circuits.score_edges(model, task, method=method, progress=False)
        found |= {"names": np.array(scores.graph.edges), "scores": scores.values}
    print(f"seconds={time.process_time() - start}")
    print(f"peak={peak_mb()}")
    np.savez(folder / f"{case}-ours.npz", **found)


def _row(case: str, folder: Path, python: str, eap: str | None) -> dict[str, Any]:
    here = Path(__file__)
    ours = [sys.executable, str(here), "--own", case, str(folder)]
    theirs = [python, str(here.with_name("field_reference.py")), case, str(folder)]
    paths = {"ours": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "theirs": eap or ""}
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for _ in range(_ROUNDS):
        for side, command in (("ours", ours), ("theirs", theirs)):
            runs[side].append(_measured(command, paths[side]))
            print(case, side, runs[side][-1], file=sys.stderr, flush=True)
    medians = {
        side: {name: statistics.median(one[name] for one in found) for name in ("seconds", "peak")}
        for side, found in runs.items()
    }
    return {"case": case, "error": _error(case, folder)} | medians


def _measured(command: list[str], path: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": path, **_ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return {name: float(number) for name, number in re.findall(r"(\w+)=([\d.e+-]+)", done.stdout)}


def _error(case: str, folder: Path) -> float:
    """Largest difference of the scores as a share of the largest score."""
    ours, theirs = (np.load(folder / f"{case}-{side}.npz") for side in ("ours", "theirs"))
    if case != "eap-ig":
        (name,) = theirs
        mine, other = ours[name], theirs[name]
    else:  # theirs is what ablating an edge adds to the metric, ours what it takes
        known = dict(zip(theirs["names"].tolist(), (-theirs["scores"]).tolist(), strict=True))
        mine = ours["scores"]
        other = np.array([known[name] for name in ours["names"].tolist()])
        if len(known) != len(mine):
            raise SystemExit(f"{len(mine)} edges of ours and {len(known)} of theirs")
    error = float(np.abs(mine - other).max() / np.abs(other).max())
    if not error < 1e-3:
        raise SystemExit(f"{case}: the scores differ by {error:.1e} of the largest")
    return error


def _page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Beside the code of the field",
        "",
        "`python tests/benchmarks/field.py --python PYTHON --eap FOLDER`: 12 layers × 12 heads × 768, the shape of GPT-2 small, random",
        f"weights, {_VOCAB} tokens in the vocabulary; float32, 2 threads that do not spin while they wait, each run in a process of its own. Seconds are those of the",
        "processor, of both threads, which other work on the machine moves little. Theirs:",
        "TransformerLens 2.16 and EAP-IG 2.0. `peak` is that of the whole process, libraries included, in MiB; `difference` the largest",
        "difference of two scores as a share of the largest score.",
        "",
        "| | ours | theirs | seconds of CPU, ours | theirs | peak, ours | theirs | difference |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        what, ours, theirs = _WORDS[row["case"]]
        mine, other = row["ours"], row["theirs"]
        lines.append(
            f"| {what} | {ours} | {theirs} | {mine['seconds']:.1f} | {other['seconds']:.1f} | "
            f"{mine['peak']:,.0f} | {other['peak']:,.0f} | {row['error']:.0e} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
