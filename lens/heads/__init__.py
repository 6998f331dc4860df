"""Which heads matter to a task, by whose measure, and what their weights alone say.

>>> task = lens.tasks.induction(model, n=64, seed=0)
>>> lens.heads.importance(model, task, by="ablation", baseline="mean").top(3)
"""

from lens.heads.comparing import Agreement, agreement, join
from lens.heads.detector import detect
from lens.heads.dormancy import Dormancy, dormancy
from lens.heads.group import GroupAblation
from lens.heads.measuring import ablate, importance
from lens.heads.patterns import PatternClasses, pattern_classes
from lens.heads.pruned import PruningMetrics, pruning_metrics
from lens.heads.pruning import PruningCurve, pruning_curve
from lens.heads.random_weights import random_weights
from lens.heads.redundancy import HeadClusters, clusters, redundancy
from lens.heads.retrieval import (
    RetrievalScores,
    RetrievalTrial,
    copied_needles,
    retrieval,
    text_needles,
)
from lens.heads.roles import HeadRoles, roles
from lens.heads.scores import HeadScores, Intervention
from lens.heads.similarity import HeadSimilarity, similarity, trace_similarity
from lens.heads.stability import HeadStability, stability
from lens.heads.streaming import StreamingGate, StreamingScores, streaming, streaming_gate
from lens.heads.variance import VarianceShares, variance
from lens.heads.weights import HeadWeights, composition, copying, head_weights

__all__ = [
    "Agreement",
    "Dormancy",
    "GroupAblation",
    "HeadClusters",
    "HeadRoles",
    "HeadScores",
    "HeadSimilarity",
    "HeadStability",
    "HeadWeights",
    "Intervention",
    "PatternClasses",
    "PruningCurve",
    "PruningMetrics",
    "RetrievalScores",
    "RetrievalTrial",
    "StreamingGate",
    "StreamingScores",
    "VarianceShares",
    "ablate",
    "agreement",
    "clusters",
    "composition",
    "copied_needles",
    "copying",
    "detect",
    "dormancy",
    "head_weights",
    "importance",
    "join",
    "pattern_classes",
    "pruning_curve",
    "pruning_metrics",
    "random_weights",
    "redundancy",
    "retrieval",
    "roles",
    "similarity",
    "stability",
    "streaming",
    "streaming_gate",
    "text_needles",
    "trace_similarity",
    "variance",
]
