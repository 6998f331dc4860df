"""Memory and time of edge attribution: the `z` form beside the naive layout, and EAP on `stories260k`.

    python tests/benchmarks/circuits.py

measures each case in a process of its own, prints the rows and writes CIRCUITS.md. The naive layout is that
of published code: every head reads three copies of the residual stream of its own, what writers differ
by is one tensor [rows, tokens, writers, d_model], and gradients meet it as they come.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

import lens
from lens.circuits.graph.activations import Activations, PlainVisitor, read_activations
from lens.circuits.graph.nodes import Nodes, find_nodes, project, visit
from lens.circuits.scores.attribution import written
from lens.circuits.scores.scoring import score_edges
from lens.models.loaded import LoadedModel
from lens.tasks import Task

_ROWS, _TOKENS, _VOCAB = 8, 64, 997
_EXAMPLES, _SHORT = 64, 32
_GOALS = {"memory": 5.0, "seconds": 30.0}
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "OMP_WAIT_POLICY": "passive"}
_TABLE = Path(__file__).with_name("CIRCUITS.md")


def main() -> None:
    """Run every case, print the rows and write the table."""
    plain, z, naive = (_in_a_process(name) for name in ("plain", "z", "naive"))
    if abs(z["sum"] - naive["sum"]) > 1e-3 * z["size"]:
        raise SystemExit(f"the layouts disagree: {z} and {naive}")
    seconds = _in_a_process("stories260k")
    own = [case["beyond"] - plain["beyond"] for case in (naive, z)]
    ratio = own[0] / own[1]
    text = f"""# Edge attribution

`python tests/benchmarks/circuits.py`, 2 CPU threads that do not spin while they wait, float32; each case in a process of its own.

Memory: EAP of {_ROWS} prompts of {_TOKENS} tokens in one batch, 12 layers × 12 heads × 768 (the shape of GPT-2 small, 32,491 edges;
random weights, {_VOCAB} tokens in the vocabulary). Peak resident memory of the process, MiB; freed tensors go back to the system
at once (`MALLOC_MMAP_THRESHOLD_`), so that it counts what lives. Both layouts give the same scores. The goal: what the edges cost
beyond a plain forward and backward pass is at least {_GOALS["memory"]:g} times less.

| | peak | beyond the loaded model | beyond the plain pass |
|---|--:|--:|--:|
| plain forward and backward pass | {plain["peak"]:,.0f} | {plain["beyond"]:,.0f} | |
| naive: [tokens, writers, d_model], three inputs per head | {naive["peak"]:,.0f} | {naive["beyond"]:,.0f} | {own[0]:,.0f} |
| `score_edges`, heads as `z` | {z["peak"]:,.0f} | {z["beyond"]:,.0f} | {own[1]:,.0f} |
| **naive / `z`** | | {naive["beyond"] / z["beyond"]:.1f} | **{ratio:.1f}** |

Time: EAP on `stories260k`, {_EXAMPLES} examples of {_SHORT} tokens. The goal is less than {_GOALS["seconds"]:g} seconds.

| | seconds | seconds of CPU | peak of the process, MiB |
|---|--:|--:|--:|
| EAP, {seconds["edges"]:,.0f} edges | {seconds["wall"]:.1f} | {seconds["cpu"]:.1f} | {seconds["peak"]:,.0f} |
"""
    _TABLE.write_text(text, encoding="utf-8")
    print(text)
    missed = [ratio < _GOALS["memory"], seconds["wall"] > _GOALS["seconds"]]
    print("goals met" if not any(missed) else "GOALS MISSED")


def _in_a_process(case: str) -> dict[str, float]:
    found = subprocess.run(
        [sys.executable, __file__, case],
        env={**os.environ, **_ENVIRONMENT},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    pairs = (line.split("=") for line in found.stdout.splitlines() if "=" in line)
    return {name: float(number) for name, number in pairs}


def _peak() -> float:
    """MiB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _say(**numbers: float) -> None:
    for name, number in numbers.items():
        print(f"{name}={number}")


def _memory(layout: str) -> None:
    """One pass of EAP; the peak before it is that of the model and of a short run."""
    model, task = _random_gpt2(), _drawn_task(_ROWS, _TOKENS, _VOCAB)
    read_activations(find_nodes(model), task.clean[:1, :4])
    before = _peak()
    scores = _LAYOUTS[layout](model, task)
    peak = _peak()
    _say(peak=peak, beyond=peak - before, sum=scores.sum(), size=np.abs(scores).sum())


def _plain(model: LoadedModel, task: Task) -> np.ndarray:
    """No scores: a forward pass, and the gradient by what enters the first layer."""
    embedded = model.model.get_input_embeddings()(task.clean).requires_grad_()
    logits = model.model(inputs_embeds=embedded).logits
    task.measure(logits, torch.arange(_ROWS)).sum().backward()
    return np.zeros(1)


def _z_form(model: LoadedModel, task: Task) -> np.ndarray:
    """[rows, edges]."""
    return score_edges(model, task, method="eap", batch_size=_ROWS, progress=False).per_prompt


def _differences(nodes: Nodes, task: Task) -> Activations:
    _, clean = read_activations(nodes, task.clean)
    _, corrupt = read_activations(nodes, task.corrupt_or_refuse())
    return clean.minus(corrupt)


class _Copying(PlainVisitor):
    """Every reader has a copy of the residual stream; its gradient meets the differences at once."""

    def __init__(self, nodes: Nodes, differences: Tensor) -> None:
        super().__init__(nodes)
        graph = nodes.graph
        self._differences = differences  # [rows, tokens, writers, d_model]
        self.found = torch.zeros(len(differences), len(graph.readers), len(graph.writers))

    def _read(self, residual: Tensor, readers: slice) -> Tensor:
        copies = residual[None].expand(readers.stop - readers.start, -1, -1, -1).clone()

        def meet(slope: Tensor) -> None:
            self.found[:, readers] = torch.einsum("nrtd,rtwd->rnw", slope, self._differences)

        copies.register_hook(meet)
        return copies

    def enter(self, hidden: Tensor) -> Tensor:
        return hidden.detach().requires_grad_()

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts, graph = self.nodes.layers[layer], self.nodes.graph
        copies = self._read(residual, graph.attention_readers(layer))
        normed = parts.block.norm.forward(copies).split(graph.heads)
        q, k, v = (project(parts, part, some).movedim(0, -2) for part, some in enumerate(normed))
        return q, k, v

    def mlp_input(self, layer: int, residual: Tensor) -> Tensor:
        reader = self.nodes.graph.mlp_reader(layer)
        return self._read(residual, slice(reader, reader + 1))[0]

    def final(self, residual: Tensor) -> Tensor:
        last = len(self.nodes.graph.readers) - 1
        return self._read(residual, slice(last, last + 1))[0]


def _naive(model: LoadedModel, task: Task) -> np.ndarray:
    """[rows, edges], by tensors of all writers and of all readers."""
    nodes = find_nodes(model)
    parts = _differences(nodes, task)
    whole = [parts.input[:, None]]
    whole += [written(nodes, parts, layer) for layer in range(nodes.graph.layers)]
    copying = _Copying(nodes, torch.cat(whole, 1).transpose(1, 2).contiguous())
    del parts, whole
    with torch.enable_grad():
        logits = visit(nodes, task.clean, copying)
        task.measure(logits, torch.arange(_ROWS)).sum().backward()
    return copying.found.numpy()[:, nodes.graph.allowed]


_LAYOUTS = {"plain": _plain, "z": _z_form, "naive": _naive}


def _random_gpt2() -> LoadedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=_VOCAB, n_positions=_TOKENS, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    return lens.load(model.requires_grad_(False))


def _drawn_task(rows: int, tokens: int, vocab: int) -> Task:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(3, vocab, shape, generator=generator)

    last = torch.full((rows, 1), tokens - 1)
    clean, corrupt = draw(rows, tokens), draw(rows, tokens)
    return Task(
        "drawn", clean, last, draw(rows, 1), "logit_difference", corrupt, wrong=draw(rows, 1)
    )


def _stories() -> None:
    model, task = lens.load("stories260k"), _drawn_task(_EXAMPLES, _SHORT, 400)
    wall, cpu = time.perf_counter(), time.process_time()
    scores = score_edges(model, task, method="eap")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    _say(wall=wall, cpu=cpu, peak=_peak(), edges=scores.graph.n)


if __name__ == "__main__":
    torch.set_num_threads(2)
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "stories260k":
        _stories()
    else:
        _memory(sys.argv[1])
