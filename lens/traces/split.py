"""The records of a prompt that is split over processes: those of the whole, on every process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from lens_kernels.distributed import Processes

from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall
from lens.passes.inputs import Prompt
from lens.passes.sessions import listening, run
from lens.passes.split import Split
from lens.traces.statistics import LayerRecord, Settings, measure


def record_split(
    model: LoadedModel,
    prompt: Prompt,
    settings: Settings,
    links: Processes,
    done: Callable[[LayerRecord], None],
) -> None:
    """Runs this process's part of a prompt; `done` gets the record of the whole of each layer."""
    assert prompt.ids is not None
    ids = torch.tensor([prompt.ids])
    split = Split(prompt.ids, settings.block_size, links, model.device)

    def on_layer(call: LayerCall) -> torch.Tensor:
        whole = split.whole(call, ids, settings.keep_qk)
        own = partial(split.attend, call)
        output, record = measure(whole, settings, lambda _, **asked: own(**asked))
        done(record)
        return output

    with torch.no_grad(), listening(model, on_layer):
        run(model, split.inputs)
