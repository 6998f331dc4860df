"""Policies measured in a model and run in it: against the model's own eager attention, and dense runs."""

import dataclasses

import numpy as np
import pytest
import torch

import lens
from lens import policies
from lens.common.results import of_kind
from lens.heads.pruning.gates import StreamingGate
from lens.passes.head_outputs import read_calls
from lens.policies.scores import COLUMNS, PolicyScores
from lens.tasks.prompts import token_losses
from tests.lens.architectures import build


@pytest.fixture(scope="module")
def model():
    return lens.load("text-lm-3l")


@pytest.fixture(scope="module")
def prompts(model):
    return [
        lens.tasks.take(model, lens.tasks.text(name), 96)
        for name in ("moby-dick", "lily", "shakespeare")
    ]


def eager(model, ids):
    """P [layers, heads, tokens, tokens] as transformers computes it."""
    model.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model.model(torch.tensor([ids]), output_attentions=True).attentions
    finally:
        model.model.set_attn_implementation("sdpa")
    return torch.cat(found).double().numpy()


def test_a_shape_keeps_what_the_models_own_attention_says(model, prompts):
    table = policies.evaluate(
        model, prompts, policies.AShape(first=16, last=16), block_size=16
    ).table()
    expected = []
    for ids in prompts:
        p = eager(model, ids)
        block = np.arange(96) // 16
        kept = np.zeros((96, 96), bool)
        for i in range(96):
            for j in range(96):
                near = any(
                    0 <= a - b < 16
                    for a in (i // 16 * 16, i // 16 * 16 + 15)
                    for b in range(j // 16 * 16, j // 16 * 16 + 16)
                )
                kept[i, j] = block[j] == 0 or near
        expected.append((p * kept).sum(-1))
    rows = np.stack(expected)  # [prompts, layers, heads, rows]
    assert np.allclose(table["recall"], rows.mean((0, -1)).ravel(), atol=1e-5)
    assert np.allclose(table["recall_min"], rows.min(-1).mean(0).ravel(), atol=1e-5)
    assert np.allclose(
        table["recall_p5"], np.percentile(rows, 5, axis=-1).mean(0).ravel(), atol=1e-5
    )
    kept_blocks, blocks = 6 + 5 + 4, 21  # the diagonal, the one beside it, the first column
    assert np.allclose(table["density"], kept_blocks / blocks)
    assert list(table.columns[:5]) == ["policy", "layer", "head", "name", "n"]
    assert (
        table["name"] == [f"L{a}H{b}" for a, b in zip(table["layer"], table["head"], strict=True)]
    ).all()
    assert (table["recall_low"] <= table["recall"]).all()
    assert (table["recall"] <= table["recall_high"]).all()
    assert (table["oracle_recall"] >= table["recall"] - 1e-6).all()
    assert (table["gap"] > -1e-6).all()
    assert table["projected_error"].between(0, 2).all()


def test_output_errors_are_those_of_masked_attention(model, prompts):
    found = policies.evaluate(model, prompts[:1], policies.AShape(4, 8), block_size=8)
    values = []
    i = torch.arange(96)
    near = (i // 8 * 8)[:, None] - (i // 8 * 8 + 7)[None] < 8
    kept = (near | (i[None] < 8)) & (i[None] <= i[:, None])
    p = torch.from_numpy(eager(model, prompts[0]))
    for call in read_calls(model, torch.tensor([prompts[0]])):
        value = call.value[0].double().repeat_interleave(6 // call.value.shape[1], 0)
        sparse = p[call.layer] * kept
        sparse = sparse / sparse.sum(-1, keepdim=True)
        whole, less = p[call.layer] @ value, sparse @ value
        values.append(((less - whole).norm(dim=-1) / whole.norm(dim=-1)).mean(-1))
    assert np.allclose(found.of("output_error")[0, ..., 0], torch.stack(values), atol=1e-4)


def test_a_policy_that_keeps_all_leaves_every_bit(model, prompts):
    plain = model.logits(prompts[0])
    with lens.edit(model):
        ours = model.logits(prompts[0])
    assert torch.allclose(plain, ours, atol=1e-3)
    for policy in (
        policies.Full(),
        policies.AShape(96, 96),
        policies.Oracle(share=1.0),
        policies.PerHead({}),
    ):
        with lens.edit(model, lens.edits.Sparse(policy, 16)) as (done,):
            assert torch.equal(model.logits(prompts[0]), ours)
        assert done.density == 1
        assert done.calls == 0


def test_a_run_is_that_of_attention_with_the_blocks_cut_off(model, prompts):
    """Against the model's own eager attention with a mask of the kept pairs."""
    ids = torch.tensor([prompts[1]])
    i = torch.arange(96)
    near = (i // 8 * 8)[:, None] - (i // 8 * 8 + 7)[None] < 8
    kept = (near | (i[None] < 8)) & (i[None] <= i[:, None])
    mask = torch.zeros(1, 1, 96, 96).masked_fill(~kept, -torch.inf)
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model.model(ids, attention_mask=mask).logits[0]
    model.model.set_attn_implementation("sdpa")
    with lens.edit(model, lens.edits.Sparse(policies.AShape(4, 8), 8)) as (done,):
        found = model.logits(prompts[1])
    assert torch.allclose(found, expected, atol=2e-3)
    assert not torch.allclose(found, model.logits(prompts[1]), atol=1e-1)
    blocks, kept_blocks = 12 * 13 // 2, 12 + 11 + 10
    assert done.density == pytest.approx(kept_blocks / blocks)
    assert done.calls == 3
    assert done.skipped_rows == 0


def test_dense_context_and_a_sparse_question(model, prompts):
    ids = prompts[0]
    with lens.edit(model):
        dense = model.logits(ids)
    with lens.edit(model, lens.edits.Sparse(policies.AShape(2, 4), 4, first_row=60)):
        late = model.logits(ids)
    assert torch.equal(late[:60], dense[:60])
    assert not torch.allclose(late[70:], dense[70:], atol=1e-2)
    with lens.edit(model, lens.edits.Sparse(policies.AShape(2, 4), 4, first_row=len(ids))) as (
        done,
    ):
        assert torch.equal(model.logits(ids), dense)
    assert done.calls == 0


def test_single_heads_and_their_own_policies(model, prompts):
    """A head edited alone, and by `PerHead`, is one thing; other heads of the layer keep their bits."""
    alone = lens.edits.Sparse(policies.AShape(2, 4), 4, heads=["L2H3"])
    mixed = lens.edits.Sparse(policies.PerHead({"L2H3": policies.AShape(2, 4)}), 4)
    with lens.edit(model, alone) as (one,):
        first = model.logits(prompts[0])
    with lens.edit(model, mixed) as (_,):
        second = model.logits(prompts[0])
    named = lens.edits.Sparse(mixed.policy, 4, heads=["L2H3", "L0H1"])
    with lens.edit(model, named) as (two,):
        third = model.logits(prompts[0])
    assert one.calls == two.calls == 1
    assert two.edited_rows == one.edited_rows > 0
    assert torch.equal(third, first)
    assert torch.allclose(first, second, atol=1e-5)
    assert not torch.allclose(first, model.logits(prompts[0]), atol=1e-3)


def test_every_decoding_step_is_sparse_where_the_policy_has_a_form_for_it(model, prompts):
    ids = prompts[1][:40]
    with lens.edit(model, lens.edits.Sparse(policies.AShape(2, 4), (1, 1))) as (done,):
        written = model.generate(ids, max_new_tokens=6)[0].tolist()
    assert done.steps == 6
    assert done.calls == 18
    # Token by token from scratch, the same rows see the same keys.
    again = list(ids)
    for _ in range(6):
        with lens.edit(model, lens.edits.Sparse(policies.AShape(2, 4), (1, 1))):
            again.append(int(model.logits(again)[-1].argmax()))
    assert written == again
    lines = policies.VerticalSlash(2, 2, first=1, last=1, probe=8)
    with lens.edit(model, lens.edits.Sparse(lines, (8, 1))) as (done,):
        model.generate(ids, max_new_tokens=4)
    assert done.calls == 3  # the prompt alone: it does not decode


def test_heads_that_the_model_has_not_got_are_refused(model, prompts):
    elsewhere = policies.PerHead({"L9H0": policies.AShape(2, 4)})
    for policy in (elsewhere, policies.Oracle(like=elsewhere)):
        with pytest.raises(lens.LensError, match="there is no L9H0"):
            policies.evaluate(model, prompts, policy)
    with (
        pytest.raises(lens.LensError, match="there is no L9H0"),
        lens.edit(model, lens.edits.Sparse(elsewhere)),
    ):
        pass


def test_the_loss_is_that_of_a_run_and_paired(model, prompts):
    policy = policies.AShape(4, 8)
    found = policies.evaluate(model, prompts, [policy, policies.Full()], block_size=8, loss=True)
    for place, ids in enumerate(prompts):
        with lens.edit(model, lens.edits.Sparse(policy, 8)):
            expected = float(token_losses(model, ids).mean())
        assert found.sparse_loss[0, place] == pytest.approx(expected, abs=1e-5)
    change = found.summary()["loss_change"].to_numpy()
    assert change[1] == pytest.approx(0, abs=1e-5)
    assert change[0] == pytest.approx(float((found.sparse_loss[0] - found.dense_loss).mean()))


def test_sentences_follow_the_numbers():
    values = np.zeros((1, len(COLUMNS), 1, 2, 2))
    names = ["density", "recall", "oracle_recall", "random_recall", "output_error"]
    for name, numbers in zip(
        names, ([0.25, 0.25], [0.8, 1.0], [0.95, 1.0], [0.3, 0.3], [0.4, 0.0]), strict=True
    ):
        values[0, list(COLUMNS).index(name), 0] = np.array(numbers)[:, None]
    found = PolicyScores(
        values=values,
        dense_loss=np.array([2.0, 3.0]),
        sparse_loss=np.array([[2.5, 3.5]]),
        policies=("AShape(first=1)",),
        references=(False,),
        layers=(3,),
        block_sizes=((16, 16),),
        tokens=(64, 96),
        unprojected="",
        seed=0,
        model="m",
    )
    said = {sentence.kind: str(sentence) for sentence in found.findings()}
    assert said["recall"] == (
        "AShape(first=1) keeps 25.0% of the blocks and 90.0% [90.0%, 90.0%] of the attention; the best choice of "
        "as many blocks keeps 97.5%, a random one 30.0%."
    )
    assert said["heads"].startswith(
        "1 of 2 heads keep less than 90% under AShape(first=1), with the whole interval: L3H0; the poorest"
    )
    assert "80.0% [80.0%, 80.0%], and its output is off by 40.0% [40.0%, 40.0%]" in said["heads"]
    assert "changes by +0.5000 [0.5000, 0.5000] nats per token from 2.5000" in said["loss"]
    assert said["limit"].startswith("Measured on 2 prompts of 64 to 96 tokens")
    better = dataclasses.replace(
        found, values=np.where(values == 0.8, 0.99, values), dense_loss=np.full(2, np.nan)
    )
    assert {sentence.kind for sentence in better.findings()} == {"recall", "limit"}
    wide = values.copy()  # below on the mean alone
    wide[0, list(COLUMNS).index("recall"), 0, 0] = 0.65, 0.95
    assert not of_kind(dataclasses.replace(found, values=wide).findings(), "heads")
    alone = dataclasses.replace(
        found,
        values=values[..., :1],
        dense_loss=np.ones(1),
        sparse_loss=np.full((1, 1), 3.0),
        tokens=(64,),
    )
    assert {sentence.kind for sentence in alone.findings()} == {"recall", "loss", "limit"}
    several = dataclasses.replace(
        alone, values=np.repeat(alone.values, 2, 0), sparse_loss=np.full((2, 1), 3.0),
        policies=("A", "B"), references=(False, False), block_sizes=((16, 16),) * 2,
    )  # fmt: skip
    assert not of_kind(several.findings(), "best")  # one prompt, the same loss: none is cheapest


def test_the_cheapest_of_several_is_named_beside_bounds_and_draws(model, prompts):
    offered = [
        policies.AShape(2, 4),
        policies.AShape(4, 40),
        policies.Full(),
        policies.RandomBlocks(share=0.3, ends=True),
    ]
    found = policies.evaluate(model, prompts, offered, block_size=8, loss=True)
    (best,) = of_kind(found.findings(), "best")
    change = found.summary().set_index("policy")["loss_change"]
    assert change["AShape(first=4, last=40)"] < change["AShape(first=2, last=4)"]
    assert best.startswith("Of 2 policies in all heads AShape(first=4, last=40) costs least")
    assert "beside it: Full() +0.0000 at 100.0%; RandomBlocks(share=0.3, ends=True) +" in best
    worst = dataclasses.replace(found, sparse_loss=found.sparse_loss[[1, 0, 2, 3]])
    assert of_kind(worst.findings(), "best")[0].startswith(
        "Of 2 policies in all heads AShape(first=2"
    )
    assert not of_kind(policies.evaluate(model, prompts, offered, block_size=8).findings(), "best")
    steady = found.dense_loss + np.array([[0.3], [0.2], [0.0], [0.5]])
    (told,) = of_kind(dataclasses.replace(found, sparse_loss=steady).findings(), "best")
    assert "AShape(first=4, last=40) costs least: +0.2" in told
    steady[0, 0] = found.dense_loss[0] - 1  # cheaper in one prompt, dearer in the others
    steady[0, 1] = found.dense_loss[1] + 2
    (alike,) = of_kind(dataclasses.replace(found, sparse_loss=steady).findings(), "best")
    assert "last=40) costs least, not told apart from AShape(first=2, last=4): +0.2" in alike


def test_pictures_have_as_many_tokens_as_patches():
    vit, digit = lens.load("vit-digits"), np.zeros((8, 8), np.uint8)
    found = policies.evaluate(vit, digit, policies.AShape(1, 4), block_size=4, first_row=2)
    length = lens.capture(vit, digit, progress=False).length
    assert found.tokens == (length,)
    assert f"of {length} to {length} tokens" in of_kind(found.findings(), "limit")[0]
    shown = policies.maps(vit, digit, policies.AShape(1, 4), block_size=4)
    assert f"in one prompt of {length} tokens" in shown.findings()[0]
    with pytest.raises(lens.LensError, match=f"first_row is 500, and a prompt has {length} tokens"):
        policies.evaluate(vit, digit, policies.AShape(1, 4), first_row=500)


def test_policies_that_write_themselves_alike_have_names_of_their_own(model, prompts):
    near = [policies.PerHead({"L0H0": policies.AShape(1, last)}) for last in (4, 8)]
    found = policies.evaluate(model, prompts[:1], near, block_size=4)
    assert found.policies == (
        "PerHead(1 heads: AShape, Full)",
        "PerHead(1 heads: AShape, Full) (2)",
    )
    shown = policies.maps(model, prompts[0], near, block_size=4)
    kept = [shown.of("L0H0", name)[1].sum() for name in found.policies]
    assert kept[0] < kept[1]


def test_later_rows_alone_can_count(model, prompts):
    policy = policies.AShape(4, 8)
    late = policies.evaluate(model, prompts[:1], policy, block_size=8, first_row=40)
    p = eager(model, prompts[0])
    i = np.arange(96)
    kept = ((i // 8 * 8)[:, None] - (i // 8 * 8 + 7)[None] < 8) | (i[None] < 8)
    recall = (p * kept).sum(-1)[..., 40:].mean(-1)
    assert np.allclose(late.of("recall")[0, ..., 0], recall, atol=1e-5)
    whole = policies.evaluate(model, prompts[:1], policy, block_size=8)
    assert np.array_equal(late.of("density"), whole.of("density"))


def test_minference_takes_what_keeps_most_of_late_rows(model, prompts):
    grid = (
        policies.AShape(2, 8),
        policies.VerticalSlash(8, 4, first=1, last=1, probe=8),
        policies.BlockSparse(share=0.125),
    )
    chosen = policies.minference(model, prompts[0], candidates=grid, first_row=40, block_size=8)
    found = policies.evaluate(model, prompts[:1], grid, block_size=8, first_row=40)
    recall = found.of("recall")[..., 0]
    for layer, head in np.ndindex(recall.shape[1:]):
        assert chosen.of((layer, head)) == grid[int(recall[:, layer, head].argmax())]
    assert len(set(map(str, chosen.policies.values()))) > 1
    with pytest.raises(lens.LensError, match="first_row is 2500, and a prompt has 96 tokens"):
        policies.minference(model, prompts[0])


def test_gates_of_duo_attention_become_policies(model):
    share = model.info.heads // model.info.kv_heads
    alpha = np.linspace(1, 0, 3 * model.info.kv_heads).reshape(3, -1)
    gate = StreamingGate(
        alpha=alpha, losses=np.zeros(1), heads=model.info.heads, first=3, last=9, penalty=0.05,
        rate=0.02, seed=0, n=1, model=model.name,
    )  # fmt: skip
    policy = policies.from_gates(gate, full=1 / 3, last=16)
    for head in model.info.every_head:
        expected = policies.Full() if head.layer == 0 else policies.AShape(3, 16)
        assert policy.of(head) == expected
    most = policies.from_gates(gate, full=2 / alpha.size)
    assert sum(isinstance(one, policies.Full) for one in most.policies.values()) == 2 * share
    with pytest.raises(lens.LensError, match="full must be a share"):
        policies.from_gates(gate, full=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"policy": "AShape"}, "policy must be one of lens.policies"),
        ({"policy": []}, "at least one policy"),
        ({"policy": policies.Full(), "block_size": 0}, "block_size must be"),
        ({"policy": policies.Full(), "block_size": (8, 8, 8)}, "block_size must be"),
        ({"policy": policies.Full(), "block_size": 2.5}, "block_size must be"),
    ],
)
def test_bad_arguments_are_refused_before_any_pass(model, prompts, arguments, said):
    with pytest.raises(lens.LensError, match=said):
        policies.evaluate(model, prompts, **arguments)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@torch.no_grad()
def test_blocks_begin_with_the_first_token_behind_padding_and_in_a_windows_cache(kind):
    network = build(kind)
    model = lens.load(network)
    ids = torch.randint(3, 40, (2, 26), generator=torch.Generator().manual_seed(2))
    real = torch.ones_like(ids)
    real[0, :5] = 0
    places = (real.cumsum(-1) - 1).clamp(min=0)
    for sizes in ((4, 4), (1, 4)):
        with lens.edit(model, lens.edits.Sparse(policies.AShape(4, 3), sizes, first_row=6)):
            batch = network(ids, attention_mask=real, position_ids=places).logits
            alone = [network(ids[:1, 5:]).logits[0], network(ids[1:]).logits[0]]
        assert (batch[0, 5:] - alone[0]).abs().max() < 1e-4
        assert (batch[1] - alone[1]).abs().max() < 1e-4
    with lens.edit(model, lens.edits.Sparse(policies.AShape(4, 3), (1, 4), first_row=6)):
        cache, found = None, []
        for start, end in [(0, 18), *((at, at + 1) for at in range(18, 26))]:
            given = {"attention_mask": real[:, :end], "position_ids": places[:, start:end]}
            made = network(ids[:, start:end], past_key_values=cache, use_cache=True, **given)
            cache, found = made.past_key_values, [*found, made.logits]
    assert (torch.cat(found, 1) - batch)[real.bool()].abs().max() < 1e-4
    assert (network(ids[1:]).logits[0] - alone[1]).abs().max() > 1e-2
