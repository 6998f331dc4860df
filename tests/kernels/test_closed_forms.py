"""Numbers known without any attention code: uniform attention, planted sinks, invariants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lens_kernels import AttentionMask
from lens_kernels.validation import make_problem

from tests.kernels.helpers import BACKENDS, assert_close, check, run_or_skip, tensors

CAUSAL = AttentionMask(causal=True)


def uniform(backend, device, count, statistics, **options):
    """Causal attention with equal logits over `count` tokens: row i (from 1) is 1/i on i keys."""
    zeros = torch.zeros(1, 1, count, 16, device=device)
    problem = make_problem(zeros, zeros, zeros, mask=CAUSAL, statistics=statistics, **options)
    return run_or_skip(backend, problem).tensors


def harmonic(count):
    """[count + 1], H_0 .. H_count."""
    terms = 1 / torch.arange(1, count + 1, dtype=torch.float64)
    return torch.cat((torch.zeros(1, dtype=torch.float64), terms.cumsum(0)))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_uniform_causal_rows(backend, device):
    rows = torch.arange(1, 98, dtype=torch.float64)
    names = ("lse", "max_logit", "entropy", "concentration", "distance", "prefix_mass", "moments")
    got = uniform(backend, device, 97, names)
    expected = {
        "lse": rows.log(),
        "max_logit": torch.zeros(97),
        "entropy": rows.log(),
        "concentration": 1 / rows,
        "distance": (rows - 1) / 2,
        "prefix_mass": (4 / rows).clamp(max=1),
        "moments": torch.stack(((rows - 1) / 2, (rows - 1) * (2 * rows - 1) / 6), dim=-1),
    }
    for name in names:
        assert_close(got[name][0, 0], expected[name], 1e-6, name)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_rows_on_one_key(backend, device):
    """Row i looks at key i - 7 (or the first) alone: no entropy, one key, and the distance itself."""
    keys = torch.eye(31, 32, device=device)
    at = (torch.arange(31) - 7).clamp(min=0)
    names = ("max_logit", "entropy", "concentration", "distance", "moments")
    problem = make_problem(
        200 * keys[at][None, None], keys[None, None], keys[None, None], mask=CAUSAL, scale=1.0, statistics=names,
    )  # fmt: skip
    got = run_or_skip(backend, problem).tensors
    expected = {
        "max_logit": torch.full((31,), 200.0),
        "entropy": torch.zeros(31),
        "concentration": torch.ones(31),
        "distance": torch.arange(31) - at,
        "moments": torch.stack((at, at**2), dim=-1),
    }
    for name in names:
        assert torch.allclose(got[name][0, 0].cpu().double(), expected[name].double(), atol=1e-5), (
            name
        )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_uniform_causal_columns(backend, device):
    """received_j = H_N - H_{j-1}; distance d holds H_N - H_d."""
    got = uniform(backend, device, 97, ("received", "diagonal"))
    H = harmonic(97)
    assert_close(got["received"][0, 0], H[97] - H[:97], 1e-6)
    assert_close(got["diagonal"][0, 0], H[97] - H[:97], 1e-6)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_uniform_sink_scores_are_those_of_gu_et_al(backend, device):
    """alpha_k = (H_T - H_{k-1}) / (T - k + 1), arXiv 2410.10781; T = 64."""
    received = uniform(backend, device, 64, ("received",))["received"][0, 0].cpu().double()
    alpha = received / torch.arange(64, 0, -1)
    anchors = {1: 0.0741233, 2: 0.0594268, 32: 0.0217165, 64: 1 / 64}
    for key, value in anchors.items():
        assert float(alpha[key - 1]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_uniform_causal_blocks(backend, device):
    got = uniform(
        backend, device, 80, ("block_mass", "block_max", "block_max_logit"), block_size=16
    )
    rows = torch.arange(1, 81, dtype=torch.float64)
    P = (1 / rows)[:, None] * (torch.arange(80) < rows[:, None])
    blocks = P.view(5, 16, 5, 16)
    assert_close(got["block_mass"][0, 0], blocks.sum(3).mean(1), 1e-6)
    assert_close(got["block_max"][0, 0], blocks.amax((1, 3)), 1e-6)
    visible = torch.ones(5, 5).tril() > 0
    logit = torch.where(visible, 0.0, -torch.inf)
    assert torch.equal(got["block_max_logit"][0, 0].cpu(), logit)


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.999])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_planted_sink_is_recovered(backend, device, mass):
    """Key 0 holds `mass` of every row; the rest is uniform over 63 keys."""
    logit = math.log(mass / (1 - mass) * 63)
    zeros = torch.zeros(1, 1, 48, 16, device=device)
    key = torch.zeros(1, 1, 64, 16, device=device)
    bias = torch.zeros(64, device=device)
    bias[0] = logit
    names = ("entropy", "received", "prefix_mass", "concentration", "top_keys", "block_max")
    mask = AttentionMask(bias=bias)
    problem = make_problem(
        zeros, key, key, mask=mask, statistics=names, prefix=1, top_k=1, block_size=16
    )
    got = run_or_skip(backend, problem).tensors
    rest = (1 - mass) / 63
    entropy = -mass * math.log(mass) - 63 * rest * math.log(rest)
    for name, value in {
        "entropy": entropy,
        "prefix_mass": mass,
        "concentration": mass**2 + 63 * rest**2,
    }.items():
        # 1 + 63 small terms is summed in float32: at 0.999 the entropy of 0.012 feels it
        limit = 1e-4 if name == "entropy" else 1e-5
        assert_close(got[name], torch.full((1, 1, 48), value, dtype=torch.float64), limit, name)
    assert_close(got["received"][0, 0, :1], torch.tensor([48 * mass]), 1e-5)
    assert bool((got["top_keys"] == 0).all())
    assert_close(got["top_mass"][..., 0], torch.full((1, 1, 3), mass + 15 * rest), 1e-5)
    assert_close(got["block_max"][..., 0], torch.full((1, 1, 3), mass), 1e-5)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_learned_sink_of_zero_is_softmax_off_by_one(backend, device):
    """sigma(LSE - sink) scales the output; the mass that is left is the row sum of P."""
    query, key, value = tensors(1, 2, 1, 37, 41, device=device)
    sinks = torch.tensor([0.0, 2.0], device=device)
    plain = check(backend, make_problem(query, key, value, statistics=("received", "entropy")))
    sunk = check(
        backend,
        make_problem(query, key, value, sink_logits=sinks, statistics=("received", "block_mass")),
    )
    gate = torch.sigmoid(plain.tensors["lse"] - sinks[:, None])
    assert_close(sunk.output, plain.output * gate[..., None], 1e-5)
    assert_close(sunk.tensors["block_mass"].sum((2, 3)), gate.mean(-1), 1e-5)
    assert_close(sunk.tensors["received"].sum(-1), gate.sum(-1), 1e-5)


def test_image_grid_moments_of_uniform_attention():
    """A 3 x 5 image after a class key: the mean of x is 2 and that of y is 1."""
    zeros = torch.zeros(1, 1, 16, 16)
    problem = make_problem(zeros, zeros, zeros, grid=(3, 5, 1), statistics=("grid_moments",))
    got = run_or_skip("torch", problem).tensors["grid_moments"][0, 0, 0]
    share = 15 / 16
    expected = torch.tensor([2 * share, 1 * share, 6 * share, 5 / 3 * share, share])
    assert_close(got, expected, 1e-6)


SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 45)
FAST = [pytest.param("torch", id="torch"), pytest.param("cpu", id="cpu")]
PROFILE = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("backend", FAST)
@PROFILE
@given(
    seed=SEEDS,
    queries=SIZES,
    keys=SIZES,
    blocks=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 20),
    sink=st.booleans(),
    share=st.integers(1, 3),
)
def test_any_shape_equals_the_definition(
    backend, seed, queries, keys, blocks, causal, window, sink, share
):
    query, key, value = tensors(1, 2 * share, 2, queries, keys, 7, 3, seed=seed)
    problem = make_problem(
        query,
        key,
        value,
        mask=AttentionMask(causal=causal, window=window),
        sink_logits=torch.linspace(-1, 1, 2 * share) if sink else None,
        statistics="all",
        block_size=blocks,
    )
    result = check(backend, problem, 2e-5)
    row_mass = torch.exp(torch.logsumexp(result.tensors["block_mass"].log(), -1))
    assert bool((row_mass <= 1 + 1e-5).all())
    total = result.tensors["received"].sum(-1)
    assert_close(result.tensors["diagonal"].sum(-1), total, 1e-5)
    seen = (result.tensors["lse"] > -torch.inf).sum(-1)
    if not sink:
        assert_close(total, seen, 1e-5)


@pytest.mark.parametrize("backend", FAST)
@PROFILE
@given(seed=SEEDS, queries=SIZES, keys=SIZES, shift=st.floats(-30, 30))
def test_order_of_keys_and_a_shift_of_logits_change_nothing_else(
    backend, seed, queries, keys, shift
):
    query, key, value = tensors(1, 2, 1, queries, keys, seed=seed)
    names = ("entropy", "concentration", "received", "max_logit")
    plain = run_or_skip(backend, make_problem(query, key, value, statistics=names))
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(seed))
    moved = run_or_skip(
        backend,
        make_problem(
            query,
            key[:, :, order],
            value[:, :, order],
            mask=AttentionMask(bias=torch.full((1, 1, 1, keys), shift)),
            statistics=names,
        ),
    )
    limit = 1e-4
    assert_close(moved.output, plain.output, limit)
    assert_close(moved.tensors["received"], plain.tensors["received"][..., order], limit)
    assert_close(moved.tensors["concentration"], plain.tensors["concentration"], limit)
    for name in ("lse", "max_logit"):
        error = moved.tensors[name] - plain.tensors[name] - shift
        assert float(error.abs().max()) < 2e-5
