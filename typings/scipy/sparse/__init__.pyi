from typing import Any

import numpy as np

class _Matrix:
    def astype(self, dtype: Any) -> _Matrix: ...
    def tocsr(self) -> _Matrix: ...

def coo_matrix(
    arg1: tuple[Any, tuple[Any, Any]] | np.ndarray, shape: tuple[int, int]
) -> _Matrix: ...
