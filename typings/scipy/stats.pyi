from typing import Any, NamedTuple

import numpy as np

class _Tau(NamedTuple):
    statistic: float
    pvalue: float

class binom:  # noqa: N801
    @staticmethod
    def pmf(k: Any, n: Any, p: Any) -> Any: ...
    @staticmethod
    def sf(k: Any, n: Any, p: Any) -> Any: ...

def kendalltau(x: np.ndarray, y: np.ndarray) -> _Tau: ...
def rankdata(a: Any, method: str = ..., *, axis: int | None = ...) -> np.ndarray: ...
