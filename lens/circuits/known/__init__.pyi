from .circuit import KnownCircuit as KnownCircuit
from .compiled import PROGRAMS as PROGRAMS
from .compiled import tracr as tracr
from .gates import GATES as GATES
from .gates import logic_gate as logic_gate
from .induction import induction_transformer as induction_transformer
