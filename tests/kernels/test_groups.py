"""Key groups: one state per group in one pass, alike on every backend and by gathering."""

import dataclasses

import pytest
import torch
from lens_kernels import AttentionMask, attention, decode, explain, merge, reference
from lens_kernels.groups import run_by_group
from lens_kernels.validation import make_problem

from tests.kernels.helpers import (
    BACKENDS,
    CASES,
    assert_close,
    case_problem,
    check,
    compare,
    few,
    ids,
    run_or_skip,
    tensors,
)

ROWS = ("max_logit", "entropy", "concentration", "distance")
CAUSAL = AttentionMask(causal=True)


def scattered(batch: int, keys: int, count: int = 3) -> torch.Tensor:
    """Group of each key, scattered, and different in each batch row."""
    return (torch.arange(batch * keys) * 7 % 11 % count).view(batch, keys)


def alone(problem, group):
    """The definition: attention with all keys of other groups hidden, by the boolean mask."""
    member = (problem.groups == group)[:, None, None]
    plan = problem.plan
    allowed = member if plan.allowed is None else member & plan.allowed
    plan = dataclasses.replace(plan, allowed=allowed)
    hidden = dataclasses.replace(
        problem, plan=plan, sink_logits=None, groups=None, group_count=0, differentiable=frozenset()
    )
    return reference.run(hidden)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_a_group_is_attention_with_the_other_keys_hidden(case):
    groups = scattered(2, case.keys)
    problem = case_problem(case, "cpu", groups=groups, statistics=ROWS, sink_logits=torch.ones(4))
    states = reference.run(problem).groups
    assert states is not None
    assert set(states.statistics) == set(ROWS)
    for group in range(3):
        expected = alone(problem, group)
        assert_close(states.output[group], expected.output, 1e-13)
        for name in ("lse", *ROWS):
            got = states.lse if name == "lse" else states.statistics[name]
            assert_close(got[group], expected.tensors[name], 1e-12, name)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 3.0, 40.0])], ids=["", "sinks"])
@pytest.mark.parametrize("case", CASES[::2], ids=ids(CASES[::2]))
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_merged_groups_are_the_whole(backend, device, case, sinks):
    groups = scattered(2, case.keys, 4).to(device)
    sinks = None if sinks is None else sinks.to(device)
    problem = case_problem(case, device, groups=groups, statistics=ROWS, sink_logits=sinks)
    result = run_or_skip(backend, problem)
    assert result.groups is not None
    whole = merge(*result.groups.states, sink_logits=sinks)
    assert_close(whole.output, result.output, 1e-6)
    assert_close(whole.lse, result.tensors["lse"], 1e-6)
    for name in ROWS:
        assert_close(whole.statistics[name], result.tensors[name], 1e-5, name)


@pytest.mark.parametrize("more", [(), ("block_mass", "received", "prefix_mass")], ids=str)
@pytest.mark.parametrize("case", few(CASES))
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_gathering_gives_what_one_pass_gives(backend, case, more):
    sinks = torch.tensor([0.5, -1.0, 3.0, 40.0])
    problem = case_problem(
        case,
        "cpu",
        groups=scattered(2, case.keys),
        sink_logits=sinks,
        softcap=2.5,
        statistics=(*ROWS, *more),
    )
    result = run_by_group(problem, lambda part: run_or_skip(backend, part))
    compare(problem, result, reference.run(problem), 1e-5)


def test_gathering_reads_each_key_once():
    """Three groups together multiply as many keys as there are, filled up by batch row."""
    query, key, value = tensors(2, 4, 2, 37, 53)
    groups = torch.zeros(2, 53, dtype=torch.int64)
    groups[:, 5:11] = 1
    groups[:, 17:41] = 2
    seen = []

    def spy(problem):
        seen.append(problem.keys)
        return run_or_skip("torch", problem)

    run_by_group(make_problem(query, key, value, groups=groups, mask=CAUSAL), spy)
    assert seen == [53 - 6 - 24, 6, 24]


@pytest.mark.parametrize("kind", ["alibi", "block_mask"])
def test_keys_stay_in_place_where_the_mask_needs_it(kind):
    query, key, value = tensors(2, 4, 2, 37, 53)
    options = {
        "alibi": {"mask": AttentionMask(alibi_slopes=torch.tensor([0.5, 0.25, 1.0, 2.0]))},
        "block_mask": {
            "mask": CAUSAL,
            "block_mask": torch.eye(4, dtype=torch.bool)[None, None, :3],
        },
    }[kind]
    problem = make_problem(
        query, key, value, groups=scattered(2, 53), statistics=ROWS, block_size=16, **options
    )
    widths = []

    def spy(part):
        widths.append(part.keys)
        return run_or_skip("torch", part)

    compare(problem, run_by_group(problem, spy), reference.run(problem), 1e-5)
    assert widths == [53, 53, 53]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_group_without_keys_is_the_neutral_element(backend, device):
    query, key, value = tensors(2, 4, 2, 37, 41, device=device)
    groups = torch.where(torch.arange(41) % 5 == 0, 2, 0).expand(2, -1).clone()
    groups[1] = 2
    problem = make_problem(
        query, key, value, mask=CAUSAL, groups=groups.to(device), statistics=ROWS, block_size=16
    )
    states = check(backend, problem).groups
    assert states is not None
    assert bool((states.lse[1] == -torch.inf).all())
    assert bool((states.output[1] == 0).all())
    assert bool((states.lse[0, 1] == -torch.inf).all())
    assert all(bool((states.statistics[name][1] == 0).all()) for name in ROWS[1:])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_group_of_tiny_mass_keeps_its_digits(backend, device):
    """The rest of a row beside a sink that holds all but 1e-20 of it."""
    query, key, value = tensors(1, 2, 1, 37, 41, device=device)
    query[..., 0], key[..., 0] = 4, 0
    key[:, :, 3, 0] = 46
    groups = torch.ones(1, 41, dtype=torch.int64, device=device)
    groups[:, 3] = 0
    problem = make_problem(query, key, value, groups=groups, statistics=ROWS)
    result, expected = run_or_skip(backend, problem), reference.run(problem)
    assert result.groups is not None
    assert expected.groups is not None
    mass = torch.exp(expected.groups.lse[1] - expected.tensors["lse"])
    assert 0 < float(mass.max()) < 1e-12
    assert_close(result.groups.output, expected.groups.output, 1e-6)
    for name in ROWS:
        statistic = result.groups.statistics[name]
        assert_close(statistic, expected.groups.statistics[name], 1e-6, name)


def test_only_what_was_asked_for_comes_with_a_group():
    query, key, value = tensors(2, 4, 2, 37, 41)
    result = attention(
        query, key, value, groups=scattered(2, 41), statistics=("entropy", "received")
    )
    assert result.groups is not None
    assert set(result.groups.statistics) == {"entropy"}
    assert [set(state.statistics) for state in result.groups.states] == [{"entropy"}] * 3


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_groups_without_outputs_are_the_same_groups(backend, device):
    query, key, value = (part.to(device) for part in tensors(2, 4, 2, 37, 41))
    query[0, 1, 5, 0] = torch.nan
    options = {"groups": scattered(2, 41).to(device), "statistics": ROWS, "backend": backend}
    one, other = (
        attention(query, key, value, group_outputs=outputs, **options) for outputs in (True, False)
    )
    assert one.groups is not None
    assert other.groups is not None
    assert other.groups.output.shape == (*one.groups.lse.shape, 0)
    assert one.groups.output.shape == (*one.groups.lse.shape, value.shape[-1])
    assert torch.isnan(one.output).any()
    pairs = [(one.output, other.output), (one.groups.lse, other.groups.lse)]
    pairs += [(one.groups.statistics[name], other.groups.statistics[name]) for name in ROWS]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_pieces_of_a_lone_key_need_no_outputs(backend):
    """A backend that takes the lone first key along has none for its piece, and for the others it has."""
    inputs = tensors(1, 2, 1, 3, 37, dtype=torch.float16)
    groups = (torch.arange(37) > 0).long()[None]
    asked = {"groups": groups, "backend": backend, "statistics": ROWS, "block_size": 16}
    if (obstacle := explain(*inputs).obstacles[backend]) is not None:
        pytest.skip(obstacle)
    one, other = (
        decode(*inputs, piece=32, group_outputs=outputs, **asked).groups
        for outputs in (True, False)
    )
    assert one is not None
    assert other is not None
    assert other.output.shape == (2, 1, 2, 3, 0)
    assert_close(other.lse, one.lse, 1e-6)
    for name in ROWS:
        assert_close(other.statistics[name], one.statistics[name], 1e-5, name)
