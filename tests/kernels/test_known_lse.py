"""`masses_from_lse`: with the row's own LSE the statistics of `attention`, with an old one the error it says."""

import pytest
import torch
from lens_kernels import attention, masses_from_lse, reference
from lens_kernels.validation import make_problem

from tests.kernels.helpers import CASES, assert_close, ids, tensors, to_device

NAMES = ("received", "diagonal", "block_mass", "block_max", "match_mass", "top_mass")


def _inputs(case, seed=0):
    query, key, value = tensors(2, 4, 2, case.queries, case.keys, 16, 24, seed=seed)
    mask = to_device(case.mask(4, case.queries, case.keys), "cpu")
    row, column = torch.arange(case.queries) % 5, torch.arange(case.keys) % 5
    return (
        query,
        key,
        value,
        {"mask": mask, "match": [(row, column)], "block_size": (16, 8), "top_k": 3},
    )


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_the_own_lse_gives_the_own_statistics(case, backend):
    query, key, value, options = _inputs(case)
    if case.keys < 17:
        options["top_k"] = 1
    expected = attention(
        query, key, value, statistics=("lse", *NAMES), backend="reference", **options
    )
    found = masses_from_lse(
        query, key, expected.statistics.lse, statistics=NAMES, backend=backend, **options
    )
    for name in NAMES:
        assert_close(found.statistics[name], expected.statistics[name], 2e-5, name)
    assert float(found.drift.abs().max()) < 5e-6
    seen = ~found.lowest.isinf()
    assert torch.allclose(found.lowest[seen], torch.ones(()), atol=1e-5)
    assert torch.allclose(found.highest[seen], torch.ones(()), atol=1e-5)


def test_an_old_lse_makes_the_error_that_it_says():
    """Against the definition, in float64; the true block masses lie within the bounds."""
    case = next(case for case in CASES if case.name == "causal")
    query, key, value, options = _inputs(case)
    old = attention(query, key, value, statistics=("lse",), **options).statistics.lse
    moved = query + 0.2 * torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
    found = masses_from_lse(moved, key, old, statistics=("block_mass", "received"), **options)
    problem = make_problem(moved, key, value, **options)
    scores = reference.logits(problem)
    unnormalised = torch.exp(scores - old.double()[..., None])
    assert_close(found.statistics.received, unnormalised.sum(-2), 1e-5)
    true = attention(
        moved, key, value, statistics=("lse", "block_mass"), backend="reference", **options
    )
    drift = true.statistics.lse - old
    assert float(drift.abs().max()) > 0.1
    assert_close(found.drift, drift, 1e-5)
    low = found.statistics.block_mass / found.highest[..., None]
    high = found.statistics.block_mass / found.lowest[..., None]
    mass = true.statistics.block_mass
    assert bool((mass >= low * (1 - 1e-5)).all())
    assert bool((mass <= high * (1 + 1e-5)).all())
    assert float((high / low.clamp(min=1e-30)).max()) > 1.2  # the bounds say something


def test_learned_sinks_are_in_the_lse_and_softcaps_apply():
    case = next(case for case in CASES if case.name == "window")
    query, key, value, options = _inputs(case)
    options["softcap"] = 1.5
    sinks = torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = attention(
        query, key, value, statistics=("lse", "received"), sink_logits=sinks, **options
    )
    found = masses_from_lse(
        query, key, expected.statistics.lse, statistics=("received",), **options
    )
    assert_close(found.statistics.received, expected.statistics.received, 1e-5)


def test_a_row_that_is_far_off_keeps_its_digits():
    case = next(case for case in CASES if case.name == "causal")
    query, key, value, options = _inputs(case)
    lse = attention(query, key, value, statistics=("lse",), **options).statistics.lse
    for shift in (-6.0, 6.0):
        found = masses_from_lse(query, key, lse + shift, statistics=("block_mass",), **options)
        assert torch.allclose(found.drift, torch.full((), -shift), atol=1e-5)


def test_what_is_refused():
    case = next(case for case in CASES if case.name == "causal")
    query, key, _, options = _inputs(case)
    with pytest.raises(
        ValueError, match="entropy cannot be had from a known LSE; it gives block_mass"
    ):
        masses_from_lse(query, key, query[..., 0], statistics=("entropy",), **options)
    with pytest.raises(ValueError, match=r"lse must be floating point \[batch, heads, queries\]"):
        masses_from_lse(query, key, query[..., :1], **options)
    broken = query[..., 0].clone()
    broken[0, 1, 20] = torch.nan
    found = masses_from_lse(query, key, broken, **options)
    rows = found.drift.isnan()
    assert rows.nonzero().tolist() == [[0, 1, 20]]
    assert found.statistics.block_mass.isnan().any(-1).nonzero().tolist() == [[0, 1, 1]]
