"""NaN and infinities mean the same in every backend: what sees them is NaN, and nothing else."""

import pytest
import torch
from lens_kernels import AttentionMask, attention, decode, explain
from lens_kernels.normalisers import Sigmoid
from lens_kernels.weighted import weighted_attention

from tests.kernels.helpers import CASES, everything, few, tensors
from tests.tiers import first

BACKENDS = ("reference", "torch", "cpu", "triton")
IN_THE_INTERPRETER = ("one query", "bias of -inf")


def close(found, wanted, name="output"):
    torch.testing.assert_close(
        found,
        wanted,
        rtol=1e-4,
        atol=2e-5,
        check_dtype=False,
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


def poisoned(queries: int, keys: int, dims: tuple[int, int]):
    """q, k and v with a NaN, an infinity or both in each; and with zeros in their places."""
    clean = tensors(2, 4, 2, queries, keys, *dims)
    broken = [part.clone() for part in clean]
    broken[0][0, 1, queries // 3, 2] = torch.nan
    broken[1][0, 0, keys // 2, 3] = torch.inf
    broken[1][1, 1, keys - 2] = torch.nan
    broken[2][1, 0, 2, 5] = -torch.inf
    broken[2][0, 1, keys // 4, 1] = torch.nan
    return broken


def expected(inputs, mask):
    """Pairs with a NaN logit, pairs that are seen, and the inputs with zeros there, all N x N."""
    query, key, value = inputs
    bad_query, bad_key = ~query.isfinite().all(-1), ~key.isfinite().all(-1)
    zero = [
        query.masked_fill(bad_query[..., None], 0),
        key.masked_fill(bad_key[..., None], 0),
        value.masked_fill(~value.isfinite(), 0),
    ]
    flat = [torch.zeros_like(part) for part in zero[:2]]
    one_hot = torch.eye(key.shape[2]).expand(2, 2, -1, -1)
    seen = attention(*flat, one_hot, mask=mask, backend="reference").output > 0
    wrong = bad_query[..., None] | bad_key.repeat_interleave(2, 1)[:, :, None]
    return seen & wrong, seen, zero


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", few(CASES))
def test_rows_that_see_them_are_nan_and_no_others(backend, case):
    if backend == "triton" and case.name not in IN_THE_INTERPRETER:
        pytest.skip("slow in the interpreter")
    queries, keys = case.queries, case.keys
    broken = poisoned(queries, keys, (16, 24))
    mask = case.mask(4, queries, keys)
    if mask is not None and mask.alibi_slopes is not None:
        pytest.skip("slopes only move finite logits")
    obstacle = explain(*broken, mask=mask).obstacles[backend]
    if obstacle is not None:
        pytest.skip(obstacle)
    wrong, seen, zero = expected(broken, mask)
    options = {"mask": mask, "block_size": (16, 32), **everything(keys, queries, 4, "cpu")}
    found = attention(*broken, backend=backend, **options)
    plain = attention(*zero, backend="reference", **options)
    rows = wrong.any(-1)
    touched = seen & rows[..., None]
    assert torch.equal(found.statistics.lse.isnan(), rows)
    assert torch.equal(found.statistics.entropy.isnan(), rows)
    assert torch.equal(found.statistics.match_mass.isnan(), rows[..., None].expand(-1, -1, -1, 3))
    assert torch.equal(found.statistics.received.isnan(), touched.any(2))
    value = (~broken[2].isfinite()).repeat_interleave(2, 1).float()
    output = (seen.float() @ value > 0) | rows[..., None]
    assert torch.equal(found.output.isnan(), output)
    assert torch.equal(found.statistics.value_norm.isnan(), output.any(-1))
    blocks = torch.nn.functional.pad(touched, (0, -keys % 32, 0, -queries % 16))
    blocks = blocks.unflatten(3, (-1, 32)).unflatten(2, (-1, 16)).any(5).any(3)
    for name in ("block_mass", "block_max", "block_max_logit", "block_weighted"):
        assert torch.equal(found.statistics[name].isnan(), blocks), name
    for name in found.statistics:
        one, other = found.statistics[name], plain.statistics[name]
        if name == "top_keys":
            assert torch.equal(one, other) or backend != "reference"
            continue
        finite = ~one.isnan()
        close(one[finite], other[finite], name)


@pytest.mark.parametrize("backend", BACKENDS[:3])
@pytest.mark.parametrize("what", ["allowed", "bias", "block_mask", "window", "key_padding"])
@pytest.mark.parametrize("fill", first([torch.inf, torch.nan], torch.inf), ids=str)
def test_what_no_query_sees_leaves_no_trace(backend, what, fill):
    query, key, value = tensors(2, 4, 2, 5, 20)
    seen = torch.ones(5, 20, dtype=torch.bool)
    seen[:, :4] = False
    blocks = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    blocks[..., 0] = False
    mask = {
        "allowed": AttentionMask(allowed=seen),
        "bias": AttentionMask(bias=torch.zeros(5, 20).masked_fill(~seen, -torch.inf)),
        "block_mask": None,
        "window": AttentionMask(causal=True, window=12),
        "key_padding": AttentionMask(key_padding=seen[:2]),
    }[what]
    more = {"block_mask": blocks} if what == "block_mask" else {}
    options = {"mask": mask, "block_size": 4, **everything(20, 5, 4, "cpu"), **more}
    plain = attention(query, key, value, backend=backend, **options)
    broken = [key.clone(), value.clone()]
    for part in broken:
        part[:, :, :4] = fill
    for result in (
        attention(query, *broken, backend=backend, **options),
        decode(query, *broken, backend=backend, piece=8, **options),
    ):
        close(result.output, plain.output)
        for name in result.statistics:
            if name != "top_keys":
                close(result.statistics[name], plain.statistics[name], name)


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_group_states_and_pieces_are_nan_where_they_see_them(backend):
    query, key, value = tensors(2, 4, 2, 5, 20)
    key[0, 0, 7] = torch.nan
    value[1, 1, 9, 3] = torch.inf
    groups = (torch.arange(40) % 2).view(2, 20)
    options = {"groups": groups, "statistics": ("lse", "entropy"), "block_size": 4}
    for result in (
        attention(query, key, value, backend=backend, **options),
        decode(query, key, value, backend=backend, piece=8, **options),
    ):
        assert result.groups is not None
        lse = result.groups.lse.isnan()
        assert not lse[0].any()
        assert lse[1, 0, :2].all()
        assert lse[1].sum() == 10
        output = result.groups.output.isnan()
        assert not output[0].any()
        assert output[1, 1, 2:, :, 3].all()
        assert output[1].sum() == 10 * 16 + 10
        assert torch.equal(result.groups.statistics["entropy"].isnan(), lse)
        assert torch.equal(result.statistics.lse.isnan(), lse[1])


def test_a_bias_is_nan_for_its_own_pair():
    query, key, value = tensors(1, 2, 1, 5, 7)
    bias = torch.zeros(5, 7)
    bias[2, 3] = torch.nan
    bias[4, 1] = torch.inf
    for backend in BACKENDS[:3]:
        result = attention(query, key, value, mask=AttentionMask(bias=bias), backend=backend)
        assert result.statistics.lse.isnan()[0, 0].tolist() == [False, False, True, False, True]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (5, 7), (1, 600)], ids=str)
def test_an_infinity_whose_logits_are_those_of_a_hidden_key(backend, queries, keys):
    """Where every query is positive, -inf in a key makes each of its logits -inf, and no output is not finite."""
    query, key, value = tensors(1, 2, 1, queries, keys)
    key[0, 0, 3, 2] = -torch.inf
    options = {"mask": AttentionMask(causal=True), "block_size": 4, "statistics": "all"}
    inputs = (query.abs(), key, value)
    obstacle = explain(*inputs, **options).obstacles[backend]
    if obstacle is not None:
        pytest.skip(obstacle)
    found = attention(*inputs, backend=backend, **options)
    seen = torch.arange(queries) + keys - queries >= 3
    for rows in (found.statistics.lse.isnan(), found.output.isnan().all(-1)):
        assert torch.equal(rows, seen.expand(1, 2, -1))
    assert found.statistics.received[0, 0, 3].isnan()


def test_an_infinity_that_saturates_a_sigmoid():
    query, key, value = tensors(1, 2, 1, 5, 7)
    key[0, 0, 3, 2] = torch.inf
    for backend in ("auto", "torch", "reference"):
        found = weighted_attention(query.abs(), key, value, Sigmoid(), backend=backend)
        assert found.output.isnan().all()


def test_finite_numbers_may_overflow():
    """A product of finite numbers beyond the type is as large as a number gets: its key is hidden or alone."""
    query, key, value = tensors(1, 2, 1, 3, 7)
    query, key = query.abs() * 1e20, key.abs()
    key[0, 0, 3] *= -1e20
    for backend in BACKENDS[:3]:
        found = attention(query, key, value, statistics=("lse", "received"), backend=backend)
        assert found.output.isfinite().all()
        assert (found.statistics.received[..., 3] == 0).all()


def test_sinks_and_weights_are_refused():
    query, key, value = tensors(1, 2, 1, 5, 7)
    with pytest.raises(ValueError, match="sink_logits must hold no NaN and no"):
        attention(query, key, value, sink_logits=torch.tensor([0.0, torch.inf]))
    weights = torch.ones(1, 2, 7)
    weights[0, 0, 3] = torch.nan
    with pytest.raises(ValueError, match="key_weights must be finite"):
        attention(query, key, value, key_weights=weights)


def test_rows_are_looked_at_in_portions(monkeypatch):
    broken = poisoned(29, 53, (16, 16))
    options = {"statistics": ("lse", "received", "diagonal", "block_mass"), "block_size": 8}
    whole = attention(*broken, mask=AttentionMask(causal=True), **options)
    monkeypatch.setattr("lens_kernels.nonfinite.CELLS", 3 * 2 * 4 * 53)
    parts = attention(*broken, mask=AttentionMask(causal=True), **options)
    for name in options["statistics"]:
        close(parts.statistics[name], whole.statistics[name])
