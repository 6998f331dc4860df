"""Attention moved while the model runs.

`lens.redistribute` moves it between chosen keys; `var`, `act` and `pasta` are published recipes. `base` is what all edits have in common, `keys` says which keys are meant,
`rules` what an edit does with the states of key groups.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lens.redistribution.agreement import DimsAgreement, dims_agreement
    from lens.redistribution.calibration import ActEdit, act
    from lens.redistribution.doses import Dose, dose
    from lens.redistribution.effects import SideEffects, side_effects
    from lens.redistribution.searching import HeadSearch, search_heads
    from lens.redistribution.sink_dims import KNOWN, SinkDims, find_sink_dims, phi
    from lens.redistribution.steering import PastaEdit, pasta
    from lens.redistribution.vision import PRESETS, VarEdit, VarSettings, var

__all__ = [
    "KNOWN",
    "PRESETS",
    "ActEdit",
    "DimsAgreement",
    "Dose",
    "HeadSearch",
    "PastaEdit",
    "SideEffects",
    "SinkDims",
    "VarEdit",
    "VarSettings",
    "act",
    "dims_agreement",
    "dose",
    "find_sink_dims",
    "pasta",
    "phi",
    "search_heads",
    "side_effects",
    "var",
]

_HOMES = {
    "DimsAgreement": "agreement",
    "dims_agreement": "agreement",
    "Dose": "doses",
    "dose": "doses",
    "HeadSearch": "searching",
    "search_heads": "searching",
    "SideEffects": "effects",
    "side_effects": "effects",
    "ActEdit": "calibration",
    "act": "calibration",
    "PastaEdit": "steering",
    "pasta": "steering",
    "KNOWN": "sink_dims",
    "PRESETS": "vision",
    "SinkDims": "sink_dims",
    "VarEdit": "vision",
    "VarSettings": "vision",
    "find_sink_dims": "sink_dims",
    "phi": "sink_dims",
    "var": "vision",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lens.redistribution.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lens.redistribution' has no attribute {name!r}")
