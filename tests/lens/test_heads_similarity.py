"""Similarity of heads: against whole matrices of eager models, in closed form, and on known heads."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.heads import similarity
from lens.heads.likeness import pairs
from lens.heads.likeness.head_similarity import HeadSimilarity
from lens.heads.likeness.pairs import dependence, divergence
from lens.heads.likeness.states import HeadStates, read_states
from lens.passes.inputs import read_prompts
from lens.stats.intervals import longer
from tests.lens.architectures import VOCAB, build
from tests.lens.naive import rms_ratio
from tests.lens.traces import probabilities, trace_of
from tests.tiers import first

LENGTHS = (13, 7, 11)
BYS = ("js", "log_odds", "cka")
ARCHITECTURES = ["gpt2", "mistral", "gemma2", "gpt_oss"]


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


class Whole:
    """Attention [heads, n, n] and outputs [heads, n, dim] of every head of an eager model."""

    def __init__(self, model, ids, sink_excluded):
        values = []
        handles = [
            module.register_forward_pre_hook(lambda _, inputs: values.append(inputs[0][0]))
            for name, module in model.named_modules()
            if name.endswith((".o_proj", "attn.c_proj"))
        ]
        model.set_attn_implementation("eager")
        with torch.no_grad():
            attentions = model(torch.tensor([ids]), output_attentions=True).attentions
        for handle in handles:
            handle.remove()
        self.p = torch.cat([layer[0] for layer in attentions]).double().numpy()
        heads = len(self.p) // len(values)
        self.z = np.concatenate(
            [z.double().unflatten(-1, (heads, -1)).transpose(0, 1).numpy() for z in values]
        )
        if self.p.sum(-1).max() < 0.999:  # a learned sink: one more column
            self.p = np.concatenate([self.p, 1 - self.p.sum(-1, keepdims=True)], -1)
        if sink_excluded:
            self.p = self.p[..., 1 : len(ids)]
            total = self.p.sum(-1, keepdims=True)
            self.p = np.divide(self.p, total, out=np.zeros_like(self.p), where=total > 0)


def naive_js(p, first):
    """Row by row, pair by pair, straight from the definition with KL divergences."""
    heads = len(p)
    sums, rows = np.zeros((heads, heads)), range(first, p.shape[1])
    for a in range(heads):
        for b in range(heads):
            for row in rows:
                x, y = p[a, row], p[b, row]
                m = (x + y) / 2
                for one in (x, y):
                    kept = one > 0
                    sums[a, b] += (one[kept] * np.log(one[kept] / m[kept])).sum() / 2
    return sums, len(rows)


def naive_log_odds(p, first):
    """Keys that the layer of a head hides (eager's exact zeros) have log-odds 0 and do not count."""
    vectors = []
    for head in p:
        parts = []
        for row in head[first:]:
            seen, odds = row > 0, np.zeros(len(row))
            odds[seen] = np.log((0.999 * row[seen] + 0.001 / seen.sum()) * seen.sum())
            parts.append(odds)
        vectors.append(np.concatenate(parts))
    return np.array(vectors) @ np.array(vectors).T


def naive_hsic(x, y):
    """The unbiased estimate of Song et al. from whole Gram matrices."""
    n = len(x)
    k, l = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(n)
    return (
        np.trace(k @ l)
        + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        - 2 * (one @ k @ l @ one) / (n - 2)
    ) / (n * (n - 3))


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("name", first(ARCHITECTURES, "gpt2", "gpt_oss"))
def test_attention_is_compared_as_whole_matrices_would_be(name, excluded, monkeypatch):
    monkeypatch.setattr(pairs, "_CHUNK", 18 * 13 * 5)  # several chunks, the last one short
    bare = build(name)
    model = lens.load(bare)
    first = 2 if excluded else 1
    texts = prompts()
    js = similarity(model, texts, method="js", sink_excluded=excluded)
    odds = similarity(model, texts, method="log_odds", sink_excluded=excluded)
    for number, ids in enumerate(texts):
        whole = Whole(bare, ids, excluded)
        sums, count = naive_js(whole.p, first)
        assert rms_ratio(js.sums[number], sums) < 1e-4
        assert (js.counts[number] == count).all()
        seen = whole.p[..., : len(ids) - excluded]
        assert rms_ratio(odds.sums[number], naive_log_odds(seen, first)) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_outputs_are_compared_as_whole_gram_matrices_would_be(name):
    bare = build(name)
    model = lens.load(bare)
    found = similarity(model, prompts(), method="cka")
    for number, ids in enumerate(prompts()):
        z = Whole(bare, ids, sink_excluded=False).z[:, 1:]
        expected = [[naive_hsic(x, y) for y in z] for x in z]
        assert rms_ratio(found.sums[number], expected) < 1e-3
    total = found.sums.sum(0)
    norm = np.sqrt(np.outer(total.diagonal(), total.diagonal()))
    assert rms_ratio(found.values, total / norm) < 1e-12


def test_the_output_without_the_sink_is_that_of_the_renormalised_rows():
    bare = build("gpt2")
    (prompt,), _ = read_prompts(lens.load(bare), prompts((17,))[0])
    raw = read_states(lens.load(bare), prompt, sink_excluded=False)
    states = read_states(lens.load(bare), prompt, sink_excluded=True)
    p, q = raw.rows(slice(1, 17)), states.rows(slice(1, 17))
    assert rms_ratio(q, p[..., 1:] / p[..., 1:].sum(-1, keepdim=True)) < 1e-6
    # values from the raw rows (square and causal, so they can be solved for), then the edited rows
    whole = raw.rows(slice(0, 17))
    values = torch.linalg.solve_triangular(whole, raw.output, upper=False)
    assert rms_ratio(states.output[:, 1:], q @ values[:, 1:]) < 1e-3


def states_of(output):
    output = torch.as_tensor(output)
    return cast(HeadStates, SimpleNamespace(output=output, length=output.shape[1], first_row=0))


def test_cka_does_not_change_with_rotation_and_scale_and_is_0_on_average_for_noise():
    random = np.random.default_rng(0)
    x = random.normal(size=(11, 7))
    turned = 3.7 * x @ np.linalg.qr(random.normal(size=(7, 7)))[0] + 5
    same = states_of(np.stack([x, turned]))
    sums = dependence(same, same).numpy()
    assert sums[0, 1] / np.sqrt(sums[0, 0] * sums[1, 1]) == pytest.approx(1, abs=1e-12)
    noise = [states_of(random.normal(size=(2, 11, 7))) for _ in range(300)]
    pairs_of_noise = np.array([dependence(s, s).numpy() for s in noise])
    assert abs(pairs_of_noise[:, 0, 1].mean()) < 0.02 * pairs_of_noise[:, 0, 0].mean()


def test_divergence_is_symmetric_bounded_and_0_for_a_head_with_itself():
    found = similarity(lens.load("induction-2l"), [[64, *range(30)], [64, *range(5, 35)]])
    values = found.values
    assert (values == values.T).all()
    assert values.max() <= np.log(2)
    assert values.diagonal() == pytest.approx(0, abs=1e-12)
    assert found.closeness.diagonal() == pytest.approx(1)


def test_rows_apart_are_log_2_and_the_root_of_the_divergence_is_a_distance():
    """Heads on the first key, on the own one, and half on each: no way round is shorter than the straight one."""
    first, own = torch.zeros(9, 9, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    first[:, 0] = 1
    p = torch.stack([first, own, (first + own) / 2])
    given = SimpleNamespace(output=p, length=9, first_row=1, rows=lambda rows: p[:, rows])
    sums, counts = divergence(cast(HeadStates, given), cast(HeadStates, given))
    values = (sums / counts).numpy()
    half = (np.log(4 / 3) + np.log(2 / 3) / 2 + np.log(2) / 2) / 2
    expected = [[0, np.log(2), half], [np.log(2), 0, half], [half, half, 0]]
    np.testing.assert_allclose(values, expected, atol=1e-6)
    model = lens.load("induction-2l")
    for each in (values, similarity(model, induction_prompts(model, 2)).values):
        root = np.sqrt(each.clip(0))
        assert (root[:, :, None] <= root[:, None] + root.T[None] + 1e-9).all()


def induction_prompts(model, n=6):
    return [lens.tasks.copied(model, 25, seed) for seed in range(n)]


def test_the_three_induction_heads_are_closest_to_each_other_and_above_the_floor():
    model = lens.load("induction-2l")
    found = similarity(model, induction_prompts(model), floor=True)
    induction = {"L1H0", "L1H2", "L1H3"}
    table = found.table()
    assert set(table["first"][:3]) | set(table["second"][:3]) == induction
    assert (table["value"][:3] < table["floor"][:3]).all()
    assert set(found.neighbours("L1H0", 2)["name"]) == induction - {"L1H0"}
    with pytest.raises(LensError, match="count must be a positive integer, got -1"):
        found.neighbours("L1H0", -1)  # which gave all but the farthest


def test_the_floor_compares_each_prompt_with_the_next():
    bare = build("gpt2")
    model = lens.load(bare)
    texts = prompts((15, 15, 15))
    whole = [Whole(bare, ids, False).p[:, 1:] for ids in texts]
    model = lens.load(build("gpt2"))
    found = similarity(model, texts, floor=True)
    expected = np.zeros((18, 18))
    for left, right in ((0, 1), (1, 2), (2, 0)):
        a, b = whole[left][:, None], whole[right][None]
        m = (a + b) / 2
        for one in (a, b):
            one = np.broadcast_to(one, m.shape)
            safe = np.where(one > 0, one, 1)
            expected += (one * np.log(safe / np.where(m > 0, m, 1))).sum((2, 3)) / 2
    assert found.floor is not None
    assert rms_ratio(found.floor, expected / (3 * 14)) < 1e-4


@pytest.mark.parametrize("by", BYS)
def test_the_interval_holds_the_value_and_comes_from_whole_prompts(by):
    model = lens.load("induction-2l")
    found = similarity(model, induction_prompts(model, 5), method=by)
    low, high = found.interval(seed=1)
    off = ~np.eye(8, dtype=bool)
    assert (low <= found.values + 1e-9).all()
    assert (found.values <= high + 1e-9).all()
    assert (low[off] < high[off]).all()
    drawn = np.stack(list(found.resampled(1000, seed=1)))
    above = np.triu_indices(8, 1)
    values = found.values[above]
    expected = values + longer(5) * (np.percentile(drawn, 2.5, axis=0) - values)
    assert rms_ratio(low[above], np.maximum(expected, 0 if by == "js" else -1)) < 1e-9
    assert rms_ratio(low.T, low) < 1e-12
    one = similarity(model, induction_prompts(model, 1), method=by)
    assert np.isnan(one.interval()[0]).all()
    with pytest.raises(LensError, match="one prompt cannot be resampled"):
        one.resampled(3, 0)


def test_block_maps_give_a_lower_bound_and_the_value_itself_at_blocks_of_one():
    model = lens.load("induction-2l")
    texts = induction_prompts(model, 2)
    exact = similarity(model, texts).values
    for size, tolerance in ((1, 1e-4), (7, None)):
        found = similarity(lens.capture(model, texts, block_size=size))
        assert found.exactness == "lower bound"
        if tolerance:
            assert rms_ratio(found.values, exact) < tolerance
        else:
            assert (found.values <= exact + 1e-6).all()
            assert found.values.max() > 0.05
            (said,) = found.findings()
            assert "divergence of attention (nats), lower bound by block maps " in said
    one = lens.capture(model, texts, block_size=64)
    with pytest.raises(LensError, match="lie in one block, in which heads cannot differ; capture"):
        similarity(one)


def test_a_constant_output_is_not_scored():
    sums = np.array([[[2.0, 0.0], [0.0, 0.0]]])
    found = HeadSimilarity(
        sums, np.ones_like(sums), "cka", False, "exact", (HeadId(0, 0), HeadId(0, 1)), "toy"
    )
    assert found.values[0, 0] == pytest.approx(1)
    assert np.isnan(found.values[1]).all()


def test_what_cannot_be_compared_is_refused():
    model = lens.load("induction-2l")
    one, two = [64, *range(9)], [64, *range(12)]
    cases = [
        (
            lambda: similarity(model, one, method="kl"),
            "method must be one of 'js', 'log_odds', 'cka', got 'kl'",
        ),
        (lambda: similarity(model, [64]), "a prompt of 1 tokens has no query"),
        (lambda: similarity(model, [64, 1, 2], method="cka"), "CKA needs 4 rows"),
        (lambda: similarity(model, one, floor=True), "give at least two"),
        (lambda: similarity(model, [one, two], floor=True), "prompts of one length, got 10 and 13"),
        (lambda: similarity([]), "takes a loaded model and prompts, or traces"),
    ]
    for call, message in cases:
        with pytest.raises(LensError, match=message):
            call()
    p = probabilities(1, 2, 17, 0)
    with pytest.raises(LensError, match="no block_mass"):
        similarity(trace_of(p, without=("block_mass",)))
    with pytest.raises(LensError, match="has learned sinks"):
        similarity(trace_of(p, learned_sinks=True))
    with pytest.raises(LensError, match="must come from one model"):
        similarity([trace_of(p), trace_of(p, model="other")])


def test_a_model_with_one_head_has_no_pairs():
    found = similarity([trace_of(probabilities(1, 1, 17, seed)) for seed in range(3)])
    assert "1 head, 3 prompts)" in repr(found)
    assert found.findings() == ()
    assert found.table().empty
    assert "a single head, no pairs" in found.plot().layout.title.text
    row = found.redundancy().iloc[0]
    assert (row["name"], row["nearest"]) == ("L0H0", "")
    assert np.isnan(row[["value", "low", "high"]].to_numpy(float)).all()


def test_it_says_what_was_compared():
    model = lens.load("induction-2l")
    shown = repr(similarity(model, induction_prompts(model, 2), sink_excluded=True))
    assert "Jensen-Shannon" in shown
    assert "sink excluded" in shown
    assert "2 prompts" in shown
