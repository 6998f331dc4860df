"""The traces of one prompt of an encoder-decoder (its encoder, decoder, cross-attention), or of towers (text, vision)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lens.common.errors import LensError
from lens.common.files import as_path
from lens.common.head_ids import PARTS
from lens.traces.store import INDEX
from lens.traces.trace import AttentionTrace


class TraceParts(Mapping[str, AttentionTrace]):
    """Traces by part: `parts["cross"]`, or `parts.cross`.

    A part that a model has not got (the encoder of a Q-Former) or that no trace can hold (one in stages) is missing.
    """

    def __init__(self, traces: Mapping[str, AttentionTrace]) -> None:
        self._traces = dict(traces)

    def __getitem__(self, part: str) -> AttentionTrace:
        if part not in self._traces:
            raise KeyError(f"{part!r}; there are {', '.join(self._traces)}")
        return self._traces[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._traces)

    def __len__(self) -> int:
        return len(self._traces)

    def __getattr__(self, part: str) -> AttentionTrace:
        if not part.startswith("_") and part in self._traces:
            return self._traces[part]
        raise AttributeError(f"there is no {part} here; there are {', '.join(self._traces)}")

    def save(self, folder: str | Path) -> Path:
        """Write each into a new folder of its name inside `folder`. Errors as `AttentionTrace.save`."""
        folder = as_path("folder", folder)
        for part, trace in self.items():
            trace.save(folder / part)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> TraceParts:
        """Open what `save` or `lens.capture(..., out=)` wrote.

        Raises:
            LensError: none of them, or as `AttentionTrace.load`.
        """
        folder = as_path("folder", folder)
        inside = sorted(one.parent.name for one in folder.glob(f"*/{INDEX}"))
        there = sorted(inside, key=lambda part: PARTS.index(part) if part in PARTS else len(PARTS))
        if not there:
            raise LensError(
                f"{folder} holds no traces of parts (encoder, decoder, cross; of towers text, vision)"
            )
        return cls({part: AttentionTrace.load(folder / part) for part in there})

    def __repr__(self) -> str:
        return "\n".join(f"{part}: {trace!r}" for part, trace in self.items())
