"""A small convolutional autoencoder of square maps, and principal components as its baseline."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lens.common.progress import advancing

_WIDTHS = (8, 16, 16, 16)  # channels after each halving of the side
_LAST = 4  # side at which halving ends
_ROWS = 256  # maps in one step; all, where there are fewer, so that their order says nothing


class Encoded(NamedTuple):
    """Maps by few numbers.

    Attributes:
        latent: [maps, numbers].
        decode: what comes back from any latents [n, numbers]: [n, side, side].
        missed: share of the variance that does not come back.
    """

    latent: np.ndarray
    decode: Callable[[np.ndarray], np.ndarray]
    missed: float


def components(maps: np.ndarray, size: int) -> Encoded:
    """The first principal components of maps [maps, side, side]."""
    flat, side = maps.reshape(len(maps), -1), maps.shape[-1]
    middle = flat.mean(0)
    _, _, axes = np.linalg.svd(flat - middle, full_matrices=False)
    axes = axes[:size]
    latent = (flat - middle) @ axes.T

    def decoded(values: np.ndarray) -> np.ndarray:
        return (values @ axes + middle).reshape(-1, side, side)

    return Encoded(latent, decoded, _missed(flat, decoded(latent).reshape(len(maps), -1)))


def autoencoder(maps: np.ndarray, size: int, steps: int, seed: int, progress: bool) -> Encoded:
    """A convolutional autoencoder trained on maps [maps, side, side], side a power of 2 from 8 on."""
    flat, side = maps.reshape(len(maps), -1), maps.shape[-1]
    middle, scale = maps.mean(0), float(maps.std()) or 1.0
    given = torch.as_tensor((maps - middle) / scale, dtype=torch.float32)[:, None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, decoder = _networks(side, size)
    random = torch.Generator().manual_seed(seed)
    learner = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(learner, steps)
    with torch.enable_grad(), advancing("autoencoder", steps, progress) as advance:
        for _ in range(steps):
            some = given
            if len(given) > _ROWS:
                some = given[torch.randperm(len(given), generator=random)[:_ROWS]]
            loss = (decoder(encoder(some)) - some).square().mean()
            learner.zero_grad()
            loss.backward()
            learner.step()
            schedule.step()
            advance(1)

    def decoded(values: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found: Tensor = decoder(torch.as_tensor(values, dtype=torch.float32))
        return found[:, 0].double().numpy() * scale + middle

    with torch.no_grad():
        latent = encoder(given).double().numpy()
    return Encoded(latent, decoded, _missed(flat, decoded(latent).reshape(len(maps), -1)))


def _networks(side: int, size: int) -> tuple[nn.Sequential, nn.Sequential]:
    halvings = int(np.log2(side // _LAST))
    widths = [1, *_WIDTHS[:halvings]]
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        down += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.ReLU()]
        up = [nn.ReLU(), nn.ConvTranspose2d(outer, inner, 4, stride=2, padding=1), *up]
    shape = (widths[-1], _LAST, _LAST)
    inside = int(np.prod(shape))
    encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(inside, size))
    return encoder, nn.Sequential(nn.Linear(size, inside), nn.Unflatten(1, shape), *up)


def _missed(maps: np.ndarray, back: np.ndarray) -> float:
    total = float(np.square(maps - maps.mean(0)).sum())
    return float(np.square(maps - back).sum()) / total if total else 0.0
