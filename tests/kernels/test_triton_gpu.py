"""The Triton kernels on a CUDA GPU, at the types and sizes that they are made for.

test_triton_interpreter.py runs the same bodies (triton_checks.py) on the CPU at small sizes; every
test of this folder that is parametrised over backends runs the GPU's as well.
"""

import pytest
import torch
from lens_kernels import explain

from tests.kernels import triton_checks as checks
from tests.kernels.helpers import CASES, CUDA, Case, case_problem, check, ids, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="no CUDA GPU: test_triton_interpreter.py stands in"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
REPEATS = 50


@pytest.fixture
def _nan_in_new_memory(monkeypatch):
    from lens_kernels import triton_launch

    monkeypatch.setattr(triton_launch, "_poison", True)


@pytest.mark.usefixtures("_nan_in_new_memory")
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_statistic_under_every_mask(dtype, case):
    """With softcap and learned sinks; in memory that is NaN wherever nothing was written."""
    problem = case_problem(case, "cuda", dtype=dtype, softcap=2.5, sink_logits=_sinks(4))
    checks.check_surrounded(problem)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_with_their_statistics(dtype, case):
    checks.check_gradients(case, "cuda", dtype)


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(dtype, head_dim):
    checks.check_head_dim("cuda", dtype, head_dim, head_dim)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(192, 128), (17, 96), (64, 256)])
def test_value_dims(head_dim, value_dim):
    checks.check_head_dim("cuda", torch.bfloat16, head_dim, value_dim)


@pytest.mark.parametrize("mask", ["window", "padding", "blocks"])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_gradients(dtype, dim, mask):
    checks.check_wide_gradients("cuda", dtype, dim, mask)


@pytest.mark.usefixtures("_nan_in_new_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tiles(dtype):
    """Several tiles of each kernel along both axes, of a length that none divides."""
    problem = checks.full_problem("cuda", 1031, 1307, 64, dtype=dtype, block_size=64)
    limits = checks.LIMITS[dtype], checks.VALUE_LIMITS[dtype]
    check("triton", problem, *limits)
    checks.check_gradients(Case("", 523, 661, lambda h, q, k: checks.CAUSAL), "cuda", dtype)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1), (6, 2)], ids=str)
def test_grouped_heads(heads):
    problem = checks.full_problem("cuda", 257, 389, 64, dtype=torch.bfloat16, heads=heads)
    check("triton", problem, checks.LIMITS[torch.bfloat16], checks.VALUE_LIMITS[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_repeats_give_the_same_bits(head_dim, dtype):
    problem = checks.full_problem(
        "cuda", 1999, 1999, head_dim, dtype=dtype, heads=(16, 4), block_size=64
    )
    checks.check_repeats(problem, REPEATS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_is_linear_at_32k(dtype):
    checks.check_memory("cuda", 32768, 64, 128, dtype)


@pytest.mark.parametrize("queries", [1, 3, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding(dtype, queries):
    checks.check_decoding("cuda", 16411, 2048, queries, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_with_gaps_in_memory(dtype):
    for masked in (False, True):
        checks.check_strided("cuda", dtype, masked)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(dtype):
    checks.check_groups("cuda", 257, 389, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_is_cut(dtype):
    checks.check_one_query_is_cut("cuda", dtype, 16411, 4096)


@pytest.mark.parametrize("name", checks.LONE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_key_beside_all_others(dtype, name):
    checks.check_lone_key("cuda", dtype, name)


@pytest.mark.parametrize("block", [(64, 64), (128, 32), (16, 48)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_mask(dtype, block):
    checks.check_block_mask("cuda", 517, 773, block, dtype)


def test_auto_takes_it_and_says_so():
    inputs = tensors(1, 2, 1, 37, 41, dtype=torch.bfloat16, device="cuda")
    said = explain(*inputs)
    assert (said.chosen, said.why) == ("triton", "the fast one on cuda")
    checks.check_own_backward("cuda")


def _sinks(heads):
    return torch.linspace(-1, 4, heads, device="cuda")
