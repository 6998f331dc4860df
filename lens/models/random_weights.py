"""The same architecture with weights drawn anew: what a score is worth that such a model has too."""

from dataclasses import replace

import torch

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel


def random_weights(model: LoadedModel, seed: int = 0) -> LoadedModel:
    """A copy of the model with weights as they were before training, drawn by `seed`.

    They are drawn by the architecture's own initialisation. The model itself and the state of torch's
    random numbers stay as they are.

    Raises:
        LensError: a `TransformerBridge`, whose initialisation is not known here.

    Example:
        >>> random_weights(lens.load("induction-2l")).name
        'induction-2l (random weights, seed 0)'
    """
    if model.is_bridge:
        raise LensError(
            f"{model.name} is a TransformerBridge, whose weights cannot be drawn anew; "
            "load the transformers model instead"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = type(model.model)(model.model.config)
    drawn = drawn.to(model.device, model.dtype).eval()
    return replace(
        model, model=drawn, name=f"{model.name} (random weights, seed {seed})", check=None
    )
