"""The trace of one prompt while it is captured: each layer is checked, written and let go of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lens.common.errors import LensError
from lens.common.version import __version__
from lens.models.loaded import LoadedModel
from lens.models.sizes import image_token
from lens.passes.calls import Places
from lens.passes.inputs import Prompt
from lens.passes.sessions import in_rows
from lens.traces.labels import PREFIX
from lens.traces.naming import Axis, keys_of, queries_of
from lens.traces.pictures import picture_note
from lens.traces.segments import segments
from lens.traces.statistics import COMPARING, LayerRecord, Settings
from lens.traces.trace import AttentionTrace, TraceWriter

_PACKAGES = ("torch", "transformers", "transformer-lens", "numpy", "xarray")


class Writing:
    """The trace of one prompt, of a model or one of its parts, taken layer by layer."""

    def __init__(
        self, model: LoadedModel, prompt: Prompt, settings: Settings, out: str | Path | None
    ) -> None:
        self._model, self._prompt, self._settings = model, prompt, settings
        self._segments = _segments(model, prompt)
        self._writer = TraceWriter(out, len(model.info.attending))
        self._layers: list[LayerRecord] = []

    def take(self, record: LayerRecord) -> None:
        """Hand the arrays to the writer and keep only the numbers that describe the layer."""
        if (rows := len(record.variables["visible"])) != 1:
            raise in_rows(self._model.info.class_name, record.layer, rows)
        if self._layers:
            _check_alike(self._model, self._layers[0], record, self._settings)
        kept = {
            name: tensor[0].numpy()
            for name, tensor in record.variables.items()
            if not record.cross or name not in COMPARING
        }
        self._writer.add_layer(record.layer, kept)
        record.variables.clear()
        self._layers.append(record)

    def finish(self, note: Mapping[str, Any]) -> AttentionTrace:
        """The trace of all layers; `note` is what else its attributes say."""
        model, prompt, layers = self._model, self._prompt, self._layers
        if not layers:
            raise LensError(
                f"cannot reach the attention of {model.info.class_name}: no layer asked for its "
                "attention function on this prompt"
            )
        for own in self._settings.labels:
            own.check(layers[0].keys)
        first, rows = layers[0], None
        keys = _axis(first.key_places) or keys_of(model, prompt, first.keys, first.extra)
        if first.extra:
            own = first.extra if first.queries == first.keys else ()
            rows = keys_of(model, prompt, first.queries, own)
        elif first.cross:
            rows = _axis(first.query_places) or queries_of(model, prompt, first.queries)
        if len((rows or keys).names) != first.queries or len(keys.names) != first.keys:
            raise LensError(
                f"{model.info.class_name} attends from {first.queries} to {first.keys} positions where the prompt has "
                f"{len(keys.names)}, and what the others are is not known; lens.traces.capturing(model) has the numbers"
            )
        more: dict[str, Any] = {"segments": self._segments, "patches": keys.patches}
        if rows is not None and rows.patches is not None:
            more |= {"query_patches": rows.patches}
        more |= {"picture": picture_note(model, prompt)}
        if (places := layers[0].key_places) is not None and places.cells is not None:
            more |= {"cells": [list(cell) for cell in places.cells]}
        if model.parts:
            more |= {"part": model.chosen}
        if keys.seconds is not None:
            more |= {"seconds_per_position": keys.seconds}
        return self._writer.finish(
            token_ids=keys.ids,
            tokens=keys.names,
            query_ids=None if rows is None else rows.ids,
            query_tokens=None if rows is None else rows.names,
            attributes=_attributes(model, prompt, self._settings, layers) | more | dict(note),
        )


def _axis(places: Places | None) -> Axis | None:
    """Of a layer that says what its positions are."""
    if places is None:
        return None
    return Axis([-1] * len(places.names), list(places.names), dict(places.patches))


def _check_alike(
    model: LoadedModel, first: LayerRecord, record: LayerRecord, settings: Settings
) -> None:
    """Raises LensError: a layer that does not fit into one trace with the first."""
    where = f"layer {record.layer} of {model.info.class_name}"
    if (record.queries, record.keys) != (first.queries, first.keys):
        raise LensError(
            f"{where} attends from {record.queries} to {record.keys} positions, layer {first.layer} from "
            f"{first.queries} to {first.keys}; a trace holds one sequence: capture one tower, or use "
            "lens.traces.capturing(model)"
        )
    if record.heads != first.heads or record.causal != first.causal:
        kinds = [
            f"{one.heads} {'causal' if one.causal else 'two-way'} heads" for one in (record, first)
        ]
        raise LensError(
            f"{where} has {kinds[0]}, layer {first.layer} {kinds[1]}; a trace needs the same in every "
            "layer: use lens.traces.capturing(model)"
        )
    sizes = [(one.kv_heads, one.head_dim) for one in (record, first)]
    if settings.keep_qk and sizes[0] != sizes[1]:
        raise LensError(
            f"{where} has (key heads, head_dim) = {sizes[0]}, layer {first.layer} {sizes[1]}; q and k of "
            "such layers do not fit into one trace: capture without keep_qk"
        )


def _attributes(
    model: LoadedModel,
    prompt: Prompt,
    settings: Settings,
    layers: list[LayerRecord],
) -> dict[str, Any]:
    """As in docs/schema/trace.md."""
    starts_with_bos = (
        bool(prompt.ids) and model.bos_id is not None and prompt.ids[0] == model.bos_id
    )
    return provenance(layers, settings, model.dtype, model.device) | {
        "model": model.name,
        "model_class": model.info.class_name,
        "revision": model.revision,
        "without_attention": list(model.info.without_attention),
        "twice": list(model.info.twice),
        "bos": "added" if starts_with_bos else "absent",
        "text_sha256": prompt.sha256,
        "check": model.check,
        "labels": {
            one.name: {"query": one.query.tolist(), "key": one.key.tolist()}
            for one in settings.labels
        },
    }


def folders_of(out: str | Path | None, count: int, is_single: bool) -> list[Path | None]:
    """Where the trace of each prompt is written: of one `out`, of several a folder each inside it; None: nowhere."""
    if out is None:
        return [None] * count
    return [Path(out)] if is_single else [Path(out) / f"p{number:03d}" for number in range(count)]


def provenance(
    layers: Sequence[LayerRecord], settings: Settings, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The attributes that the records and settings of a trace say, whatever was run."""
    first = layers[0]
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "backend": first.backend,
        "block_size": settings.block_size,
        "causal": all(layer.causal for layer in layers),
        "windows": [layer.window for layer in layers],
        "softcap": first.softcap,
        "scale": [layer.scale for layer in layers],
        "learned_sinks": any(layer.sink_logits is not None for layer in layers),
        "biased": any(layer.biased for layer in layers),
        "kv_heads": first.kv_heads,
        "prefix": PREFIX,
        "tokens": first.keys,
        "versions": dict(versions()),
    } | _masks(layers)


def _masks(layers: Sequence[LayerRecord]) -> dict[str, Any]:
    """`seen` and `partition`, where the mask of a layer is neither causal nor a window."""
    found = {}
    for name, of in (("seen", "ranges"), ("partition", "parts")):
        masks = [getattr(layer, name) for layer in layers]
        known = [None if one is None else one.tolist() for one in masks]
        each = [one for at, one in enumerate(known) if one is not None and one not in known[:at]]
        if each:
            numbers = [None if one is None else each.index(one) for one in known]
            found[name] = {"of": numbers, of: each}
    return found


def _segments(model: LoadedModel, prompt: Prompt) -> dict[str, Any] | None:
    """What the tokens of a prompt with images are; None for any other prompt."""
    if prompt.ids is None or "pixel_values" not in prompt.inputs:
        return None
    if image_token(model.model.config) is None:  # images beside the text, not inside
        return None
    return segments(model, prompt.inputs).to_dict()


@cache
def versions() -> dict[str, str]:
    """The packages that a trace rests on, those that are installed."""
    found = {"attention-lens": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
