"""Sparse attention: policies that choose blocks of keys, what heads keep under them, and what that costs.

>>> found = lens.policies.evaluate(model, texts, lens.policies.AShape(4, 8), block_size=4)
>>> found.table()

A policy is a small frozen object; `lens.edit(model, lens.edits.Sparse(policy))` runs one. Beside those that
`dir()` shows there are:

    Landmark, LongHeads, Hierarchical    blocks that one key, or a summary, stands for
    LargestEntry                         blocks by the largest entry of P, as SeerAttention is trained
    Strided, Routing                     stripes that differ from head to head; clusters of blocks
    Regions                              the regions of a picture that fit best
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
