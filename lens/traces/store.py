"""A trace on disk: one safetensors file per layer and one JSON file, read a slice at a time.

The layout is docs/schema/trace.md. A layer's file appears whole or not at all (temporary name, then
rename) and `trace.json` comes last, so a killed capture leaves whole layers and no trace.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xarray as xr
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from xarray.backends import BackendArray
from xarray.core import indexing

from lens.common.errors import LensError
from lens.common.files import PART, open_regular, read_json, write_atomically, write_json
from lens.common.schema import validated
from lens.traces.labels import MATCH_RULES

SCHEMA_VERSION = 1
INDEX = "trace.json"

_MOST_LAYER = 2**40
_LARGEST_PICTURE = 8 << 20  # characters
_Cell = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
_Place = Annotated[float, Field(allow_inf_nan=False)]
_TYPES = {"visible": ("I32",), "q": ("F32", "F16"), "k": ("F32", "F16")}
"""Of the arrays that are not float32."""
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
    "strongest": _ROW,
    "center": _ROW,
    "match_mass": (*_ROW, "match"),
    "received": ("head", "key"),
    "diagonal": ("head", "offset"),
    "block_mass": _BLOCK,
    "block_max": _BLOCK,
    "visible": ("key",),
    "q": (*_ROW, "dim"),
    "k": ("kv_head", "key", "dim"),
    "bias": ("head", "row_offset", "column_offset"),
}
"""Dimensions of every variable that a layer may have, without `layer`."""

_PART = r"^(encoder|decoder|cross|self|joint|time|space|stage\d{1,3})$"

REQUIRED = (
    "model",
    "dtype",
    "backend",
    "block_size",
    "causal",
    "windows",
    "scale",
    "softcap",
    "prefix",
    "bos",
)
"""Attributes that a trace cannot do without."""


def layer_file(layer: int) -> str:
    """Name of a layer's file."""
    return f"layer-{layer:02d}.safetensors"


def write_layer(folder: Path, layer: int, variables: Mapping[str, np.ndarray]) -> None:
    """Write one layer, whole or not at all."""
    check_variables(layer, variables)
    contiguous = {name: np.ascontiguousarray(array) for name, array in variables.items()}
    write_atomically(
        folder / layer_file(layer),
        lambda path: save_file(contiguous, path, metadata={"layer": str(layer)}),
    )


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


def trace_files(folder: Path) -> list[str]:
    """Names of the files of a finished trace."""
    return [INDEX, *read_index(folder)["files"]]


def remove_trace(folder: Path) -> None:
    """Remove the files of a trace, finished or not; all else that lies there stays."""
    for path in [folder / INDEX, *folder.glob("layer-*.safetensors"), *folder.glob(f".*{PART}")]:
        path.unlink(missing_ok=True)


def read_index(folder: Path) -> dict[str, Any]:
    """The checked contents of `trace.json`.

    Raises:
        LensError: missing or damaged, of another schema version, or a layer's file is missing, has
            another size than when it was written, or other arrays than its tokens and blocks make.
    """
    path = folder / INDEX
    if not path.exists() and not path.is_symlink():
        raise LensError(f"{folder} holds no finished trace ({INDEX} is missing); capture it again")
    index = read_json(path, within=folder)
    version = index.get("schema_version")
    if version != SCHEMA_VERSION:
        attributes = index.get("attributes")
        versions = attributes.get("versions") if isinstance(attributes, dict) else None
        writer = versions.get("attention-lens") if isinstance(versions, dict) else None
        raise LensError(
            f"{path} has schema version {version}, this attention-lens reads {SCHEMA_VERSION}; "
            f"it was written by attention-lens {writer or 'unknown'}: read it with that version"
        )
    found = validated(_TraceFile, index, path)
    for name, size in found.files.items():
        with open_regular(folder / name, most=_MOST_LAYER, within=folder) as file:
            stored = os.fstat(file.fileno()).st_size
        if stored != size:
            raise LensError(
                f"{folder / name} has {stored} bytes instead of {size}; capture this prompt again"
            )
    _check_arrays(folder, found)
    return index


class _Coordinates(BaseModel):
    token: list[str] = Field(min_length=1)
    token_id: list[int]
    query_token: list[str] | None = Field(default=None, min_length=1)
    query_token_id: list[int] | None = None


class _LabelPair(BaseModel):
    query: list[int]
    key: list[int]


class _PictureNote(BaseModel):
    png: str = Field(max_length=_LARGEST_PICTURE)
    size: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
    boxes: list[Annotated[list[_Place], Field(min_length=4, max_length=4)]]
    stretched: bool


class _Seen(BaseModel):
    of: list[Annotated[int, Field(ge=0)] | None]
    ranges: list[
        Annotated[list[list[Annotated[int, Field(ge=0)]]], Field(min_length=2, max_length=2)]
    ]


class _Partition(BaseModel):
    of: list[Annotated[int, Field(ge=0)] | None]
    parts: list[list[Annotated[int, Field(ge=-1)]]]


class _Attributes(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str
    dtype: str
    backend: str
    block_size: int = Field(ge=1, le=2**31)
    causal: bool
    windows: list[Annotated[int, Field(ge=1)] | None]
    scale: list[Annotated[float, Field(allow_inf_nan=False)] | None]
    softcap: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    prefix: int = Field(ge=0)
    bos: str
    learned_sinks: bool = False
    biased: bool | None = None
    segments: dict[str, Any] | None = None
    labels: dict[str, _LabelPair] = Field(default_factory=dict)
    patches: dict[str, Any] | None = None
    query_patches: dict[str, Any] | None = None
    picture: _PictureNote | None = None
    seen: _Seen | None = None
    partition: _Partition | None = None
    cells: list[_Cell] | None = None
    part: Annotated[str, Field(pattern=_PART)] | None = None
    seconds_per_position: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class _TraceFile(BaseModel):
    """`trace.json` (docs/schema/trace.md)."""

    layers: list[Annotated[int, Field(ge=0, le=10_000)]] = Field(min_length=1)
    files: dict[str, int]
    coordinates: _Coordinates
    attributes: _Attributes

    @model_validator(mode="after")
    def _fit(self) -> "_TraceFile":
        if self.layers != sorted(set(self.layers)):
            raise ValueError("layers must rise")
        if sorted(self.files) != sorted(map(layer_file, self.layers)):
            raise ValueError("files must name one file per layer")
        if len(self.coordinates.token) != len(self.coordinates.token_id):
            raise ValueError("coordinates must hold token and token_id, equally long")
        for name, pair in self.attributes.labels.items():
            if {len(pair.query), len(pair.key)} != {len(self.coordinates.token)}:
                raise ValueError(f"labels.{name} must have one query and one key label per token")
        if (seen := self.attributes.seen) is not None:
            self._check_named("seen", seen.of, "ranges", seen.ranges)
            rows = len(self.coordinates.query_token or self.coordinates.token)
            if any(len(ends) != rows for one in seen.ranges for ends in one):
                raise ValueError("seen.ranges must have one first and one last key per query")
        length = len(self.coordinates.token)
        if (apart := self.attributes.partition) is not None:
            self._check_named("partition", apart.of, "parts", apart.parts)
            if self.coordinates.query_token or any(len(one) != length for one in apart.parts):
                raise ValueError("partition.parts must have one part per token")
        if len(self.attributes.cells or range(length)) != length:
            raise ValueError("cells must have one row and column per token")
        if len(self.coordinates.query_token or ()) != len(self.coordinates.query_token_id or ()):
            raise ValueError("coordinates must hold query_token and query_token_id, equally long")
        if wrong := missing_attributes(self.attributes.model_dump(), len(self.layers)):
            raise ValueError(wrong)
        return self

    def _check_named(self, name: str, of: list[int | None], each: str, given: list[Any]) -> None:
        if len(of) != len(self.layers) or any(one is not None and one >= len(given) for one in of):
            raise ValueError(f"{name}.of must name one of {name}.{each} or null per layer")


def _check_arrays(folder: Path, index: _TraceFile) -> None:
    """Raises LensError where a layer has other variables, types or shapes than the schema and the first layer."""
    length, block = len(index.coordinates.token), index.attributes.block_size
    rows = len(index.coordinates.query_token or index.coordinates.token)
    offsets = length if index.attributes.causal else 2 * length - 1
    sizes = {"query": rows, "key": length, "offset": offsets}
    sizes |= {"query_block": -(-rows // block), "key_block": -(-length // block)}
    sizes["match"] = len(MATCH_RULES) + len(index.attributes.labels)
    ends = map(max, zip(*(index.attributes.cells or [(-1, -1)]), strict=True))
    sizes |= zip(("row_offset", "column_offset"), (2 * end + 1 for end in ends), strict=True)
    names: set[str] = set()
    for layer in index.layers:
        path = folder / layer_file(layer)
        with _opened(path) as file:
            written = (file.metadata() or {}).get("layer", str(layer))
            stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            names = names or set(stored)
            wrong = f"is of layer {written}" if written != str(layer) else ""
            if set(stored) != names:
                wrong = (
                    f"has other variables than the first layer: {', '.join(set(stored) ^ names)}"
                )
            for name, part in stored.items():
                wrong = wrong or _wrong_array(name, part.get_dtype(), part.get_shape(), sizes)
        if wrong:
            raise LensError(f"{path} {wrong}; capture this prompt again")


def _wrong_array(name: str, dtype: str, shape: list[int], sizes: dict[str, int]) -> str:
    if name not in DIMENSIONS:
        return f"has {name}, which is not known"
    types = _TYPES.get(name, ("F32",))
    if dtype not in types:
        return f"has {name} as {dtype} instead of {' or '.join(types)}"
    expected = [sizes.setdefault(*pair) for pair in zip(DIMENSIONS[name], shape, strict=False)]
    if len(shape) != len(DIMENSIONS[name]) or shape != expected:
        return f"has {name} of shape {shape} instead of {expected}"
    return ""


def missing_attributes(attributes: Mapping[str, Any], layers: int) -> str:
    """Which attributes are missing or do not fit the number of layers; nothing if all do."""
    missing = [name for name in REQUIRED if name not in attributes]
    if missing:
        return f"attributes lack {', '.join(missing)}"
    counts = {name: len(attributes[name]) for name in ("windows", "scale")}
    if set(counts.values()) != {layers}:
        return f"attributes must have one entry per layer ({layers}), got {counts}"
    return ""


class LayeredArray(BackendArray):
    """One variable of all layers, of which only what is indexed is read from disk."""

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
        layers, *rest = key
        if not isinstance(layers, slice):
            return self._read_layer(self._paths[layers], rest)
        parts = [self._read_layer(path, rest) for path in self._paths[layers]]
        if not parts:
            return np.empty(self.shape, self.dtype)[key]
        return np.stack(parts)

    def _read_layer(self, path: Path, key: Sequence[int | slice]) -> np.ndarray:
        """`array[key]`, reading the smallest box round it."""
        boxes, within = zip(*map(_box, key, self.shape[1:]), strict=True)
        with _opened(path) as file:
            stored = file.get_slice(self._name)
            return stored[boxes][within]


def _box(key: int | slice, size: int) -> tuple[slice, int | slice]:
    """The contiguous range that holds `range(size)[key]`, and the key within it."""
    if not isinstance(key, slice):
        start = int(key) % size
        return slice(start, start + 1), 0
    chosen = range(size)[key]
    if not chosen:
        return slice(0, 0), slice(None)
    low, high = min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])
    return slice(low, high + 1), slice(None, None, chosen.step)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError) as error:
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
