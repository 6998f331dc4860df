"""Scores of tokens: published identities, conservation of relevance, and deletion that rewards no method for keeping more."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.passes.interface import switched
from lens.reading import _maps, attributing, judging, perturbing
from lens.reading._answers import Answer
from lens.reading._relevance import Gradients
from lens.reading._rows import dense, with_values
from lens.reading.judged import Faithfulness
from lens.reading.robustness import Robustness
from tests.lens.layouts import layout_model


def prompt(length=11):
    return torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def models():
    made: dict = {}

    def get(kind: str, **changed):
        key = (kind, *changed.items())
        if key not in made:
            made[key] = lens.load(layout_model(kind, **changed))
        return made[key]

    return get


@pytest.fixture(scope="module")
def copying():
    model = lens.load("induction-2l")
    return model, [lens.tasks.copied(model, 10, seed) for seed in range(4)]


def random_maps(layers=3, heads=2, tokens=6):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    return list(
        logits.masked_fill(~torch.ones(tokens, tokens).tril().bool(), -torch.inf).softmax(-1)
    )


def test_rollout_rows_sum_to_one_and_is_the_product_of_the_layers():
    maps = random_maps()
    found = _maps.rollout(maps)
    assert torch.allclose(found.sum(-1), torch.ones(6, dtype=torch.float64))
    eye = torch.eye(6, dtype=torch.float64)
    one, two, three = ((attention.mean(0) + eye) / 2 for attention in maps)
    assert torch.allclose(found, three @ two @ one)
    assert torch.allclose(_maps.rollout([eye[None]] * 4), eye)


def test_flow_on_two_layers_is_the_value_by_hand():
    """Query 1 gives key 0 a half, twice; half of each capacity is its own place."""
    attention = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]], dtype=torch.float64)
    found = _maps.flow([attention, attention], row=1)
    # capacities: 0.25 to the left, 0.75 to itself: two ways lead to token 0 (0.25 early, 0.25 late), one to 1
    assert found.tolist() == pytest.approx([0.5 / 1.25, 0.75 / 1.25], abs=1e-5)
    with pytest.raises(LensError, match="at most 128 tokens, got 130"):
        _maps.flow([torch.eye(130)[None]], row=3)


def test_effective_attention_writes_the_same_and_is_smallest():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    row = torch.rand(9, generator=generator, dtype=torch.float64)
    seen = torch.arange(9) < 7
    row = row * seen / (row * seen).sum()
    found = _maps.effective(row, values, seen)
    assert torch.allclose(found @ values, row @ values)
    assert float(found.sum()) == pytest.approx(1)
    assert float(found[7:].abs().max()) == 0
    assert float(found.norm()) < float(row.norm())
    few = torch.arange(9) < 4  # four keys, three dimensions and ones: nothing is free
    assert torch.allclose(_maps.effective(row * few, values, few), row * few)


def test_sizes_of_what_is_written_are_those_of_the_parts_of_the_output(models):
    model = models("llama")
    answer = Answer(model, prompt())
    found = Gradients(answer)
    block = answer.layout.blocks[-1]
    attention, values = found.attention[-1][0], found.values[-1]
    sizes = attributing.scored(answer, "norm")
    for key in range(answer.tokens):
        written = sum(
            attention[head, -1, key] * values[head, key] @ block.output[head].double()
            for head in range(model.info.heads)
        )
        assert float(sizes[key]) == pytest.approx(float(written.norm()), rel=1e-6)


def test_gradient_rollout_by_hand():
    maps = random_maps(layers=2)
    slopes = [one.flip(0) - 0.3 for one in maps]
    found = _maps.gradient_rollout(list(zip(maps, slopes, strict=True)))
    relevance = torch.eye(6, dtype=torch.float64)
    for attention, slope in zip(maps, slopes, strict=True):
        mean = sum(torch.relu(a * s) for a, s in zip(attention, slope, strict=True)) / 2
        relevance = relevance + mean @ relevance
    assert torch.allclose(found, relevance - torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "changed"),
    [("llama", {"attention_bias": False}), ("qwen3", {}), ("granite", {}), ("mistral", {})],
)
def test_relevance_is_conserved_without_biases(models, kind, changed):
    """CP-LRP sums to the logit; AttnLRP with what its softmaxes keep, which is what makes it another sum."""
    answer = Answer(models(kind, **changed), prompt())
    sums = {}
    for rule in ("plain", "attnlrp", "cp_lrp"):
        found = Gradients(answer, rule)
        sums[rule] = float((found.hidden * answer.own.double()).sum()), found.kept_by_softmax
        assert found.logit == pytest.approx(Gradients(answer).logit, rel=1e-5)
    logit = Gradients(answer).logit
    scale = max(1, abs(logit))
    assert sums["cp_lrp"] == (pytest.approx(logit, abs=1e-4 * scale), 0)
    assert sum(sums["attnlrp"]) == pytest.approx(logit, abs=1e-4 * scale)
    assert abs(sums["attnlrp"][1]) > 1e-4
    assert abs(sums["plain"][0] - logit) > 0.1


def held_llama(network, ids):
    """Written out with attention, gates and sizes held: [tokens], what each token's embedding alone gives the answer."""
    states = network(ids, output_hidden_states=True, output_attentions=True)
    answer = int(states.logits[0, -1].argmax())
    own = network.model.embed_tokens(ids)[0]
    alone = torch.diag_embed(torch.ones(len(own)))[..., None] * own  # [token, tokens, d_model]

    def normed(norm, x, of):
        return norm.weight * x / (of.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

    stream = own
    for layer, attention in zip(network.model.layers, states.attentions, strict=True):
        part = layer.self_attn
        share = attention.shape[1] // (part.v_proj.out_features // part.head_dim)

        def attend(x, part=part, attention=attention, share=share):
            v = part.v_proj(x).unflatten(-1, (-1, part.head_dim)).repeat_interleave(share, -2)
            return part.o_proj(torch.einsum("hij,...jhd->...ihd", attention[0], v).flatten(-2))

        alone = alone + attend(normed(layer.input_layernorm, alone, stream))
        stream = stream + attend(normed(layer.input_layernorm, stream, stream))
        read = normed(layer.post_attention_layernorm, stream, stream)
        gate = layer.mlp.act_fn(layer.mlp.gate_proj(read))
        inner = normed(layer.post_attention_layernorm, alone, stream)
        alone = alone + layer.mlp.down_proj(gate * layer.mlp.up_proj(inner))
        stream = stream + layer.mlp(read)
    last = normed(network.model.norm, alone, stream)[:, -1]
    return (last @ network.lm_head.weight[answer]).detach()


def test_cp_lrp_is_the_model_with_attention_gates_and_sizes_held(models):
    model = models("llama", attention_bias=False)
    model.model.set_attn_implementation("eager")
    expected = held_llama(model.model, prompt()[None])
    found = lens.reading.attribute(model, prompt(), "cp_lrp", progress=False)
    scale = float(expected.abs().max())
    assert torch.allclose(found.float(), expected, atol=1e-4 * scale)
    other = lens.reading.attribute(model, prompt(), "attnlrp", progress=False)
    assert not torch.allclose(other.float(), expected, atol=0.05 * scale)


def test_cp_lrp_does_not_see_what_an_induction_head_matches(copying):
    """A limit of the rule: attention is held, so the copied token gets the logit and the one that was looked up nothing."""
    model, prompts = copying
    for ids in prompts:
        answer = Answer(model, torch.tensor(ids))
        scores = attributing.scored(answer, "cp_lrp")
        matched = ids.index(ids[-1])
        assert int(scores.argmax()) == matched + 1
        assert abs(float(scores[matched])) < 0.1 * float(scores.max())
        assert float(attributing.scored(answer, "leave_one_out")[matched]) > 0.3
        assert float(attributing.scored(answer, "attnlrp")[matched]) > 0.05 * float(scores.max())
    found = lens.reading.faithfulness(model, prompts, ["cp_lrp"], draws=5, progress=False)
    rows = found.table().set_index("method")
    assert rows.loc["cp_lrp", "comprehensiveness"] > rows.loc["random", "comprehensiveness"]
    assert rows.loc["cp_lrp", "sufficiency"] > rows.loc["random", "sufficiency"]  # more is lost


def test_mlps_that_lrp_has_no_rules_for_are_refused(models):
    for kind, match in (
        ("phi3", "the product in the MLP of phi3"),
        ("mixtral", "the product in the MLP of mixtral"),
    ):
        with pytest.raises(LensError, match=match):
            lens.reading.attribute(models(kind), prompt(), "attnlrp")


def test_attention_written_out_is_the_models_own(models):
    for kind in ("gemma2", "gpt_oss", "bert"):
        answer = Answer(models(kind), prompt())
        with torch.no_grad():
            own = answer.logits(answer.own[None])
            again = answer.logits(answer.own[None], lambda call: with_values(call, dense(call)[1]))
            plain = models(kind).model(prompt()[None]).logits[:, -1]
        assert torch.allclose(own, again, atol=1e-5)
        assert torch.allclose(own, plain.float(), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_leave_one_out_is_the_mean_embedding_in_place(models, kind):
    model = models(kind)
    ids = prompt()[None]
    found = lens.reading.attribute(model, ids[0], "leave_one_out")
    table = model.model.get_input_embeddings()
    with torch.no_grad():
        own = table(ids)
        whole = model.model(inputs_embeds=own).logits[0, -1].softmax(-1)
        for place in range(ids.shape[1]):
            changed = own.clone()
            changed[0, place] = table.weight.mean(0)
            less = model.model(inputs_embeds=changed).logits[0, -1].softmax(-1)
            expected = float(whole.max() - less[whole.argmax()])
            assert float(found[place]) == pytest.approx(expected, abs=1e-5)


def test_integrated_gradients_sum_to_the_difference_of_the_logits(models):
    answer = Answer(models("llama"), prompt())
    whole = attributing.whole(answer)["integrated_gradients"]
    with torch.no_grad():
        ends = answer.logits(torch.stack([answer.own, answer.deleted]))[:, answer.answer]
    assert whole == pytest.approx(float(ends[0] - ends[1]))
    missing = [
        float(attributing.along_path(answer, Gradients, steps).sum()) - whole for steps in (4, 64)
    ]
    assert abs(missing[1]) < 0.02 * abs(whole)
    assert abs(missing[0]) > abs(missing[1])


def test_what_scores_do_not_sum_to_is_told(models):
    """Of AttnLRP what softmaxes and biases keep, of integrated gradients what steps leave out; of attention nothing is known."""
    model = models("llama")  # with biases
    methods = ["raw", "attnlrp", "integrated_gradients"]
    found = lens.reading.faithfulness(model, prompt(), methods, draws=1, progress=False)
    answer = Answer(model, prompt())
    logit = attributing.whole(answer)["cp_lrp"]
    with torch.no_grad():
        assert logit == pytest.approx(float(answer.logits(answer.own[None])[0, answer.answer]))
    table = found.table().set_index("method")
    summed = float(attributing.scored(answer, "attnlrp").sum())
    assert table.loc["attnlrp", "missing"] == pytest.approx(abs(summed - logit), rel=1e-5)
    assert table["missing"].isna().tolist() == [True, False, False, True]
    said = [
        one
        for one in found.findings()
        if one.startswith("How far sums of scores are from the logit")
    ]
    assert len(said) == 1
    assert said[0].count(" (from all tokens deleted)") == 1  # of integrated gradients alone
    assert f"attnlrp {abs(summed - logit):.2g} of {abs(logit):.2g}" in said[0]


def judged(comprehensiveness, soft):
    """Of a method and of random order, [method, prompt] each."""
    curves = np.array(comprehensiveness)[..., None]
    none = np.zeros((*curves.shape[:2], 2))
    drawn = np.zeros((2, curves.shape[1], 2, 1))
    soft = np.array(soft)[..., None]
    return Faithfulness(
        ("raw", "random"), (0.5,), curves, curves, soft, soft, none, drawn, {}, {}, 0, "m"
    )


def test_no_better_than_random_order_is_said_of_pairs_of_prompts():
    """Every prompt loses more without what is scored than in random order, though prompts differ by far more than that."""
    base = np.arange(8) / 10
    ahead = judged([base + 0.01, base], [base, base])
    assert "none" not in [one.kind for one in ahead.findings()]
    behind = judged([base + np.tile([0.01, -0.02], 4), base], [base, base])
    (said,) = [one for one in behind.findings() if one.kind == "none"]
    assert said.endswith("as far as 8 prompts tell: raw.")
    once = judged([[0.4], [0.1]], [[0.5], [0.2]])
    assert "none" not in [one.kind for one in once.findings()]


def test_prompts_whose_answer_hangs_on_no_token_leave_the_soft_curves_to_the_others():
    found = judged([[0.4, 0.2, 0.3], [0.1, 0.1, 0.1]], [[0.5, np.nan, 0.7], [0.2, np.nan, 0.4]])
    table = found.table()
    assert table["soft_sufficiency"].tolist() == pytest.approx([0.6, 0.3])
    assert table["soft_sufficiency_low"].tolist() == [0, 0]
    assert table["n_soft"].tolist() == [2, 2]
    assert table["n"].tolist() == [3, 3]


def test_every_method_keeps_the_same_share():
    generator = np.random.default_rng(0)
    for score in (generator.normal(size=17), np.zeros(17), np.arange(17) ** 3.0):
        for share in (0.1, 0.5, 0.9):
            kept = judging.kept_share(score, share)
            assert kept.mean() == pytest.approx(share, abs=1e-12)
            assert np.all(np.diff(kept[np.argsort(score, kind="stable")]) >= 0)
    assert np.allclose(judging.kept_share(np.zeros(17), 0.3), 0.3)
    stretched = judging.kept_share(np.array([3.0, 1, 2]), 0.4)
    assert np.allclose(stretched, judging.kept_share(np.array([300.0, -5, 2]), 0.4))


def test_scores_that_keep_more_gain_nothing_and_ends_are_fixed(copying):
    """Any increasing function of scores has the same curves; nearly all kept is all of the answer."""
    model, prompts = copying
    answer = Answer(model, torch.tensor(prompts[0]))
    score = attributing.scored(answer, "rollout").numpy()
    uniform = np.random.default_rng(0).random((2, 6, answer.tokens))
    empty = float(answer.kept(torch.zeros(1, answer.tokens, dtype=torch.bool))[0])
    one = judging.soft_curves(answer, score, (0.2, 0.6), uniform, empty)
    other = judging.soft_curves(answer, np.exp(20 * score) + 9, (0.2, 0.6), uniform, empty)
    np.testing.assert_array_equal(one, other)
    lost, kept = judging.soft_curves(answer, score, (1 - 1e-9,) * 2, uniform, empty)
    assert kept.tolist() == pytest.approx([1, 1])
    assert lost.tolist() == pytest.approx([0, 0], abs=1e-6)
    hard = judging.hard_curves(answer, score, (0.999,))
    assert hard[1].tolist() == pytest.approx([0], abs=1e-6)  # all kept
    assert hard[0].tolist() == pytest.approx([answer.probability - empty], abs=1e-6)


def test_a_constant_score_is_a_random_order(copying):
    """Ties stand in the order of random numbers that all methods share; by place a constant would be the first tokens."""
    model, prompts = copying
    answer = Answer(model, torch.tensor(prompts[0]))
    ties = np.random.default_rng(1).random(answer.tokens)
    shares, constant = (0.3, 0.6), np.ones(answer.tokens)
    own = judging.hard_curves(answer, constant, shares, ties)
    np.testing.assert_array_equal(own, judging.hard_curves(answer, -ties, shares))
    by_place = judging.hard_curves(answer, -np.arange(answer.tokens), shares)
    assert np.abs(np.subtract(own, by_place)).max() > 0.01
    seen = []
    curves = judging.hard_curves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "hard_curves", lambda *args: seen.append(args) or curves(*args))
        lens.reading.faithfulness(model, prompts[:1], ["raw"], draws=1, progress=False)
    given = [args[3] for args in seen if len(args) == 4]
    assert len(given) == 3  # of the method and of both that all are compared with
    assert all((one == given[0]).all() for one in given)


def test_what_all_tokens_bring_is_what_the_layer_writes(models):
    """`sum over keys and heads of A_ij v_j W_O` is the output of the last layer's projection (Kobayashi)."""
    model = models("llama")
    answer = Answer(model, prompt())
    found = Gradients(answer)
    kept = {}
    module = answer.layout.blocks[-1].output_module
    handle = module.register_forward_hook(
        lambda _, __, output: kept.update(written=output[0].detach())
    )
    with torch.no_grad():
        model.model(prompt()[None])
    handle.remove()
    attention, values = found.attention[-1][0], found.values[-1]
    parts = torch.einsum(
        "hij,hjk,hkd->ijd", attention, values, answer.layout.blocks[-1].output.double()
    )
    whole = kept["written"].double() - (module.bias.double() if module.bias is not None else 0)
    assert torch.allclose(parts.sum(1), whole, atol=1e-5)
    assert torch.allclose(
        parts[-1].norm(dim=-1).cpu(), attributing.scored(answer, "norm"), rtol=1e-6
    )


def test_what_carries_the_answer_is_found(copying):
    model, prompts = copying
    methods = ["raw", "rollout", "gradient_input", "leave_one_out"]
    found = lens.reading.faithfulness(model, prompts, methods, draws=6, progress=False)
    table = found.table().set_index("method")
    assert table.loc["leave_one_out", "sufficiency"] == table["sufficiency"].min()
    assert table.loc["leave_one_out", "sufficiency_high"] < table.loc["random", "sufficiency"]
    assert table.loc["leave_one_out", "as_leave_one_out"] == pytest.approx(1)
    assert abs(table.loc["random", "as_leave_one_out"]) < 0.3
    kinds = [one.kind for one in found.findings()]
    assert kinds[:2] == ["best", "sufficiency"]
    assert kinds[-1] == "limit"
    figure = found.plot()
    names = {trace.name: trace for trace in figure.data}
    assert list(names["rollout"].y) == found.sufficiency[1].mean(0).tolist()
    assert {"random", "leave_one_out"} <= set(names)
    random, oracle = (trace for trace in figure.data if trace.fill == "toself")
    for band, name in ((random, "random"), (oracle, "leave_one_out")):
        high, low = np.split(np.asarray(band.y), 2)
        curve = np.asarray(names[name].y)
        assert (low[::-1] <= curve + 1e-9).all()
        assert (curve <= high + 1e-9).all()
        assert (high > low[::-1]).any()
    np.testing.assert_allclose(found.drawn.mean(0)[:, 0], found.comprehensiveness[-1])
    assert found.plot("comprehensiveness").data[-1].name == "random"
    with pytest.raises(LensError, match="measure must be"):
        found.plot("completeness")


def test_methods_without_rules_are_named_and_the_rest_is_scored(models):
    model = models("mixtral")
    found = lens.reading.faithfulness(model, prompt(), shares=(0.5,), draws=1, progress=False)
    assert set(found.left_out) == {"attnlrp", "cp_lrp"}
    assert "raw" in found.methods
    assert [one.kind for one in found.findings()].count("unsupported") == 2


def test_another_row_of_attention_gives_the_same_logits(models):
    model = models("llama", attention_bias=False)
    found = lens.reading.adversary(model, prompt(), ["L1H3"], draws=10, progress=False)
    row, other = found.attention[0][0], found.other[0][0]
    assert found.free[0, 0] == 11 - 5  # eleven keys, four dimensions and the sum
    assert found.error[0, 0] < 1e-6
    assert other.min() >= 0
    assert other.sum() == pytest.approx(1)
    assert 0.05 < found.divergence[0, 0] <= math.log(2)
    middle = (row + other) / 2
    apart = sum(np.sum(one * np.log((one + 1e-300) / middle)) for one in (row, other)) / 2
    assert found.divergence[0, 0] == pytest.approx(apart)
    answer = Answer(model, prompt())

    def logits(instead):
        def on_layer(call):
            attention = dense(call)[1]
            if call.layer == 1:
                attention = attention.clone()
                attention[0, 3, -1] = torch.tensor(instead, dtype=attention.dtype)
            return with_values(call, attention)

        with torch.no_grad():
            return answer.logits(answer.own[None], on_layer)

    own, changed, even = logits(row), logits(other), logits(np.full(11, 1 / 11))
    assert torch.allclose(own, changed, atol=1e-5)
    assert found.change[0, 0] == pytest.approx(0, abs=1e-5)
    lost = (own.log_softmax(-1) - even.log_softmax(-1))[0, answer.answer]
    assert found.uniform_change[0, 0] == pytest.approx(float(lost), abs=1e-5)
    assert abs(float(lost)) > 1e-4
    few = lens.reading.adversary(model, prompt(4), ["L1H3"], progress=False)
    assert (few.free[0, 0], few.divergence[0, 0]) == (0, 0.0)


def test_a_row_is_said_to_be_one_of_many_only_where_another_was_found(models):
    model = models("llama", attention_bias=False)
    heads = ["L0H0", "L1H3", "L2H1", "L2H4"]
    found = lens.reading.adversary(model, [prompt(), prompt(12)], heads, draws=1, progress=False)
    assert [one.kind for one in found.findings()] == ["same"] * 3
    assert found.table()["n"].tolist() == [2] * 4
    few = lens.reading.adversary(model, prompt(4), ["L1H3", "L0H0"], draws=0, progress=False)
    (said,) = few.findings()
    assert said.kind == "none"
    assert "L1H3, L0H0: there are no more keys than values and the sum leave free" in said
    one_key = replace(found, divergence=np.full_like(found.divergence, 0.004))
    (said,) = one_key.findings()
    assert said.endswith("was found for L0H0, L1H3, L2H1, L2H4.")
    once = replace(found, divergence=np.tile([0.012, 0.0], (4, 1)))  # on one prompt: not none
    assert {one.kind for one in once.findings()} == {"same"}
    assert len(found.plot().data[0].x) == 4


def test_a_gradient_is_said_to_cost_more_only_where_it_surely_does(models):
    """The same masses of loss: a head with more in every prompt, one with as much, one that alternates."""
    heads = tuple(HeadId(0, place) for place in range(3))
    worst = np.array([[[0.5, 0.6, 0.7, 0.8]], [[0.1, 0.2, 0.1, 0.2]], [[2.0, 0.0, 0.0, 0.1]]])
    random = np.array([[[0.1] * 4], [[0.1, 0.2, 0.1, 0.2]], [[0.1] * 4]])
    found = Robustness(heads, (1.0,), worst, random, 0, "none")
    first, second = found.findings()
    assert (first.kind, second.kind) == ("head", "none")
    assert "of L0H0 along their gradient costs the answer +0.65 [" in first
    assert second.endswith("as far as 4 prompts tell: L0H1, L0H2.")
    assert len(found.plot().data) == 6
    one = replace(found, worst=worst[..., :1], random=random[..., :1])
    assert [said.kind for said in one.findings()] == ["head"] * 3  # without an interval
    two = replace(
        found, sizes=(2.0, 1.0), worst=np.tile(worst, (1, 2, 1)), random=np.tile(random, (1, 2, 1))
    )
    assert two.findings()[0].startswith("A change of size 2 of")


def test_the_loss_grows_most_along_its_gradient(models):
    model = models("gpt2")
    with pytest.raises(LensError, match="sizes has one twice: 1, 1"):
        lens.reading.perturb(model, prompt(), ["L1H2"], sizes=[1.0, 1.0])
    with pytest.raises(LensError, match="heads names none"):
        lens.reading.perturb(model, prompt(), np.array([]))
    small = lens.reading.perturb(
        model, prompt(), np.array(["L1H2"]), sizes=[1e-2], draws=2, progress=False
    )
    answer = Answer(model, prompt())
    slope = Gradients(answer, of_loss=True).scores[1][2]
    assert small.worst[0, 0, 0] == pytest.approx(1e-2 * float(slope.norm()), rel=0.1)
    columns = slope.sum(0)
    pair = torch.zeros_like(slope)
    pair[:, columns.argmin()] += 1
    pair[:, columns.argmax()] -= 1
    pair = pair * ((slope[:, [columns.argmin(), columns.argmax()]] != 0).all(1))[:, None]
    asked = {"sizes": [1e-2], "draws": 3, "progress": False, "along": "pairs"}
    words = lens.reading.perturb(model, prompt(), ["L1H2"], **asked)
    expected = -1e-2 * float((slope * pair / pair.norm()).sum())
    assert words.worst[0, 0, 0] == pytest.approx(expected, rel=0.1)
    assert words.random[0, 0, 0] < words.worst[0, 0, 0]
    assert "from one token to another" in words.findings()[0]
    found = lens.reading.perturb(model, prompt(), sizes=[0.5, 2.0], draws=2, progress=False)
    assert found.worst.shape == (18, 2, 1)
    assert (found.worst.mean((1, 2)) > found.random.mean((1, 2))).mean() > 0.9
    assert len(found.table()) == 36
    assert "along their gradient" in found.findings()[0]


@pytest.mark.parametrize("at", [4, 10])
def test_a_model_that_fills_masks_is_explained_at_the_row_whose_logit_it_is(at):
    """The one mask, or without one the last token: never the first, as of a classifier."""
    network = layout_model("bert")
    model = replace(lens.load(network), tokenizer=SimpleNamespace(mask_token_id=2))
    ids = prompt()
    ids[4] = 2 if at == 4 else ids[4]
    answer = Answer(model, ids)
    with torch.no_grad(), switched(network, "eager"):
        out = network(ids[None], output_attentions=True)
    assert answer.row == at
    assert answer.answer == int(out.logits[0, at].argmax())
    raw = attributing.scored(answer, "raw")
    assert torch.allclose(raw.float(), out.attentions[-1][0, :, at].mean(0), atol=1e-6)


@pytest.mark.parametrize("along", ["logits", "pairs"])
def test_one_token_hangs_on_no_logit(models, along):
    """One key gets all, whatever its logit; it ended in an index error."""
    asked = {"sizes": [1.0], "draws": 2, "along": along, "progress": False}
    found = lens.reading.perturb(models("gpt2"), torch.tensor([5]), ["L1H2"], **asked)
    assert found.worst.tolist() == found.random.tolist() == [[[0.0]]]


def test_changes_go_over_what_is_seen_and_not_over_what_has_a_slope(models):
    """An attention so sharp that most slopes are 0 is changed at random in all of its logits alike."""
    model = models("mistral")  # windows of five keys
    found = Gradients(Answer(model, prompt()), of_loss=True)
    band = torch.ones(11, 11, dtype=torch.bool).tril().triu(-4)
    assert len(found.seen) == model.info.layers
    for seen in found.seen[:-1]:
        assert torch.equal(seen, band)
    assert torch.equal(found.seen[-1], band & (torch.arange(11) == 10)[:, None])
    for slope, seen in zip(found.scores, found.seen, strict=True):
        assert not slope[:, ~seen].any()
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    slope = torch.zeros(4, 4)
    slope[3, 0], slope[3, 1] = 1.0, -1.0
    ways = perturbing._pairs(slope, seen, 40, np.random.default_rng(0))
    assert ways[0][1:, :2].tolist() == [[-1.0, 1.0]] * 3  # in all rows that see both
    assert any(bool(way[3, 3]) for way in ways)


def test_what_cannot_be_judged_is_refused(models):
    model = models("llama")
    with pytest.raises(LensError, match="methods must be one of 'raw'"):
        lens.reading.faithfulness(model, prompt(), ["attention"], progress=False)
    with pytest.raises(LensError, match="methods must name at least one of raw"):
        lens.reading.faithfulness(model, prompt(), [], progress=False)
    with pytest.raises(LensError, match="shares must lie between 0 and 1"):
        lens.reading.faithfulness(model, prompt(), ["raw"], shares=(0.5, 1.0), progress=False)
    with pytest.raises(LensError, match="sizes must be positive numbers"):
        lens.reading.perturb(model, prompt(), sizes=[0.0], progress=False)
    with pytest.raises(LensError, match="answer must be 0 to 60, got 99"):
        lens.reading.attribute(model, prompt(), "raw", answer=99)
    with pytest.raises(LensError, match="one prompt of tokens at a time"):
        lens.reading.attribute(model, [[3, 4], [5, 6]], "raw")
