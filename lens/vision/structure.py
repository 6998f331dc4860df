"""The structure that attention gives a picture: trees of patches, and segments of patches that look alike.

Trees: Ding et al., "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", CVPR 2023, arXiv
2304.03282. Read backwards, attention sends what patch i knows to the patch j that it looks at: j is the parent of i. The
tree is the arborescence with the highest sum of log D, D the mean of heads without sinks, each row normalised. It has one
root, the patch whose own parent is missed least; with roots="sink" a patch may also be a root for what it gives to no
patch ([CLS], registers, sinks). Greedy parents, each patch's best, may run in circles, which are counted. In windows nobody
looks out of the own one: each has a tree of its own.

Segments: patches whose rows are alike look at the same thing. Rows are compared by the symmetric Kullback-Leibler
divergence and merged while they differ by at most tau (the attention clustering of Ding et al., "Betrayed by Attention",
ECCV 2024, arXiv 2311.17893). Rows of two windows have no key in common, so that a segment ends where a window does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from lens.common.choices import check_choice, check_counts, is_number
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId
from lens.common.results import Result, Sentence
from lens.stats.intervals import of_share
from lens.traces.overlays import SINK_TIMES, heads_of, received
from lens.traces.pictures import PatchGrid
from lens.traces.tiles import sees
from lens.vision._arborescence import arborescence, greedy_cycles
from lens.vision._patches import grid_of, offsets

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

_FLOOR = 1e-12
_ROUNDS = 20
_NEVER = 1e6  # what a second root costs


@dataclass(frozen=True, repr=False, eq=False)
class PatchTree(Result):
    """The tree of patches of one or several heads.

    Attributes:
        parents: [patches] int, row by row: the parent of each patch, -1 of a root.
        depth: [patches] edges up to a root.
        score, greedy_score: sum of log D over the edges of the tree, and of each patch's best.
        cycles: circles among the greedy parents.
        adjacent, adjacent_chance: share of edges that go to one of the 8 neighbours, and of all pairs.
        what: whose attention.
        grid: of the patches.
        windows: parts of the picture of which none sees another.
    """

    parents: np.ndarray = field(repr=False)
    depth: np.ndarray = field(repr=False)
    score: float
    greedy_score: float
    cycles: int
    adjacent: float
    adjacent_chance: float
    what: str
    grid: PatchGrid = field(repr=False)
    windows: int = 1

    def table(self) -> pd.DataFrame:
        """One row per patch: `patch`, `row`, `column`, `parent`, `parent_row`, `parent_column`, `depth`, `children`."""
        width = self.grid.width
        rows, columns = np.divmod(np.arange(len(self.parents)), width)
        up, along = np.divmod(np.where(self.parents < 0, 0, self.parents), width)
        is_root = self.parents < 0
        children = np.bincount(self.parents[~is_root], minlength=len(self.parents))
        return pd.DataFrame(
            {
                "patch": np.arange(len(self.parents)),
                "row": rows,
                "column": columns,
                "parent": self.parents,
                "parent_row": np.where(is_root, -1, up),
                "parent_column": np.where(is_root, -1, along),
                "depth": self.depth,
                "children": children,
            }
        )

    def agreement(self, parents: Any) -> tuple[float, float]:
        """Share of patches whose parent is the given one (unlabelled attachment score), and that of the best rule which
        takes the same neighbour for every patch.

        Args:
            parents: [patches] int, row by row, -1 for roots.

        Raises:
            LensError: of another number of patches.

        Example:
            >>> tree = lens.vision.tree(lens.capture(vit, {"pixel_values": images}, keep_qk=True))
            >>> tree.agreement(tree.parents)[0]
            1.0
        """
        given = np.asarray(parents)
        if given.shape != self.parents.shape:
            raise LensError(f"parents must be [{len(self.parents)}], got {list(given.shape)}")
        height, width = self.grid.height, self.grid.width
        rows, columns = np.divmod(np.arange(len(given)), width)
        rules = []
        for down, across in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            r, c = rows + down, columns + across
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            rules.append(float((np.where(inside, r * width + c, -1) == given).mean()))
        return float((self.parents == given).mean()), max(rules)

    def _adjacent(self, edges: int) -> str:
        if not edges:
            return "every patch is a root, so none has a parent."
        low, high = of_share(self.adjacent, edges)
        beside = "more than" if low > self.adjacent_chance else "fewer than"
        if low <= self.adjacent_chance <= high:
            beside = "not told from"
        return (
            f"{self.adjacent:.1%} [{low:.1%}, {high:.1%}] of parents are direct neighbours, {beside} the "
            f"{self.adjacent_chance:.1%} of chance."
        )

    def findings(self) -> tuple[Sentence, ...]:
        """Depth and roots ("tree"), and how near parents are ("adjacent")."""
        roots = int((self.parents < 0).sum())
        return (
            Sentence(
                f"{self.what}: the tree of {len(self.parents)} patches has {roots} root{'s' * (roots != 1)} and a depth of "
                f"{int(self.depth.max())} (mean {self.depth.mean():.1f}); the best parent of each patch alone makes "
                f"{self.cycles} circles.{_apart(self.windows)}",
                kind="tree",
            ),
            Sentence(f"{self.what}: {self._adjacent(len(self.parents) - roots)}", kind="adjacent"),
        )


def tree(
    trace: AttentionTrace,
    heads: AnyHead | Sequence[AnyHead] = "mean",
    *,
    roots: Literal["one", "sink"] = "one",
    image: int = 0,
) -> PatchTree:
    """The dependency tree of patches from attention read backwards.

    Args:
        trace: of a picture, with q and k (`keep_qk`).
        heads: as of `overlay`: "mean", "L3", "L3H5", or several, whose mean is taken.
        roots: "one", or "sink": also every patch that gives more to no patch than to its best parent.
        image: number of the picture or tile.

    Raises:
        LensError: no picture, no such head, no such roots, too many patches or no exact tiles.

    Reference:
        arXiv 2304.03282; Chu & Liu 1965, Edmonds 1967 for the arborescence.

    Example:
        >>> lens.vision.tree(lens.capture(vit, {"pixel_values": images}, keep_qk=True), "L1").findings()
    """
    check_choice("roots", roots, ("one", "sink"))
    grid = grid_of(trace, image)
    what, scores, sinks, seen = _mean_map(trace, grid, heads)
    scores[:, sinks] = 0
    np.fill_diagonal(scores, 0)
    given = scores.sum(-1)
    if roots == "sink":
        given = np.maximum(given, 1)  # what is given to no patch competes with the parents
    scores = scores / np.where(given > 0, given, 1)[:, None]
    logs = np.where(seen, np.log(np.maximum(scores, _FLOOR)), -np.inf)
    np.fill_diagonal(logs, -np.inf)
    root_log = np.log(np.maximum(1 - scores.sum(-1), _FLOOR)) - (_NEVER if roots == "one" else 0)
    parents = arborescence(logs, root_log)
    root_log = root_log + (_NEVER if roots == "one" else 0)
    best = np.where(np.isfinite(logs.max(-1)), logs.argmax(-1), -1)
    if roots == "sink":
        best = np.where(logs.max(-1) >= root_log, best, -1)
    at = np.arange(len(parents))
    near = np.abs(offsets(grid)).max(0) == 1
    pairs = seen & ~np.eye(len(seen), dtype=bool)
    has = parents >= 0
    order = np.argsort(grid.order)  # from row by row to positions
    by_row = np.where(parents >= 0, grid.order[parents], -1)[order]
    return PatchTree(
        parents=by_row,
        depth=_depths(by_row),
        score=float(
            logs[at, parents][has].sum() + (root_log[~has].sum() if roots == "sink" else 0)
        ),
        greedy_score=float(np.where(best >= 0, logs[at, best], root_log).sum()),
        cycles=greedy_cycles(best),
        adjacent=float(near[at, parents][has].mean()) if has.any() else float("nan"),
        adjacent_chance=float(near[pairs].mean()) if pairs.any() else float("nan"),
        what=what,
        grid=grid,
        windows=_windows(seen),
    )


def _mean_map(
    trace: AttentionTrace, grid: PatchGrid, heads: Any
) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """In words whose; the mean map [patches, patches] of heads; bool [patches] of sinks; bool [patches, patches] who sees whom."""
    asked = list(heads) if isinstance(heads, list) else [heads]
    chosen = {head: None for one in asked for head in heads_of(trace, one)}
    if not chosen:
        raise LensError("heads must name at least one head, got none; e.g. 'L1H3' or 'L1'")
    found = np.mean([trace.tile(*head, grid.span, grid.span) for head in chosen], 0)
    mass = np.mean([received(trace, head)[slice(*grid.span)] for head in chosen], 0)
    names = [one if isinstance(one, str) else str(HeadId(*one)) for one in asked]
    seen = np.any(
        [
            sees(trace.dataset, layer, grid.span)[:, slice(*grid.span)]
            for layer in {head.layer for head in chosen}
        ],
        0,
    )
    return ", ".join(names), found, mass > SINK_TIMES * np.median(mass), seen


def _windows(seen: np.ndarray) -> int:
    return int(connected_components(seen, directed=False)[0])


def _apart(windows: int) -> str:
    return f" The picture falls into {windows} windows that do not see each other." * (windows > 1)


def _depths(parents: np.ndarray) -> np.ndarray:
    depth = np.zeros(len(parents), int)
    at = parents.copy()
    while (at >= 0).any():
        depth += at >= 0
        at = np.where(at >= 0, parents[at], -1)
    return depth


@dataclass(frozen=True, repr=False, eq=False)
class PatchSegments(Result):
    """Patches that look alike.

    Attributes:
        labels: [height, width] int, largest segment first.
        tau: in nats, up to which middles of segments were merged; each patch is in the segment whose middle is nearest
            to its row, at whatever distance.
        what: whose attention.
        grid: of the patches.
        windows: parts of the picture of which none sees another.
    """

    labels: np.ndarray = field(repr=False)
    tau: float
    what: str
    grid: PatchGrid = field(repr=False)
    windows: int = 1

    def table(self) -> pd.DataFrame:
        """One row per segment: `segment`, `patches`, `share`, and its middle `row`, `column`."""
        rows = []
        for number in range(int(self.labels.max()) + 1):
            places = np.argwhere(self.labels == number)
            rows.append(
                {
                    "segment": number,
                    "patches": len(places),
                    "share": len(places) / self.labels.size,
                    "row": float(places[:, 0].mean()),
                    "column": float(places[:, 1].mean()),
                }
            )
        return pd.DataFrame(rows)

    def iou(self, mask: Any, *, draws: int = 200, seed: int = 0) -> tuple[float, float]:
        """IoU of the segment that fits a mask best, and what segments of these sizes have when patches are shuffled (mean).

        Args:
            mask: bool [height, width] in patches.
            draws, seed: of the shuffled ones.

        Raises:
            LensError: a mask of another shape, or an empty one.

        Example:
            >>> found = lens.vision.cluster(lens.capture(vit, {"pixel_values": images}, keep_qk=True))
            >>> found.iou(found.labels == 0)[0]
            1.0
        """
        check_counts(0, seed=seed)
        given = np.asarray(mask, bool)
        if given.shape != self.labels.shape or not given.any():
            raise LensError(
                f"mask must be bool {list(self.labels.shape)} with some patch in it, got {list(given.shape)} with {given.sum()}"
            )

        def best(labels: np.ndarray) -> float:
            inside = np.bincount(labels[given], minlength=labels.max() + 1)
            union = np.bincount(labels.ravel()) + given.sum() - inside
            return float((inside / union).max())

        random = np.random.default_rng(seed)
        shuffled = [
            best(random.permutation(self.labels.ravel()).reshape(given.shape)) for _ in range(draws)
        ]
        return best(self.labels), float(np.mean(shuffled))

    def findings(self) -> tuple[Sentence, ...]:
        """How many segments there are and how large the largest are."""
        sizes = np.bincount(self.labels.ravel())
        largest = ", ".join(f"{size / sizes.sum():.0%}" for size in sizes[:3])
        return (
            Sentence(
                f"{self.what}: {len(sizes)} segments of patches, merged while their middles differ by at most {self.tau:g} nats; the "
                f"largest hold {largest} of the picture.{_apart(self.windows)}",
                kind="segments",
            ),
        )


def cluster(
    trace: AttentionTrace,
    heads: AnyHead | Sequence[AnyHead] = "mean",
    *,
    tau: float = 0.5,
    image: int = 0,
) -> PatchSegments:
    """Segments of a picture: patches whose attention over the other patches is alike.

    Args:
        trace: of a picture, with q and k (`keep_qk`).
        heads: as of `tree`; the last layers of a self-supervised tower see objects.
        tau: symmetric divergence in nats up to which rows are joined; to 0 every patch is one, with a large one all are.
        image: number of the picture or tile.

    Raises:
        LensError: as `tree`; tau not above 0.

    Reference:
        arXiv 2311.17893, the attention clustering; here of one picture.

    Example:
        >>> lens.vision.cluster(lens.capture(vit, {"pixel_values": images}, keep_qk=True), "L1").findings()
    """
    if not is_number(tau) or not tau > 0:
        raise LensError(f"tau must be above 0, got {tau!r}")
    grid = grid_of(trace, image)
    what, rows, sinks, seen = _mean_map(trace, grid, heads)
    rows[:, sinks] = 0
    rows = np.maximum(rows, _FLOOR)
    rows /= rows.sum(-1, keepdims=True)
    near = _divergences(rows, rows) <= tau
    rows = near @ rows / near.sum(-1, keepdims=True)
    centres, weights = rows, np.ones(len(rows))
    for _ in range(_ROUNDS):
        before = len(centres)
        centres, weights = _merged(centres, weights, tau)
        if len(centres) == before:
            break
    found = _divergences(rows, centres).argmin(-1)
    order = np.argsort(-np.bincount(found, minlength=len(centres)), kind="stable")
    labels = np.argsort(order)[found]
    return PatchSegments(grid.laid(labels), tau, what, grid, _windows(seen))


def _divergences(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[rows, others] sum a log(a / b) + sum b log(b / a)."""
    log_rows, log_others = np.log(rows), np.log(others)
    own, theirs = (rows * log_rows).sum(-1), (others * log_others).sum(-1)
    return own[:, None] + theirs - rows @ log_others.T - log_rows @ others.T


def _merged(centres: np.ndarray, weights: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """Each row joins the first leader within tau, or leads."""
    far = _divergences(centres, centres)
    leader = np.full(len(centres), -1)
    for number in range(len(centres)):
        if leader[number] < 0:
            leader[(leader < 0) & (far[number] <= tau)] = number
            leader[number] = number
    kept = np.unique(leader)
    sums = np.stack([(centres * weights[:, None])[leader == one].sum(0) for one in kept])
    totals = np.array([weights[leader == one].sum() for one in kept])
    return sums / totals[:, None], totals
