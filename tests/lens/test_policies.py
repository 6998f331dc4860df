"""Every policy against an independent slow twin, and the identities of recall, error and budgets."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lens
from lens import policies
from lens.common.errors import LensError
from lens.passes.blocks import BlockView
from lens.passes.calls import LayerCall, attend
from lens.passes.structures import MaskStructure
from lens.policies.grids import Pattern
from lens.policies.measures import BUDGETS, Dense, measure, ranked
from tests.lens import naive_policies as naive

EVERY = [
    policies.AShape(3, 9),
    policies.VerticalSlash(5, 7, first=2, last=3, probe=6),
    policies.BlockSparse(2),
    policies.BlockSparse(share=0.3),
    policies.FlexPrefill(least=8),
    policies.XAttention(0.8, stride=4),
    policies.Sparge(similarity=0.1, mass=0.6),
    policies.Quest(16, dense_layers=0),
    policies.Oracle(top=2),
    policies.Oracle(mass=0.7),
    policies.RandomBlocks(share=0.4),
    policies.LargestEntry(0.05),
    policies.LargestEntry(0.0),
    policies.Landmark(2),
    policies.NativeSparse(4),
    policies.LongHeads(4),
    policies.Hierarchical(3),
    policies.Strided(2, 3),
    policies.Routing(3, last=8),
    policies.PerHead({"L0H1": policies.AShape(2, 4)}, policies.BlockSparse(2)),
    policies.GlobalToLocal(0, 8, first=2),
    policies.Full(),
]


def call(tokens=53, heads=4, kv_heads=2, dim=8, seed=0, sharpness=2.0):
    """Random q, k, v of one causal layer."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, count, tokens, dim, generator=generator)
        for count in (heads, kv_heads, kv_heads)
    )
    return LayerCall(q * sharpness, k, v, MaskStructure(causal=True), scale=dim**-0.5)


def measured(view, kept):
    """What is measured of each head, without an output projection."""
    dense = Dense(view.attended(statistics=("lse",)).output, None)
    return measure(
        view, kept, 0.0, dense, [ranked(view, number) for number in range(view.shape[1])]
    )


def head(view, number):
    """q and k of one head as float64 arrays."""
    return view.query[0, number].double().numpy(), view.key[0, number].double().numpy()


TWINS = {
    "a_shape": (policies.AShape(3, 9), (8, 8), lambda q, k, size: naive.a_shape(q, k, size, 3, 9)),
    "a_shape, uneven blocks": (
        policies.AShape(5, 2),
        (4, 16),
        lambda q, k, size: naive.a_shape(q, k, size, 5, 2),
    ),
    "vertical_slash": (
        policies.VerticalSlash(5, 7, first=2, last=3, probe=6),
        (8, 8),
        lambda q, k, size: naive.vertical_slash(q, k, size, 5, 7, 2, 3, 6),
    ),
    "vertical_slash, single columns": (
        policies.VerticalSlash(4, 4, first=1, last=1, probe=9),
        (8, 1),
        lambda q, k, size: naive.vertical_slash(q, k, size, 4, 4, 1, 1, 9),
    ),
    "block_sparse": (
        policies.BlockSparse(2),
        (8, 8),
        lambda q, k, size: naive.block_sparse(q, k, size, 2),
    ),
    "flex_prefill, lines": (
        policies.FlexPrefill(gamma=0.7, tau=0.0, least=8),
        (8, 8),
        lambda q, k, size: naive.flex_prefill(q, k, size, 0.7, 0.0, 8),
    ),
    "flex_prefill, aware": (
        policies.FlexPrefill(gamma=0.7, tau=0.9, least=8),
        (8, 8),
        lambda q, k, size: naive.flex_prefill(q, k, size, 0.7, 0.9, 8),
    ),
    "flex_prefill, some of both": (
        policies.FlexPrefill(gamma=0.8, tau=0.18, least=1),
        (8, 8),
        lambda q, k, size: naive.flex_prefill(q, k, size, 0.8, 0.18, 1),
    ),
    "xattention": (
        policies.XAttention(0.8, stride=4),
        (8, 8),
        lambda q, k, size: naive.xattention(q, k, size, 0.8, 4),
    ),
    "sparge": (
        policies.Sparge(similarity=0.15, mass=0.6),
        (8, 4),
        lambda q, k, size: naive.sparge(q, k, size, 0.15, 0.6),
    ),
    "quest": (
        policies.Quest(16, dense_layers=0),
        (1, 4),
        lambda q, k, size: naive.quest(q, k, size[1], 16),
    ),
    "oracle": (policies.Oracle(top=2), (8, 8), lambda q, k, size: naive.oracle(q, k, size, 2)),
    "landmark": (policies.Landmark(2), (8, 8), lambda q, k, size: naive.landmark(q, k, size, 2)),
    "largest_entry": (
        policies.LargestEntry(0.2),
        (8, 8),
        lambda q, k, size: naive.largest_entry(q, k, size, 0.2),
    ),
    "oracle, mass": (
        policies.Oracle(mass=0.7),
        (8, 4),
        lambda q, k, size: naive.oracle_mass(q, k, size, 0.7),
    ),
    "hierarchical": (
        policies.Hierarchical(3, levels=2),
        (8, 4),
        lambda q, k, size: naive.hierarchical(q, k, size, 3, 2),
    ),
    "routing": (
        policies.Routing(3, last=2, rounds=4),
        (8, 8),
        lambda q, k, size: naive.routing(
            q,
            k,
            size,
            3,
            2,
            4,
            torch.randperm(2 * -(-len(q) // 8), generator=torch.Generator().manual_seed(0)).numpy(),
        ),
    ),
    "global_to_local": (
        policies.GlobalToLocal(0, 8, first=3),
        (4, 4),
        lambda q, k, size: naive.global_to_local(q, k, size, 8, 3),
    ),
    "global_to_local, uneven blocks": (
        policies.GlobalToLocal(0, 6),
        (4, 8),
        lambda q, k, size: naive.global_to_local(q, k, size, 6, 0),
    ),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("tokens", [53, 64])
def test_a_policy_keeps_what_its_twin_keeps(name, tokens):
    policy, size, twin = TWINS[name]
    view = BlockView(call(tokens), *size)
    kept = policy.keep(view).blocks & view.visible
    for number in range(4):
        expected = twin(*head(view, number), size)
        assert np.array_equal(kept[0, number].numpy(), expected), f"head {number}"
    assert kept.any()
    assert name == "quest" or not (kept == view.visible).all()


def test_long_heads_keep_the_chunks_that_their_summaries_say():
    one = call(53)
    view = BlockView(one, 8, 8)
    kept = policies.LongHeads(4).keep(view).blocks & view.visible
    for number in range(4):
        value = one.value[0, number // 2].double().numpy()
        expected = naive.long_heads(*head(view, number), value, (8, 8), 4)
        assert np.array_equal(kept[0, number].numpy(), expected)


@pytest.mark.parametrize(("rows", "tokens"), [(8, 53), (1, 64)])
def test_native_sparse_attention_chooses_once_for_heads_that_share_keys(rows, tokens):
    view = BlockView(call(tokens), rows, 8)
    kept = policies.NativeSparse(4).keep(view).blocks & view.visible
    for pair in range(2):
        heads = [head(view, 2 * pair + number) for number in range(2)]
        expected = naive.native_sparse([q for q, _ in heads], heads[0][1], (rows, 8), 4)
        assert np.array_equal(kept[0, 2 * pair].numpy(), expected)
        assert np.array_equal(kept[0, 2 * pair + 1].numpy(), expected)
    assert not (kept == view.visible).all()
    with pytest.raises(LensError, match="top"):
        policies.NativeSparse(2)


def test_lower_layers_look_everywhere():
    view = BlockView(call(40), 4, 4)
    assert torch.equal(policies.GlobalToLocal(1).keep(view).blocks, view.visible)


def test_flex_prefill_decides_head_by_head():
    """The tau of the twin's third case lies between the distances of its heads: both ways are taken."""
    view = BlockView(call(53), 8, 8)
    policy = policies.FlexPrefill(gamma=0.8, tau=0.18, least=1)
    vertical = torch.stack([torch.tensor(naive.lines(*head(view, n), 8)[0]) for n in range(4)])[
        None
    ]
    aware = policy.distance(view, vertical.float()) < 0.18
    assert 0 < int(aware.sum()) < 4


def test_strided_heads_keep_their_own_stripes_and_all_together_everything():
    view = BlockView(call(64), 8, 8)
    kept = policies.Strided(2, 4).keep(view).blocks & view.visible
    for number in range(4):
        expected = naive.strided(4, number, 8, 2, 4, 0) & np.tri(8, dtype=bool)
        assert np.array_equal(kept[0, number].numpy(), expected)
    assert torch.equal(kept.any(1), view.visible.any(1))
    assert not torch.equal(kept[:, 0], view.visible[:, 0])
    # a far block that a row uses was used by the row before: a cache may forget the rest
    far = torch.arange(1, 8)[:, None] - torch.arange(8) >= 2
    assert not (kept[:, :, 1:] & ~kept[:, :, :-1] & far).any()


@pytest.mark.parametrize("size", [(8, 4), (4, 8), (8, 3)])
def test_rows_keep_their_own_keys_in_blocks_of_any_shape(size):
    view = BlockView(call(53), *size)
    rows, keys = (torch.arange(53) // one for one in size)
    own = torch.zeros(view.shape[2:], dtype=torch.bool)
    own[rows, keys] = True
    for policy in (policies.FlexPrefill(gamma=0.1, tau=0.0, least=0), policies.Strided(1, 1000)):
        assert not (own & ~policy.keep(view).blocks).any(), str(policy)
    near = torch.zeros_like(own)
    for row in range(53):
        block = row // size[1]
        near[row // size[0], max(0, block - 1) : block + 1] = True
    kept = policies.Strided(2, 1000, offset=1).keep(view).blocks & view.visible
    assert torch.equal(kept[0, 0], near & view.visible[0, 0])


@pytest.mark.parametrize("size", [(1, 1), (4, 8)])
def test_near_keys_lie_on_both_sides_where_rows_see_later_ones(size):
    both = replace(call(24), mask=MaskStructure(causal=False))
    view = BlockView(both, *size)
    assert view.looks_ahead
    assert not BlockView(call(24), *size).looks_ahead
    apart = (torch.arange(24)[:, None] - torch.arange(24)).abs()
    kept = policies.AShape(1, 5).keep(view).blocks
    expected = view.any_pair(((apart < 5) | (torch.arange(24) < 1))[None, None])
    assert torch.equal(kept, expected.expand(view.shape))
    assert policies.AShape(0, 1000).keep(view).blocks.all()
    # lines: of each distance the mass of both sides
    lines = policies.VerticalSlash(2, 3, first=0, last=0, probe=6)
    dense = view.probabilities()[..., -6:, :]
    for head in range(4):
        held = torch.stack([dense[0, head][apart[-6:] == one].sum() for one in range(24)])
        by_key = dense[0, head].sum(0)
        pairs = torch.isin(apart, held.topk(3).indices)
        pairs[:, by_key.topk(2).indices] = True
        expected = view.any_pair(pairs[None, None])
        assert torch.equal(lines.keep(view).blocks[0, head], expected[0, 0])
    # a mask that is spelled out sees as far as its entries do
    ahead = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril(2)
    spelled = MaskStructure(causal=False).with_allowed(ahead)
    assert BlockView(replace(both, mask=spelled), 4, 4).looks_ahead
    spelled = MaskStructure(causal=False).with_allowed(ahead.tril())
    assert not BlockView(replace(both, mask=spelled), 4, 4).looks_ahead


@pytest.mark.parametrize("policy", [*EVERY, policies.Oracle(top=2, shared=True)], ids=str)
def test_a_policy_of_one_head_keeps_what_it_keeps_where_all_have_it(policy):
    view = BlockView(call(53), 8, 8)
    mixed = policies.PerHead({"L0H3": policy})
    alone = policy.keep(view)
    found = mixed.keep(view)
    assert torch.equal(
        found.blocks[:, 3] & view.visible[:, 3],
        alone.blocks.expand(view.shape)[:, 3] & view.visible[:, 3],
    )
    assert found.blocks[:, :3].all()
    assert mixed.cost(view) == pytest.approx(policy.cost(view) / 4)


@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_recall_error_and_budgets_hold_for_every_policy(policy):
    """r in [0, 1]; the oracle of each row keeps no less; |o' - o| = (1 - r) |o_dropped - o_kept|."""
    size = (8, 4) if not isinstance(policy, policies.XAttention) else (8, 8)
    view = BlockView(call(), *size)
    kept = policy.choose(view)
    blocks = kept.blocks & view.visible
    dense = view.attended(statistics=("lse",))
    sparse = view.attended(blocks, statistics=("lse",))
    rows = torch.arange(view.queries) // view.query_block
    recall = torch.where(blocks[:, :, rows], view.row_masses, 0).sum(-1)
    assert torch.allclose(recall, (sparse.statistics.lse - dense.statistics.lse).exp(), atol=1e-5)
    assert (recall > -1e-6).all()
    assert (recall < 1 + 1e-5).all()
    assert torch.allclose(view.row_masses.sum(-1), torch.ones_like(recall), atol=1e-5)

    dropped = view.attended(view.visible & ~blocks).output
    missing = (sparse.output - dense.output).norm(dim=-1)
    lived = (recall > 1e-6) & (recall < 1 - 1e-6)
    gap = (1 - recall) * (dropped - sparse.output).norm(dim=-1)
    assert torch.allclose(missing[lived], gap[lived], atol=1e-5)
    bound = 2 * (1 - recall) * view.call.value.norm(dim=-1).max()
    assert (missing[recall > 1e-6] <= bound[recall > 1e-6] + 1e-5).all()

    found = measured(view, kept)
    for number, one in enumerate(found):
        assert one["recall"] == pytest.approx(float(recall[0, number].mean()), abs=1e-5)
        assert one["recall_min"] <= one["recall_p5"] <= one["recall"] + 1e-6
        assert one["oracle_recall"] >= one["recall"] - 1e-6
        assert one["budget_90"] <= one["budget_95"] <= one["budget_99"] <= 1
    if isinstance(policy, policies.Full):
        assert all(one["recall"] == pytest.approx(1, abs=1e-6) for one in found)
        assert all(one["output_error"] == 0 and one["density"] == 1 for one in found)


def test_budgets_count_the_fewest_blocks_of_each_row():
    view = BlockView(call(24), 8, 4)
    found = measured(view, policies.Full().keep(view))
    for number in range(4):
        p = naive.probabilities(*head(view, number))
        needed = {share: [] for share in BUDGETS}
        for i, row in enumerate(p):
            masses = sorted((row[j : j + 4].sum() for j in range(0, 24, 4)), reverse=True)
            seen = (i // 8 * 8 + 7) // 4 + 1
            for share in BUDGETS:
                count = next(n for n in range(1, 7) if sum(masses[:n]) >= share - 1e-7)
                needed[share].append(count / seen)
        for share in BUDGETS:
            assert found[number][f"budget_{share * 100:.0f}"] == pytest.approx(
                np.mean(needed[share])
            )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), top=st.integers(1, 6), tokens=st.integers(2, 40))
def test_a_larger_budget_never_keeps_less(seed, top, tokens):
    view = BlockView(call(tokens, seed=seed), 4, 4)
    less, more = (policies.Oracle(top=count).keep(view).blocks for count in (top, top + 1))
    assert not (less & ~more).any()
    equal = (
        policies.RandomBlocks(like=policies.Oracle(top=top), seed=seed).keep(view).blocks
        & view.visible
    )
    assert torch.equal(equal.sum(-1), (less & view.visible).sum(-1))
    assert (view.masses * less).sum() >= (view.masses * equal).sum() - 1e-5


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), page=st.sampled_from([1, 4, 16]), parts=st.sampled_from([1, 2, 4])
)
def test_no_key_of_a_page_beats_its_bound(seed, page, parts):
    view = BlockView(call(37, seed=seed), 1, page * parts)
    bounds = policies.Quest(16, sub_pages=parts).bounds(view)
    products = view.query @ view.key.transpose(-1, -2)
    for at in range(view.shape[3]):
        inside = products[..., at * page * parts : (at + 1) * page * parts]
        assert (bounds[..., at] >= inside.amax(-1) - 1e-4).all()
    if parts == 1:
        expected = naive.quest_bounds(*head(view, 2), page)
        assert np.allclose(bounds[0, 2].numpy(), expected, atol=1e-4)


def test_queries_that_reuse_a_choice_take_that_of_the_first_of_them():
    view = BlockView(call(64), 1, 4)
    alone, together = (
        policies.Quest(16, reuse=n, dense_layers=0).keep(view).blocks for n in (1, 4)
    )
    for row in range(64):
        expected = alone[:, :, row // 4 * 4].clone()
        expected[..., row // 4] = True  # its own page
        assert torch.equal(together[:, :, row], expected)


def test_random_blocks_are_drawn_for_each_prompt_and_again_alike():
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 2, 3]]).repeat_interleave(8, 1)
    one = call(24)
    three = replace(
        one, query=one.query.expand(3, -1, -1, -1), key=one.key.expand(3, -1, -1, -1),
        value=one.value.expand(3, -1, -1, -1), tokens=tokens,
    )  # fmt: skip
    policy = policies.RandomBlocks(share=0.5)
    kept = policy.keep(BlockView(three, 2, 2)).blocks
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0, 0], kept[0, 1])
    other = policy.keep(
        BlockView(
            replace(three, tokens=None, key=three.key * torch.tensor([1.0, 2, 1]).view(3, 1, 1, 1)),
            2,
            2,
        )
    ).blocks
    assert torch.equal(other[0], other[2])
    assert not torch.equal(other[0], other[1])


def test_a_decoding_step_chooses_anew_and_costs_as_much():
    one = call(64)
    step = BlockView(replace(one, query=one.query[:, :, -1:]), 1, 4)
    each, four = policies.Quest(12, dense_layers=0), policies.Quest(12, reuse=4, dense_layers=0)
    own = torch.arange(16) == 15  # the page of the query itself is added to a choice that is shared
    assert torch.equal(each.choose(step).blocks | own, four.choose(step).blocks)
    assert four.cost(step) == each.cost(step) > 0
    assert four.cost(BlockView(one, 1, 4)) == each.cost(BlockView(one, 1, 4)) / 4


def planted(kind, tokens=64, dim=64):
    """A head of one kind, made of one-hot q and k."""
    place = torch.arange(tokens)
    q, k = torch.zeros(tokens, dim), torch.zeros(tokens, dim)
    if kind == "streaming":  # the first key and the query's own
        k[0, 0] = q[:, 0] = 1
        q[place, place % (dim - 1) + 1] = k[place, place % (dim - 1) + 1] = 1
    elif kind == "needle":  # key 20, from the last rows
        q[48:, 1] = k[20, 1] = 1
    elif kind == "slash":  # the key 24 before
        q[place, place % dim] = 1
        k[place, (place + 24) % dim] = 1
    mask = MaskStructure(causal=True)
    value = torch.randn(1, 1, tokens, 8, generator=torch.Generator().manual_seed(0))
    sharp = 0.0 if kind == "uniform" else 40.0
    return LayerCall(q[None, None] * sharp, k[None, None], value, mask, scale=1.0)


def recall(call, policy, size=(8, 8), rows=slice(None)):
    view = BlockView(call, *size)
    found = torch.where(
        (policy.keep(view).blocks & view.visible)[:, :, torch.arange(view.queries) // size[0]],
        view.row_masses,
        0,
    ).sum(-1)
    return float(found[..., rows].mean())


def test_planted_heads_are_kept_by_the_policy_that_is_made_for_them():
    assert recall(planted("streaming"), policies.AShape(1, 1)) == pytest.approx(1, abs=1e-5)
    lines = policies.VerticalSlash(1, 1, first=0, last=1, probe=16)
    far = slice(24, None)
    assert (
        recall(planted("slash"), lines, rows=far) < 0.3
    )  # one column, and the queries' own diagonal
    lines = policies.VerticalSlash(1, 2, first=0, last=1, probe=16)
    assert recall(planted("slash"), lines, rows=far) == pytest.approx(1, abs=1e-5)
    rows = slice(48, None)
    assert recall(planted("needle"), policies.AShape(8, 8), rows=rows) < 1e-5
    pages = policies.Quest(8, dense_layers=0)
    assert recall(planted("needle"), pages, (1, 8), rows) == pytest.approx(1, abs=1e-5)
    uniform, policy = planted("uniform"), policies.AShape(8, 8)
    view = BlockView(uniform, 8, 8)
    kept = policy.keep(view).blocks[0, 0][-1]
    assert recall(uniform, policy, rows=slice(-1, None)) == pytest.approx(
        float(kept.float().mean())
    )


def test_antidiagonals_see_columns_and_slashes():
    for kind in ("slash", "needle"):
        policy = policies.XAttention(0.9, stride=8)
        assert recall(planted(kind), policy, rows=slice(48, None)) > 0.99


def test_grids_keep_what_their_pattern_says():
    height, width, first = 4, 6, 2
    tokens = first + height * width
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(3))
    view = BlockView(LayerCall(q, k, v, MaskStructure(causal=False), scale=1.0), 1, 1)
    rules: dict[Pattern, Callable[..., bool]] = {
        "axial": lambda a, b: a[0] == b[0],
        "criss-cross": lambda a, b: a[0] == b[0] or a[1] == b[1],
        "window": lambda a, b: (a[0] // 2, a[1] // 2) == (b[0] // 2, b[1] // 2),
        "shifted": lambda a, b: (
            ((a[0] + 1) // 2, (a[1] + 1) // 2) == ((b[0] + 1) // 2, (b[1] + 1) // 2)
        ),
        "neighbourhood": lambda a, b: (
            abs(min(max(a[0], 1), height - 2) - b[0]) <= 1
            and abs(min(max(a[1], 1), width - 2) - b[1]) <= 1
        ),
    }
    for pattern, near in rules.items():
        radius = 1 if pattern == "neighbourhood" else 2
        kept = (
            policies.Grid(pattern, height, width, radius=radius, first=first)
            .keep(view)
            .blocks[0, 0]
        )
        for i in range(tokens):
            for j in range(tokens):
                both = i >= first and j >= first
                places = [divmod(at - first, width) for at in (i, j)]
                assert bool(kept[i, j]) == (near(*places) if both else True), (pattern, i, j)
    counts = (
        policies.Grid("neighbourhood", height, width, radius=1, first=first)
        .keep(view)
        .blocks[0, 0, first:, first:]
    )
    assert (counts.sum(-1) == 9).all()
    dilated = policies.Grid("dilated", 8, 8, radius=1, step=2)._near(torch.device("cpu"))
    assert (dilated.sum(-1) == 9).all()
    assert dilated[0].nonzero()[:, 0].tolist() == [0, 2, 4, 16, 18, 20, 32, 34, 36]


def test_regions_see_the_regions_that_fit_best():
    height = width = 4
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 16, 8, generator=generator) for _ in range(3))
    view = BlockView(LayerCall(q, k, v, MaskStructure(causal=False), scale=1.0), 1, 1)
    kept = policies.Regions(height, width, rows=2, columns=2, top=2).keep(view).blocks[0]
    region = [(at // 4 // 2) * 2 + at % 4 // 2 for at in range(16)]
    members = [[at for at in range(16) if region[at] == one] for one in range(4)]
    for number in range(2):
        scores = np.array(
            [[q[0, number, a].mean(0) @ k[0, number, b].mean(0) for b in members] for a in members]
        )
        for i in range(16):
            chosen = naive.best(scores[region[i]], 2)
            assert kept[number, i].tolist() == [region[j] in chosen for j in range(16)]


def test_hierarchical_misses_grow_with_the_levels_and_a_flat_search_by_means_is_the_pooled_one():
    view = BlockView(call(64), 8, 4)
    policy = policies.Hierarchical(4, levels=2)
    misses = policy.misses(view)
    assert len(misses) == 3
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(misses))
    flat = policies.Hierarchical(3, levels=0, representative="mean", first=0)
    left = flat.by_level(view)[-1]
    assert torch.equal(left, policies.BlockSparse(3).keep(view).blocks & view.visible)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: policies.AShape(-1, 4), "first of AShape"),
        (lambda: policies.AShape(1, 0), "last of AShape"),
        (lambda: policies.Oracle(), "exactly one of top, share, mass, like; got none"),
        (lambda: policies.Oracle(top=1, mass=0.5), "got top and mass"),
        (lambda: policies.RandomBlocks(like=cast(Any, "a")), "like must be a policy"),
        (lambda: policies.BlockSparse(1, 0.5), "top or share"),
        (lambda: policies.XAttention(1.5), "threshold of XAttention"),
        (lambda: policies.FlexPrefill(gamma=0), "gamma of FlexPrefill"),
        (lambda: policies.LargestEntry(-0.1), "threshold of LargestEntry must be from 0 on"),
        (lambda: policies.Sparge(2.0), "similarity of Sparge must be a cosine"),
        (lambda: policies.PerHead(cast(Any, "L0H0")), "takes a mapping.*got str"),
        (lambda: policies.PerHead({"L0H0": cast(Any, "a")}), "takes policies"),
        (lambda: policies.Grid(cast(Any, "diagonal"), 2, 2), "pattern must be one of"),
        (lambda: policies.Regions(5, 5), "do not divide"),
        (lambda: lens.edits.Sparse(cast(Any, "a")), "takes a policy"),
        (lambda: lens.edits.Sparse(policies.Full(), first_row=-1), "first_row of Sparse"),
        (lambda: lens.edits.Sparse(policies.Full(), 0), "block_size must be a positive integer"),
        (lambda: lens.edits.Sparse(policies.Full(), cast(Any, 2.5)), "block_size must be"),
        (
            lambda: lens.edits.Sparse(policies.Full(), first_row=cast(Any, 1.5)),
            "first_row of Sparse",
        ),
        (lambda: policies.XAttention(stride=8).keep(BlockView(call(), 4, 4)), "multiples of it"),
        (lambda: policies.Grid("axial", 9, 9).keep(BlockView(call(), 1, 1)), "81 patches"),
    ],
)
def test_bad_values_are_refused_in_words(make, said):
    with pytest.raises(lens.LensError, match=said):
        make()


def test_padding_and_windows_count_as_what_they_are():
    padding = torch.ones(2, 24, dtype=torch.bool)
    padding[0, :10] = False
    one = call(24)
    query, key, value = (torch.cat([part, part]) for part in (one.query, one.key, one.value))
    twice = LayerCall(
        query,
        key,
        value,
        MaskStructure(causal=True, window=9, padding=padding),
        scale=one.scale,
    )
    view = BlockView(twice, 4, 4)
    expected = view.any_pair(view.sees()).expand(view.shape)
    assert torch.equal(view.visible, expected)
    assert not view.visible[0, :, :, :2].any()
    assert view.visible[1, :, 0, 0].all()
    plain = BlockView(
        LayerCall(one.query, one.key, one.value, MaskStructure(True, 9), scale=one.scale), 4, 4
    )
    assert torch.equal(plain.visible, plain.any_pair(plain.sees()).expand(plain.shape))
    sinks = torch.rand(one.query.shape[1])
    for rows in (view, plain, replace(plain, call=replace(plain.call, sink_logits=sinks))):
        masses = attend(
            rows.call, block_size=(1, 4), statistics=("block_mass",)
        ).statistics.block_mass
        assert torch.allclose(rows.row_masses, masses)
        dense = rows.probabilities()
        blocks = torch.nn.functional.pad(dense, (0, 0)).unflatten(-1, (-1, 4)).sum(-1)
        assert torch.allclose(rows.row_masses, blocks, atol=1e-5)
