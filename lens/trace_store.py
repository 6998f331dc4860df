"""A trace on disk: one safetensors file per layer and one JSON file, read a slice at a time.

The layout is docs/schema/trace.md. A layer's file appears whole or not at all (temporary name, then
rename) and `trace.json` comes last, so a killed capture leaves whole layers and no trace.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from xarray.backends import BackendArray
from xarray.core import indexing

from lens.errors import LensError
from lens.files import read_json, write_atomically, write_json

SCHEMA_VERSION = 1
INDEX = "trace.json"

_ROW = ("head", "query")
_BLOCK = ("head", "query_block", "key_block")
DIMENSIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "lse",
            "max_logit",
            "entropy",
            "entropy_sink_excluded",
            "concentration",
            "distance",
            "distance_sink_excluded",
            "prefix_mass",
            "first_mass",
            "rest_mass",
        ),
        _ROW,
    ),
    "match_mass": (*_ROW, "match"),
    "received": ("head", "key"),
    "diagonal": ("head", "offset"),
    "block_mass": _BLOCK,
    "block_max": _BLOCK,
    "visible": ("key",),
    "q": (*_ROW, "dim"),
    "k": ("kv_head", "key", "dim"),
}
"""Dimensions of every variable that a layer may have, without `layer`."""


def layer_file(layer: int) -> str:
    """Name of a layer's file."""
    return f"layer-{layer:02d}.safetensors"


def write_layer(folder: Path, layer: int, variables: Mapping[str, np.ndarray]) -> None:
    """Write one layer, whole or not at all."""
    check_variables(layer, variables)
    contiguous = {name: np.ascontiguousarray(array) for name, array in variables.items()}
    write_atomically(folder / layer_file(layer), lambda path: save_file(contiguous, path))


def check_variables(layer: int, variables: Mapping[str, np.ndarray]) -> None:
    """Every variable is known and has its number of dimensions.

    Raises:
        ValueError: an unknown name or a wrong number of dimensions.
    """
    for name, array in variables.items():
        if name not in DIMENSIONS:
            raise ValueError(f"layer {layer}: unknown variable {name!r}; known: {[*DIMENSIONS]}")
        if array.ndim != len(DIMENSIONS[name]):
            raise ValueError(
                f"layer {layer}: {name} must have the dimensions {DIMENSIONS[name]}, "
                f"got shape {array.shape}"
            )


def write_index(
    folder: Path,
    layers: Sequence[int],
    coordinates: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> None:
    """Write `trace.json`, which makes the folder a trace."""
    files = {layer_file(layer): (folder / layer_file(layer)).stat().st_size for layer in layers}
    write_json(
        folder / INDEX,
        {
            "schema": "attention-lens/trace",
            "schema_version": SCHEMA_VERSION,
            "layers": list(layers),
            "files": files,
            "coordinates": dict(coordinates),
            "attributes": dict(attributes),
        },
    )


def read_index(folder: Path) -> dict[str, Any]:
    """The checked contents of `trace.json`.

    Raises:
        LensError: missing or damaged, of another schema version, or a layer's file is missing or
            has another size than when it was written.
    """
    path = folder / INDEX
    if not path.exists():
        raise LensError(f"{folder} holds no finished trace ({INDEX} is missing); capture it again")
    index = read_json(path)
    version = index.get("schema_version")
    if version != SCHEMA_VERSION:
        writer = index.get("attributes", {}).get("versions", {}).get("attention-lens", "unknown")
        raise LensError(
            f"{path} has schema version {version}, this attention-lens reads {SCHEMA_VERSION}; "
            f"it was written by attention-lens {writer}: read it with that version"
        )
    for name, size in index["files"].items():
        file = folder / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise LensError(f"{file} {what}; capture this prompt again")
    return index


class LayeredArray(BackendArray):
    """One variable of all layers, read from disk for the layers and heads that are indexed."""

    def __init__(self, folder: Path, layers: Sequence[int], name: str) -> None:
        self._paths = [folder / layer_file(layer) for layer in layers]
        self._name = name
        with _opened(self._paths[0]) as file:
            stored = file.get_slice(name)
            self.shape = (len(layers), *stored.get_shape())
            self.dtype = stored[tuple(slice(0, 0) for _ in stored.get_shape())].dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, self._read
        )

    def _read(self, key: tuple[int | slice, ...]) -> np.ndarray:
        layers, first, *rest = key
        paths = self._paths[layers]
        if isinstance(paths, Path):
            return self._read_layer(paths, first, rest)
        parts = [self._read_layer(path, first, rest) for path in paths]
        if not parts:
            return np.empty(self.shape, self.dtype)[(layers, first, *rest)]
        return np.stack(parts)

    def _read_layer(self, path: Path, first: int | slice, rest: list[int | slice]) -> np.ndarray:
        """Only the part along the first dimension (the heads) comes from disk."""
        with _opened(path) as file:
            stored = file.get_slice(self._name)
            if isinstance(first, int | np.integer):
                return stored[int(first) : int(first) + 1][0][tuple(rest)]
            start, stop, step = first.indices(self.shape[1])
            if step < 0:
                return stored[:][(first, *rest)]
            return stored[start:stop][(slice(None, None, step), *rest)]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise LensError(f"{path} is damaged ({error}); capture this prompt again") from error


def lazy_variables(folder: Path, layers: Sequence[int]) -> dict[str, xr.Variable]:
    """Every stored variable, with `layer` first, reading nothing but the headers."""
    with _opened(folder / layer_file(layers[0])) as file:
        names = [name for name in DIMENSIONS if name in set(file.keys())]
    return {
        name: xr.Variable(
            ("layer", *DIMENSIONS[name]),
            indexing.LazilyIndexedArray(LayeredArray(folder, layers, name)),
        )
        for name in names
    }
