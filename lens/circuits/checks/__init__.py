"""Whether a circuit is what is claimed of it.

>>> circuit = lens.circuits.score_edges(model, task, progress=False).top(40)
>>> lens.circuits.checks.control(model, held_out, circuit, draws=2, progress=False).findings()
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
