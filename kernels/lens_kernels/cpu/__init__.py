"""Backend "cpu": compiled C on the machine's own vector unit, one Q K' for output and statistics.

`forward.c`, `decode.c` (few queries: the keys are the lanes) and `backward.c` hold the method. They
are compiled on first use with the machine's C compiler (a few seconds, once; `build.py`) and called
through ctypes. bfloat16 is multiplied by the machine's own instruction where the compiler knows one (`brain.h`,
AVX512_BF16, and `amx.h`, the tiles of AMX; the probabilities are then rounded to bfloat16 before they meet the values, as
elsewhere, and statistics are not), else as float32. Where there is no compiler, `supports` says so, and the torch backend
serves, slower.

Why C without torch's headers, measured on 2 cores (causal, 8 heads x 64, 4,096 tokens, with
`scaled_dot_product_attention` = 1; tests/benchmarks/RESULTS.md has the current figures): this one
0.8 with row and block statistics, and 3 s to compile; a C++ extension with torch's headers and the
matrix products of its libraries 0.9 to 1.2, but 88 s to compile and tied to one torch build; numba
1.6 to 2.2, 8 s per process or a cache of pickles, and a dependency; loops of torch operations 1.2
to 17. The own matrix product reaches 110 GFLOP/s per core where the library behind torch has 91.
"""

from __future__ import annotations

import torch

from lens_kernels.backward import Gradients, Saved, Upstream
from lens_kernels.cpu.calls import BackwardCall, ForwardCall
from lens_kernels.cpu.library import load
from lens_kernels.problem import BackendResult, Problem


def supports(problem: Problem) -> str | None:
    """None when this backend can do all of `problem`, else the reason why not.

    The first call of a process may compile the library.
    """
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}, not on the CPU"
    if problem.query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, and the inputs are {problem.query.dtype}"
    library = load()
    return library if isinstance(library, str) else None


def run(problem: Problem) -> BackendResult:
    """Computes output, LSE and the statistics asked for; see `lens_kernels.problem`.

    Raises:
        RuntimeError: when there is no library (ask `supports` first).
        MemoryError: when no thread gets its scratch memory.
    """
    with torch.no_grad():
        call = ForwardCall(problem)
        call.run("forward")
        return call.result()


def supports_gradients(problem: Problem) -> str | None:
    """None when it has the whole backward pass of `problem`, else the reason why not."""
    bias = problem.plan.bias
    if bias is not None and bias.requires_grad:
        return "it has no gradient of an additive bias"
    if problem.groups is not None:
        return "it has no gradient of group states"
    if problem.wants("block_influence") and problem.differentiable:
        return "it has block_influence only through the output, not beside differentiable="
    return None


def gradients(saved: Saved, upstream: Upstream) -> Gradients:
    """Gradients of query, key, value and learned sinks, and the exports asked for.

    Raises:
        RuntimeError, MemoryError: as `run`.
    """
    with torch.no_grad():
        call = BackwardCall(saved, upstream)
        call.run("backward")
        return call.result()
