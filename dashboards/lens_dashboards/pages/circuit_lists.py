"""What stands beside the graph on the page of circuits: its groups, nodes and paths."""

from typing import Any

from dash import dcc, html

from lens.common.head_ids import head_of_node
from lens_dashboards.circuit_edges import CircuitEdges
from lens_dashboards.circuit_groups import MOST_LETTERS, write_groups
from lens_dashboards.pages.parts import Cell, data_table, number
from lens_dashboards.selection import Selection

_MOST_NODES = 60


def groups_list(view: Selection, own: dict[str, list[str]], pins: list[str]) -> list[Any]:
    """The groups that somebody made, and how to make one of the pinned nodes."""
    items = []
    for name, nodes in own.items():
        rest = write_groups({one: of for one, of in own.items() if one != name})
        items.append(
            html.Li(
                [
                    html.B(name),
                    f": {', '.join(nodes)} ",
                    dcc.Link(
                        "ungroup", href=view.where(groups=rest).url(), title=f"ungroup {name}"
                    ),
                ]
            )
        )
    free = [node for node in pins if not any(node in nodes for nodes in own.values())]
    hint = (
        f"Pinned and in no group: {', '.join(free)}."
        if free
        else "Pin nodes below, give them a name, and they are drawn as one; the link and the saved circuit "
        "keep it."
    )
    return [
        html.Ul(items, id="groups"),
        html.P(hint, className="small"),
        html.Div(
            [
                html.Label("Name", htmlFor="group-name"),
                dcc.Input(id="group-name", type="text", maxLength=MOST_LETTERS, debounce=False),
                html.Button(
                    "group the pinned nodes",
                    id="make-group",
                    type="button",
                    className="quiet",
                    disabled=not free,
                ),
            ],
            className="control group",
        ),
        html.P(id="group-problem", className="problem", role="alert"),
    ]


def nodes_table(
    view: Selection, edges: CircuitEdges, chosen: list[int], pins: list[str]
) -> list[Any]:
    """The writers of the circuit, each with a link that pins it."""
    rows = edges.nodes(chosen)
    body: list[list[Cell]] = []
    for row in rows[:_MOST_NODES]:
        node = row["node"]
        after = [one for one in pins if one != node] if node in pins else [*pins, node]
        act = "unpin" if node in pins else "pin"
        name, page = _name(node, edges), node_link(view, node, edges)
        body.append(
            [
                (name, page) if page else name,
                f"{row['edges']:,}",
                f"{row['score']:+z.3g}",
                (act, view.where(pins=",".join(after)).url(), f"{act} {node}"),
            ]
        )
    left = len(rows) - len(body)
    return [
        html.P(
            "With pinned nodes the graph shows only the edges that leave or enter them."
            + (f" The {_MOST_NODES} largest of {len(rows)} nodes." if left else ""),
            className="small",
        ),
        data_table(
            "Nodes of the circuit",
            ("Node", "Edges out", "Sum of scores", "Pinned"),
            body,
            marked=[number for number, row in enumerate(rows[:_MOST_NODES]) if row["node"] in pins],
        ),
    ]


def paths_list(view: Selection, edges: CircuitEdges, chosen: list[int]) -> Any:
    """The paths from the input to the logits whose weakest edge is strongest."""
    paths = edges.paths(chosen)
    if not paths:
        return html.P("No path from the input to the logits.")
    items = []
    for size, nodes in paths:
        parts: list[Any] = []
        for node in nodes:
            name, page = _name(node, edges), node_link(view, node, edges)
            parts += [dcc.Link(name, href=page) if page else name, " → "]
        items.append(html.Li([*parts[:-1], html.Span(f": weakest edge {number(size)}")]))
    return html.Ol(items, className="strongest", id="paths")


def _name(node: str, edges: CircuitEdges) -> str:
    head = head_of_node(node)
    return f"{head or node}{' (mixer)' * edges.is_mixer(node)}"


def node_link(view: Selection, node: str, edges: CircuitEdges) -> str:
    """The page of a head, "" for other nodes and for heads of mixers."""
    head = head_of_node(node)
    return view.to_head(*head).url() if head and not edges.is_mixer(node) else ""
