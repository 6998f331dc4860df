"""Heads of mixers taken out: as the model with the weights that make them, or read them, set to zero."""

import copy

import numpy as np
import pytest
import torch
import transformers

import lens
from lens import mixers
from lens.edits import Mask

from .hybrids import hybrid

IDS = list(range(3, 30))
TEXTS = [IDS, list(range(40, 67))]


def conv_of_bamba(layer, head):
    """x of the head behind the convolution is silu(0)."""
    conv = layer.mamba.conv1d
    conv.weight[head * 32 : (head + 1) * 32] = 0
    conv.bias[head * 32 : (head + 1) * 32] = 0


def column_of_lfm2(layer, head):
    layer.conv.out_proj.weight[:, head] = 0


def column_of_griffin(layer, head):
    layer.temporal_block.linear_out.weight[:, head] = 0


def value_of_olmo(layer, head):
    layer.linear_attn.v_proj.weight[head * 16 : (head + 1) * 16] = 0


def column_of_jamba(layer, channel):
    layer.mamba.out_proj.weight[:, channel] = 0


def value_of_kimi(layer, head):
    """The convolution of values has no bias, and silu(0) is 0."""
    layer.self_attn.v_proj.weight[head * 16 : (head + 1) * 16] = 0


def value_of_minimax(layer, head):
    """Queries, keys and values stand head by head, 3 × 16; values go through silu."""
    layer.self_attn.qkv_proj.weight[head * 48 + 32 : (head + 1) * 48] = 0


CASES = {
    "bamba": conv_of_bamba,
    "lfm2": column_of_lfm2,
    "recurrent_gemma": column_of_griffin,
    "olmo_hybrid": value_of_olmo,
    "jamba": column_of_jamba,
    "kimi_linear": value_of_kimi,
    "minimax": value_of_minimax,
}


def value_of_xlstm(model, head):
    model.backbone.blocks[1].mlstm_layer.v.weight[head * 16 : (head + 1) * 16] = 0


def value_of_rwkv(model, channel):
    """A channel is a weighted mean of its own values."""
    model.rwkv.blocks[1].attention.value.weight[channel] = 0


def column_of_mamba(model, channel):
    model.backbone.layers[1].mixer.out_proj.weight[:, channel] = 0


ALONE = {
    "xlstm": ({"num_heads": 4, "embedding_dim": 64, "num_blocks": 2}, value_of_xlstm),
    "rwkv": ({"attention_hidden_size": 64, "context_length": 64}, value_of_rwkv),
    "mamba": ({"state_size": 4}, column_of_mamba),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CASES)
def test_a_head_without_output_is_one_whose_weights_are_zero(kind):
    model = hybrid(kind)
    loaded, without = lens.load(model), copy.deepcopy(model)
    own = loaded.logits(IDS)
    CASES[kind](without.model.layers[2], 3)
    expected = without(torch.tensor([IDS])).logits[0]
    with lens.edit(loaded, mixers.Ablate(["L2H3"])) as (done,):
        found = loaded.logits(IDS)
    assert done.calls == 1
    assert (found - expected).abs().max() < 1e-5
    assert (found - own).abs().max() > 1e-4
    assert torch.equal(loaded.logits(IDS), own), "nothing is left behind"
    with lens.edit(loaded, mixers.Ablate("L2H3"), Mask("first")):
        assert (loaded.logits(IDS) - expected).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ALONE)
def test_heads_of_models_of_mixers_alone_are_taken_out_too(kind):
    given, change = ALONE[kind]
    config = transformers.CONFIG_MAPPING[kind](
        vocab_size=97, hidden_size=64, num_hidden_layers=2, **given
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    without, ids = copy.deepcopy(model), torch.tensor([IDS])
    change(without, 3)
    own, expected = (one(ids, use_cache=False).logits for one in (model, without))
    with lens.edit(lens.load(model), mixers.Ablate("L1H3")) as (done,):
        found = model(ids, use_cache=False).logits
    assert done.calls == 1
    assert torch.equal(model(ids, use_cache=False).logits, own), "nothing is left behind"
    assert (found - expected).abs().max() < 1e-5 * own.abs().max()
    assert (found - own).abs().max() > 1e-4 * own.abs().max()


def test_effects_stand_beside_other_mixer_heads():
    loaded = lens.load(hybrid("bamba"))
    found = lens.effect(loaded, TEXTS, mixers.Ablate("L2H3"), progress=False)
    assert set(found.values) == {"edit", "size", "layer"}
    assert (
        "no softmax"
        in lens.effect(
            loaded, TEXTS, mixers.Ablate("L2H3"), controls="mass", progress=False
        ).missing["mass"]
    )
    deltas = {}
    for layer, head in [(layer, head) for layer in (0, 2) for head in range(4)]:
        name = f"L{layer}H{head}"
        with torch.no_grad(), lens.edit(loaded, mixers.Ablate(name)):
            edited = [loaded.logits(ids).log_softmax(-1) for ids in TEXTS]
        own = [loaded.logits(ids).log_softmax(-1) for ids in TEXTS]
        deltas[name] = [
            float((a - b)[:-1].gather(1, torch.tensor(ids)[1:, None]).mean())
            for a, b, ids in zip(own, edited, TEXTS, strict=True)
        ]
    assert found.values["edit"]["delta_loss"][0] == pytest.approx(deltas["L2H3"], abs=1e-5)
    for control, others in (("size", deltas), ("layer", ["L2H0", "L2H1", "L2H2"])):
        for number, value in enumerate(found.values[control]["delta_loss"][0]):
            gaps = [abs(deltas[name][number] - value) for name in others if name != "L2H3"]
            assert min(gaps) < 1e-5


@torch.no_grad()
def test_a_mean_is_that_of_what_the_scan_gives():
    loaded = lens.load(hybrid("bamba"))
    captured = [mixers.capture(loaded, ids, progress=False) for ids in TEXTS]
    given = torch.cat([one.phi(2).output()[3] for one in captured])  # [tokens, dim]
    edit = mixers.Ablate("L2H3", "pooled_mean").ready(loaded, TEXTS)
    assert torch.allclose(edit.over.by_layer[2][3], given.mean(0), atol=1e-5)
    with lens.edit(loaded, edit):
        first = loaded.logits(IDS)
    with lens.edit(loaded, mixers.Ablate("L2H3", "pooled_mean", over=TEXTS)):
        assert torch.equal(loaded.logits(IDS), first)
    found = lens.effect(
        loaded, TEXTS, mixers.Ablate("L2H3", "pooled_mean"), controls=(), progress=False
    )
    change = (loaded.logits(IDS).log_softmax(-1) - first.log_softmax(-1))[:-1]
    delta = float(change.gather(1, torch.tensor(IDS)[1:, None]).mean())
    assert found.values["edit"]["delta_loss"][0, 0] == pytest.approx(delta, abs=1e-5)
    assert np.isfinite(found.values["edit"]["kl"]).all()


def test_what_cannot_be_taken_out_is_refused():
    loaded = lens.load(hybrid("bamba"))
    zamba = lens.load(hybrid("zamba"))
    for run, said in [
        (lambda: mixers.Ablate("L1H0").start(loaded, "auto"), "no mixer of .* has a head L1H0; .* L0: 4, L2: 4"),
        (lambda: mixers.Ablate("L0H9").start(loaded, "auto"), "has a head L0H9"),
        (lambda: mixers.Ablate([]), "at least one head"),
        (lambda: mixers.Ablate(3), "heads must be a list, got 3"),  # pyright: ignore[reportArgumentType]
        (lambda: mixers.Ablate("L0H0", "mean"), "baseline must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: mixers.Ablate("L0H0", "pooled_mean").start(loaded, "auto"), "needs the prompts"),
        (lambda: mixers.Ablate("L0H0").start(lens.load("induction-2l"), "auto"), "no mixer that is known"),
        (lambda: mixers.Ablate("L0H0").start(zamba, "auto"), "in several calls"),
        (lambda: lens.heads.retrieval(loaded, lens.tasks.needles.copied(loaded)), "layers 0 and 2 of .* have none"),
    ]:  # fmt: skip
        with pytest.raises(lens.LensError, match=said):
            run()
    with (
        lens.edit(loaded, mixers.Ablate("L0H0")),
        pytest.raises(lens.LensError, match="cached state"),
    ):
        loaded.generate(IDS[:5], max_new_tokens=3)
    with lens.edit(loaded, mixers.Ablate("L0H0")) as (done,):
        loaded.generate(IDS[:5], max_new_tokens=3, min_new_tokens=3, use_cache=False)
    assert done.calls == 3
