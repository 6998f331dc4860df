"""Edits by group states against the same edits of the materialised probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lens_kernels import AttentionMask, AttentionState, attention, merge, redistribute, reference
from lens_kernels.redistribution import (
    Drop,
    LearnedSink,
    LogitBias,
    Mask,
    Scale,
    Transfer,
)
from lens_kernels.validation import make_problem

from tests.kernels.helpers import assert_close, rms_ratio, tensors

CAUSAL = AttentionMask(causal=True)
S, R, U = 0, 1, 2  # sources (sinks), receivers, untouched


class Setting:
    """Attention in float64 with keys in three groups, its states and its materialised `P`."""

    def __init__(self, seed=0, sinks=None, mask=CAUSAL):
        query, key, value = (part.double() for part in tensors(2, 4, 2, 37, 41, seed=seed))
        self.groups = (torch.arange(82) * 7 % 11 % 3).view(2, 41)
        self.groups[:, :7] = torch.tensor([S, U, U, S, U, U, S])  # the first rows see no receiver
        self.sinks = sinks
        options = {"mask": mask, "groups": self.groups, "sink_logits": sinks}
        self.problem = make_problem(query, key, value, **options)
        result = attention(query, key, value, backend="torch", **options)
        assert result.groups is not None
        self.output, self.lse, self.states = result.output, result.statistics.lse, result.groups
        self.p = reference.probabilities(self.problem)
        self.logits = reference.logits(self.problem)
        self.value = value.repeat_interleave(2, 1)

    def member(self, group):
        """bool [batch, 1, 1, keys]."""
        return (self.groups == group)[:, None, None]

    def mass(self, *groups, of=None):
        p = self.p if of is None else of
        return sum((p * self.member(group)).sum(-1, keepdim=True) for group in groups)

    def redistribute(self, rule, **options):
        return redistribute(self.states, rule, sink_logits=self.sinks, **options)

    def check(self, rule, p, lse=None, limit=1e-12):
        """The edit against probabilities edited by hand; returns the result."""
        result = self.redistribute(rule)
        assert_close(result.output, p @ self.value, limit, "output")
        assert_close(result.lse, self.lse if lse is None else lse, limit, "lse")
        for group in (S, R, U):
            assert_close(result.mass[group], self.mass(group, of=p).squeeze(-1), limit, "mass")
            before = self.mass(group).squeeze(-1)
            assert_close(result.mass_before[group], before, limit, "mass before")
        return result


SETTINGS = {"plain": {}, "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 1.5]).double()}}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return Setting(**SETTINGS[request.param])


def softmax(logits, sinks):
    """`P` over the keys, and LSE; the learned sink is one more column."""
    if sinks is not None:
        column = sinks[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], -1)
    p = torch.softmax(logits, -1)
    return p if sinks is None else p[..., :-1], torch.logsumexp(logits, -1)


def same(actual, expected, limit=1e-12):
    """Two results are the same attention."""
    assert_close(actual.output, expected.output, limit, "output")
    assert_close(actual.mass, expected.mass, limit, "mass")


def test_the_states_are_the_attention(setting):
    """I1."""
    merged = merge(*setting.states.states, sink_logits=setting.sinks)
    assert_close(merged.output, setting.output, 1e-13)
    assert_close(merged.lse, setting.lse, 1e-13)


def test_mask_is_attention_without_the_keys(setting):
    """I2: nothing is subtracted, the others are renormalised (with the learned sink)."""
    hidden = setting.logits.masked_fill(setting.member(S), -torch.inf)
    p, lse = softmax(hidden, setting.sinks)
    result = setting.check(Mask([S]), p, lse)
    assert_close(lse, setting.lse + torch.log1p(-setting.mass(S)[..., 0]), 1e-9)
    # I3: the change is m_S (o_without - o_S)
    states = setting.states
    change = setting.mass(S) * (result.output - states.output[S])
    assert_close(result.output - setting.output, change, 1e-9)


def test_drop_leaves_the_rest_of_the_sum_alone(setting):
    """I4."""
    result = setting.check(Drop([S, U]), setting.p * setting.member(R))
    assert float(result.mass.sum(0).max()) < 1


WEIGHTS = (0.25, 3.0, 1.0)


def test_logit_bias_is_scaling_and_renormalising(setting):
    """I5: a softmax of the biased logits; the same as Scale(w)."""
    weight = sum(w * setting.member(group).double() for group, w in enumerate(WEIGHTS))
    biased = setting.logits + weight.log()
    p, lse = softmax(biased, setting.sinks)
    result = setting.check(LogitBias([math.log(w) for w in WEIGHTS]), p, lse)
    scaled = setting.redistribute(Scale(WEIGHTS))
    same(scaled, result)
    assert_close(scaled.lse, lse, 1e-12)
    if setting.sinks is None:
        by_hand = setting.p * weight
        assert_close(p, by_hand / by_hand.sum(-1, keepdim=True), 1e-12)
        shift = (weight * setting.p).sum(-1).log()
        assert_close(lse, setting.lse + shift, 1e-12)


def test_masking_is_a_weight_of_zero(setting):
    masked = setting.redistribute(Mask([S]))
    same(setting.redistribute(Scale([0, 1, 1])), masked)
    same(setting.redistribute(LogitBias([-math.inf, 0, 0])), masked)


def transferred(setting, amount, targets=(R,)):
    """`P` after moving `amount` of S to the targets, by hand."""
    receivers = sum(setting.member(group) for group in targets).bool()
    room = setting.mass(*targets)
    possible = room >= 1e-8
    moved = amount * setting.mass(S) / torch.where(possible, room, 1)
    p = torch.where(setting.member(S), (1 - amount) * setting.p, setting.p)
    p = torch.where(receivers, (1 + moved) * setting.p, p)
    return torch.where(possible, p, setting.p), ~possible.squeeze(-1)


@pytest.mark.parametrize("amount", [0.1, 0.6, 1.0])
def test_transfer_moves_mass_pro_rata(setting, amount):
    """I6 and I7: rows keep their sum, U is untouched, odds inside R stay, S keeps 1 - amount."""
    p, skipped = transferred(setting, amount)
    result = setting.check(Transfer([S], [R], amount), p)
    assert torch.equal(result.skipped, skipped)
    assert result.skipped_rows == int(skipped.sum()) > 0
    assert_close(result.mass.sum(0), result.mass_before.sum(0), 1e-12)
    assert torch.equal(result.mass[U], result.mass_before[U])
    edited = ~skipped
    assert_close(
        result.mass[S][edited], (1 - amount) * result.mass_before[S][edited], 1e-12, "sources"
    )
    assert bool((result.mass >= 0).all())
    # I6: o + amount * m_S (o_R - o_S)
    states = setting.states.output
    delta = amount * setting.mass(S) * (states[R] - states[S])
    expected = torch.where(edited[..., None], setting.output + delta, setting.output)
    assert_close(result.output, expected, 1e-12)


def test_transfer_to_all_others_is_scale_with_receivers(setting):
    """w_R = (1 - (1-p) m_S) / (1 - m_S); not what renormalising over all groups gives."""
    amount = 0.6
    transfer = setting.redistribute(Transfer([S], [R, U], amount))
    same(setting.redistribute(Scale([1 - amount, 1, 1], receivers=[R, U])), transfer)
    overall = setting.redistribute(Scale([1 - amount, 1, 1]))
    assert rms_ratio(overall.output, transfer.output) > 1e-2
    if setting.sinks is None:
        sources = setting.mass(S).squeeze(-1)
        kept = (1 - amount) * sources / (1 - amount * sources)
        assert_close(overall.mass[S], kept, 1e-12)
        rows = ~transfer.skipped
        weight = (1 - (1 - amount) * sources) / (1 - sources)
        others = transfer.mass_before[R] + transfer.mass_before[U]
        assert_close((transfer.mass[R] + transfer.mass[U])[rows], (weight * others)[rows], 1e-10)


def test_transfer_of_everything_to_all_others_is_masking():
    setting = Setting()
    transfer, masked = (
        setting.redistribute(Transfer([S], [R, U], 1.0)),
        setting.redistribute(Mask([S])),
    )
    rows = ~transfer.skipped
    assert_close(transfer.output[rows], masked.output[rows], 1e-12)
    assert bool((transfer.mass[S][rows] == 0).all())


def test_scale_with_receivers_takes_several_sources(setting):
    p = setting.p
    freed = 0.7 * setting.mass(S) + 0.2 * setting.mass(U)
    room = setting.mass(R)
    possible = room >= 1e-8
    grown = 1 + freed / torch.where(possible, room, 1)
    s, u = setting.member(S).double(), setting.member(U).double()
    edited = p * (0.3 * s + 0.8 * u + grown * setting.member(R))
    setting.check(Scale([0.3, 1.0, 0.8], receivers=[R]), torch.where(possible, edited, p))


@pytest.mark.parametrize("logit", [-math.inf, -2.0, 0.0, 5.0])
def test_learned_sink_is_a_gate(setting, logit):
    """I8: sigmoid(lse - b) o; b = 0 is softmax-off-by-one, b = -inf nothing."""
    result = setting.redistribute(LearnedSink(logit))
    gate = torch.sigmoid(setting.lse - logit)[..., None]
    assert_close(result.output, gate * setting.output, 1e-12)
    assert_close(result.lse, torch.logaddexp(setting.lse, torch.tensor(logit).double()), 1e-12)
    by_head = setting.redistribute(LearnedSink(torch.full((4,), logit).double()))
    same(by_head, result)


def test_off_by_one_is_one_in_the_denominator():
    setting = Setting()
    weight = setting.logits.exp()
    p = weight / (1 + weight.sum(-1, keepdim=True))
    setting.check(LearnedSink(0.0), p, lse=torch.log1p(weight.sum(-1)))


@pytest.mark.parametrize(
    "rule",
    [
        Transfer([S], [R], 0.0),
        Scale([1, 1, 1]),
        Scale([1, 1, 1], receivers=[R]),
        LogitBias([0.0, 0, 0]),
        LearnedSink(-math.inf),
    ],
    ids=["transfer", "scale", "receivers", "bias", "sink"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_amount_of_zero_is_bit_identical(rule, dtype):
    query, key, value = tensors(2, 4, 2, 37, 41, dtype=dtype)
    groups = (torch.arange(82) * 7 % 11 % 3).view(2, 41)
    result = attention(query, key, value, mask=CAUSAL, groups=groups)
    assert result.groups is not None
    edited = redistribute(result.groups, rule, output=result.output)
    assert edited.output.dtype == dtype
    assert torch.equal(edited.output, result.output)
    without = redistribute(result.groups, rule)
    assert torch.equal(without.output, merge(*result.groups.states).output)


def test_heads_and_rows_that_are_not_selected_stay_bit_by_bit():
    setting = Setting()
    amount = torch.zeros(2, 4, 37, dtype=torch.float64)
    amount[:, 2, 10:20] = 0.6
    edited = setting.redistribute(Transfer([S], [R], amount), output=setting.output)
    differs = (edited.output != setting.output).any(-1)
    assert torch.equal(differs, amount > 0)
    by_head = torch.tensor([0.0, 0.6, 0.0, 0.0]).double()[:, None]
    edited = setting.redistribute(Transfer([S], [R], by_head), output=setting.output)
    differs = (edited.output != setting.output).any(-1)
    assert not bool(differs[:, [0, 2, 3]].any())
    assert bool(differs[:, 1, 20:].all())


def test_twice_moves_more():
    """Not idempotent: amounts p and q make 1 - (1 - p)(1 - q)."""
    setting = Setting()
    once = setting.redistribute(Transfer([S], [R], 0.5))
    lses = torch.log(once.mass) + setting.lse
    states = [AttentionState(setting.states.output[g], lses[g]) for g in range(3)]
    twice = redistribute(states, Transfer([S], [R], 0.2))
    same(twice, setting.redistribute(Transfer([S], [R], 1 - 0.5 * 0.8)), 1e-10)


def test_empty_targets_are_counted_and_never_nan():
    """The first rows see no target; a whole batch row has none."""
    setting = Setting()
    groups = setting.groups.clone()
    groups[groups == R] = U
    groups[0, 20] = R
    query, key, value = setting.problem.query, setting.problem.key, setting.problem.value
    result = attention(query, key, value, mask=CAUSAL, groups=groups, backend="torch")
    assert result.groups is not None
    edited = redistribute(result.groups, Transfer([S], [R], 0.6), output=result.output)
    assert not bool(edited.output.isnan().any() | edited.mass.isnan().any())
    reaches = torch.arange(37) + 4 >= 20
    expected = torch.stack([~reaches, torch.ones_like(reaches)])[:, None].expand(-1, 4, -1)
    assert torch.equal(edited.skipped, expected)
    assert edited.skipped_rows == 4 * (37 + 16)
    kept = edited.skipped[..., None].expand_as(edited.output)
    assert torch.equal(edited.output[kept], result.output[kept])


def test_rows_that_see_nothing_stay_empty():
    setting = Setting(mask=AttentionMask(causal=True, key_lengths=[0, 41]))
    for rule in (Mask([S]), Drop([S]), Transfer([S], [R], 0.6), LearnedSink(0.0), Scale([2, 1, 1])):
        result = setting.redistribute(rule)
        assert bool((result.output[0] == 0).all())
        assert bool((result.mass[:, 0] == 0).all())
        assert bool((result.lse[0] == -torch.inf).all())
        assert not result.skipped[0].any()


def test_masking_everything_leaves_nothing():
    result = Setting().redistribute(Mask([S, R, U]))
    assert bool((result.output == 0).all())
    assert bool((result.lse == -torch.inf).all())


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    seed=st.integers(0, 5),
    amount=st.floats(0, 1),
    beta=st.lists(st.floats(0, 10), min_size=3, max_size=3),
)
def test_sums_and_signs(seed, amount, beta):
    setting = Setting(seed)
    seen = (setting.lse > -torch.inf).double()
    rules = [Transfer([S], [R], amount), Transfer([S, U], [R], amount)]
    if sum(beta) > 0.01:
        rules.append(Scale([b + 1e-9 for b in beta]))
    for rule in rules:
        mass = setting.redistribute(rule).mass
        assert bool((mass >= 0).all())
        assert_close(mass.sum(0), seen, 1e-12)


def test_var_of_the_paper_is_that_of_its_code():
    """The released code keeps p of the sinks and moves 1 - p; the paper moves p."""
    setting = Setting()
    paper = setting.redistribute(Transfer([S], [R], 0.4))
    code_p = 0.6
    room = setting.mass(R)
    budget = (1 - code_p) * setting.mass(S)
    grown = setting.p + budget * setting.p / torch.where(room > 1e-8, room, 1)
    code = torch.where(setting.member(S), code_p * setting.p, setting.p)
    code = torch.where(setting.member(R), grown, code)
    rows = ~paper.skipped
    assert_close(paper.output[rows], (code @ setting.value)[rows], 1e-12)


def planted(mass, dtype, norm=1.0):
    """Attention of 521 queries on 1,021 keys where key 0 holds exactly `mass` of each row."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(1, 2, count, 64, generator=generator).to(dtype) for count in (521, 1021, 1021)
    )
    value[:, :, 0] = (value[:, :, 0] * norm).to(dtype)
    plain = reference.logits(make_problem(query, key, value))
    rest = torch.logsumexp(plain[..., 1:], -1)
    bias = torch.zeros_like(plain, dtype=torch.float32)
    bias[..., 0] = (math.log(mass / (1 - mass)) + rest - plain[..., 0]).float()
    groups = torch.ones(1, 1021, dtype=torch.int64)
    groups[0, 0] = 0
    problem = make_problem(query, key, value, mask=AttentionMask(bias=bias), groups=groups)
    options = {"mask": AttentionMask(bias=bias), "groups": groups}
    return problem, attention(query, key, value, **options)


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99, 0.999])
def test_a_planted_sink_is_removed_where_subtraction_fails(mass):
    """bfloat16: the states are right to 3e-3 everywhere, a subtraction from the output is not."""
    problem, result = planted(mass, torch.bfloat16)
    assert result.groups is not None
    before = redistribute(result.groups, Mask([0])).mass_before[0]
    assert_close(before, torch.full_like(before, mass), 1e-4)
    truth = reference.run(problem).groups
    assert truth is not None
    stored = [
        AttentionState(result.groups.output[g].bfloat16(), result.groups.lse[g]) for g in range(2)
    ]
    removed = redistribute(stored, Mask([0]))
    assert rms_ratio(removed.output, truth.output[1]) < 3e-3
    sinks = mass * truth.output[0]
    subtracted = (result.output.double() - sinks) / (1 - mass)
    assert (
        rms_ratio(subtracted, truth.output[1]) > {0.5: 2e-3, 0.9: 2e-2, 0.99: 0.2, 0.999: 2}[mass]
    )
    moved = redistribute(stored, Transfer([0], [1], 0.6))
    expected = 0.4 * mass * truth.output[0] + (1 - 0.4 * mass) * truth.output[1]
    assert rms_ratio(moved.output, expected) < 3e-3


def test_gradients_flow_through_an_edit():
    """Of the amount, of q, k and v: equal to those of the edited probabilities."""
    inputs = [part.double() for part in tensors(1, 2, 1, 23, 29)]
    groups = (torch.arange(29) * 7 % 11 % 3)[None]
    weights = torch.randn(1, 2, 23, 16, generator=torch.Generator().manual_seed(1)).double()

    def gradients(edit):
        leaves = [part.clone().requires_grad_() for part in inputs]
        amount = torch.tensor([[0.3], [0.7]], dtype=torch.float64, requires_grad=True)
        (edit(*leaves, amount) * weights).sum().backward()
        return [leaf.grad for leaf in (*leaves, amount)]

    def by_states(query, key, value, amount):
        result = attention(query, key, value, groups=groups, backend="torch")
        assert result.groups is not None
        return redistribute(result.groups, Transfer([S], [R], amount)).output

    def by_probabilities(query, key, value, amount):
        p = reference.probabilities(make_problem(query, key, value))
        source, target = ((groups == group)[:, None, None] for group in (S, R))
        moved = amount[..., None] * (p * source).sum(-1, keepdim=True)
        grown = 1 + moved / (p * target).sum(-1, keepdim=True)
        p = p * torch.where(source, 1 - amount[..., None], torch.where(target, grown, 1))
        return p @ value.repeat_interleave(2, 1)

    for actual, expected in zip(gradients(by_states), gradients(by_probabilities), strict=True):
        assert_close(actual, expected, 1e-11)


def test_weights_of_zero_give_finite_gradients():
    setting = Setting()
    weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.0, 1.0, 2.0)]
    setting.redistribute(Scale(weights)).output.sum().backward()
    assert all(bool(weight.grad.isfinite()) for weight in weights)


STATES = [AttentionState(torch.zeros(2, 4, 5, 3), torch.zeros(2, 4, 5)) for _ in range(3)]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Mask([3]), r"groups must be some of 0\.\.2 \(there are 3 states\), got \[3\]"),
        (Mask([]), r"groups must be some of 0\.\.2"),
        (Drop([-1]), r"groups must be some of 0\.\.2"),
        (Transfer([0], [0, 1], 0.5), r"sources and targets must be disjoint, both hold \[0\]"),
        (Transfer([0], [1], 1.2), r"amount must lie in 0\.\.1, got 1\.2"),
        (Transfer([0], [1], torch.zeros(7)), r"amount must be a number or broadcastable to \[2, 4"),
        (LogitBias([0, 1]), r"bias must have one entry per state \(3\), got 2"),
        (Scale([1, -1, 1]), r"weights must be 0 or more, got -1\.\.1"),
        (Scale([2, 1, 1], receivers=[1]), r"weights must be in 0\.\.1 where there are receivers"),
        (Scale([0.5, 0.5, 1], receivers=[1]), "weights of receivers must be 1"),
        (LearnedSink(torch.zeros(3)), r"sink_logits must be one per head, got \[3\]"),
        (LearnedSink(torch.zeros(3, 2)), r"sink_logits must be one per head, got \[3, 2\]"),
    ],
    ids=lambda part: str(part)[:30] if not isinstance(part, str) else "",
)
def test_refusals(rule, message):
    with pytest.raises(ValueError, match=message):
        redistribute(STATES, rule)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: redistribute([], Mask([0])), "at least one state; call attention with groups="),
        (
            lambda: redistribute(
                [STATES[0], AttentionState(torch.zeros(5, 3), torch.zeros(5))], Mask([0])
            ),
            r"states must have equal shapes, got \[\(2, 4, 5, 3\), \(5, 3\)\]",
        ),
        (
            lambda: redistribute(STATES, Mask([0]), output=torch.zeros(2, 4, 5, 7)),
            r"output must be of the states' shape \[2, 4, 5, 3\], got \[2, 4, 5, 7\]",
        ),
        (
            lambda: redistribute(STATES, Mask([0]), sink_logits=torch.zeros(5)),
            r"sink_logits must be one per head, got \[5\]",
        ),
    ],
    ids=["none", "shapes", "output", "sinks"],
)
def test_states_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
