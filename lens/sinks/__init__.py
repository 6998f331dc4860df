"""Attention sinks: which keys attention is parked on, how often, and how sure that is.

>>> traces = lens.capture(model, texts, statistics=["received"])
>>> lens.sinks.rate(traces).value
>>> lens.sinks.find(traces[0]).table()
>>> lens.sinks.effect(model, texts, heads=["L1H0"]).findings()

After Gu et al., "When Attention Sink Emerges", arXiv 2410.10781.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lens.sinks.blocks import BlockAlphas, block_bounds
from lens.sinks.detection import SinkRate, SinkSensitivity, rate, sensitivity
from lens.sinks.positions import SinkKeys, SinkProfile, find, profile

if TYPE_CHECKING:
    from lens.sinks.activations import MassiveActivations, massive, massive_effect
    from lens.sinks.causal import effect
    from lens.sinks.clean import CleanRuns
    from lens.sinks.dosage import DoseResponse, dose_response
    from lens.sinks.effects import SinkEffect
    from lens.sinks.emergences import (
        SinkEmergence,
        bos_pair,
        by_length,
        control_prompts,
        emergence,
    )
    from lens.sinks.gated_outputs import output_gates
    from lens.sinks.gates import EffectiveGates, effective_gate
    from lens.sinks.geometry import SinkMechanism, mechanism
    from lens.sinks.head_edits import HeadActivity, activity, head_effect
    from lens.sinks.norms import HighNormTokens, high_norm, register_neurons
    from lens.sinks.persistent import PersistentMemory, persistent_memory
    from lens.sinks.scopes import ScopedEffects, by_bos, by_scope
    from lens.sinks.spectral import BandLosses, SpectralBands, band_energies, band_losses, bands
    from lens.sinks.streaming_policies import StreamingPolicies, streaming

__all__ = [
    "BandLosses",
    "BlockAlphas",
    "CleanRuns",
    "DoseResponse",
    "EffectiveGates",
    "HeadActivity",
    "HighNormTokens",
    "MassiveActivations",
    "PersistentMemory",
    "ScopedEffects",
    "SinkEffect",
    "SinkEmergence",
    "SinkKeys",
    "SinkMechanism",
    "SinkProfile",
    "SinkRate",
    "SinkSensitivity",
    "SpectralBands",
    "StreamingPolicies",
    "activity",
    "band_energies",
    "band_losses",
    "bands",
    "block_bounds",
    "bos_pair",
    "by_bos",
    "by_length",
    "by_scope",
    "control_prompts",
    "dose_response",
    "effect",
    "effective_gate",
    "emergence",
    "find",
    "head_effect",
    "high_norm",
    "massive",
    "massive_effect",
    "mechanism",
    "output_gates",
    "persistent_memory",
    "profile",
    "rate",
    "register_neurons",
    "sensitivity",
    "streaming",
]


_WITH_TORCH = {  # which reading traces does not need
    "DoseResponse": "dosage",
    "dose_response": "dosage",
    "SinkEffect": "effects",
    "CleanRuns": "clean",
    "effect": "causal",
    "SinkMechanism": "geometry",
    "mechanism": "geometry",
    "MassiveActivations": "activations",
    "massive": "activations",
    "HeadActivity": "head_edits",
    "activity": "head_edits",
    "head_effect": "head_edits",
    "SinkEmergence": "emergences",
    "bos_pair": "emergences",
    "by_length": "emergences",
    "control_prompts": "emergences",
    "emergence": "emergences",
    "EffectiveGates": "gates",
    "effective_gate": "gates",
    "BandLosses": "spectral",
    "SpectralBands": "spectral",
    "band_energies": "spectral",
    "band_losses": "spectral",
    "bands": "spectral",
    "PersistentMemory": "persistent",
    "persistent_memory": "persistent",
    "HighNormTokens": "norms",
    "high_norm": "norms",
    "output_gates": "gated_outputs",
    "register_neurons": "norms",
    "ScopedEffects": "scopes",
    "by_bos": "scopes",
    "by_scope": "scopes",
    "StreamingPolicies": "streaming_policies",
    "streaming": "streaming_policies",
    "massive_effect": "activations",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(f"lens.sinks.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module 'lens.sinks' has no attribute {name!r}")
