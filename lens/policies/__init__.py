"""Sparse attention: policies that choose blocks of keys, what heads keep under them, and what that costs.

>>> found = lens.policies.evaluate(model, texts, lens.policies.AShape(4, 8), block_size=4)
>>> found.table()

A policy is a small frozen object; `lens.edit(model, lens.edits.Sparse(policy))` runs one. Beside those that
`dir()` shows there are:

    Landmark, LongHeads, Hierarchical    blocks that one key, or a summary, stands for
    NativeSparse                         blocks by compressed keys, one choice for heads that share keys
    LargestEntry                         blocks by the largest entry of P, as SeerAttention is trained
    Strided, Routing, GlobalToLocal      stripes by head; clusters of blocks; upper layers near alone
    Grid, Regions                        places on a picture; its regions that fit best
    Seer, Sparsifiner, Indexer           what `train` makes: predictors of the map
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
