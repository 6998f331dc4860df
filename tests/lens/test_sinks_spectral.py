"""Spectral bands: a partition of the stream, energies that sum to 1, filtered losses by hand."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.sinks import bands
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio

IDS = torch.randint(3, 97, (2, 23), generator=torch.Generator().manual_seed(5))
COUNT = 7  # of 48 dimensions: bands of unequal size


@pytest.fixture(scope="module")
def network():
    found = build("llama")
    torch.nn.init.normal_(found.lm_head.weight, std=0.7)
    torch.nn.init.uniform_(found.model.norm.weight, 0.5, 2)
    return found


def test_projectors_sum_to_the_identity_and_are_those_of_the_svd(network):
    found = bands(lens.load(network), count=COUNT)
    projectors = [found.projector(band) for band in range(COUNT)]
    assert rms_ratio(torch.stack(projectors).sum(0), torch.eye(48)) < 1e-12
    weight = (network.lm_head.weight * network.model.norm.weight).detach().double()
    _, sizes, directions = torch.linalg.svd(weight, full_matrices=False)
    for band, (a, b) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
        expected = directions[a:b].T @ directions[a:b]
        assert rms_ratio(projectors[band], expected) < 1e-5
        assert found.share[band] == pytest.approx(
            float(sizes[a:b].square().sum() / sizes.square().sum())
        )
    assert found.share.tolist() == sorted(found.share, reverse=True)


def test_energies_sum_to_one_and_equal_projected_norms(network):
    model = lens.load(network)
    table = bands(model, count=COUNT).table()
    assert len(table) == 4 * 3 * 6 * COUNT
    sums = table.groupby(["layer", "head", "weight"])["energy"].sum()
    assert sums.to_numpy() == pytest.approx(np.ones(72))
    weight = network.model.layers[2].self_attn.o_proj.weight[:, 32:40].detach().double()
    projector = bands(model, count=COUNT).projector(3)
    expected = (projector @ weight).square().sum() / weight.square().sum()
    row = table.query("layer == 2 and head == 4 and weight == 'output' and band == 3")
    assert row["energy"].to_numpy() == pytest.approx([float(expected)])


def test_losses_without_a_band_equal_those_by_hand(network):
    model = lens.load(network)
    result = bands(model, IDS, count=COUNT).losses
    assert result is not None
    taken = []
    hook = network.model.norm.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    with torch.no_grad():
        plain = network(IDS[1:]).logits[0, :-1]
        hook.remove()
        for band in (0, COUNT - 1):
            stream = taken[0].double() @ (torch.eye(48) - bands(model, count=COUNT).projector(band))
            logits = network.lm_head(network.model.norm(stream.float()))[0, :-1]
            losses = [torch.nn.functional.cross_entropy(x, IDS[1, 1:]) for x in (logits, plain)]
            expected = float(losses[0] - losses[1])
            assert abs(expected) > 1e-3
            assert result.delta_loss[band, 1] == pytest.approx(expected, abs=1e-5)
    assert len(result.table()) == COUNT
    drawn = torch.randn(48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = torch.linalg.qr(drawn).Q[:, :7]  # 48 directions in seven bands: the first has seven
    with torch.no_grad():
        stream = taken[0].double() @ (torch.eye(48) - own @ own.T)
        logits = network.lm_head(network.model.norm(stream.float()))[0, :-1]
        losses = [torch.nn.functional.cross_entropy(x, IDS[1, 1:]) for x in (logits, plain)]
    assert result.random[0, 1] == pytest.approx(float(losses[0] - losses[1]), abs=1e-5)
    chance = bands(model, count=COUNT).table().drop_duplicates("band")["chance"]
    assert chance.tolist() == pytest.approx([7 / 48] * 3 + [6 / 48] + [7 / 48] * 3)
    assert "(2 prompts, BOS absent)" in result.findings()[0]


def test_refusals(network):
    model = lens.load(network)
    with pytest.raises(LensError, match=r"count must be 1 to 48 .* got 49"):
        bands(model, count=49)
    found = bands(model, count=COUNT)
    with pytest.raises(LensError, match="band must be 0 to 6, got 7"):
        found.projector(7)
    assert found.losses is None
    with pytest.raises(LensError, match="at least two"):
        bands(model, [[5]])
