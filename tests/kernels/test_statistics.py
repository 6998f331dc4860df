"""Every backend against the float64 definition: statistics x masks x options x types x sizes."""

import pytest
import torch
from lens_kernels import attention
from lens_kernels.statistics import STATISTICS
from lens_kernels.types import AttentionMask
from lens_kernels.validation import make_problem

from tests.kernels.helpers import (
    BACKENDS,
    CASES,
    assert_close,
    case_problem,
    check,
    everything,
    ids,
    run_or_skip,
    tensors,
)

FORWARD = sorted(name for name, entry in STATISTICS.items() if not entry.from_backward)
CAUSAL = AttentionMask(causal=True)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_every_statistic_under_every_mask(backend, device, case):
    check(backend, case_problem(case, device))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_every_mask_with_softcap_learned_sink_scale_and_groups(backend, device, case):
    sinks = torch.tensor([0.5, -1.0, 3.0, 120.0], device=device)
    groups = (torch.arange(2 * case.keys, device=device) * 7 % 3).view(2, case.keys)
    check(
        backend,
        case_problem(
            case, device, softcap=2.5, sink_logits=sinks, scale=0.37, groups=groups, heads=4
        ),
    )


@pytest.mark.parametrize("case", CASES[::3], ids=ids(CASES[::3]))
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_block_sparse_runs(backend, device, case):
    generator = torch.Generator().manual_seed(1)
    shape = (2, 4, -(-case.queries // 16), -(-case.keys // 16))
    kept = torch.rand(shape, generator=generator) > 0.5
    kept[0, 1, 0] = False
    check(backend, case_problem(case, device, block_mask=kept.to(device), block_size=16))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_exactness_says_what_a_cut_makes_of_a_number(backend, device):
    """A lower bound is nowhere above the dense number, and "approx" is above here and below there."""
    query, key, value = tensors(2, 4, 2, 37, 41, device=device)
    kept = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(1)).to(device) > 0.4
    options = {"block_size": 8, "backend": backend, **everything(41, 37, 4, device)}
    whole = attention(query, key, value, **options).statistics
    cut = attention(query, key, value, block_mask=kept, **options).statistics
    assert {whole.exactness(name) for name in FORWARD} == {"exact"}
    for name in set(FORWARD) - {"top_keys"}:
        above = (cut[name] > whole[name] + 1e-5).any()
        below = (cut[name] < whole[name] - 1e-5).any()
        assert below, name
        assert cut.exactness(name) == ("approx" if above else "lower_bound"), name
    assert cut.exactness("top_keys") == "approx"


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_masses_of_kept_blocks_are_upper_bounds_and_dropped_ones_are_zero(backend, device):
    """So the whole map is neither, and says "approx"."""
    query, key, value = tensors(1, 2, 1, 37, 41, device=device)
    kept = torch.eye(3, dtype=torch.bool, device=device)[None, None]
    options = {"statistics": ("block_mass", "block_max"), "block_size": 16, "backend": backend}
    whole = attention(query, key, value, **options).statistics
    cut = attention(query, key, value, block_mask=kept, **options).statistics
    for name in options["statistics"]:
        assert bool((cut[name] > whole[name])[kept.expand(1, 2, 3, 3)].all())
        assert bool((cut[name] == 0)[~kept.expand(1, 2, 3, 3)].all())


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_dropped_block_is_not_read(backend, device):
    query, key, value = tensors(1, 2, 1, 48, 64, device=device)
    kept = torch.ones(1, 1, 3, 4, dtype=torch.bool, device=device)
    kept[..., 2] = False
    key[:, :, 32:48] = value[:, :, 32:48] = torch.nan
    problem = make_problem(
        query, key, value, block_mask=kept, block_size=16, statistics=("block_mass", "received")
    )
    result = run_or_skip(backend, problem)
    assert not result.output.isnan().any()
    assert_close(result.tensors["block_mass"].sum(-1), torch.ones(1, 2, 3), 1e-6)
    assert bool((result.tensors["received"][..., 32:48] == 0).all())


@pytest.mark.parametrize("block_size", [(11, 7), (1, 1), 5, 1000], ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_block_sizes(backend, device, block_size):
    check(backend, case_problem(CASES[2], device, block_size=block_size))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (5, 1), (3, 3)])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_grouped_heads(backend, device, heads, kv_heads):
    check(backend, case_problem(CASES[1], device, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(16, 16), (17, 5), (64, 32), (80, 80), (96, 128), (256, 256)]
)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_head_dims(backend, device, head_dim, value_dim):
    query, key, value = tensors(1, 2, 1, 43, 47, head_dim, value_dim, device=device)
    check(backend, make_problem(query, key, value, mask=CAUSAL, statistics="all", block_size=32))


HALF = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_half_precision_inputs(backend, device, dtype):
    """Statistics are of unrounded P: as good as in float32. Values may be met by rounded P."""
    query, key, value = tensors(2, 4, 2, 67, 71, 32, 32, dtype=dtype, device=device)
    problem = make_problem(query, key, value, mask=CAUSAL, statistics="all", block_size=16)
    result = check(backend, problem, 2e-5, HALF[dtype])
    assert result.output.dtype == dtype


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_float64_inputs_keep_their_precision(backend, device):
    query, key, value = tensors(2, 4, 2, 37, 41, dtype=torch.float64, device=device)
    sinks = torch.ones(4, dtype=torch.float64, device=device)
    problem = make_problem(
        query, key, value, mask=CAUSAL, sink_logits=sinks, statistics="all", block_size=16
    )
    check(backend, problem, 1e-13)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_strided_inputs(backend, device):
    """[batch, positions, heads, dim] storage, as models have it, and a broadcast batch."""
    query, key, value = (
        part.transpose(1, 2).contiguous().transpose(1, 2)
        for part in tensors(2, 4, 2, 37, 41, device=device)
    )
    key = key[:1].expand(2, -1, -1, -1)
    check(backend, make_problem(query, key, value, mask=CAUSAL, statistics="all", block_size=16))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_large_logits_neither_overflow_nor_lose_the_row(backend, device):
    query, key, value = tensors(1, 2, 2, 37, 41, device=device)
    problem = make_problem(query * 40, key, value, statistics="all", block_size=16)
    check(backend, problem)


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_each_statistic_alone_equals_itself_among_all(backend, device, name):
    """What else is asked for changes nothing, and nothing comes that was not asked for."""
    case = CASES[5]
    together = run_or_skip(backend, case_problem(case, device)).tensors
    problem = case_problem(case, device, statistics=(name,))
    alone = run_or_skip(backend, problem).tensors
    assert set(alone) == problem.statistics | {"lse"}
    for part in problem.statistics:
        assert_close(alone[part].double(), together[part].double(), 1e-6, part)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_no_statistics_still_gives_the_output(backend, device):
    problem = case_problem(CASES[1], device, statistics=())
    result = check(backend, problem)
    assert set(result.tensors) == {"lse"}


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_many_blocks_and_panels(backend, device):
    """Longer than any tile, so that sums run over several of them."""
    query, key, value = tensors(1, 2, 1, 131, 211, device=device)
    groups = (torch.arange(211, device=device) % 4)[None]
    problem = make_problem(
        query, key, value, mask=CAUSAL, statistics="all", block_size=16, groups=groups
    )
    check(backend, problem)
