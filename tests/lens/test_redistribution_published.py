"""ACT, PASTA and the equivalences of the rules: equal to twins on whole probabilities."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import lens
from lens import edits
from lens.common.errors import LensError
from lens.edits._act import ActEdit
from lens.edits._pasta import PastaEdit
from lens.edits._var import VarEdit, VarSettings
from lens.passes.calls import LayerCall, attend
from lens.passes.structures import MaskStructure
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio
from tests.lens.test_edits import call_of, run

SIZE = 37


def probabilities(call):
    q, k, v = (x.double() for x in (call.query, call.key, call.value))
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = call.scale * q @ k.transpose(-1, -2)
    queries, keys = scores.shape[-2:]
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return scores.masked_fill(~visible, -math.inf).softmax(-1), v


def grown(call):
    """One decoding step after `call`: a query on one key more."""
    new = call_of(kv_heads=call.key.shape[1], queries=1, keys=1, seed=4)
    return replace(
        call,
        query=new.query,
        key=torch.cat([call.key, new.key], 2),
        value=torch.cat([call.value, new.value], 2),
    )


def chosen(heads=range(6)):
    found = torch.zeros(1, 6, dtype=torch.bool)
    found[0, list(heads)] = True
    return found


def act_twin(p, preset, beta, threshold, sinks=None):
    """Edited probabilities and sinks [batch, heads, keys], key by key and row by row."""
    p = p.numpy()
    batch, heads, queries, keys = p.shape
    if sinks is None:
        sinks = np.zeros((batch, heads, keys), bool)
        for b, h in np.ndindex(batch, heads):
            found = [k for k in range(keys) if p[b, h, :, k].sum() / (keys - k) > threshold]
            kept = [k for k in found if k != 0] if preset == "paper" else found[1:]
            sinks[b, h, kept] = True
    new = p.copy()
    for b, h, i in np.ndindex(batch, heads, queries):
        s = sinks[b, h]
        freed, others = (1 - beta) * p[b, h, i, s].sum(), p[b, h, i, ~s].sum()
        if others < 1e-8:
            continue
        new[b, h, i, s] *= beta
        new[b, h, i, ~s] *= 1 + freed / others
    return torch.from_numpy(new), sinks


@pytest.mark.parametrize("beta", [0.4, 0.0])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_act_equals_its_twin_in_the_prompt_and_in_a_step(preset, beta):
    call = call_of()
    p, v = probabilities(call)
    heads = [0, 1, 3, 4]
    edit = ActEdit(preset, beta, None, chosen(heads), "auto")
    output = edit.on_layer(call)
    threshold = 5 / SIZE if preset == "paper" else 0.1
    new, sinks = act_twin(p, preset, beta, threshold)
    assert sinks[:, heads].any(-1).any()
    assert len({tuple(row) for row in sinks[0].tolist()}) > 1  # they differ from head to head
    new[:, [2, 5]] = p[:, [2, 5]]
    assert torch.allclose(new.sum(-1), torch.ones(()).double())
    assert (new >= 0).all()
    assert rms_ratio(output, new @ v) < 1e-5
    assert rms_ratio(output, p @ v) > 1e-3
    plain = attend(call).output
    assert torch.equal(output[:, [2, 5]], plain[:, [2, 5]])
    step = grown(call)
    edit._layer = 0
    found = edit.on_layer(step)
    p, v = probabilities(step)
    if preset == "paper":
        longer = np.pad(sinks, ((0, 0), (0, 0), (0, 1)))
        longer[:, [2, 5]] = False
        p, _ = act_twin(p, preset, beta, threshold, longer)
    assert rms_ratio(found, p @ v) < 1e-5


def test_act_without_sinks_or_with_beta_one_keeps_every_bit():
    call = call_of()
    plain = attend(call).output
    nothing = ActEdit("paper", 0.4, 1.0, chosen(), "auto")
    assert torch.equal(nothing.on_layer(call), plain)
    assert (nothing.calls, nothing.empty_calls, nothing.skipped_rows) == (0, 1, 0)
    kept = ActEdit("paper", 1.0, None, chosen(), "auto")
    assert torch.equal(kept.on_layer(call), plain)
    assert (kept.calls, kept.empty_calls) == (0, 0)


def pasta_twin(p, spans, alpha, prompt, compounding):
    weight = torch.ones(p.shape[-1], dtype=torch.float64)
    for place in range(prompt):
        others = sum(not start <= place < end for start, end in spans)
        if compounding:
            weight[place] = alpha**others
        elif others == len(spans):
            weight[place] = alpha
    new = p * weight
    return new / new.sum(-1, keepdim=True)


@pytest.mark.parametrize("spans", [[(4, 9)], [(4, 9), (20, 23), (30, 31)]])
@pytest.mark.parametrize("released", [False, True])
def test_pasta_equals_its_twin_in_the_prompt_and_in_a_step(released, spans):
    call, alpha = call_of(), 0.05
    count = len(spans) if released else 1
    biases = (count * math.log(alpha), (count - 1) * math.log(alpha))
    edit = PastaEdit(spans, biases, chosen([0, 2, 3]), "auto")
    for call in (call, grown(call)):  # noqa: B020, the second has a generated token
        edit._layer = 0
        p, v = probabilities(call)
        expected = pasta_twin(p, spans, alpha, SIZE, released)
        expected[:, [1, 4, 5]] = p[:, [1, 4, 5]]
        output = edit.on_layer(call)
        assert rms_ratio(output, expected @ v) < 1e-5
        assert rms_ratio(output, p @ v) > 1e-2
        plain = attend(call).output
        assert torch.equal(output[:, [1, 4, 5]], plain[:, [1, 4, 5]])


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99, 0.999])
def test_var_in_bfloat16_is_right_for_any_mass_of_the_sink(mass):
    """One sink of known mass; all of it moves to the image, whose keys are alike."""
    value = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(1))
    key = torch.zeros(1, 1, 64, 16)
    key[..., 0, 0] = math.log(mass / (1 - mass) * 63)
    query = torch.zeros(1, 1, 64, 16)
    query[..., 0] = 1
    for dtype, bound in ((torch.bfloat16, 3e-3), (torch.float32, 1e-5)):
        parts = [tensor.to(dtype) for tensor in (query, key, value)]
        call = LayerCall(*parts, MaskStructure(True), 1.0)
        settings = VarSettings(amount=1.0, rho=0.5, least_visual=0.0)
        heads = torch.ones(1, 1, dtype=torch.bool)
        edit = VarEdit(range(1, 50), settings, None, [0], heads, "auto")
        last = edit.on_layer(call)[0, 0, -1].float()
        p = (parts[0].double() @ parts[1].double().mT).softmax(-1)[0, 0, -1]
        v = parts[2][0, 0].double()
        expected = (p[0] / p[1:50].sum() + 1) * (p[1:50] @ v[1:50]) + p[50:] @ v[50:]
        assert rms_ratio(last, expected) < bound
        assert edit.mass_after == 0


def test_published_recipes_run_in_a_model_and_refuse_what_does_not_fit():
    network = build("llama")
    model = lens.load(network)
    ids = torch.randint(3, 97, (1, 29), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        own = network(input_ids=ids).logits
        with lens.edit(model, lens.edits.Act(threshold=0.08)) as (edit,):
            acted = network(input_ids=ids).logits
        assert edit.calls > 0
        assert rms_ratio(acted, own) > 1e-4
        with lens.edit(model, lens.edits.Act(preset="released", threshold=0.0)) as (edit,):
            network(input_ids=ids)
        assert edit.calls == 0  # layers 2 to the last but one: none of 3
        for steps in (
            1,
            2,
        ):  # cached steps give what the whole sequence gives; several at once are refused
            with lens.edit(model, lens.edits.Pasta([(4, 9)], heads=["L0H1", "L2H0"])) as (edit,):
                first = network(input_ids=ids[:, : 29 - steps], use_cache=True)
                rest = ids[:, 29 - steps :], first.past_key_values
                if steps > 1:
                    with pytest.raises(LensError, match="several tokens on cached keys"):
                        network(input_ids=rest[0], past_key_values=rest[1])
                    continue
                rest = network(input_ids=rest[0], past_key_values=rest[1]).logits
            assert edit.calls == 4

            def outside(at, prompt=29 - steps):
                return ((at.positions < 4) | (at.positions >= 9)) & (at.positions < prompt)

            bias = lens.edits.Bias(outside, math.log(0.01), heads=["L0H1", "L2H0"])
            with lens.edit(model, bias):
                whole = network(input_ids=ids).logits
            assert rms_ratio(rest, whole[:, 29 - steps :]) < 1e-5
        cache = network(input_ids=ids, use_cache=True).past_key_values
        for recipe, match in (
            (lens.edits.Act(), "sinks of its prompt are not known"),
            (lens.edits.Pasta([(1, 3)]), "end of its prompt is not known"),
        ):
            with lens.edit(model, recipe), pytest.raises(LensError, match=match):
                network(input_ids=ids[:, :1], past_key_values=cache)
    behind = lens.edits.Pasta([(500, 600)])
    with lens.edit(model, behind), pytest.raises(LensError, match="within the prompt, which has"):
        network(input_ids=ids)
    for match, recipe, arguments in (
        ("preset must be one of 'paper', 'released', got 'code'", "Act", {"preset": "code"}),
        ("beta of ACT is a fraction 0..1, got 2", "Act", {"beta": 2}),
        ("threshold of ACT is a fraction 0..1, got 5", "Act", {"threshold": 5}),
        ("preset must be one of", "Pasta", {"spans": [(0, 1)], "preset": "code"}),
        ("alpha of PASTA must be above 0, got 0", "Pasta", {"spans": [(0, 1)], "alpha": 0}),
        ("0 <= start < end, got ..3, 3", "Pasta", {"spans": [(3, 3)]}),
        ("spans must not overlap", "Pasta", {"spans": [(0, 4), (3, 5)]}),
    ):
        with pytest.raises(LensError, match=match):
            getattr(lens.edits, recipe)(**arguments)
    looking = replace(call_of(causal=False))
    for edit, name in (
        (ActEdit("paper", 0.4, None, chosen(), "auto"), "ACT"),
        (VarEdit([1], VarSettings(0.5, 0.5), None, [0], chosen(), "auto"), "VAR"),
    ):
        with pytest.raises(LensError, match=f"sees later tokens; {name} is defined for causal"):
            edit.on_layer(looking)


def test_rules_agree_where_they_are_the_same_edit():
    call, sources = call_of(), [0, 7, 23]
    masked, biased, hidden, whole, moved, all_moved = (
        run(call, one)[0]
        for one in (
            edits.Mask(sources, 0.7),
            edits.Bias(sources, math.log(0.3)),
            edits.Bias(sources, -math.inf),
            edits.Mask(sources),
            edits.Move(sources, amount=0.7),
            edits.Move(sources),
        )
    )
    assert rms_ratio(biased, masked) < 1e-6
    assert rms_ratio(whole, hidden) < 1e-6
    assert rms_ratio(moved, masked) > 1e-3  # not the same
    assert rms_ratio(all_moved, hidden) < 1e-6  # but at 1 it is
    steered = PastaEdit([(0, 1), (7, 8), (23, 24)], (math.log(0.3), 0.0), chosen(), "auto")
    others = [place for place in range(SIZE) if place not in sources]
    assert rms_ratio(steered.on_layer(call), run(call, edits.Mask(others, 0.7))[0]) < 1e-6
