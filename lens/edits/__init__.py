"""One language of interventions: small frozen objects, run together by `lens.edit`.

`attention` edits what heads pay to chosen keys, `parts` takes out heads and sub-layers, `published` are
recipes that find their keys themselves; `running` carries them out.
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
