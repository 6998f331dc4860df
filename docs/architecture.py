"""Draw the house from its imports: `make architecture` writes `docs/house.svg`.

A room is a first-level folder of `lens/`, or one of the other packages; `lens` is the front door. An
arrow says that a file of the upper room imports one of the lower, whether at the top, inside a function,
for type checking only or in a stub. Arrows that longer ways imply are left out of the drawing; the title
of a box names all of them. Rooms in a circle are drawn in red.
"""

import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).parents[1]))

from docs.imports import arrows_of, module_files

PICTURE = Path(__file__).parent / "house.svg"
Arrows = dict[str, set[str]]  # room -> the rooms that it imports
Node = tuple[str, str, int]  # a room and its storey; or a point of an arrow: from, to, storey

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 150, 38, 30, 52, 24
COLORS = {"lens_kernels": "#fbe3c8", "lens_analyses": "#dff0dc", "lens_dashboards": "#dff0dc"}
STYLE = """
text { font: 600 14px system-ui, sans-serif; text-anchor: middle; fill: #1b2733 }
rect.room { fill: #dbe7f6; stroke: #5b6b7b }
path { fill: none; stroke: #5b6b7b; stroke-width: 1.3; marker-end: url(#head) }
path.circle { stroke: #c62828; stroke-width: 2 }
"""


def arrows(files: Mapping[str, list[Path]]) -> Arrows:
    """Which room imports which, from the files of each module."""
    found: Arrows = {}
    for name, targets in arrows_of(files).items():
        found.setdefault(_room(name), set()).update(map(_room, targets))
    return {room: targets - {room} for room, targets in found.items()}


def _room(module: str) -> str:
    package, _, inside = module.partition(".")
    return inside.partition(".")[0] if package == "lens" and inside else package


def reached(found: Arrows) -> Arrows:
    """Every room that a room imports, at first or second hand; itself where it is in a circle."""
    far = {room: set(targets) for room, targets in found.items()}
    for between in found:
        for targets in far.values():
            if between in targets:
                targets |= far[between]
    return far


def needed(found: Arrows) -> Arrows:
    """The arrows that no longer way implies; every arrow of a circle stays."""
    far = reached(found)

    def circle(one: str, other: str) -> bool:
        return other in far[one] and one in far[other]

    return {
        room: {
            target
            for target in targets
            if circle(room, target)
            or not any(
                target in far[other] and not circle(room, other) and not circle(other, target)
                for other in targets - {target}
            )
        }
        for room, targets in found.items()
    }


def heights(found: Arrows) -> dict[str, int]:
    """Room -> its storey: one above the highest that it imports; the rooms of a circle share theirs."""
    far = reached(found)
    below = {room: {t for t in far[room] if room not in far[t]} for room in found}
    storeys: dict[str, int] = {}
    for room in sorted(found, key=lambda room: len(below[room])):
        storeys[room] = 1 + max((storeys[target] for target in below[room]), default=-1)
    return storeys


def drawn(found: Arrows) -> str:
    """The SVG: what is imported stands below what imports it."""
    far, storeys = reached(found), heights(found)
    ways = [
        _way(room, target, storeys)
        for room, targets in sorted(needed(found).items())
        for target in sorted(targets)
    ]
    level = {node: node[2] for way in ways for node in way}
    level |= {(room, "", storeys[room]): storeys[room] for room in found}
    x = _placed(_ordered(level, ways), ways)
    top = max(storeys.values())

    def upper(node: Node) -> float:
        return MARGIN + (top - node[2]) * (HEIGHT + GAP_Y)

    width, height = max(x.values()) + WIDTH / 2 + MARGIN, upper(("", "", 0)) + HEIGHT + MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-label="Rooms and their imports">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0,0 L8,4 L0,8 z" style="fill:#5b6b7b;stroke:none;marker-end:none"/>'
        "</marker></defs>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    ends = _spread(ways, x)
    for way in ways:
        room, target = way[0][0], way[-1][0]
        kind = ' class="circle"' if room in far[target] else ""
        out.append(f'<path{kind} d="{_curve(way, x, upper, ends)}"/>')
    for room in sorted(found):
        node = (room, "", storeys[room])
        left = x[node] - WIDTH / 2
        fill = f' style="fill:{COLORS[room]}"' if room in COLORS else ""
        title = f"{room} imports {', '.join(sorted(found[room])) or 'no other room'}"
        out.append(
            f"<g><title>{escape(title)}</title>"
            f'<rect class="room" x="{left:.1f}" y="{upper(node):.1f}" width="{WIDTH}" height="{HEIGHT}" '
            f'rx="6"{fill}/>'
            f'<text x="{x[node]:.1f}" y="{upper(node) + 24:.1f}">{escape(room)}</text></g>'
        )
    return "\n".join([*out, "</svg>\n"])


def _way(room: str, target: str, storeys: Mapping[str, int]) -> list[Node]:
    """The nodes that an arrow goes through: its room, a point in every storey between, its target."""
    start, end = storeys[room], storeys[target]
    between = [(room, target, level) for level in range(start - 1, end, -1)]
    return [(room, "", start), *between, (target, "", end)]


def _ordered(level: Mapping[Node, int], ways: list[list[Node]]) -> list[list[Node]]:
    """The nodes of each storey from left to right, so that few arrows cross (barycentres, up and down)."""
    near = _neighbours(ways)
    rows = [sorted(n for n in level if level[n] == at) for at in range(max(level.values()) + 1)]
    best, fewest = rows, _crossings(rows, ways)
    for sweep in range(24):
        rows = [list(row) for row in rows]
        step = 1 if sweep % 2 else -1
        for row in rows[::-1] if step == 1 else rows:
            at = {n: i / max(len(r) - 1, 1) for r in rows for i, n in enumerate(r)}
            beside = {n: [at[m] for m in near.get(n, ()) if (m[2] - n[2]) * step > 0] for n in row}
            row.sort(key=lambda n: (fmean(beside[n]) if beside[n] else at[n], n))
        if (crossed := _crossings(rows, ways)) < fewest:
            best, fewest = rows, crossed
    return best


def _neighbours(ways: list[list[Node]]) -> dict[Node, list[Node]]:
    near: dict[Node, list[Node]] = {}
    for way in ways:
        for one, other in itertools.pairwise(way):
            near.setdefault(one, []).append(other)
            near.setdefault(other, []).append(one)
    return near


def _crossings(rows: list[list[Node]], ways: list[list[Node]]) -> int:
    at = {node: i for row in rows for i, node in enumerate(row)}
    pieces: dict[int, list[tuple[int, int]]] = {}
    for way in ways:
        for one, other in itertools.pairwise(way):
            pieces.setdefault(one[2], []).append((at[one], at[other]))
    return sum(
        (a - c) * (b - d) < 0
        for several in pieces.values()
        for i, (a, b) in enumerate(several)
        for c, d in several[:i]
    )


def _placed(rows: list[list[Node]], ways: list[list[Node]]) -> dict[Node, float]:
    """The middle of each node: near its neighbours' middle, in its row's order, without overlap."""
    near = _neighbours(ways)

    def room_for(left: Node, right: Node) -> float:
        widths = [WIDTH if not node[1] else 0 for node in (left, right)]
        return sum(widths) / 2 + GAP_X

    x: dict[Node, float] = {}
    for row in rows:
        for i, node in enumerate(row):
            x[node] = x[row[i - 1]] + room_for(row[i - 1], node) if i else 0.0
    for _ in range(60):
        for row in rows:
            wish = {n: fmean([x[m] for m in near[n]]) if n in near else x[n] for n in row}
            left, right = dict(wish), dict(wish)
            for one, other in itertools.pairwise(row):
                left[other] = max(left[other], left[one] + room_for(one, other))
            for one, other in zip(row[:0:-1], row[-2::-1], strict=False):
                right[other] = min(right[other], right[one] - room_for(other, one))
            x |= {node: (left[node] + right[node]) / 2 for node in row}
    shift = MARGIN + WIDTH / 2 - min(x.values())
    return {node: round(value + shift, 1) for node, value in x.items()}


def _spread(ways: list[list[Node]], x: Mapping[Node, float]) -> dict[tuple[Node, Node], float]:
    """Where an arrow leaves a box and where it enters one: side by side, in the order of its way."""
    found: dict[tuple[Node, Node], float] = {}
    for first, second in ((0, 1), (-1, -2)):
        for box in {way[first] for way in ways}:
            others = sorted((way[second] for way in ways if way[first] == box), key=lambda n: x[n])
            step = min(18.0, (WIDTH - 24) / len(others))
            for i, other in enumerate(others):
                found[box, other] = x[box] + (i - (len(others) - 1) / 2) * step
    return found


def _curve(
    way: list[Node],
    x: Mapping[Node, float],
    upper: Callable[[Node], float],
    ends: Mapping[tuple[Node, Node], float],
) -> str:
    start, end = ends[way[0], way[1]], ends[way[-1], way[-2]]
    if way[0][2] == way[-1][2]:  # a circle inside one storey
        y = upper(way[0]) + HEIGHT
        return f"M{start:.1f},{y:.1f} C{start:.1f},{y + 40:.1f} {end:.1f},{y + 40:.1f} {end:.1f},{y:.1f}"
    points = [(start, upper(way[0]) + HEIGHT)]
    for node in way[1:-1]:
        points += [(x[node], upper(node)), (x[node], upper(node) + HEIGHT)]
    points.append((end, upper(way[-1]) - 1))
    path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        half = (y0 + y1) / 2
        path += f" C{x0:.1f},{half:.1f} {x1:.1f},{half:.1f} {x1:.1f},{y1:.1f}"
    return path


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(drawn(arrows(module_files())))
    print(PICTURE)


if __name__ == "__main__":
    main()
