"""Attention moved while the model runs.

`lens.redistribute` moves it between chosen keys; `var`, `act` and `pasta` are published recipes. `base` is what all edits have in common, `keys` says which keys are meant,
`rules` what an edit does with the states of key groups.
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
