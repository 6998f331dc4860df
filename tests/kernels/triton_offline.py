"""Compile the Triton kernels for GPUs that are not here; run as a script, prints one JSON a kernel.

`python triton_offline.py [--list] [--kernels NAME,...] [--known FILE] ARCH [JOB ...] [ARCH [JOB ...] ...]`, all jobs
of an architecture where none is named; `--list` says what would be compiled, and with which tiles, at once. A job, "bfloat16-128-window", is
every kernel of one input type, head dim and mask (or what else changes a kernel), with the sets of
statistics that change it too; `--known` leaves out what stands in a table already.

A process of its own, because Triton reads TRITON_INTERPRET when a kernel is decorated.
"""

import argparse
import ast
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

MASKS = {
    "causal": {"bfloat16": (64, 128, 256), "float32": (64, 128)},
    "apart": {"bfloat16": (64, 128)},
    "decoding": {"bfloat16": (128,)},
    "odd": {"bfloat16": (128,)},
    "none": {"bfloat16": (64,)},
    "window": {"bfloat16": (128,)},
    "ragged": {"bfloat16": (128,)},
    "sinks": {"bfloat16": (64,)},
    "softcap": {"bfloat16": (256,)},
    "narrow": {"bfloat16": (192,)},
    "sparse": {"bfloat16": (128,)},
    "everything": {"bfloat16": (128,)},
}
"""What most models run, the commonest first, and the head dims of those that run it; any other can be asked for by name.

"causal" and "sinks" have a length that 16 divides, as the compiler knows, "odd" and every mask after it one that it
does not. "apart" is causal with the first key a group of its own, in the forward pass. "decoding" has one query, its
keys in pieces. "ragged" stands for whatever loads the range of each row: lengths, packed sequences,
left padding. "sinks" bear on the forward pass alone. "narrow" has values of 128 for keys of 192. float16 has the tiles of bfloat16, and of 762 kernels of both none differed in
spilled bytes, shared memory or instructions.
"""

LEARNT = ("causal", "odd", "none", "window", "sparse", "everything")
"""Masks whose gradients are compiled too; "everything", which no model runs, is all that can bear on the logits, at once."""
ROWS = ("lse", "max_logit", "entropy", "concentration", "distance", "prefix_mass")
GROUP_ROWS = ("lse", "max_logit", "entropy", "concentration", "distance")
EXPORTS = (
    "block_attribution",
    "row_attribution",
    "block_logit_gradient",
    "block_logit_gradient_abs",
)


CHOSEN = (
    *("arch", "dtype", "head_dim", "mask", "statistics", "kernel"),
    *("tile", "warps", "stages", "code"),
)
"""Columns that say what is compiled, and with which tile: `code` is ten digits that change with any of it."""


@dataclass(frozen=True)
class Job:
    """Every kernel of one input type, head dim and mask."""

    dtype: str
    dim: int
    mask: str

    @classmethod
    def named(cls, name: str) -> "Job":
        dtype, dim, mask = name.split("-")
        return cls(dtype, int(dim), mask)

    def __str__(self) -> str:
        return f"{self.dtype}-{self.dim}-{self.mask}"


JOBS = {
    90: [
        Job(dtype, dim, mask)
        for mask, types in MASKS.items()
        for dtype, dims in types.items()
        for dim in dims
    ],
    80: [Job("bfloat16", dim, "causal") for dim in MASKS["causal"]["bfloat16"]],
}
"""By architecture, the commonest first; of the older one plain attention alone."""


def options(mask: str, length: int) -> dict[str, Any]:
    """What bears on the logits, for a batch of one and four heads."""
    from lens_kernels.types import AttentionMask

    blocks = -(-length // 64)
    bias = torch.zeros(1, 4, length, length)
    several = {
        "window": 99,
        "key_lengths": [131],
        "key_padding": torch.ones(1, length, dtype=torch.bool),
        "alibi_slopes": torch.ones(4),
        "bias": bias,
        "allowed": bias == 0,
    }
    picked = {
        "window": ("window",),
        "ragged": ("window", "key_lengths"),
        "padding": ("key_padding",),
        "alibi": ("alibi_slopes",),
        "bias": ("bias",),
        "allowed": ("allowed",),
        "everything": tuple(several),
    }
    parts = {name: several[name] for name in picked.get(mask, ())}
    if mask == "prefix":
        parts["prefix"] = 13
    return {
        "mask": AttentionMask(causal=mask != "none", **parts),
        "softcap": 30.0 if mask in ("softcap", "everything") else None,
        "sink_logits": torch.zeros(4) if mask in ("sinks", "everything") else None,
        "block_mask": torch.ones(1, 1, blocks, blocks).bool() if mask == "sparse" else None,
    }


OTHER = "3.6"
"""The version of Triton on GPU machines, where the environment has a newer one."""


def other_triton() -> Path:
    """Where `make test` puts that version."""
    return Path(sys.prefix) / f"triton-{OTHER}"


def start(
    *words: int | str, triton: Path | None = None, complaints: int | None = subprocess.PIPE
) -> subprocess.Popen[str]:
    """This script as a process, for kernels that are compiled and not interpreted.

    Args:
        words: each architecture with its jobs behind it, and options.
        triton: folder of another Triton than the environment's.
        complaints: where they go; None: to those of this process.
    """
    environment = {name: part for name, part in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(triton)] if triton else []
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *(path for path in sys.path if path)])
    command = [sys.executable, __file__, *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=complaints, text=True, env=environment)


def rows(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What it printed, when it is done.

    Raises:
        RuntimeError: with the end of what it complained of.
    """
    out, complaint = process.communicate()
    if process.returncode:
        raise RuntimeError(complaint[-3000:])
    return [json.loads(line) for line in out.splitlines()]


class Stub:
    """Stands in for the GPU driver."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _tool(name: str, *words: str, data: bytes, suffix: str) -> str:
    """What a tool inside Triton's wheel says about a file with that content."""
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    tool = shutil.which(name, path=str(folder)) or name
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        done = subprocess.run([tool, *words, file.name], capture_output=True, text=True)
    return done.stdout + done.stderr


def usage(cubin: bytes) -> dict[str, int]:
    """What a kernel takes.

    Registers of a thread, bytes of stack and local memory; its instructions, the matrix instructions
    (wgmma) among them, and its waits for those.
    """
    said = _tool("cuobjdump", "-res-usage", data=cubin, suffix=".cubin")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    assert found, said
    text = _tool("nvdisasm", "-ndf", "-c", data=cubin, suffix=".cubin")  # without its flow of data
    counts = {
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/", text)),
        "matrix_instructions": text.count("GMMA."),
        "waits": text.count("WARPGROUP.DEPBAR"),
    }
    assert counts["instructions"], text[:300]
    return (
        dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True)) | counts
    )


def complaints(ptx: str, arch: int) -> str:
    """Why the assembler waits for each wgmma before the next: "C7510 ..." and the like, or ""."""
    if "wgmma" not in ptx:
        return ""
    from triton.backends.nvidia.compiler import get_ptxas

    words = (f"--gpu-name=sm_{arch}a", "-o", os.devnull)
    said = _tool(Path(get_ptxas(arch).path).name, *words, data=ptx.encode(), suffix=".ptx")
    lines = re.findall(r"\((C\d+)\) (.*wgmma.* serialized .*)", said)
    assert "fatal" not in said, said
    return "; ".join(f"{code} {text}" for code, text in lines)


@cache
def written(kernel: Any) -> tuple[tuple[str, str], ...]:
    """What a kernel reaches, itself included: functions without comments and docstrings, constants, fields of tuples."""
    from triton.runtime.jit import JITFunction

    found: dict[str, str] = {}
    waiting = {kernel.__name__: kernel}
    while waiting:
        name, value = waiting.popitem()
        if not isinstance(value, JITFunction):
            found[name] = repr(getattr(value, "_fields", value))
            continue
        tree = ast.parse(inspect.getsource(value.fn)).body[0]
        assert isinstance(tree, ast.FunctionDef)
        if ast.get_docstring(tree) is not None:
            del tree.body[0]
        found[name] = ast.unparse(tree)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        known = {name: part for name, part in value.fn.__globals__.items() if name in names}
        waiting |= {
            name: part
            for name, part in known.items()
            if name not in found and not inspect.ismodule(part)
        }
    return tuple(sorted(found.items()))


def main(
    arch: int, names: list[str], listing: bool, kernels: list[str], known: frozenset[str]
) -> None:
    """Compile, or list, the kernels of the jobs for one architecture, each once.

    Args:
        names: of jobs; all where none is named.
        kernels: names of kernels; likewise.
        known: `code` of what is left out.
    """
    assert "TRITON_INTERPRET" not in os.environ
    from lens_kernels import triton_configs, triton_launch
    from triton import knobs
    from triton.runtime import driver

    driver.set_active(Stub(arch))
    triton_launch.capability = triton_configs.capability = lambda device: divmod(arch, 10)
    row: dict[str, Any] = {}
    seen = set(known)

    def passed_over(*, fn: Any, compile: Any, **_: Any) -> bool:
        """Called by Triton with what it would compile; puts the `code` of it into `row` where it is wanted."""
        parts = [compile[name] for name in ("signature", "constants", "configs")]
        parts += [arch, row["config"], written(fn.jit_function)]
        code = hashlib.sha256(repr(parts).encode()).hexdigest()[:10]
        if code in seen or (kernels and row["kernel"] not in kernels):
            return True
        seen.add(code)
        row["code"] = code
        return listing

    def compile_only(kernel, programs, config, *arguments, **constants):
        row.pop("code", None)
        tile = f"{config.rows}x{config.columns}"
        row.update(kernel=kernel.__name__, tile=tile, warps=config.warps, stages=config.stages)
        row["config"] = config
        made = kernel.warmup(
            *arguments,
            **constants,
            grid=(programs,),
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
            maxnreg=config.registers,
        )
        if "code" not in row:
            return
        found = {name: row[name] for name in CHOSEN}
        if not listing:
            ptx = made.asm["ptx"]
            found |= usage(made.asm["cubin"])
            found["shared"] = made.metadata.shared
            products = [name for name in ("wgmma", "mma.sync") if name in ptx]
            found["products"] = products[0] if products else "fma"
            found["serialised"] = complaints(ptx, arch)
            found["triton"] = metadata.version("triton")
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()

    triton_launch.launch = compile_only
    knobs.runtime.jit_cache_hook = passed_over
    for job in map(Job.named, names) if names else JOBS[arch]:
        row |= {"arch": arch, "dtype": job.dtype, "head_dim": job.dim, "mask": job.mask}
        for statistics, launch in launches(job):
            row["statistics"] = statistics
            launch()


def launches(job: Job) -> Iterator[tuple[str, Any]]:
    """The passes of a job, each with a name for its statistics."""
    from lens_kernels import triton_gradients, triton_run
    from lens_kernels.backward import Saved, Upstream
    from lens_kernels.groups import run_by_group
    from lens_kernels.problem import BackendResult
    from lens_kernels.validation import make_problem

    keys = 256 if job.mask in ("causal", "sinks", "apart") else 251
    queries = 1 if job.mask == "decoding" else keys
    value_dim = 128 if job.mask == "narrow" else job.dim
    dtype = getattr(torch, job.dtype)
    query = torch.zeros(1, 4, queries, job.dim, dtype=dtype, requires_grad=True)
    key = torch.zeros(1, 2, keys, job.dim, dtype=dtype)
    value = torch.zeros(1, 2, keys, value_dim, dtype=dtype)
    lse = torch.zeros(1, 4, queries)
    row_labels, labels = torch.zeros(queries, dtype=torch.int64), torch.zeros(keys).long()
    extras = {
        "match": [(row_labels, labels)] * 2,
        "grid": (4, 8, 2),
        "key_weights": torch.ones(1, 2, keys),
    }

    def problem(statistics, **more):
        known = options(job.mask, keys)
        return make_problem(query, key, value, statistics=statistics, **known, **more)

    def backward(statistics):
        saved = Saved(
            problem(statistics),
            lse,
            None,
            frozenset({"query", "key", "value"}),
            torch.zeros(1, 4, queries, value_dim, dtype=dtype),
        )
        triton_gradients.run_gradients(saved, Upstream(torch.zeros_like(saved.output)))

    def state(part):
        return BackendResult(*triton_run.run_rows(part, part.compute_dtype)[:2])

    if job.mask == "groups":
        groups = torch.zeros(1, keys, dtype=torch.int64)
        bare, rows = (problem(names, groups=groups) for names in (("lse",), GROUP_ROWS))
        yield "lse", lambda: run_by_group(bare, state)
        yield "rows", lambda: run_by_group(rows, state)
        return
    apart, groups = None, {}
    if job.mask == "apart":
        apart = torch.zeros(1, dtype=torch.int32)
        groups["groups"] = (torch.arange(keys) > 0).long()[None]
    with torch.no_grad():
        bare, rows = problem(("lse",), **groups), problem(ROWS, **groups)
        every = problem("all", **extras, **groups)
    piece = 128 if job.mask == "decoding" else None
    yield "lse", lambda: triton_run.run_rows(bare, dtype, apart, piece)
    yield "rows", lambda: triton_run.run_rows(rows, dtype, apart, piece)
    yield "all", lambda: triton_run.run_rows(every, dtype, apart, piece)
    if job.mask in ("sinks", "apart"):
        return
    yield "all", lambda: triton_run.run_columns(every, lse)
    yield "all", lambda: triton_run.run_diagonals(every, lse)
    if job.mask not in LEARNT:
        return
    yield "none", lambda: backward(("lse",))
    yield "all", lambda: backward(EXPORTS)  # which bear on one kernel of the three


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--kernels", type=lambda text: text.split(","), default=[])
    parser.add_argument("--known", type=Path, help="JSON list of `code` that is left out")
    parser.add_argument("words", nargs="+", help="ARCH [JOB ...] [ARCH [JOB ...] ...]")
    given = parser.parse_intermixed_args()
    left_out = json.loads(given.known.read_text()) if given.known else []
    jobs_of: dict[int, list[str]] = {}
    for word in given.words:
        if word.isdigit():
            jobs_of[int(word)] = []
        else:
            jobs_of[[*jobs_of][-1]].append(word)
    for arch, names in jobs_of.items():
        main(arch, names, given.list, given.kernels, frozenset(left_out))
