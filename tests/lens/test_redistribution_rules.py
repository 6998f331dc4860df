"""Recipes beside other edits, off-by-one, and generation under them."""

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


def test_off_by_one_is_a_learned_sink_with_logit_0():
    model = a_model()
    found, (edit,) = logits(model, lens.edit(model, lens.edits.LearnedSink()))
    assert 0 < edit.mass_after < edit.mass_before <= 1.0001
    with torch.no_grad(), switched(model.model, "off_by_one_twin"):
        whole = model.model(IDS).logits
    assert rms_ratio(found, whole) < 1e-5
    own, _ = logits(model, lens.traces.capturing(model, statistics=()))
    assert rms_ratio(found, own) > 1e-3


def off_by_one(module, query, key, value, attention_mask, scaling=None, **_):
    share = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(share, 1) for x in (key, value))
    weight = (query.double() @ k.transpose(-1, -2) * scaling + attention_mask.double()).exp()
    p = weight / (1 + weight.sum(-1, keepdim=True))
    return (p @ v).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register("off_by_one_twin", off_by_one)
AttentionMaskInterface.register("off_by_one_twin", eager_mask)


def test_recipes_of_different_heads_run_beside_other_edits():
    model = a_model()
    several = [
        lens.edits.Act(heads=["L0H1", "L1H0"]),
        lens.edits.Mask([2, 3], heads=["L0H2", "L1H0"][:1]),
        lens.edits.Var(IMAGE, sinks=SINKS, rho=0.0, least_visual=0.0, heads=["L0H4"]),
    ]
    _, done = logits(model, lens.edit(model, *several))
    assert [one.calls > 0 for one in done] == [True] * 3
    first = []
    for one in several:
        with lens.edit(model, one), torch.no_grad():
            first.append(attention_of_layer_0(model))
    with lens.edit(model, *several), torch.no_grad():
        both = attention_of_layer_0(model)
    for head, alone in zip((1, 2, 4), first, strict=True):
        assert torch.equal(both[..., head, :], alone[..., head, :])
    with pytest.raises(LensError, match="Act and Mask edit the same heads of layer 1"):
        logits(model, lens.edit(model, several[0], lens.edits.Mask(layers=[1])))


def attention_of_layer_0(model):
    """What enters the output projection, [1, tokens, heads, value_dim]."""
    found = []
    projection = model.model.model.layers[0].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model.model(IDS)
    hook.remove()
    return found[0].unflatten(-1, (model.info.heads, -1))


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
    edits = {"act": lens.edits.Act(), "pasta": lens.edits.Pasta([(4, 6), (9, 10)])}
    with torch.no_grad():
        with lens.edit(model, edits[rule]) as (edit,):
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
