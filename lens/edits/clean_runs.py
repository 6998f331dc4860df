"""Each prompt run once as it is, for all the edits that are compared with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lens.common.errors import LensError
from lens.edits.losses import predictions
from lens.edits.watching import Watch
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt
from lens.passes.logits import predicts_next

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True, eq=False)
class CleanRun:
    """What one prompt gives without an edit.

    Attributes:
        predictions: log probabilities of what follows each token.
        received: attention that each key receives, summed over the queries.
        alpha: mean over the queries that see it; NaN where too few do.
        queries: how many there are.
        hides: bool [tokens - 1], whose next token is seen by none up to there, so that it has a loss; None: all.
    """

    predictions: Float[torch.Tensor, "tokens vocab"]
    received: Float[torch.Tensor, "layers heads keys"]
    alpha: Float[torch.Tensor, "layers heads keys"]
    queries: int
    hides: Bool[torch.Tensor, "before"] | None = None


class CleanRuns:
    """Remembers the clean run of each prompt of one model: 4 bytes × tokens × vocabulary a prompt.

    Give the same object to several tests of one model and its prompts are run without an edit once.

    Example:
        >>> clean = CleanRuns(model)
        >>> found = [lens.effect(model, texts, e, clean=clean) for e in (lens.edits.Mask(), lens.edits.Drop())]
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self._runs: dict[tuple[tuple[int, ...], str], CleanRun] = {}

    def __len__(self) -> int:
        """Prompts run so far."""
        return len(self._runs)

    def of(self, prompt: Prompt) -> CleanRun:
        """The run of a prompt. Errors as in `lens.effect`."""
        more = prompt.inputs.keys() - {"input_ids"}
        name = tuple(prompt.ids or ()), prompt.inputs_sha256 if more else ""
        if name not in self._runs:
            self._runs[name] = self.run(prompt)
        return self._runs[name]

    def run(self, prompt: Prompt, rows: Bool[torch.Tensor, "tokens"] | None = None) -> CleanRun:
        """The prompt run now; `rows`: whose attention is looked at; None: all."""
        watch = Watch(rows=rows, ahead=looks_ahead(self.model))
        found = predictions(self.model, prompt, watch.on_layer, parts=True)
        received = of_layers(self.model, watch.layers_received())
        alpha = of_layers(self.model, watch.alpha())
        return CleanRun(found, received, alpha, watch.queries, watch.hides)


def looks_ahead(model: LoadedModel) -> bool:
    """Whether layers may see later tokens, or those of another sequence, and predictions are none the worse."""
    return model.chosen in ("encoder", "cross") or not predicts_next(model)


def of_layers(
    model: LoadedModel, values: Float[torch.Tensor, "attending *rest"]
) -> Float[torch.Tensor, "layers *rest"]:
    """[attending layers, ...] as [layers, ...], with NaN where a layer has no softmax attention."""
    return torch.from_numpy(model.info.by_layer(values.float().numpy())).to(values.dtype)


def clean_runs(model: LoadedModel, clean: CleanRuns | None) -> CleanRuns:
    """The given clean runs, or new ones.

    Raises:
        LensError: they are of another model.
    """
    if clean is not None and clean.model is not model:
        raise LensError("clean holds runs of another model; make one CleanRuns for each model")
    return CleanRuns(model) if clean is None else clean
