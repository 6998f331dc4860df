"""Models that compute their own attention: what capture follows is `eager`'s, what it cannot stays the model's."""

import pytest
import torch
import transformers
from torch import nn

import lens
from lens.common.errors import LensError
from lens.passes import computed
from lens.passes.computed import following
from lens.passes.interface import switched

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 97}
GPT = {"n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 97, "n_positions": 64}
CONFIGS = {
    "gpt_neo": transformers.GPTNeoConfig(
        hidden_size=48,
        num_layers=4,
        num_heads=6,
        attention_types=[[["global", "local"], 2]],
        window_size=7,
        vocab_size=97,
        max_position_embeddings=64,
    ),
    "gptj": transformers.GPTJConfig(**GPT, rotary_dim=4),
    "codegen": transformers.CodeGenConfig(**{**GPT, "n_head": 4}, rotary_dim=4),
    "bloom": transformers.BloomConfig(hidden_size=48, n_layer=3, n_head=6, vocab_size=97),
    "falcon": transformers.FalconConfig(**SIZES),
    "falcon_alibi": transformers.FalconConfig(**SIZES, alibi=True, multi_query=False),
    "mpt": transformers.MptConfig(
        d_model=48, n_heads=6, n_layers=3, expansion_ratio=2, max_seq_len=64, vocab_size=97
    ),
    "openai-gpt": transformers.OpenAIGPTConfig(**GPT),
    "xlnet": transformers.XLNetConfig(d_model=48, n_layer=3, n_head=6, d_inner=56, vocab_size=97),
    "xglm": transformers.XGLMConfig(
        d_model=48, num_layers=3, attention_heads=6, ffn_dim=56, vocab_size=97, pad_token_id=0
    ),
    "deberta-v2": transformers.DebertaV2Config(
        **SIZES, intermediate_size=56, relative_attention=True, pos_att_type="c2p|p2c"
    ),
}


def built(name: str):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["bloom", "gpt_neo"])
def test_padding_on_the_right_counts_in_no_mask_of_a_models_own(name):
    """Its queries see all keys there, and would count among those that look at a sink: outputs off by 2 to 8."""
    model = lens.load(built(name))
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 28:] = 0
    plain = model.model(ids, attention_mask=mask)[0]
    with lens.edit(model, lens.edits.Act()):
        together = model.model(ids, attention_mask=mask)[0]
        alone = model.model(ids[1:, :28])[0]
    assert (together[1, :28] - alone[0]).abs().max() < 1e-4 * alone.abs().max()
    assert (plain[1, :28] - alone[0]).abs().max() > 1e-2 * alone.abs().max()  # it edits
    with lens.traces.capturing(model) as recorded:
        model.model(ids, attention_mask=mask)
    assert int(recorded.layers(0)[0].variables["visible"][1, 0]) == 28


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_that_a_model_computes_itself_is_captured(name):
    model = built(name)
    ids = torch.randint(3, 97, (1, 29), generator=torch.Generator().manual_seed(5))
    with switched(model, "eager"):
        own = model(ids, output_attentions=True)
    loaded = lens.load(model)
    trace = lens.capture(loaded, ids[0].tolist(), block_size=1, progress=False)
    assert loaded.check is not None
    assert len(trace.layers) == len(own.attentions)
    for layer, weights in enumerate(own.attentions):
        found = torch.from_numpy(trace.block_mass.values[layer])
        assert (found - weights[0]).abs().max() < 1e-5
    with lens.traces.capturing(loaded):
        found = model(ids)[0]
    assert (found - own[0]).abs().max() < 1e-4 * own[0].abs().max()
    assert not any("forward" in vars(part) for part in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_scores_in_float32_of_a_model_of_another_type(dtype):
    """GPT-J takes queries and keys to float32 and leaves values as they are."""
    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        n_embd=48, n_layer=2, n_head=6, rotary_dim=4, vocab_size=97, n_positions=64
    )
    model = transformers.GPTJForCausalLM(config).eval().to(dtype)
    loaded = lens.load(model)
    ids = torch.arange(20)[None]
    own = model(ids, output_attentions=True)
    with lens.traces.capturing(loaded, block_size=1) as recorder:
        found = model(ids).logits
    assert found.dtype == dtype
    assert (found - own.logits).abs().max() <= 2e-2 * own.logits.abs().max()
    for record, weights in zip(recorder.records, own.attentions, strict=True):
        assert (record.variables["block_mass"] - weights.float()).abs().max() < 5e-3


class _Attention(nn.Module):
    """Its own attention, with something done to scores or probabilities."""

    num_heads = 3

    def __init__(self, change, after=False):
        super().__init__()
        self.change, self.after = change, after

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores if self.after else self.change(scores)
        probabilities = scores.softmax(-1)
        probabilities = self.change(probabilities) if self.after else probabilities
        return torch.matmul(probabilities, v), probabilities


_Attention.__module__ = "transformers.made.up"


def _run(monkeypatch, module, *tensors):
    monkeypatch.setattr(computed, "_computes_attention", lambda kind: kind is _Attention)
    calls = []

    def attend(module, query, key, value, mask, scale, bias, causal):
        logits = query @ key.transpose(-1, -2) * scale + (0 if bias is None else bias)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        calls.append((scale, bias, mask))
        return (logits.softmax(-1) @ value).transpose(1, 2)

    with following(nn.ModuleList([module]), attend):
        found = module(*tensors)[0]
    return found, calls


CAUSAL = torch.ones(7, 7).tril().bool()
BIAS = torch.randn(1, 3, 7, 7, generator=torch.Generator().manual_seed(2))
FOLLOWED = {
    "scaled": lambda s: s / 3,
    "scaled in place": lambda s: s.mul_(0.4),
    "biased, then scaled": lambda s: (s + BIAS) * 0.7,
    "biased before": lambda s: BIAS - 0.5 + s,
    "additive mask": lambda s: s + torch.zeros(7, 7).masked_fill(~CAUSAL, -1e4),
    "filled": lambda s: s.masked_fill(~CAUSAL, -1e9),
    "where": lambda s: torch.where(CAUSAL, s, torch.finfo(s.dtype).min),
    "top keys": lambda s: s.masked_fill(s < s.topk(3, -1)[0][..., -1:], -1e9),
    "switched off, then hidden": lambda s: s * CAUSAL.float() + -1e4 * (1 - CAUSAL.float()),
    "bias of heads": lambda s: s + BIAS[0],
    "seen as rows": lambda s: (s.view(6, 7, 7) + BIAS[0, :1]).view(2, 3, 7, 7),
    "bias of heads, seen as rows": lambda s: (s + BIAS[0]).view(6, 7, 7).view(2, 3, 7, 7),
    "rows and columns": lambda s: (
        (s.view(6, 7, 7).view(6, 7, 1, 1, 7) + BIAS[0, 0, :1]).view(6, 7, 7).view(2, 3, 7, 7)
    ),
    "windows of a batch": lambda s: (s.view(1, 2, 3, 7, 7) + BIAS[None, :, :1]).view(2, 3, 7, 7),
    "rows of a batch": lambda s: (s.view(6, 7, 7) + BIAS[0].repeat(2, 1, 1)).view(2, 3, 7, 7),
}
SPELLED_OUT = {
    "multiplied by a tensor": lambda s: s * BIAS,
    "switched off and not hidden": lambda s: s * CAUSAL.float(),
    "switched off, others hidden": lambda s: (
        s * CAUSAL.float()
        + torch.zeros(7, 7).masked_fill(
            CAUSAL.T & ~torch.eye(7).bool() & (torch.arange(7) > 3), -1e4
        )
    ),
    "softcap": lambda s: s.tanh(),
    "other order of axes": lambda s: s.transpose(-1, -2),
}


@pytest.mark.parametrize("name", [*FOLLOWED, *SPELLED_OUT])
def test_whatever_is_done_to_scores_the_output_is_the_modules_own(monkeypatch, name):
    change = (FOLLOWED | SPELLED_OUT)[name]
    tensors = torch.randn(3, 2, 3, 7, 5, generator=torch.Generator().manual_seed(1))
    module = _Attention(change)
    expected = module(*tensors)[0]
    found, calls = _run(monkeypatch, module, *tensors)
    assert torch.allclose(found, expected, atol=1e-6)
    assert len(calls) == (name in FOLLOWED)


@pytest.mark.parametrize("change", [lambda p: p * BIAS, lambda p: p.masked_fill(~CAUSAL, 0)])
def test_changed_probabilities_are_not_taken_for_attention(monkeypatch, change):
    tensors = torch.randn(3, 2, 3, 7, 5, generator=torch.Generator().manual_seed(1))
    module = _Attention(change, after=True)
    expected = module(*tensors)[0]
    found, calls = _run(monkeypatch, module, *tensors)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not calls


def test_scores_that_are_changed_in_place_in_another_way_are_refused(monkeypatch):
    tensors = torch.randn(3, 2, 3, 7, 5)

    def clip(scores):
        scores.clamp_(-1, 1)
        return scores

    with pytest.raises(LensError, match="_Attention changes its attention scores by clamp_"):
        _run(monkeypatch, _Attention(clip), *tensors)
