"""What each part of a mask means, against plain Python loops; and that padding cannot leak."""

import dataclasses
import itertools

import pytest
import torch
from lens_kernels import AttentionMask, attention, reference
from lens_kernels.problem import Problem
from lens_kernels.validation import make_problem

from tests.kernels.helpers import BACKENDS, CASES, assert_close, case_problem, check, ids, tensors


def entry(values, batch, default):
    return default if values is None else int(values[batch])


def sees(mask, batch, query, key, queries, keys):
    """One cell, straight from the docstring of `AttentionMask`."""
    key_end = entry(mask.key_lengths, batch, keys)
    query_end = entry(mask.query_lengths, batch, queries)
    origin = entry(mask.key_start, batch, 0)
    if mask.cu_seqlens is not None:
        bounds = torch.as_tensor(mask.cu_seqlens).expand(2, -1)[batch].tolist()
        inside = [(start, end) for start, end in itertools.pairwise(bounds) if start <= query < end]
        if not inside:
            return False
        origin, key_end = inside[0]
    if query >= query_end or not origin <= key < key_end:
        return False
    anchor = query + keys - queries
    if mask.key_lengths is not None and mask.query_lengths is not None:
        anchor = query + key_end - query_end
    if mask.window is not None and anchor - key >= mask.window:
        return False
    ahead = key > anchor
    if ahead and mask.window is not None and key - anchor >= mask.window:
        return False
    prefix = 0
    if mask.prefix is not None:
        prefix = int(torch.as_tensor(mask.prefix).expand(2)[batch])
    if ahead and mask.causal and key >= origin + prefix:
        return False
    return mask.key_padding is None or bool(mask.key_padding[batch, key])


STRUCTURAL = [
    case
    for case in CASES
    if (mask := case.mask(4, case.queries, case.keys)) is None
    or (mask.bias is None and mask.allowed is None)
]


@pytest.mark.parametrize("case", STRUCTURAL, ids=ids(STRUCTURAL))
def test_visible_keys_are_those_of_the_plain_loops(case):
    mask = case.mask(4, case.queries, case.keys) or AttentionMask()
    expected = [
        [[sees(mask, b, q, k, case.queries, case.keys) for k in range(case.keys)]
         for q in range(case.queries)]
        for b in range(2)
    ]  # fmt: skip
    problem = case_problem(case, "cpu")
    assert torch.equal(reference.visible(problem)[:, 1], torch.tensor(expected))
    assert torch.tensor(expected).sum() > 0 or mask.window == 1


@pytest.mark.parametrize("rows", [1, 3, 16, 100])
@pytest.mark.parametrize("case", STRUCTURAL, ids=ids(STRUCTURAL))
def test_ranges_hold_what_a_panel_sees_and_no_more(case, rows):
    plan = case_problem(case, "cpu").plan
    index = torch.arange(case.keys)
    seen = (plan.low[..., None] <= index) & (index < plan.high[..., None])
    for batch, ranges in enumerate(plan.ranges(rows)):
        assert len(ranges) == -(-case.queries // rows)
        for panel, (first, end) in enumerate(ranges):
            keys = seen[batch, panel * rows : (panel + 1) * rows].any(0).nonzero().flatten()
            expected = (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 0)
            assert (first, end) == expected


def test_a_plan_that_says_simple_is_simple():
    """Kernels compute the interval of a simple plan from causal, window and offset alone."""
    simple = 0
    for case in STRUCTURAL:
        plan = case_problem(case, "cpu").plan
        if not plan.simple:
            continue
        simple += 1
        anchor = torch.arange(case.queries) + plan.offset
        low = torch.zeros_like(anchor)
        high = torch.full_like(anchor, case.keys)
        if plan.causal:
            high = (anchor + 1).clamp(max=case.keys)
        if plan.window is not None:
            low = (anchor - plan.window + 1).clamp(min=0)
            if not plan.causal:
                high = (anchor + plan.window).clamp(max=case.keys)
        empty = high <= low
        for batch in range(2):
            assert torch.equal(plan.anchor[batch].long(), anchor)
            assert torch.equal(plan.low[batch].long(), low.masked_fill(empty, 0))
            assert torch.equal(plan.high[batch].long(), high.masked_fill(empty, 0))
    assert simple >= 8


def test_positions_count_from_the_start_of_the_sequence():
    packed = case_problem(next(c for c in CASES if c.name == "packed"), "cpu").plan
    expected = [*range(17), *range(6), *range(30)]
    assert packed.key_position[0].tolist() == expected
    left = case_problem(next(c for c in CASES if c.name == "left padding"), "cpu").plan
    assert left.key_position[1].tolist() == list(range(-13, 28))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_packed_row_equals_its_sequences_apart(backend, device):
    query, key, value = tensors(1, 4, 2, 53, 53, device=device)
    bounds = [0, 17, 29, 53]
    names = ("lse", "entropy", "distance", "prefix_mass", "moments", "received")
    options = {"statistics": names, "block_size": 16}
    mask = AttentionMask(causal=True, window=13, cu_seqlens=bounds)
    whole = check(backend, make_problem(query, key, value, mask=mask, **options))
    for start, end in itertools.pairwise(bounds):
        part = [tensor[:, :, start:end] for tensor in (query, key, value)]
        mask = AttentionMask(causal=True, window=13)
        apart = reference.run(make_problem(*part, mask=mask, **options))
        assert_close(whole.output[:, :, start:end], apart.output, 1e-5)
        for name in names:
            assert_close(whole.tensors[name][:, :, start:end], apart.tensors[name], 1e-5, name)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_left_and_right_padding_equal_the_sequence_alone(backend, device):
    query, key, value = tensors(1, 4, 2, 31, 31, device=device)
    options = {"statistics": ("lse", "distance", "moments", "received"), "block_size": 16}
    mask = AttentionMask(causal=True, window=13)
    alone = reference.run(make_problem(query, key, value, mask=mask, **options))
    for pad, mask in (
        ((0, 0, 10, 0), AttentionMask(causal=True, window=13, key_start=[10])),
        (
            (0, 0, 0, 10),
            AttentionMask(causal=True, window=13, key_lengths=[31], query_lengths=[31]),
        ),
    ):
        padded = [torch.nn.functional.pad(part, pad, value=7.0) for part in (query, key, value)]
        result = check(backend, make_problem(*padded, mask=mask, **options))
        real = slice(pad[2], pad[2] + 31)
        assert_close(result.output[:, :, real], alone.output, 1e-5)
        for name in options["statistics"]:
            assert_close(result.tensors[name][:, :, real], alone.tensors[name], 1e-5, name)


POISONED = [
    case
    for case in STRUCTURAL
    if (mask := case.mask(4, case.queries, case.keys)) is not None
    and any(
        part is not None
        for part in (mask.key_lengths, mask.key_start, mask.key_padding, mask.cu_seqlens)
    )
]


@pytest.mark.parametrize("case", POISONED, ids=ids(POISONED))
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_nan_in_padding_reaches_nothing(backend, device, case):
    query, key, value = tensors(2, 4, 2, case.queries, case.keys, device=device)
    mask = case.mask(4, case.queries, case.keys)
    assert mask is not None
    if mask.key_padding is not None:
        mask = dataclasses.replace(mask, key_padding=mask.key_padding.to(device))
    options = {
        "mask": mask,
        "statistics": "all",
        "block_size": 16,
        "key_weights": torch.ones(2, 2, case.keys, device=device),
    }
    clean = make_problem(query, key, value, **options)
    seen = reference.visible(clean)[:, 0]
    dead_keys, dead_rows = ~seen.any(1)[:, None], ~seen.any(2)[:, None]
    key, value = (part.masked_fill(dead_keys[..., None], torch.nan) for part in (key, value))
    options["key_weights"] = options["key_weights"].masked_fill(dead_keys, torch.nan)
    if mask.key_padding is None:
        query = query.masked_fill(dead_rows[..., None], torch.nan)
    assert key.isnan().any() or query.isnan().any() or case.name.startswith("packed")
    poisoned = make_problem(query, key, value, **options)
    for part in (poisoned.query, poisoned.key, poisoned.value):
        assert not part.isnan().any()  # a gradient would carry it on
    result = check(backend, poisoned)
    expected = reference.run(clean)
    assert_close(result.output, expected.output, 1e-5)
    assert_close(result.tensors["received"], expected.tensors["received"], 1e-5)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_row_that_sees_nothing(backend, device):
    query, key, value = tensors(1, 2, 1, 24, 32, device=device)
    allowed = torch.ones(24, 32, dtype=torch.bool, device=device)
    allowed[3] = allowed[20:] = False
    labels = (torch.zeros(24, dtype=torch.int64), torch.zeros(32, dtype=torch.int64))
    problem = make_problem(
        query,
        key,
        value,
        mask=AttentionMask(allowed=allowed),
        statistics="all",
        match=[(labels[0].to(device), labels[1].to(device))],
        grid=(4, 8),
        sink_logits=torch.tensor([1.0, 30.0], device=device),
        key_weights=torch.ones(1, 2, 32, device=device),
        block_size=4,
    )
    result = check(backend, problem)
    empty = [3, 20, 21, 22, 23]
    assert bool((result.output[:, :, empty] == 0).all())
    for name in ("lse", "max_logit"):
        assert bool((result.tensors[name][:, :, empty] == -torch.inf).all()), name
    for name in ("entropy", "concentration", "distance", "prefix_mass", "match_mass", "moments"):
        assert bool((result.tensors[name][:, :, empty] == 0).all()), name
    mass = result.tensors["block_mass"].sum(-1)
    share = result.tensors["prefix_mass"].new_tensor(1.0) - torch.exp(
        torch.tensor([1.0, 30.0], device=device)[:, None] - result.tensors["lse"][0]
    )
    share = share.clamp(min=0)
    share[:, empty] = torch.nan
    assert_close(mass[0, :, :5], share.unflatten(-1, (6, 4)).nanmean(-1)[:, :5], 1e-5)
    assert bool((mass[0, :, 5] == 0).all())


def test_a_problem_is_the_same_for_lists_and_tensors():
    query, key, value = tensors(2, 2, 1, 7, 11)
    lists = AttentionMask(causal=True, key_lengths=[5, 11], prefix=[2, 0])
    given = AttentionMask(
        causal=True, key_lengths=torch.tensor([5, 11]), prefix=torch.tensor([2, 0])
    )
    a, b = (make_problem(query, key, value, mask=mask).plan for mask in (lists, given))
    assert torch.equal(a.low, b.low)
    assert torch.equal(a.high, b.high)


def test_broadcast_masks_are_not_copied():
    query, key, value = tensors(2, 4, 2, 37, 41)
    bias = torch.zeros(37, 41)
    problem: Problem = make_problem(query, key, value, mask=AttentionMask(bias=bias))
    assert problem.plan.bias is not None
    assert problem.plan.bias.shape == (1, 1, 37, 41)
    assert problem.plan.bias.data_ptr() == bias.data_ptr()


def test_inputs_without_padding_are_not_copied():
    query, key, value = tensors(2, 4, 2, 37, 41)
    problem = make_problem(query, key, value, mask=AttentionMask(causal=True, window=5))
    assert problem.key.data_ptr() == key.data_ptr()
    assert problem.value.data_ptr() == value.data_ptr()


def test_left_padded_batch_of_a_decoder_through_the_public_entrance():
    query, key, value = tensors(2, 4, 2, 13, 13)
    padding = torch.ones(2, 13, dtype=torch.bool)
    padding[1, :4] = False
    by_padding = attention(
        query, key, value, mask=AttentionMask(causal=True, key_padding=padding), backend="torch"
    )
    by_start = attention(
        query, key, value, mask=AttentionMask(causal=True, key_start=[0, 4]), backend="torch"
    )
    assert torch.equal(by_padding.output, by_start.output)
    assert torch.equal(by_padding.statistics.lse, by_start.statistics.lse)
