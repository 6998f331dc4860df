"""`lens.traces.capturing`: records every attention layer of whatever runs inside the block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall
from lens.passes.sessions import listening
from lens.traces.statistics import LayerRecord, Settings, make_settings, measure


class Recorder:
    """Measures each attention call and keeps the records, or hands them on.

    Attributes:
        records: one `LayerRecord` per attention layer and forward pass, in order; empty when they
            are handed on instead.
    """

    def __init__(
        self, settings: Settings, on_record: Callable[[LayerRecord], None] | None = None
    ) -> None:
        self.records: list[LayerRecord] = []
        self._settings = settings
        self._on_record = on_record or self.records.append

    def layers(self, step: int = 0) -> list[LayerRecord]:
        """Records of one forward pass, in the order of the layers."""
        return [record for record in self.records if record.step == step]

    @property
    def steps(self) -> int:
        """Number of forward passes so far."""
        return self.records[-1].step + 1 if self.records else 0

    def on_layer(self, call: LayerCall) -> torch.Tensor:
        """See `lens.passes.sessions.listening`."""
        output, record = measure(call, self._settings)
        self._on_record(record)
        return output


@contextmanager
def capturing(
    model: LoadedModel,
    *,
    statistics: str | Sequence[str] = "all",
    block_size: int = 64,
    keep_qk: bool = False,
    backend: str = "auto",
) -> Iterator[Recorder]:
    """Record the attention of every forward pass inside the block, generation included.

    Args:
        model: as `lens.load` returns it; run `model.model` inside the block as you like.
        statistics, block_size, keep_qk, backend: as in `lens.capture`.

    Yields:
        A `Recorder`; `recorder.layers(step)` are the records of forward pass `step`. Decoding steps
        have one query and all the cached keys.

    Raises:
        LensError: as in `lens.capture`.

    Example:
        >>> with capturing(model) as recorder:
        ...     model.model.generate(ids, max_new_tokens=3)
        >>> recorder.layers(step=1)[0].queries
        1
    """
    settings = make_settings(
        statistics=statistics, block_size=block_size, keep_qk=keep_qk, backend=backend
    )
    recorder = Recorder(settings)
    with listening(model, recorder.on_layer, parts=True):
        yield recorder
