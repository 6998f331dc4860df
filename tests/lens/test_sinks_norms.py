"""Tokens of high norm: planted ones found, none where there is one mode, the neuron that writes them."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.models.layout import blocks
from lens.sinks import high_norm
from lens.sinks.activations.norms import otsu
from tests.lens.architectures import build

PIXELS = {"pixel_values": torch.randn(7, 1, 10, 10, generator=torch.Generator().manual_seed(3))}
PLANTED = {1: 5, 4: 13, 6: 20}  # prompt -> token


def test_otsu_equals_the_best_of_all_cuts():
    values = np.random.default_rng(4).normal(0, 1, 37)
    cuts = {}
    for cut in (np.sort(values)[1:] + np.sort(values)[:-1]) / 2:
        low, high = values[values <= cut], values[values > cut]
        between = sum(len(x) * (x.mean() - values.mean()) ** 2 for x in (low, high))
        cuts[cut] = between / 37 / values.var()
    best = max(cuts, key=lambda cut: cuts[cut])
    assert otsu(values) == pytest.approx(best)
    assert otsu(np.array([0, 0.1, 7, 7.2])) == pytest.approx(3.55)
    assert otsu(np.full(5, 2.0)) == 2


@pytest.fixture(scope="module")
def network():
    return build("vit")


def plant(model, layer=1, neuron=9):
    """One neuron of a layer fires at the planted tokens, and writes a long vector."""
    linear = [m for m in blocks(model)[layer].modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        linear[-1].weight[:, neuron] = 3.0
    count = iter(range(10**6))

    def fire(_, args):
        hidden = args[0].clone()
        number = next(count) % len(PIXELS["pixel_values"])
        if number in PLANTED:
            hidden[0, PLANTED[number], neuron] = 40.0
        return (hidden,)

    return linear[-1].register_forward_pre_hook(fire)


def test_planted_tokens_and_their_neuron_are_found():
    network = build("vit")
    model = lens.load(network)
    hook = plant(model)
    found = high_norm(model, PIXELS, skip=1)
    table = found.table()
    assert dict(zip(table["prompt"], table["position"], strict=True)) == PLANTED
    assert (table["norm"] > found.cutoff).all()
    assert found.layer == 2
    assert found.share == pytest.approx(3 / (7 * 25))
    assert found.findings()[0].startswith("3 tokens (1.71%) have a norm above")
    assert len(found.plot().to_dict()["data"]) == 1
    with pytest.raises(LensError, match="top must be a positive integer, got -4"):
        found.neurons(model, PIXELS, top=-4)
    neurons = found.neurons(model, PIXELS, top=4)
    assert neurons.loc[0, ["layer", "neuron"]].tolist() == [1, 9]
    assert neurons.loc[0, "outliers"] == pytest.approx(40)
    assert neurons.loc[0, "ratio"] > 100
    assert len(neurons) == 4
    hook.remove()


def test_one_mode_gives_none_and_says_why(network):
    found = high_norm(lens.load(network), PIXELS, skip=1)
    assert found.rows.empty
    assert np.isnan(found.cutoff)
    assert found.findings()[0].startswith("None found: the norms have one mode (175 tokens of 7")
    assert np.isnan(found.norms[:, 0]).all()
    with pytest.raises(LensError, match="no token of high norm was found"):
        found.neurons(lens.load(network), PIXELS)


def test_a_given_cutoff_is_kept(network):
    model = lens.load(network)
    norms = high_norm(model, PIXELS, layer=0).norms
    cutoff = float(np.median(norms))
    found = high_norm(model, PIXELS, layer=0, cutoff=cutoff)
    assert found.is_given
    assert len(found.rows) == (norms > cutoff).sum()
    assert "(given; 182 tokens of 7 prompts, after layer 0)" in found.findings()[0]
    with pytest.raises(LensError, match="found has 7 prompts and 2 were given"):
        found.neurons(model, {"pixel_values": PIXELS["pixel_values"][:2]})
    other = PIXELS["pixel_values"].clone()
    other[3] = other[3].flip(-1)
    with pytest.raises(LensError, match="prompt 3 is another than was looked at"):
        found.neurons(model, {"pixel_values": other})
    assert not any(module._forward_pre_hooks for module in network.modules())
    every = high_norm(model, PIXELS, layer=0, cutoff=1e-9).findings()[0]
    assert every.endswith("(given; 182 tokens of 7 prompts, after layer 0).")  # no others


def test_refusals(network):
    model = lens.load(network)
    with pytest.raises(LensError, match="layer must be -3 to 2, got 3"):
        high_norm(model, PIXELS, layer=3)
    with pytest.raises(LensError, match="cutoff must be a positive norm, got 0"):
        high_norm(model, PIXELS, cutoff=0)
    with pytest.raises(LensError, match="skip must be a number of tokens"):
        high_norm(model, PIXELS, skip=-1)
    with pytest.raises(LensError, match="at least two tokens behind the first 26"):
        high_norm(model, PIXELS, skip=26)
