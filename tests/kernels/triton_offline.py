"""Compile the Triton kernels for GPUs that are not here; run as a script, prints one JSON a kernel.

A process of its own, because Triton reads TRITON_INTERPRET when a kernel is decorated.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from lens_kernels import triton_configs, triton_launch, triton_run
from lens_kernels.backward import Saved, Upstream
from lens_kernels.types import AttentionMask
from lens_kernels.validation import make_problem
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ROWS = ("lse", "max_logit", "entropy", "concentration", "distance", "prefix_mass")
MAPS = (*ROWS, "block_mass", "block_max", "received", "diagonal")

# name: (head_dim, dtype, statistics, mask, more, whether the backward pass is compiled too)
CASES = {
    "plain": (128, torch.bfloat16, ("lse",), AttentionMask(causal=True), {}, True),
    "rows": (128, torch.bfloat16, ROWS, AttentionMask(causal=True), {}, False),
    "maps": (128, torch.bfloat16, MAPS, AttentionMask(causal=True), {}, False),
    "maps-64": (64, torch.float16, MAPS, AttentionMask(causal=True), {}, True),
    "maps-80": (80, torch.bfloat16, MAPS, AttentionMask(causal=True), {}, False),
    "window-softcap": (128, torch.bfloat16, ROWS, AttentionMask(causal=True, window=99), {"softcap": 30.0}, False),
    "wide": (256, torch.bfloat16, ROWS, AttentionMask(causal=True), {}, False),
}  # fmt: skip


class Stub:
    """Stands in for the GPU driver."""

    target = GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a kernel, from the tool inside Triton's wheel."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = shutil.which("cuobjdump", path=str(tools)) or "cuobjdump"
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", out.stdout)
    assert found, out.stdout + out.stderr
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def main(arch: int, names: list[str]) -> None:
    """Compile every kernel of the cases for one architecture."""
    assert "TRITON_INTERPRET" not in os.environ
    stub = Stub()
    stub.target = GPUTarget("cuda", arch, 32)
    driver.set_active(stub)
    triton_launch.capability = triton_configs.capability = lambda device: divmod(arch, 10)
    label = ""

    def compile_only(kernel, programs, config, *arguments, **constants):
        made = kernel.warmup(
            *arguments,
            **constants,
            grid=(programs,),
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
        row = {
            "case": label,
            "kernel": kernel.__name__,
            "shared": made.metadata.shared,
            "wgmma": "wgmma" in made.asm["ptx"],
            "mma": "mma.sync" in made.asm["ptx"],
            **usage(made.asm["cubin"]),
        }
        sys.stdout.write(json.dumps(row) + "\n")

    triton_launch.launch = compile_only
    for label in names:
        compile_case(*CASES[label])


def compile_case(dim, dtype, statistics, mask, more, backward) -> None:
    """Forward pass, LSE pass and, if asked for, the backward pass of one problem."""
    query = torch.zeros(1, 4, 256, dim, dtype=dtype, requires_grad=True)
    key = torch.zeros(1, 2, 256, dim, dtype=dtype)
    problem = make_problem(query, key, key.clone(), mask=mask, statistics=statistics, **more)
    with torch.no_grad():
        lse = torch.zeros(1, 4, 256)
        triton_run.run_rows(problem, dtype)
        if problem.wants("block_mass", "received"):
            triton_run.run_columns(problem, lse)
        if problem.wants("diagonal"):
            triton_run.run_diagonals(problem, lse)
        if backward:
            output = torch.zeros(1, 4, 256, dim, dtype=dtype)
            saved = Saved(problem, lse, None, frozenset({"query", "key", "value"}), output)
            triton_run.run_gradients(saved, Upstream(output))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
