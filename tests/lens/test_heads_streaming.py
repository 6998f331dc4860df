"""Streaming scores equal a twin on whole matrices; the gate keeps the heads that look far back."""

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.heads import streaming
from lens.heads.pruning import gate as streaming_gate
from lens.heads.pruning.gates import _Gate, _last_hidden
from lens.passes.inputs import read_prompts
from tests.lens.architectures import build
from tests.lens.naive import probabilities_and_values, rms_ratio

FIRST, LAST, LENGTH = 3, 7, 41


def near_keys(length=LENGTH):
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    return (j <= i) & ((j < FIRST) | (i - j < LAST))


def prompt_of(model, length=LENGTH):
    return lens.tasks.take(model, lens.tasks.text("moby-dick"), length)


@pytest.mark.parametrize("name", ["text-lm-3l", "stories260k"])
def test_scores_equal_the_twin(name):
    model = lens.load(name)
    ids, info = prompt_of(model), model.info
    found = streaming(model, ids, first=FIRST, last=LAST, progress=False)
    whole, values = (
        part.numpy() for part in probabilities_and_values(model.model, torch.tensor([ids]))
    )
    kept, error, rms = (np.empty((info.layers, info.heads)) for _ in range(3))
    for layer in range(info.layers):
        for head in range(info.heads):
            p = whole[layer, head]
            v = values[layer, head // (info.heads // info.kv_heads)]
            near = p * near_keys()
            mass = near.sum(-1)
            full, rest = p @ v, near / mass[:, None] @ v
            missing = np.linalg.norm(full - rest, axis=-1) / np.linalg.norm(full, axis=-1)
            kept[layer, head] = mass[FIRST + LAST :].mean()
            error[layer, head] = missing[FIRST + LAST :].mean()
            far = slice(FIRST + LAST, None)
            rms[layer, head] = np.linalg.norm((full - rest)[far]) / np.linalg.norm(full[far])
    assert rms_ratio(found.kept[..., 0], kept) < 1e-5
    assert rms_ratio(found.row_error[..., 0], error) < 1e-4
    assert rms_ratio(found.rms_error[..., 0], rms) < 1e-4
    assert np.abs(rms / error - 1).max() > 0.2  # two quantities, not two names of one


def test_closed_gates_are_the_model_under_the_streaming_mask():
    """alpha = 0 in all heads: the model's own attention with far keys masked out, GQA included."""
    model = lens.load("stories260k")
    ids = torch.tensor([prompt_of(model)])
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(
        ~torch.tensor(near_keys()), torch.finfo(torch.float32).min
    )
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model.model.model(ids, attention_mask=mask)[0][0]
    model.model.set_attn_implementation("sdpa")
    prompt = read_prompts(model, ids)[0][0]
    closed = torch.zeros(model.info.layers, model.info.kv_heads)
    with torch.no_grad():
        found = _last_hidden(model, prompt, _Gate(FIRST, LAST, closed))
        whole = _last_hidden(model, prompt, None)
        opened = _last_hidden(model, prompt, _Gate(FIRST, LAST, 1 + closed))
    assert rms_ratio(found, expected) < 1e-5
    assert rms_ratio(opened, whole) < 1e-5
    assert rms_ratio(found, whole) > 1e-2


def test_the_gradient_of_a_gate_is_the_difference_quotient():
    model = lens.load("stories260k")
    prompt = read_prompts(model, prompt_of(model))[0][0]

    def value(alpha):
        return _last_hidden(model, prompt, _Gate(FIRST, LAST, alpha)).square().mean()

    alpha = torch.full((model.info.layers, model.info.kv_heads), 0.6, requires_grad=True)
    (slope,) = torch.autograd.grad(value(alpha), [alpha])
    direction = torch.randn(alpha.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        quotient = (value(alpha + 0.01 * direction) - value(alpha - 0.01 * direction)) / 0.02
    assert float((slope * direction).sum()) == pytest.approx(float(quotient), rel=1e-2)


def test_the_gate_keeps_the_heads_of_induction_2l_that_look_far_back():
    """Its page: L0 heads look one or two back; L1H0, L1H2, L1H3 (induction) and L1H1 look 24, 25 back."""
    model = lens.load("induction-2l")
    prompts = [lens.tasks.copied(model, 25, seed=seed) for seed in range(4)]
    options = {"first": 1, "last": 8, "steps": 50, "rate": 0.05, "progress": False}
    gate = streaming_gate(model, prompts, **options)
    alpha = gate.table().set_index("name")["alpha"]
    far = ["L1H0", "L1H2", "L1H3"]
    near = ["L0H0", "L0H1", "L0H2", "L0H3"]
    assert alpha[far].min() > 0.8
    assert alpha[near].max() < 0.2
    assert set(far) <= {str(head) for head in gate.retrieval_heads()}
    assert gate.losses[0] == pytest.approx(0.05, rel=1e-4)  # all open: the penalty alone
    assert gate.losses[-1] < 0.7 * gate.losses[0]
    again = streaming_gate(model, prompts, **options)
    np.testing.assert_array_equal(gate.alpha, again.alpha)
    assert "of 8 heads above 0.5 with 1 first + 8 last keys; 50 steps" in repr(gate)
    np.testing.assert_array_equal(gate.plot().data[0].z, gate.values)
    cheap = streaming(model, prompts, first=1, last=8, progress=False)
    table = cheap.table().set_index("name")
    assert table.loc[far, "row_error"].min() > 10 * table.loc[near[:3], "row_error"].max()
    assert (table["row_error_low"] <= table["row_error"]).all()
    assert "4 prompts; largest row error L1H0" in repr(cheap)
    np.testing.assert_allclose(cheap.plot().data[0].z, cheap.row_error.mean(-1))


def test_heads_of_a_group_share_their_gate():
    model = lens.load("stories260k")
    gate = streaming_gate(
        model, prompt_of(model), first=1, last=5, steps=3, rate=0.1, progress=False
    )
    assert gate.alpha.shape == (5, 4)
    assert gate.values.shape == (5, 8)
    several = streaming_gate(
        model, [prompt_of(model)] * 4, first=1, last=5, steps=1, progress=False
    )
    assert several.n == 1  # the others were not drawn
    np.testing.assert_array_equal(gate.values[:, ::2], gate.alpha)
    np.testing.assert_array_equal(gate.values[:, 1::2], gate.alpha)


def test_what_cannot_stream_is_said():
    model = lens.load("text-lm-3l")
    with pytest.raises(LensError, match=r"a prompt has 9 tokens; it takes more than first \+ last"):
        streaming(model, prompt_of(model, 9), first=4, last=5)
    with pytest.raises(LensError, match="last must be a positive integer, got 0"):
        streaming(model, prompt_of(model), first=0, last=0)
    with pytest.raises(LensError, match="steps must be a positive integer, got 0"):
        streaming_gate(model, prompt_of(model), steps=0)
    encoder = build("bert")
    masked = transformers.BertForMaskedLM(encoder.config).eval()
    for network, said in (
        (encoder, "BertModel lets tokens see later ones.* load a causal language model"),
        (masked, "layer 0 has attention that is not plain causal"),
    ):
        with pytest.raises(LensError, match=said):
            streaming(lens.load(network), [5, 6, 7, 8, 9], first=1, last=2, progress=False)
