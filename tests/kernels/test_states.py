"""Merging states of disjoint key sets: the laws of a commutative monoid, and equality with dense."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lens_kernels import AttentionMask, AttentionState, attention, merge
from lens_kernels.states import LINEAR, MERGEABLE, block_mass_of_rows, merge_weights

from tests.kernels.helpers import assert_close, tensors

SHAPE = (2, 3, 5)  # batch, heads, queries
ROWS = ("max_logit", "entropy", "concentration", "distance", "prefix_mass", "moments", "value_norm")


def dense(scores, value, shown):
    """The state of the keys `shown` by its definition: materialised softmax, float64."""
    scores = scores.masked_fill(~shown, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    probability = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    log = torch.where(probability > 0, probability, 1).log()
    index = torch.arange(scores.shape[-1], dtype=scores.dtype)
    blocks = torch.nn.functional.pad(probability, (0, -scores.shape[-1] % 4)).unflatten(-1, (-1, 4))
    output = probability @ value
    return AttentionState(
        output,
        lse,
        {
            "max_logit": scores.amax(-1),
            "entropy": -(probability * log).sum(-1),
            "concentration": probability.square().sum(-1),
            "distance": (probability * index).sum(-1),
            "moments": torch.stack([(probability * index**power).sum(-1) for power in (1, 2)], -1),
            "row_block_mass": blocks.sum(-1),
            "value_norm": output.norm(dim=-1),
        },
        placed=True,
    )


def close(actual: AttentionState, expected: AttentionState, limit: float) -> None:
    assert_close(actual.output, expected.output, limit, "output")
    assert_close(actual.lse, expected.lse, limit, "lse")
    assert actual.statistics.keys() == expected.statistics.keys()
    for name, tensor in expected.statistics.items():
        found = actual.statistics[name]
        if name == "entropy":  # in keys: rows with almost none of it have few digits of it
            found, tensor = found.exp(), tensor.exp()
        assert_close(found, tensor, limit, name)


@st.composite
def partitions(draw, parts):
    """Scores [2, 3, 5, keys] with holes and empty rows, values, and a part of each key."""
    keys = draw(st.integers(1, 13))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.1, 3.0, 40.0]))
    scores = torch.randn(*SHAPE, keys, generator=generator, dtype=torch.float64) * spread
    hidden = torch.rand(scores.shape, generator=generator) < draw(st.sampled_from([0, 0.5, 0.9]))
    scores = scores.masked_fill(hidden, -torch.inf)
    if draw(st.booleans()):
        scores[0, 1, 2] = -torch.inf
    value = torch.randn(*SHAPE[:2], keys, 7, generator=generator, dtype=torch.float64)
    part = draw(st.lists(st.integers(0, parts - 1), min_size=keys, max_size=keys))
    return scores, value, torch.tensor(part)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(partitions(3))
def test_merged_parts_are_the_whole(drawn):
    """Any partition: with empty parts, empty rows, parts that some rows do not see."""
    scores, value, part = drawn
    states = [dense(scores, value, part == number) for number in range(3)]
    close(merge(*states), dense(scores, value, part >= 0), 1e-12)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(partitions(3))
def test_merge_is_associative_and_commutative(drawn):
    scores, value, part = drawn
    a, b, c = (dense(scores, value, part == number) for number in range(3))
    left = merge(merge(a, b), c)
    close(merge(a, merge(b, c)), left, 1e-12)
    close(merge(a, b, c), left, 1e-12)
    close(merge(merge(c, a), b), left, 1e-12)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(partitions(1))
def test_the_empty_state_is_neutral(drawn):
    scores, value, part = drawn
    state = dense(scores, value, part == 0)
    empty = AttentionState.empty_like(state)
    close(merge(state, empty), state, 1e-14)
    close(merge(empty, state), state, 1e-14)
    close(merge(empty, empty), empty, 0)
    close(empty, dense(scores, value, part < 0), 0)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(partitions(2), st.floats(-300, 300))
def test_a_shift_of_all_logits_moves_the_lse_alone(drawn, shift):
    scores, value, part = drawn
    plain = merge(*(dense(scores, value, part == number) for number in range(2)))
    moved = merge(*(dense(scores + shift, value, part == number) for number in range(2)))
    assert_close(moved.output, plain.output, 1e-11)
    assert_close(moved.statistics["entropy"].exp(), plain.statistics["entropy"].exp(), 1e-11)
    assert_close(moved.lse - shift, plain.lse, 1e-11)


def test_parts_are_attention_over_key_chunks():
    """Chunked prefill: each chunk of keys by itself, positions kept by padding on the left."""
    query, key, value = tensors(2, 4, 2, 37, 53)
    options = {"statistics": ("lse", *ROWS, "received"), "backend": "torch"}
    whole = attention(query, key, value, mask=AttentionMask(causal=True), **options)
    states = []
    for start, stop in ((0, 19), (19, 41), (41, 53)):
        keep = (torch.arange(53) >= start) & (torch.arange(53) < stop)
        mask = AttentionMask(causal=True, key_padding=keep.expand(2, -1))
        states.append(
            attention(query, key, value, mask=mask, **options).state(keys_before=0, keys_after=0)
        )
        assert set(states[-1].statistics) == {*ROWS, "mean_value_norm"}
    merged = merge(*states)
    assert_close(merged.output, whole.output, 1e-6)
    for name in ROWS:
        assert_close(merged.statistics[name], whole.statistics[name], 1e-5, name)


SLICED = ("lse", "max_logit", "entropy", "concentration", "distance", "moments", "match_mass")


@pytest.mark.parametrize("cuts", [(0, 19, 53), (0, 1, 7, 52, 53)], ids=str)
def test_states_of_sliced_keys_carry_their_positions(cuts):
    """Each slice counts from its own first key; merged, they count as the whole does."""
    query, key, value = tensors(2, 4, 2, 37, 53)
    allowed = torch.ones(37, 53, dtype=torch.bool).tril(16)
    query_labels, key_labels = torch.arange(37) % 5, torch.arange(53) % 5
    options = {"statistics": SLICED, "backend": "torch"}
    match = [(query_labels, key_labels)]
    mask = AttentionMask(allowed=allowed)
    whole = attention(query, key, value, mask=mask, match=match, **options)
    states = []
    for start, stop in itertools.pairwise(cuts):
        part = attention(
            query,
            key[:, :, start:stop],
            value[:, :, start:stop],
            mask=AttentionMask(allowed=allowed[:, start:stop]),
            match=[(query_labels, key_labels[start:stop])],
            **options,
        )
        states.append(part.state(keys_before=start, keys_after=53 - stop))
    merged = merge(*states)
    assert_close(merged.output, whole.output, 1e-5)
    assert merged.statistics.keys() == {*SLICED} - {"lse"}
    for name, found in merged.statistics.items():
        assert_close(found, whole.statistics[name], 1e-5, name)


def test_first_keys_of_a_slice_are_not_those_of_the_whole():
    query, key, value = tensors(1, 2, 1, 7, 11)
    result = attention(query, key, value, statistics=("lse", "prefix_mass"))
    assert "prefix_mass" in result.state(keys_before=0, keys_after=5).statistics
    for place, message in (
        ({"keys_before": 3, "keys_after": 0}, "prefix_mass of a slice with 3 keys before it"),
        ({"keys_before": -1, "keys_after": 0}, "must be 0 or more, got -1 and 0"),
        ({"keys_before": 0}, "prefix_mass count positions: say keys_before= and keys_after="),
        ({}, "prefix_mass count positions: say keys_before= and keys_after="),
    ):
        with pytest.raises(ValueError, match=message):
            result.state(**place)


ROW_STATES = AttentionState(
    torch.zeros(2, 5, 3), torch.zeros(2, 5), {"match_mass": torch.zeros(2, 5, 1)}
)
LENGTHS = {"key_lengths": [5], "query_lengths": [3]}


@pytest.mark.parametrize(
    ("mask", "place", "names", "message"),
    [
        (
            {"causal": True},
            (0, 4),
            (),
            "causal of a slice with 4 keys behind it count from its last",
        ),
        ({"causal": True, "window": 3}, (0, 1), (), "causal, window of a slice with 1 keys behind"),
        ({"alibi_slopes": torch.ones(2)}, (2, 1), (), "alibi_slopes of a slice with 1 keys behind"),
        (
            {"causal": True, "prefix": 2},
            (2, 0),
            (),
            "prefix of a slice with 2 keys before it count",
        ),
        (LENGTHS, (2, 0), ("distance",), "key_lengths, query_lengths of a slice with other keys"),
        (
            {"key_start": [1]},
            (2, 0),
            ("moments",),
            "key_start of a slice with 2 keys before it moves",
        ),
    ],
)
def test_masks_that_count_positions_are_not_those_of_a_slice(mask, place, names, message):
    """Each merged to other numbers than those of the whole: outputs off by up to 1.8."""
    options = {"mask": AttentionMask(**mask), "statistics": ("lse", *names)}
    part = attention(*tensors(1, 2, 1, 3, 7), **options)
    before, after = place
    with pytest.raises(ValueError, match=message):
        part.state(keys_before=before, keys_after=after)
    assert part.state(keys_before=0, keys_after=0).output is part.output


def test_the_last_slice_counts_from_the_same_end_as_the_whole():
    """There causality and a window see what they see in the whole; the slice before it sees `allowed`."""
    query, key, value = tensors(1, 2, 1, 7, 13)
    mask, names = AttentionMask(causal=True, window=5), ("lse", "entropy", "distance", "moments")
    whole = attention(query, key, value, mask=mask, statistics=names)
    near = torch.arange(7)[:, None] + 6 - torch.arange(13)  # anchor - key
    hidden = AttentionMask(allowed=((near >= 0) & (near < 5))[:, :8])
    first = attention(query, key[:, :, :8], value[:, :, :8], mask=hidden, statistics=names)
    last = attention(query, key[:, :, 8:], value[:, :, 8:], mask=mask, statistics=names)
    merged = merge(
        first.state(keys_before=0, keys_after=5), last.state(keys_before=8, keys_after=0)
    )
    assert_close(merged.output, whole.output, 1e-5)
    for name in names[1:]:
        assert_close(merged.statistics[name], whole.statistics[name], 1e-5, name)


def test_keys_that_would_count_twice_are_refused():
    query, key, value = tensors(1, 2, 1, 3, 11)

    def part(start, stop, whole=11):
        found = attention(query, key[:, :, start:stop], value[:, :, start:stop])
        return found.state(keys_before=start, keys_after=whole - stop)

    with pytest.raises(
        ValueError, match="keys 5 to 6 are in state 0 and in state 1, and would count"
    ):
        merge(part(0, 7), part(5, 11))
    with pytest.raises(ValueError, match="keys 2 to 3 are in state 0 and in state 1"):
        merge(merge(part(0, 2), part(2, 4)), part(2, 4))
    with pytest.raises(ValueError, match=r"one whole, but .* is 11 of state 0, 13 of state 1"):
        merge(part(0, 5), part(5, 11, 13))
    one = attention(query, key, value).state()
    with pytest.raises(ValueError, match="state 1 is given twice"):
        merge(one, one)
    sunk = attention(query, key, value, sink_logits=torch.zeros(2))
    with pytest.raises(
        ValueError, match="sink_logits are in the rows of this result, and would count"
    ):
        sunk.state()
    assert_close(merge(one, sink_logits=torch.zeros(2)).output, sunk.output, 1e-6)
    for place in ({"keys_before": "x", "keys_after": 0}, {"keys_before": 0, "keys_after": 0.5}):
        with pytest.raises(TypeError, match="must be a number of keys"):
            attention(query, key, value).state(**place)


def test_a_block_map_comes_from_row_masses():
    query, key, value = tensors(2, 4, 2, 37, 53)
    mask = AttentionMask(causal=True)
    whole = attention(query, key, value, mask=mask, statistics=("block_mass",), block_size=(16, 8))
    states = []
    for number in range(2):
        keep = (torch.arange(53) % 3 == 0) == bool(number)
        part = AttentionMask(causal=True, key_padding=keep.expand(2, -1))
        found = attention(
            query, key, value, mask=part, statistics=("lse", "block_mass"), block_size=(1, 8)
        )
        rows = {"row_block_mass": found.statistics.block_mass}
        states.append(AttentionState(found.output, found.statistics.lse, rows))
    merged = block_mass_of_rows(merge(*states), 16)
    assert_close(merged, whole.statistics.block_mass, 1e-6)


@pytest.mark.parametrize("sink", [-torch.inf, -2.0, 0.0, 40.0])
def test_a_learned_sink_is_part_of_the_denominator(sink):
    query, key, value = tensors(2, 4, 2, 37, 53)
    sinks = torch.tensor([0.5, -1.0, 3.0, sink])
    mask = AttentionMask(causal=True, key_padding=torch.arange(53).expand(2, -1) > 20)
    options = {"mask": mask, "statistics": ("lse", *ROWS), "backend": "torch"}
    plain, expected = (
        attention(query, key, value, sink_logits=s, **options) for s in (None, sinks)
    )
    found = plain.statistics
    state = AttentionState(
        plain.output, found.lse, {name: found[name] for name in ROWS}, placed=True
    )
    merged = merge(state, sink_logits=sinks)
    assert_close(merged.output, expected.output, 1e-6)
    assert_close(merged.lse, expected.statistics.lse, 1e-6)
    for name in ROWS:
        assert_close(merged.statistics[name], expected.statistics[name], 2e-5, name)


def test_gradients_through_merge():
    """Also where rows, parts or all of it are empty: no NaN, and equal to those of dense attention."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(*SHAPE, 11, generator=generator, dtype=torch.float64)
    scores[0, 1, 2] = -torch.inf
    scores[1, 0, 3, :4] = -torch.inf
    value = torch.randn(*SHAPE[:2], 11, 7, generator=generator, dtype=torch.float64)
    weights = torch.randn(*SHAPE, 7, generator=generator, dtype=torch.float64)

    def gradients(make):
        leaves = [scores.clone().requires_grad_(), value.clone().requires_grad_()]
        state = make(*leaves)
        finite = state.lse.masked_fill(state.lse == -torch.inf, 0)
        entropy = state.statistics["entropy"]
        loss = (state.output * weights).sum() + finite.square().sum() + (entropy**2).sum()
        loss.backward()
        return [leaf.grad for leaf in leaves]

    def state(scores, value, shown):
        hidden = scores.masked_fill(~shown, -torch.inf)
        seen = (hidden > -torch.inf).any(-1)
        top = torch.where(seen, hidden.detach().amax(-1), 0)
        weight = torch.exp(hidden - top[..., None])
        total = torch.where(seen, weight.sum(-1), 1)
        probability = weight / total[..., None]
        log = torch.where(probability > 0, probability, 1).log()
        lse = torch.where(seen, top + total.log(), -torch.inf)
        entropy = -(probability * log).sum(-1)
        return AttentionState(probability @ value, lse, {"entropy": entropy})

    shown = torch.arange(11) < 4
    whole = gradients(lambda s, v: state(s, v, shown | True))
    parts = gradients(lambda s, v: merge(state(s, v, shown), state(s, v, ~shown)))
    for actual, expected in zip(parts, whole, strict=True):
        assert_close(actual, expected, 1e-12)


def test_weights_sum_to_one_or_nothing():
    lses = torch.tensor([[0.0, -torch.inf, -torch.inf], [math.log(3), 1.0, -torch.inf]])
    lse, weights = merge_weights(lses)
    assert_close(weights, torch.tensor([[0.25, 0.0, 0.0], [0.75, 1.0, 0.0]]), 1e-6)
    assert lse.tolist() == [pytest.approx(math.log(4)), 1.0, -torch.inf]


def test_half_precision_outputs_merge_in_single_precision():
    lse = torch.zeros(3, 5)
    one = AttentionState(torch.full((3, 5, 2), 1.0, dtype=torch.bfloat16), lse)
    other = AttentionState(torch.full((3, 5, 2), 1.0078125, dtype=torch.bfloat16), lse)
    merged = merge(one, other).output
    assert merged.dtype == torch.float32
    assert bool((merged == 1.00390625).all())


STATE = AttentionState(torch.zeros(2, 5, 3), torch.zeros(2, 5), {"entropy": torch.zeros(2, 5)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: merge(), "merge needs at least one state"),
        (
            lambda: AttentionState(torch.zeros(2, 5, 3), torch.zeros(2, 7)),
            r"output must be \[\.\.\., queries, value_dim\] .* got \[2, 5, 3\] and \[2, 7\]",
        ),
        (
            lambda: AttentionState(torch.zeros(5, 3), torch.zeros(5), {"received": torch.zeros(5)}),
            "'received' cannot merge: it is summed over query rows and has lost the weight",
        ),
        (
            lambda: AttentionState(torch.zeros(5, 3), torch.zeros(5), {"spam": torch.zeros(5)}),
            "'spam' cannot merge; a state can carry concentration",
        ),
        (
            lambda: AttentionState(torch.zeros(5, 3), torch.zeros(5), {"entropy": torch.zeros(7)}),
            r"'entropy' must start with the axes of lse \[5\], got \[7\]",
        ),
        (
            lambda: AttentionState(torch.zeros(5, 3), torch.zeros(5), {"distance": torch.zeros(5)}),
            "distance of slices count from each slice and merge to wrong values: make the state",
        ),
        (
            lambda: attention(*tensors(1, 2, 1, 3, 5), statistics=("entropy",)).state(),
            "a state needs 'lse', the result has entropy; add",
        ),
        (
            lambda: merge(STATE, AttentionState(STATE.output, STATE.lse)),
            r"same statistics: state 0 has \['entropy'\], state 1 \[\]",
        ),
        (
            lambda: merge(STATE, AttentionState(torch.zeros(2, 7, 3), torch.zeros(2, 7))),
            r"equal shapes: output of state 0 is \[2, 5, 3\], of state 1 \[2, 7, 3\]",
        ),
        (
            lambda: merge(
                ROW_STATES, replace(ROW_STATES, statistics={"match_mass": torch.zeros(2, 5, 4)})
            ),
            r"'match_mass' of state 0 is \[2, 5, 1\], of state 1 \[2, 5, 4\]",
        ),
        (
            lambda: merge(STATE, sink_logits=torch.zeros(3)),
            r"sink_logits must be one per head, got \[3\] for states .* = \[2, 5\]",
        ),
        (
            lambda: block_mass_of_rows(STATE, 4),
            "needs the statistic 'row_block_mass', the state ca",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_cannot_be_changed_through_its_statistics():
    given = {"entropy": torch.zeros(2, 5)}
    state = AttentionState(STATE.output, STATE.lse, given)
    given["received"] = torch.zeros(1)
    assert set(state.statistics) == {"entropy"}
    with pytest.raises(TypeError, match="does not support item assignment"):
        state.statistics["entropy"] = torch.ones(2, 5)  # type: ignore[index]


def test_every_statistic_either_merges_or_is_refused_with_the_reason():
    from lens_kernels.statistics import STATISTICS

    assert LINEAR < MERGEABLE
    for name, entry in STATISTICS.items():
        if name == "lse" or name in MERGEABLE or entry.from_backward:
            continue
        with pytest.raises(ValueError, match="lost the weight of each row"):
            AttentionState(torch.zeros(5, 3), torch.zeros(5), {name: torch.zeros(5)})
