"""Models whose circuit is known exactly, because somebody wrote their weights down.

A method that finds circuits is tried on these first: there is one right answer, and it is known what
each kind of corrupt prompt can show of it.

>>> known = lens.circuits.known.tracr("reverse")
>>> known.inactive
('a1.h0', 'a2.h0', 'm3')
"""

from lens.circuits.known.circuit import KnownCircuit
from lens.circuits.known.compiled import PROGRAMS, tracr
from lens.circuits.known.gates import GATES, logic_gate
from lens.circuits.known.induction import induction_transformer

__all__ = ["GATES", "PROGRAMS", "KnownCircuit", "induction_transformer", "logic_gate", "tracr"]
