from pathlib import Path
from typing import IO

import numpy as np

class wavfile:  # noqa: N801
    class WavFileWarning(UserWarning): ...

    @staticmethod
    def read(filename: str | Path | IO[bytes]) -> tuple[int, np.ndarray]: ...
