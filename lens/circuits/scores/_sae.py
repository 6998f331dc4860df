"""A small sparse autoencoder, trained in seconds on the outputs of heads; the same by the same seed."""

from typing import NamedTuple

import torch
from torch import Tensor

from lens.common.choices import check_counts

_RATE = 1e-3


class Sae(NamedTuple):
    """Weights: encoder [features, d], its bias [features], decoder [features, d], centre [d]."""

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    centre: Tensor


def train(samples: Tensor, features: int, *, penalty: float, epochs: int, seed: int) -> Sae:
    """Fit `h = relu(W_e (x - b) + c)`, `x ~ W_d h + b` to samples [n, d].

    Loss `mean (x - x')^2 + penalty * mean |h|`; Adam, rate 1e-3, all samples in every epoch. Rows of
    the encoder and features of the decoder have the norm 1.
    """
    check_counts(0, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    size = samples.shape[1]
    encoder, decoder = (torch.randn(features, size, generator=draw) for _ in range(2))
    start = (encoder, torch.zeros(features), decoder, torch.zeros(size))
    weights = [part.requires_grad_() for part in start]
    optimizer = torch.optim.Adam(weights, lr=_RATE)
    with torch.enable_grad():
        for _ in range(epochs):
            sae = _unit(*weights)
            active = activations(sae, samples)
            error = active @ sae.decoder + sae.centre - samples
            loss = error.square().mean() + penalty * active.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Sae(*(part.detach() for part in _unit(*weights)))


def activations(sae: Sae, samples: Tensor) -> Tensor:
    """h [..., features] of samples [..., d]."""
    return ((samples - sae.centre) @ sae.encoder.T + sae.bias).relu()


def codes_of(sae: Sae, samples: Tensor) -> Tensor:
    """The most active feature [...] of samples [..., d]; the first one where none is active."""
    return activations(sae, samples).argmax(-1)


def _unit(encoder: Tensor, bias: Tensor, decoder: Tensor, centre: Tensor) -> Sae:
    encoder, decoder = (part / part.norm(dim=1, keepdim=True) for part in (encoder, decoder))
    return Sae(encoder, bias, decoder, centre)
