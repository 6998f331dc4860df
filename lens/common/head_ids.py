"""Names of heads: `L3H5`, `(3, 5)` and `"3.5"` all mean head 5 of layer 3, both counted from 0."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from lens.common.choices import check_lists, shown
from lens.common.errors import LensError
from lens.common.results import few

Part = Literal["encoder", "decoder", "cross"]
"""Attention of an encoder-decoder: of its encoder, of the decoder to itself, of the decoder to the encoder."""
PARTS: tuple[Part, ...] = get_args(Part)

_NAMED = re.compile(r"\s*[Ll](\d+)[Hh](\d+)\s*")
_NODE = re.compile(r"a(\d+)\.h(\d+)")
_DOTTED = re.compile(r"\s*(\d+)\.(\d+)\s*")


class HeadId(NamedTuple):
    """A head of a model; `str()` gives `L3H5`."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


AnyHead: TypeAlias = str | Sequence[int]
"""What `head_id` takes: `"L3H5"`, `"3.5"`, `(3, 5)` or a `HeadId`."""


def head_id(head: AnyHead, *, layers: int | None = None, heads: int | None = None) -> HeadId:
    """The head that is meant.

    Args:
        head: `"L3H5"` (case does not matter), `"3.5"` or `(3, 5)`, also a row of an array. The float 3.5 is refused, since
            3.1 and 3.10 are one float and two heads.
        layers, heads: sizes of the model, to check against.

    Raises:
        LensError: not a head, or not one of this model.

    Example:
        >>> str(head_id("3.5"))
        'L3H5'
    """
    found = _parse(head)
    for name, value, count in (("layer", found.layer, layers), ("head", found.head, heads)):
        if count is not None and value >= count:
            raise LensError(f"there is no {found}: {name} must be 0 to {count - 1}, got {value}")
    return found


def layers_in_words(layers: Sequence[int]) -> str:
    """`layer 3`, `layers 0 to 5`, `layers 3, 7 and 11`, in rising order."""
    numbers = [str(layer) for layer in layers]
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    if len(numbers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"layers {numbers[0]} to {numbers[-1]}"
    return f"layers {', '.join(numbers[:-1])} and {numbers[-1]}"


def all_heads(layers: Iterable[int], heads: int) -> list[HeadId]:
    """Every head of these layers, layer by layer."""
    return [HeadId(layer, head) for layer in layers for head in range(heads)]


def head_columns(heads: Iterable[Sequence[int]]) -> dict[str, Any]:
    """The columns `name`, `layer` and `head` of a table with one row per head."""
    places = [HeadId(*map(int, head)) for head in heads]
    return {
        "name": [str(place) for place in places],
        "layer": [place.layer for place in places],
        "head": [place.head for place in places],
    }


def head_of_node(node: str) -> HeadId | None:
    """The head that a node of a circuit is, `L3H5` of `a3.h5`; None for other nodes."""
    match = _NODE.fullmatch(node)
    return HeadId(int(match[1]), int(match[2])) if match else None


def node_of_head(named: Any) -> Any:
    """The node of a circuit that a head is by any of its names, `a3.h5` of `L3H5`; what is no head, as it is."""
    try:
        head = head_id(named)
    except LensError:
        return named
    return f"a{head.layer}.h{head.head}"


def one_or_more(name: str, given: Any) -> tuple[Any, ...]:
    """What is given as one head, by name or as (layer, head), or as a list or table of them, as a list.

    Raises:
        LensError: `heads must be a list, got 3`
    """
    if isinstance(given, str) or _pair(given) is not None:
        return (given,)
    columns = getattr(given, "columns", ())  # of a table of heads
    if "name" in columns:
        given = given["name"]
    elif {"layer", "head"} <= set(columns):
        given = [str(HeadId(*map(int, pair))) for pair in given[["layer", "head"]].to_numpy()]
    elif len(columns):
        raise LensError(
            f"{name} must be heads, got a table with the columns {few(list(columns))}; one of heads has 'name', or 'layer' and "
            "'head'"
        )
    check_lists(**{name: given})
    return tuple(given)


def _parse(head: AnyHead) -> HeadId:
    if isinstance(head, str):
        match = _NAMED.fullmatch(head) or _DOTTED.fullmatch(head)
        if match:
            return HeadId(int(match[1]), int(match[2]))
    elif (pair := _pair(head)) and min(pair) >= 0:
        return HeadId(*pair)
    got = repr(head) if isinstance(head, str | bytes | tuple) else shown(head)
    raise LensError(f"a head is written 'L3H5', '3.5' or (3, 5), counted from 0; got {got}")


def _pair(given: Any) -> tuple[int, int] | None:
    """Two whole numbers in a list, a tuple, a row of an array or tensor; None of anything else."""
    if isinstance(given, bytes) or len(getattr(given, "shape", (0,))) != 1:
        return None
    plain = getattr(given, "tolist", None)
    if plain is None and not isinstance(given, Sequence):
        return None
    parts = [*given] if plain is None else plain()
    if len(parts) != 2 or any(isinstance(one, bool | float | str | bytes) for one in parts):
        return None
    try:
        layer, head = (one.__index__() for one in parts)
    except (AttributeError, TypeError):  # of no number, or a tensor of several
        return None
    return layer, head
