"""Models whose circuit is known exactly, because somebody wrote their weights down.

A method that finds circuits is tried on these first: there is one right answer, and it is known what
each kind of corrupt prompt can show of it.

>>> known = lens.circuits.known.tracr("reverse")
>>> known.inactive
('a1.h0', 'a2.h0', 'm3')
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
