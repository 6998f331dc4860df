"""Circuits that runs hold: this run's own, and that of another run to compare it with."""

from lens import circuits
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.common.errors import LensError
from lens.runs import Run, open_run
from lens.runs.folders import CIRCUITS, IMPORTANCES
from lens_analyses.config.paths import local


def other_run(folder: str, model: str) -> Run:
    """The run to compare with, of the same model; asked for before anything long is computed, too.

    Raises:
        LensError: no run, one without a circuit, or one of another model.
    """
    other = open_run(local(folder))
    circuit, _ = circuit_of(other)
    if circuit.model != model:
        raise LensError(
            f"run {other.id} is of {circuit.model} and this one of {model}: heads of two "
            "models are not the same heads"
        )
    return other


def circuit_of(run: Run) -> tuple[Circuit, EdgeScores]:
    """The circuit of a run, and the scores that it was made from.

    Raises:
        LensError: a run without exactly one.
    """
    files = sorted((run.path / CIRCUITS).glob("*.json"))
    if len(files) != 1:
        raise LensError(
            f"run {run.id} has {len(files)} circuits and one is compared; `lens circuit` makes a run "
            "with one"
        )
    scores = circuits.exports.from_mib(run.path / IMPORTANCES)
    return circuits.load_circuit(files[0]), scores
