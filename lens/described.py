"""What a result says of itself where it is printed: its name and its first findings."""

from collections.abc import Sequence
from typing import Protocol

SENTENCES = 4


class _Says(Protocol):
    def findings(self) -> Sequence[str]: ...


def described(result: _Says) -> str:
    """`Name`, then up to `SENTENCES` findings, one a line; how many more there are.

    Example:
        >>> print(described(lens.sinks.effect(model, texts)))
    """
    said = list(result.findings())
    more = len(said) - SENTENCES
    rest = [f"... {more} more in .findings()"] if more > 0 else []
    return "\n  ".join([type(result).__name__, *said[:SENTENCES], *rest])
