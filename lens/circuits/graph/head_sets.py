"""Heads given by name, by a circuit or by a known circuit, as one ordered set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from lens.circuits.graph.circuit import Circuit
from lens.circuits.known.circuit import KnownCircuit
from lens.common.choices import check_lists
from lens.common.errors import LensError
from lens.common.given import given_as, is_of
from lens.common.head_ids import AnyHead, HeadId, head_id, head_of_node
from lens.models.loaded import LoadedModel

if TYPE_CHECKING:
    from lens.circuits.discovery._finding import FoundCircuit


def heads_of(
    heads: Iterable[AnyHead] | Circuit | FoundCircuit | KnownCircuit,
) -> tuple[HeadId, ...]:
    """The heads that are meant, sorted, each once; of a circuit, also one that was found, those that a kept edge leaves from.

    Raises:
        LensError: one string instead of a list, or something that is no head.
    """
    if isinstance(heads, KnownCircuit):
        return tuple(sorted(heads.heads))
    if is_of("Circuit", heads):
        circuit: Circuit = given_as("Circuit", heads=heads)
        return tuple(sorted(filter(None, map(head_of_node, circuit.nodes))))
    if isinstance(heads, str):
        raise LensError(f"heads must be a list such as ['L3H5'], got the string {heads!r}")
    check_lists(heads=heads)
    return tuple(sorted({head_id(head) for head in cast("Iterable[AnyHead]", heads)}))


def heads_in(
    model: LoadedModel, heads: Iterable[AnyHead] | Circuit | FoundCircuit | KnownCircuit
) -> tuple[HeadId, ...]:
    """As `heads_of`, at least one and all in the model.

    Raises:
        LensError: no head, or one that the model has not got.
    """
    info = model.info
    chosen = heads_of(heads)
    if not chosen:
        raise LensError("there are no heads in it; give at least one, such as ['L3H5']")
    return tuple(info.head(head) for head in chosen)
