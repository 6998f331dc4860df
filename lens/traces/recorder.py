"""`lens.traces.capturing`: records every attention layer of whatever runs inside the block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from lens.common.choices import Count
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend, without_last
from lens.passes.sessions import listening
from lens.traces.statistics import LayerRecord, Settings, make_settings, measure

MOST_DRAFTED = 2048
"""Tokens of a pass that is kept until it is known whether drafts among them were rejected."""


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
        self._calls: list[LayerCall] = []  # of the last pass, if drafts may be among its tokens
        self._settings = settings
        self._keeps = on_record is None
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
        if self._calls and self._calls[0].step != call.step:
            self._calls.clear()
        if self._keeps and 1 < call.query.shape[2] <= MOST_DRAFTED:
            self._calls.append(call)
        return output

    def forget(self) -> None:
        """Let go of what is kept of the last pass."""
        self._calls.clear()

    def on_cut(self, step: int, count: int) -> None:
        """Measure the pass again without its last tokens, which were rejected.

        Raises:
            LensError: the pass had too many tokens for it to be kept.
        """
        if not self._calls or self._calls[0].step != step:
            raise LensError(
                f"{count} drafted tokens of pass {step} were rejected, and that pass had more than "
                f"{MOST_DRAFTED} tokens, so that they cannot be taken out of what was recorded; run the "
                "prompt first and generate from its cache, or without drafts (assistant_model, "
                "prompt_lookup_num_tokens)"
            )
        cut = [without_last(call, count) for call in self._calls]
        start = next(at for at, record in enumerate(self.records) if record.step == step)
        self.records[start:] = [measure(call, self._settings)[1] for call in cut]


class Once:
    """Records a layer that attends twice with one pattern (DiffLlama) once."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name
        self._before: LayerCall | None = None

    def on_layer(self, call: LayerCall) -> torch.Tensor:
        before, self._before = self._before, call
        if not call.part:
            return self._recorder.on_layer(call)
        pairs = [] if before is None else [(before.query, call.query), (before.key, call.key)]
        if not pairs or not all(torch.equal(*pair) for pair in pairs):
            raise LensError(
                f"layer {call.layer} of {self._name} attends {call.part + 1} times with other queries or "
                "keys, and a trace holds one pattern a layer; use lens.traces.capturing(model), whose "
                "records have a part"
            )
        return attend(call, statistics=()).output


@contextmanager
def capturing(
    model: LoadedModel,
    *,
    statistics: str | Sequence[str] = "all",
    block_size: Count = 64,
    keep_qk: bool = False,
    backend: str = "auto",
) -> Iterator[Recorder]:
    """Record the attention of every forward pass inside the block, generation included.

    Args:
        model: as `lens.load` returns it; run `model.model` inside the block as you like.
        statistics, block_size, keep_qk, backend: as in `lens.capture`.

    Yields:
        A `Recorder`; `recorder.layers(step)` are the records of forward pass `step`. Decoding steps
        have one query and all the cached keys. Drafts that assisted or prompt-lookup decoding rejects
        are taken out of the record of their pass before the next one.

    Raises:
        LensError: as in `lens.capture`; drafts rejected from a pass of more than 2,048 tokens.

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
    with listening(model, recorder.on_layer, parts=True, on_cut=recorder.on_cut):
        yield recorder
    recorder.forget()
