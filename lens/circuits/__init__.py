"""Circuits: which heads, MLPs and edges between them carry a task.

>>> known = lens.circuits.known.induction_transformer(beta=30)
>>> lens.heads.importance(known.model, known.task, by="ablation", baseline="counterfactual")
>>> edges = lens.circuits.score_edges(known.model, known.task, method="exact")
>>> edges.top(7)
>>> lens.circuits.evaluate(known.model, known.task, edges)
"""

from lens.circuits import hypothesis, known
from lens.circuits.acdc import Acdc, acdc
from lens.circuits.circuit import Circuit, load_circuit, make_circuit
from lens.circuits.codes import CodeScores, codes
from lens.circuits.completeness import Completeness, completeness
from lens.circuits.control import Control, control
from lens.circuits.edge_scores import EdgeScores
from lens.circuits.evaluation import CircuitEvaluation, evaluate, run_circuit
from lens.circuits.exports import from_mib, to_attribution_graph, to_mib
from lens.circuits.flow import FlowRoutes, flow_routes
from lens.circuits.graph import Graph
from lens.circuits.hard_concrete import LearnedMasks, learn_masks
from lens.circuits.hisp import GateScores, hisp
from lens.circuits.joined import JoinedHeads, join
from lens.circuits.minimality import Minimality, minimality
from lens.circuits.nodes import find_nodes
from lens.circuits.overlap import Overlap, overlap
from lens.circuits.patching import PatchEffects, patch, path_patch
from lens.circuits.recovery import Recovery, recovery
from lens.circuits.reuse import Redirection, redirect
from lens.circuits.scoring import score_edges
from lens.circuits.sink_check import SinkCheck, sink_check
from lens.circuits.stability import NoiseFloor, Stability, jaccard, noise_floor, stability
from lens.circuits.transfer import Transfer, transfer

__all__ = [
    "Acdc",
    "Circuit",
    "CircuitEvaluation",
    "CodeScores",
    "Completeness",
    "Control",
    "EdgeScores",
    "FlowRoutes",
    "GateScores",
    "Graph",
    "JoinedHeads",
    "LearnedMasks",
    "Minimality",
    "NoiseFloor",
    "Overlap",
    "PatchEffects",
    "Recovery",
    "Redirection",
    "SinkCheck",
    "Stability",
    "Transfer",
    "acdc",
    "codes",
    "completeness",
    "control",
    "evaluate",
    "find_nodes",
    "flow_routes",
    "from_mib",
    "hisp",
    "hypothesis",
    "jaccard",
    "join",
    "known",
    "learn_masks",
    "load_circuit",
    "make_circuit",
    "minimality",
    "noise_floor",
    "overlap",
    "patch",
    "path_patch",
    "recovery",
    "redirect",
    "run_circuit",
    "score_edges",
    "sink_check",
    "stability",
    "to_attribution_graph",
    "to_mib",
    "transfer",
]
