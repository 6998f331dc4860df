"""Every rule by its name in `lens.redistribute`: the recipes, off-by-one, and generation under them."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import lens
from lens.common.errors import LensError
from lens.passes.interface import switched
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio

IDS = torch.tensor([[3, 17, 42, 8, 90, 23, 57, 11, 64, 29, 5, 71, 38, 2, 47, 13, 80, 9, 31]])
IMAGE = list(range(4, 11))
SINKS = [0, 6]


def a_model():
    """With attention far from uniform, so that each recipe finds something to do."""
    torch.manual_seed(0)
    network = build("llama")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12)
    return lens.load(network)


def logits(model, block):
    with block as edit, torch.no_grad():
        return model.model(IDS).logits, edit


@pytest.mark.parametrize("amount", [None, 0.3])
@pytest.mark.parametrize("rule", ["var", "act", "pasta"])
def test_a_recipe_by_name_is_the_function_of_that_name(rule, amount):
    model = a_model()
    given = {} if amount is None else {"amount": amount}
    keys, block = {
        "var": (
            {"sources": SINKS, "targets": IMAGE},
            lens.edits.var(model, IMAGE, sinks=SINKS, amount=amount, layers=[0, 1]),
        ),
        "act": ({}, lens.edits.act(model, beta=1 - (amount or 0.6), layers=[0, 1])),
        "pasta": (
            {"targets": [4, 5, 9]},
            lens.edits.pasta(model, [(4, 6), (9, 10)], alpha=1 - (amount or 0.99), layers=[0, 1]),
        ),
    }[rule]
    expected, edit = logits(model, block)
    found, named = logits(
        model, lens.redistribute(model, rule=rule, layers=[0, 1], **keys, **given)
    )
    assert torch.equal(found, expected)
    assert type(named) is type(edit)
    assert named.edited_rows == edit.edited_rows > 0
    own, _ = logits(model, lens.traces.capturing(model, statistics=()))
    assert rms_ratio(found, own) > 1e-4


def test_spans_of_pasta_may_be_a_mask_positions_or_first():
    model = a_model()
    mask = torch.zeros(19, dtype=torch.bool)
    mask[[4, 5, 9]] = True
    found = [
        logits(model, lens.redistribute(model, rule="pasta", targets=targets))[0]
        for targets in ([9, 5, 4], mask, torch.tensor([4, 5, 9]))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    first = logits(model, lens.redistribute(model, rule="pasta", targets="first"))[0]
    span = logits(model, lens.edits.pasta(model, [(0, 1)]))[0]
    assert rms_ratio(first, span) < 1e-6


def test_off_by_one_is_a_learned_sink_with_logit_0():
    model = a_model()
    for amount, given in ((1.0, {}), (0.25, {"amount": 0.25})):
        found, edit = logits(model, lens.redistribute(model, rule="off_by_one", **given))
        sink, _ = logits(model, lens.redistribute(model, rule="learned_sink", amount=amount))
        assert torch.equal(found, sink)
        assert 0 < edit.mass_after < edit.mass_before <= 1.0001
    own, _ = logits(model, lens.traces.capturing(model, statistics=()))
    nothing, _ = logits(model, lens.redistribute(model, rule="off_by_one", amount=0))
    assert torch.equal(nothing, own)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rule": "var"}, "rule 'var' needs targets, the image keys"),
        ({"rule": "pasta"}, "rule 'pasta' needs targets, the positions to emphasise"),
        ({"rule": "pasta", "targets": lambda at: at}, "targets of rule 'pasta' are positions"),
        ({"rule": "pasta", "targets": [1], "amount": 1}, "amount of rule 'pasta' must be below 1"),
        ({"rule": "act", "targets": [1]}, "rule 'act' gives to all other keys"),
        ({"rule": "act", "sources": [1]}, "rule 'act' finds its sources itself"),
        ({"rule": "act", "amount": 1.5}, "amount of rule 'act' is a fraction 0..1, got 1.5"),
        ({"rule": "mask", "sources": [1]}, "rule 'mask' needs an amount, such as amount=0.5"),
        ({"rule": "off_by_one", "sources": [1]}, "rule 'off_by_one' acts on whole rows"),
        ({"rule": "off_by_one", "amount": 2}, "amount of rule 'off_by_one' is a fraction 0..1"),
        ({"rule": "zero", "amount": 1}, r"off_by_one, or in lens.redistribute a recipe \(var"),
    ],
)
def test_what_does_not_fit_a_rule_is_refused(options, match):
    with pytest.raises(LensError, match=match), lens.redistribute(a_model(), **options):
        pass


STEPS = 5


class WholePrefix:
    """ACT or PASTA on whole probabilities over the whole prefix, sinks found in the prompt's rows."""

    def __init__(self, rule, prompt):
        self.rule, self.prompt, self.edited = rule, prompt, 0

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **_):
        share = query.shape[1] // key.shape[1]
        k, v = (x.double().repeat_interleave(share, 1) for x in (key, value))
        p = (query.double() @ k.transpose(-1, -2) * scaling + attention_mask.double()).softmax(-1)
        p = self.act(p) if self.rule == "act" else self.pasta(p)
        return (p @ v).to(query.dtype).transpose(1, 2).contiguous(), None

    def act(self, p):
        seen = self.prompt - torch.arange(self.prompt)
        alpha = p[:, :, : self.prompt, : self.prompt].sum(-2) / seen
        sink = torch.zeros(p.shape[1], p.shape[-1], dtype=torch.bool)
        sink[:, 1 : self.prompt] = alpha[0, :, 1:] > 5 / self.prompt
        self.edited += int(sink.sum())
        kept = torch.where(sink[None, :, None], 0.4 * p, p)
        others = torch.where(sink[None, :, None], 0, p)
        freed, rest = (p - kept).sum(-1, keepdim=True), others.sum(-1, keepdim=True)
        moved = kept + torch.where(rest > 1e-8, freed * others / rest.clamp(min=1e-8), 0)
        return torch.where(rest > 1e-8, moved, p)

    def pasta(self, p):
        weight = torch.ones(p.shape[-1], dtype=torch.float64)
        weight[: self.prompt] = 0.01
        weight[[4, 5, 9]] = 1
        self.edited += 1
        return p * weight / (p * weight).sum(-1, keepdim=True)


@pytest.mark.parametrize("rule", ["act", "pasta"])
def test_generate_is_what_recomputing_the_whole_prefix_gives(rule):
    model, length = a_model(), IDS.shape[1]
    options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None}
    keys = {"targets": [4, 5, 9]} if rule == "pasta" else {}
    with torch.no_grad():
        with lens.redistribute(model, rule=rule, **keys) as edit:
            found = model.model.generate(IDS, **options)
        plain = model.model.generate(IDS, **options)
        twin = WholePrefix(rule, length)
        AttentionInterface.register("prefix_twin", twin)
        AttentionMaskInterface.register("prefix_twin", eager_mask)
        with switched(model.model, "prefix_twin"):
            whole = model.model(found.sequences).logits
    scores = torch.cat(found.logits)
    assert edit.steps == STEPS
    assert twin.edited > 0
    assert rms_ratio(scores, whole[0, length - 1 : -1]) < 1e-5
    assert rms_ratio(scores[-1], plain.logits[-1][0]) > 1e-3
