"""The same architecture with weights drawn anew: what a score is worth that such a model has too."""

from copy import deepcopy
from dataclasses import replace

import torch

from lens.common.choices import Seed
from lens.models.bare import bare
from lens.models.loaded import LoadedModel


def random_weights(model: LoadedModel, seed: Seed = 0) -> LoadedModel:
    """A copy of the model with weights as they were before training, drawn by `seed`.

    They are drawn by the architecture's own initialisation. The model itself and the state of torch's
    random numbers stay as they are.

    Of a `TransformerBridge` it is the model that it wraps, drawn anew.

    Raises:
        LensError: a bridge that computes something else than the model that it wraps.

    Example:
        >>> random_weights(lens.load("induction-2l")).name
        'induction-2l (random weights, seed 0)'
    """
    model = bare(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = type(model.model)(deepcopy(model.model.config))
    drawn = drawn.to(model.device, model.dtype).eval()
    return replace(
        model, model=drawn, name=f"{model.name} (random weights, seed {seed})", check=None
    )
