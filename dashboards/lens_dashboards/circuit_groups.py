"""Nodes of a circuit that are drawn as one: named by somebody, or all heads of a layer or of a role.

A link and a saved circuit keep those that somebody named: `movers=a9.h6+a9.h9;gate=m0`.
"""

from collections.abc import Mapping
from typing import Any

from lens.common.errors import LensError
from lens.runs import Run
from lens.traces.findings import findings
from lens_dashboards.circuit_edges import CircuitEdges

MOST_LETTERS = 40
_RESERVED = set("=;+<>")
_ROLES = ("induction", "previous_token", "duplicate_token", "sink")  # the first that a head has

Groups = dict[str, list[str]]


def write_groups(groups: Mapping[str, list[str]]) -> str:
    """Groups as a link holds them."""
    return ";".join(f"{name}={'+'.join(nodes)}" for name, nodes in groups.items())


def named_groups(text: str, edges: CircuitEdges, notes: list[str]) -> Groups:
    """The groups of a link; those that cannot be read are left out, with a note."""
    found: Groups = {}
    for part in filter(None, text.split(";")):
        name, _, nodes = part.partition("=")
        try:
            found = add_group(found, name, nodes.split("+"), edges)
        except LensError as error:
            notes.append(f"The group {name[:MOST_LETTERS]!r} of this link is left out: {error}.")
    return found


def add_group(groups: Groups, name: str, nodes: list[str], edges: CircuitEdges) -> Groups:
    """The groups with one more.

    Raises:
        LensError: a name that is empty, long, taken or has one of `= ; + < >`, or no nodes, unknown ones
            or ones that are in another group.
    """
    name = name.strip()
    known = {end for pair in edges.ends for end in (pair[0], pair[1].partition("<")[0])}
    if not 0 < len(name) <= MOST_LETTERS or set(name) & _RESERVED:
        raise LensError(f"a group needs a name of 1 to {MOST_LETTERS} letters without = ; + < >")
    if name in groups or name in known:
        raise LensError(f"the name {name!r} is taken; choose another")
    taken = {node for of in groups.values() for node in of}
    for node in nodes:
        if node not in known:
            raise LensError(f"the model of this run has no node {node[:MOST_LETTERS]!r}")
        if node in taken:
            raise LensError(f"{node} is in another group already")
    if not nodes:
        raise LensError("a group needs nodes; pin some that are in no group yet")
    return {**groups, name: list(dict.fromkeys(nodes))}


def read_groups(found: Mapping[str, Any], edges: CircuitEdges) -> Groups:
    """The groups of a circuit file; none where it has none.

    Raises:
        LensError: they are not groups of this model.
    """
    given = found.get("groups", {})
    if not isinstance(given, dict) or not all(isinstance(nodes, list) for nodes in given.values()):
        raise LensError('the groups of a circuit are {"name": ["a0.h1", ...]}')
    groups: Groups = {}
    for name, nodes in given.items():
        groups = add_group(groups, name, [str(node) for node in nodes], edges)
    return groups


def drawn_groups(run: Run, edges: CircuitEdges, by: str, own: Groups) -> Groups:
    """What is drawn as one: the named groups, and the other heads by `layer` or by `role` if asked for.

    A head's role is the first of induction, previous token, duplicate token and sink whose threshold
    (see `lens.traces.findings`) it passes; heads without one, MLPs and both ends stay single.
    """
    taken = {node for nodes in own.values() for node in nodes}
    heads = list(
        dict.fromkeys(
            node
            for writer, reader in edges.ends
            for node in (writer, reader.partition("<")[0])
            if node.startswith("a")
        )
    )
    names: dict[str, str] = {}
    if by == "layer":
        names = {node: f"heads of layer {node[1:].partition('.')[0]}" for node in heads}
    elif by == "role":
        kinds = {finding.kind: finding for finding in findings(run.heads) if finding.found}
        for kind in reversed([kind for kind in _ROLES if kind in kinds]):
            for score in kinds[kind].heads:
                names[f"a{score.layer}.h{score.head}"] = f"{kind.replace('_', ' ')} heads"
    groups: Groups = {}
    for node in heads:
        if node in names and node not in taken:
            groups.setdefault(names[node], []).append(node)
    return own | {name: nodes for name, nodes in groups.items() if name not in own}
