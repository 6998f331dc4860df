"""Calls of lens.stats with right and with wrong shapes, for test_shapes.py."""

import numpy as np

from lens import stats
from lens.stats.controls import jaccard, jaccard_by_chance, others
from lens.stats.intervals import columns

LINE = np.abs(np.subtract.outer(np.arange(5.0), np.arange(5.0)))
TREE = stats.ward_tree(LINE)
MEASURES = np.random.default_rng(0).normal(size=(7, 3, 11))
LABELS = np.arange(5)

RIGHT = {
    "interval": lambda: [stats.interval(MEASURES), stats.interval([1, 2]), stats.interval([])],
    "quantile": lambda: [stats.quantile(MEASURES, 0.5, axis=1), stats.quantile([1, 2], 0.5)],
    "draws": lambda: stats.draws(3, np.random.default_rng(0), 2),
    "over_units": lambda: stats.over_units(MEASURES, MEASURES > 0, 0),
    "over_units of one number": lambda: stats.over_units(np.arange(5), np.ones(5), 0),
    "over_rows": lambda: stats.over_rows(MEASURES, 0),
    "ranks": lambda: [stats.ranks(MEASURES), stats.ranks([3, 1])],
    "kendall": lambda: [stats.kendall(MEASURES), stats.kendall(MEASURES[:0])],
    "spearman": lambda: stats.spearman([1, 2, 3], MEASURES[0, :, 0]),
    "top": lambda: [stats.top(MEASURES, 3), stats.top([3, 1], 1)],
    "top_overlap": lambda: stats.top_overlap(MEASURES, 3),
    "ward_tree": lambda: stats.ward_tree(LINE[np.triu_indices(5, 1)]),
    "cut_tree": lambda: stats.cut_tree(TREE, 2),
    "adjusted_rand": lambda: stats.adjusted_rand(LABELS, LABELS % 2),
    "jaccard": lambda: jaccard(MEASURES[0] > 0),
    "jaccard_by_chance": lambda: jaccard_by_chance(MEASURES[0, :, 0] ** 2),
    "others": lambda: others(MEASURES[0] > 0, np.random.default_rng(0), within=True),
    "columns": lambda: [columns("x", MEASURES, 0), columns("x", np.arange(5.0), 0, plain=True)],
}
WRONG = {
    "over_units of other counts": lambda: stats.over_units(MEASURES, MEASURES[:, 0], 0),
    "ward_tree of a rectangle": lambda: stats.ward_tree(LINE[:4]),
    "cut_tree of scipy's tree": lambda: stats.cut_tree(np.zeros((4, 4)), 2),
    "adjusted_rand of other members": lambda: stats.adjusted_rand(LABELS, LABELS[1:]),
    "others of fewer": lambda: others(
        MEASURES[0] > 0, np.random.default_rng(0), MEASURES[0, 1:] > 9
    ),
    "jaccard of a row": lambda: jaccard(LABELS > 2),
}
CALLS = RIGHT | WRONG
