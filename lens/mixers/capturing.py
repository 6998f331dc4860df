"""`lens.mixers.capture`: one prompt through a model, and what its linear and recurrent mixers did."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.choices import Count
from lens.common.errors import LensError
from lens.common.head_ids import layers_in_words
from lens.common.progress import advancing
from lens.common.results import Result, Sentence
from lens.mixers.measures import MixerMeasures, measure
from lens.mixers.phi import BLOCK, Phi, joined
from lens.mixers.reading import Scan, recorded
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts
from lens.traces.trace import AttentionTrace

_TOLERANCE = 1e-3


@dataclass(frozen=True, repr=False, eq=False)
class MixerCapture(Result):
    """The mixers of a model on one prompt.

    Attributes:
        measures: of each layer that has one, in order (a layer may have several).
        phis: their matrices, for tiles.
        model: its name.
        tokens: of the prompt, as numbers.
    """

    measures: tuple[MixerMeasures, ...]
    phis: tuple[Phi, ...]
    model: str
    tokens: tuple[int, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with a mixer."""
        return tuple(one.layer for one in self.measures)

    def phi(self, layer: int) -> Phi:
        """The matrix of a layer.

        Raises:
            LensError: a layer without a mixer.
        """
        if layer not in self.layers:
            raise LensError(
                f"layer {layer} of {self.model} has no mixer; {layers_in_words(self.layers)} have"
            )
        return self.phis[self.layers.index(layer)]

    def table(self, beside: AttentionTrace | None = None, *, seed: int = 0) -> pd.DataFrame:
        """One row per head: `name`, `layer`, `head`, `mixer` and the columns of `MixerMeasures.table`.

        Args:
            beside: the trace of the same prompt, whose softmax heads stand in the same table: `mixer` is "softmax",
                mass is 1, nothing negative; they have no half-life and no rank.
            seed: of the intervals.

        Raises:
            LensError: a trace of another prompt.
        """
        tables = [one.table(seed=seed) for one in self.measures]
        if beside is not None:
            if beside.dataset["token_id"].values.tolist() != list(self.tokens):
                raise LensError(
                    "beside must be the trace of the same prompt: lens.capture(model, prompt)"
                )
            tables.append(_softmax_rows(beside, seed))
        found = pd.concat(tables, ignore_index=True)
        return found.sort_values(["layer", "head"], kind="stable", ignore_index=True)

    def findings(self) -> tuple[Sentence, ...]:
        """What each layer's mixer says."""
        return tuple(sentence for one in self.measures for sentence in one.findings())


def capture(
    model: Any, prompt: Any, *, block: Count = BLOCK, progress: bool = True
) -> MixerCapture:
    """Run a prompt and measure every linear or recurrent mixer of the model.

    Args:
        model: as `lens.load` returns it, or a transformers model that has no softmax attention at all (Mamba,
            RWKV-4, xLSTM), in eval mode.
        prompt: one text (of a loaded model) or token ids.
        block: tokens a side of tiles and maps.
        progress: show a bar, on stderr, if that is a terminal.

    Returns:
        Measures and matrices. Each layer's `Phi v` was held against the output of its own scan.

    Raises:
        LensError: no mixer that is known, several prompts, or a scan that Phi does not give back.

    Example:
        >>> found = lens.mixers.capture(mamba, [3, 1, 4, 1, 5, 9, 2, 6])
        >>> found.table()["mixer"].unique().tolist()
        ['mamba2']
    """
    root, name, ids = _read(model, prompt)
    if any(getattr(one, "use_kernels", False) for one in (root, getattr(root, "config", None))):
        raise LensError(
            "use_kernels puts other functions in the place of the scans; load without it"
        )
    device = next(root.parameters()).device
    with torch.no_grad(), recorded(root) as scans:
        root(torch.tensor([ids], device=device), use_cache=False)
    if not scans:
        raise LensError(f"no mixer of {name} ran its scan on this prompt")
    scans = _by_layer(scans)
    measures = []
    with advancing(f"{name}: mixers", len(scans), progress) as advance:
        for scan in scans:
            one = measure(scan.phi, scan.output, layer=scan.layer, kind=scan.kind, block=block)
            if not one.check <= _TOLERANCE:
                raise LensError(
                    f"Phi v of layer {scan.layer} of {name} differs from the output of its {scan.kind} by "
                    f"{one.check:.1e}; the layer does something that is not known here"
                )
            measures.append(one)
            advance(1)
    return MixerCapture(tuple(measures), tuple(one.phi for one in scans), name, tuple(ids))


def _read(model: Any, prompt: Any) -> tuple[torch.nn.Module, str, list[int]]:
    """The module that is run, its name, and the token ids of the prompt."""
    if isinstance(model, LoadedModel):
        found, single = read_prompts(model, prompt)
        if not single or found[0].ids is None:
            raise LensError("capture of mixers takes one prompt of tokens")
        return model.transformer, model.name, found[0].ids
    if not isinstance(model, torch.nn.Module):
        raise LensError(
            f"model must be what lens.load returns, or a module, got {type(model).__name__}"
        )
    given = None
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # of texts and of no numbers
        given = torch.as_tensor(prompt)
    if given is None or given.is_floating_point() or given.numel() == 0:
        raise LensError(
            "of a model that was not loaded the prompt is token ids: a list or a tensor"
        )
    return model, type(model).__name__, given.flatten().tolist()


def _by_layer(scans: Sequence[Scan]) -> list[Scan]:
    """Those of one layer that are parts of one mixer (Zamba's heads are scanned apart) as one."""
    groups: dict[tuple[int, str], list[Scan]] = {}
    for scan in scans:
        groups.setdefault((scan.layer, scan.kind), []).append(scan)
    return [
        Scan(layer, kind, joined([one.phi for one in own]), torch.cat([one.output for one in own]))
        if len(own) > 1
        else own[0]
        for (layer, kind), own in groups.items()
    ]


def _softmax_rows(trace: AttentionTrace, seed: int) -> pd.DataFrame:
    """The columns of a mixer's table for the softmax heads of a trace."""
    found = []
    unknown, nothing = np.full(trace.heads, np.nan), np.zeros((trace.heads, 1, 1))
    for layer in trace.layers:
        data = trace.dataset.sel(layer=layer)
        rows = {name: data[own].values.astype(float) for name, own in _IN_TRACES.items()}
        rows |= dict.fromkeys(("mass", "size"), np.ones_like(rows["entropy"]))
        rows["negative"] = np.zeros_like(rows["entropy"])
        one = MixerMeasures(
            rows, nothing, nothing, nothing[..., 0], nothing[..., 0], unknown, unknown, unknown, np.nan, layer, "softmax"
        )  # fmt: skip
        found.append(one.table(seed=seed))
    return pd.concat(found, ignore_index=True)


_IN_TRACES = {"entropy": "entropy", "distance": "distance", "first_share": "first_mass"}
