"""The Triton kernels in Triton's interpreter, on the CPU, against the float64 definition."""

import os
import subprocess
import sys

import pytest
import torch
from lens_kernels import attention, explain

from tests.kernels import triton_checks as checks
from tests.kernels.helpers import CASES, CUDA, case_problem, check, few, tensors
from tests.tiers import first

triton_run = pytest.importorskip("lens_kernels.triton_run", reason="triton is not installed")
pytestmark = pytest.mark.skipif(CUDA, reason="the kernels run on the GPU here: test_triton_gpu.py")
FLOAT = torch.float32


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch):
    """What a kernel does not write shows."""
    monkeypatch.setattr(triton_run.pack, "_poison", True)


PART_OF_OTHERS = (
    *("causal, cached keys", "window both ways", "empty batch row", "packed prefix", "bias"),
    "allowed, one block",
)
"""Masks for which a kernel goes the way that it goes for another one."""


@pytest.mark.parametrize("case", few(CASES, *PART_OF_OTHERS))
def test_every_statistic_under_every_mask(case):
    """Every second one with softcap, learned sinks and a scale."""
    options = {}
    if CASES.index(case) % 2:
        options = {"softcap": 2.5, "sink_logits": torch.tensor([0.5, 30.0]), "scale": 0.37}
    check("triton", case_problem(case, "cpu", heads=2, kv_heads=1, **options))


@pytest.mark.parametrize("case", few(CASES[::2], *PART_OF_OTHERS, "causal, more queries"))
def test_gradients_with_their_statistics(case):
    """Each program is one head's, so that two show what a mask does; the first and the last have several of keys too."""
    heads = (4, 2) if case in (CASES[0], CASES[-1]) else (2, 1)
    checks.check_gradients(case, "cpu", FLOAT, heads=heads)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [
        (torch.float16, 80, 80),
        pytest.param(torch.float32, 17, 96, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_head_dims(dtype, head_dim, value_dim):
    checks.check_head_dim("cpu", dtype, head_dim, value_dim)


@pytest.mark.parametrize(
    ("dtype", "dim", "mask"),
    [
        (torch.float16, 256, "blocks"),
        pytest.param(torch.float32, 256, "blocks", marks=pytest.mark.exhaustive),
        pytest.param(torch.float32, 128, "window", marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_wide_gradients(dtype, dim, mask):
    checks.check_wide_gradients("cpu", dtype, dim, mask)


def test_the_backward_pass_is_its_own():
    checks.check_own_backward("cpu")


@pytest.mark.parametrize("case", few(CASES[1:20:9], "more queries than keys in a row"))
def test_nothing_beside_the_inputs_is_read(case):
    checks.check_surrounded(case_problem(case, "cpu"))


def test_tiles_that_a_gpu_loads_itself(monkeypatch):
    """By descriptors, of nothing beside the inputs; and only where it can."""
    problem = checks.full_problem("cpu", 21, 37, dtype=torch.float16)
    made = []
    descriptor = triton_run.pack.descriptor
    monkeypatch.setattr(
        triton_run.pack, "descriptor", lambda *given: made.append(descriptor(*given)) or made[-1]
    )
    checks.check_surrounded(problem)
    assert len(made) == 3
    assert None not in made
    key = torch.zeros(2, 3, 37, 40, dtype=torch.float16)
    cannot = {
        "32 bits": key.float(),
        "rows that start between": torch.zeros(2, 3, 37, 36, dtype=torch.float16),
        "rows that are repeated": key[:, :1].expand(-1, 3, -1, -1),
        "memory that starts between": key[..., 1:],
        "columns apart": key[..., ::2],
    }
    assert [name for name, part in cannot.items() if descriptor(part, 16) is not None] == []
    monkeypatch.setattr(triton_run.pack, "capability", lambda device: (8, 0))
    assert descriptor(key, 16) is None


def test_groups():
    checks.check_groups("cpu", 37, 53, FLOAT)


def test_one_query_is_cut():
    checks.check_one_query_is_cut("cpu", FLOAT, 77, 32)


@pytest.mark.parametrize(
    "name", first(checks.LONE, "left padding", "two loops, no mask", "another key")
)
def test_a_key_beside_all_others(name):
    checks.check_lone_key("cpu", torch.float16, name)


@pytest.mark.parametrize("block", first([(16, 32), (11, 7)], (16, 32)), ids=str)
def test_block_mask(block):
    checks.check_block_mask("cpu", 23, 29, block, FLOAT)


@pytest.mark.parametrize("queries", first([1, 3], 1))
def test_decoding(queries):
    checks.check_decoding("cpu", 67, 32, queries, FLOAT)


@pytest.mark.parametrize("masked", first([True, False], True))
def test_tensors_with_gaps_in_memory(masked):
    checks.check_strided("cpu", FLOAT, masked)


def test_two_runs_give_the_same_bits():
    checks.check_repeats(checks.full_problem("cpu", 23, 29), 2)


def test_memory_is_linear():
    checks.check_memory("cpu", 320, 64, 16, torch.float16)


def test_bfloat16_is_refused():
    """The interpreter would return wrong numbers for it."""
    inputs = tensors(1, 2, 1, 7, 11, dtype=torch.bfloat16)
    reason = "Triton's interpreter computes bfloat16 wrongly without saying so"
    assert explain(*inputs).obstacles["triton"] == reason
    with pytest.raises(ValueError, match=f"backend 'triton' cannot do this: {reason}; use"):
        attention(*inputs, backend="triton")


def test_float64_and_wide_heads_are_refused():
    wide = tensors(1, 1, 1, 3, 5, 264, 16)
    with pytest.raises(ValueError, match="head_dim 264 and value_dim 16 must be at most 256"):
        attention(*wide, backend="triton")
    double = tensors(1, 1, 1, 3, 5, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"it computes in float32, and the inputs are torch.float64"
    ):
        attention(*double, backend="triton")


def test_auto_does_not_take_the_interpreter():
    said = explain(*tensors(1, 2, 1, 7, 11))
    assert said.chosen != "triton"
    assert "not triton: it could, but is not asked for" in str(said)


def test_without_the_interpreter_the_cpu_is_refused():
    """In a process of its own: the variable is read when the kernels are loaded."""
    lines = [
        "import os, torch",
        "from lens_kernels import explain",
        "part = torch.zeros(1, 1, 3, 16)",
        "print(explain(part, part, part).obstacles['triton'])",
        "import lens_kernels.triton_forward; os.environ['TRITON_INTERPRET'] = '1'",
        "print(explain(part, part, part).obstacles['triton'])",
    ]
    environment = {name: part for name, part in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=environment
    )
    assert found.stdout.splitlines() == [
        "the tensors are on cpu, not on a CUDA GPU",
        "TRITON_INTERPRET was set after triton's kernels were loaded; set it before",
    ], found.stderr
