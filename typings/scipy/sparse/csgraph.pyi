import numpy as np

from . import _Matrix

class _Flow:
    flow_value: int

def maximum_flow(csgraph: _Matrix, source: int, sink: int) -> _Flow: ...
def connected_components(
    csgraph: np.ndarray | _Matrix, directed: bool = ...
) -> tuple[int, np.ndarray]: ...
