import numpy as np

class _Solved:
    x: np.ndarray | None

def linprog(
    c: np.ndarray,
    *,
    A_eq: np.ndarray,
    b_eq: np.ndarray,
    bounds: tuple[float | None, float | None],
) -> _Solved: ...
