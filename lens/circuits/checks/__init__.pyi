from . import hypothesis as hypothesis
from ._completeness import completeness as completeness
from ._control import control as control
from ._minimality import minimality as minimality
from ._sink_check import sink_check as sink_check
from ._stability import jaccard as jaccard
from ._stability import noise_floor as noise_floor
from ._stability import stability as stability
