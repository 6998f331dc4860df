"""What one prompt did in every head of a model: labelled arrays with their provenance.

`AttentionTrace` is a thin shell round an `xarray.Dataset` (docs/schema/trace.md). It is written layer
by layer, read one layer and head at a time, and needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from lens.common.choices import check_range
from lens.common.errors import LensError
from lens.common.files import as_path
from lens.common.head_ids import AnyHead, HeadId, all_heads, head_id, layers_in_words
from lens.common.plots import draw, viewer
from lens.traces.arrays import LayerArrays, labelled
from lens.traces.html import trace_html
from lens.traces.overlays import Overlay, Token, overlay
from lens.traces.store import (
    DIMENSIONS,
    INDEX,
    SCHEMA_VERSION,
    check_variables,
    lazy_variables,
    missing_attributes,
    read_index,
    write_index,
    write_layer,
)
from lens.traces.tiles import exact_tile, notes_mask, of_head, refusal
from lens.traces.uniform import visible_queries

if TYPE_CHECKING:
    import plotly.graph_objects as go


class AttentionTrace:
    """The attention of one prompt, by layer, head, query and key.

    Every variable of the dataset is an attribute: `trace.block_mass.sel(layer=3, head=5)`.

    Attributes:
        dataset: the `xarray.Dataset`; dimensions and variables as in docs/schema/trace.md.
        path: the folder that it is read from, or None in memory.
    """

    def __init__(self, dataset: xr.Dataset, path: Path | None = None) -> None:
        self.dataset = dataset
        self.path = path
        self._refusals: dict[HeadId, str] = {}

    def __getattr__(self, name: str) -> xr.DataArray:
        if name.startswith("_") or name == "dataset":
            raise AttributeError(name)
        if name in self.dataset.variables:
            return self.dataset[name]
        if name in DIMENSIONS:
            have = ", ".join(str(variable) for variable in self.dataset.data_vars)
            hint = "keep_qk=True" if name in ("q", "k") else f"statistics including {name!r}"
            raise AttributeError(f"this trace has no {name}; capture it with {hint}; it has {have}")
        raise AttributeError(f"AttentionTrace has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *map(str, self.dataset.data_vars)]

    @property
    def attrs(self) -> dict[str, Any]:
        """Provenance: model, versions, block size and the rest."""
        return dict(self.dataset.attrs)

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.dataset.attrs["model"]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with softmax attention, by the model's own number."""
        return tuple(self.dataset["layer"].values.tolist())

    @property
    def without_attention(self) -> tuple[int, ...]:
        """Layers of the model without softmax attention, which a trace does not hold."""
        return tuple(self.dataset.attrs.get("without_attention", ()))

    @property
    def heads(self) -> int:
        """Number of query heads in each layer."""
        return self.dataset.sizes["head"]

    @property
    def every_head(self) -> list[HeadId]:
        """Every head, layer by layer."""
        return all_heads(self.layers, self.heads)

    @property
    def length(self) -> int:
        """Number of tokens; of cross-attention those of the keys."""
        return self.dataset.sizes["key"]

    @property
    def queries(self) -> int:
        """Number of queries: `length`, but of cross-attention the tokens of the decoder."""
        return self.dataset.sizes["query"]

    @property
    def part(self) -> str:
        """ "cross", "stage0" and so on, of a model in parts; "" of any other."""
        return self.dataset.attrs.get("part") or ""

    @property
    def cross(self) -> bool:
        """Whether queries and keys are of two sequences, or two grids of a picture."""
        return "query_token_id" in self.dataset.coords

    @property
    def query_tokens(self) -> list[str]:
        """Token strings of the queries: `tokens`, but of cross-attention those of the decoder."""
        return [str(token) for token in self.dataset["query_token"].values]

    @property
    def tokens(self) -> list[str]:
        """Token strings; of cross-attention those of the keys."""
        return [str(token) for token in self.dataset["key_token"].values]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the user's own labels, each a rule of `match_mass`."""
        return tuple(self.dataset.attrs.get("labels", ()))

    def head_id(self, head: AnyHead) -> HeadId:
        """The head that is meant: `"L3H5"`, `"3.5"` or `(3, 5)`.

        Raises:
            LensError: not a head, or not one of this trace.
        """
        found = head_id(head)
        if found.layer not in self.layers or found.head >= self.heads:
            raise LensError(
                f"there is no {found} in this trace of {self.model}: it has the "
                f"{layers_in_words(self.layers)} and the heads 0 to {self.heads - 1}"
                + self._without_in_words()
            )
        return found

    def _without_in_words(self) -> str:
        without = self.without_attention
        return f"; {layers_in_words(without)}: no softmax attention" if without else ""

    def select(self, head: AnyHead) -> xr.Dataset:
        """Every variable of one head, named as in `head_id`, with the k that it reads; read when it is used."""
        return of_head(self.dataset, self.head_id(head))

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer: keys at a distance below it are seen; None for all."""
        return self.attrs["windows"][self.layers.index(self.head_id((layer, 0)).layer)]

    def has_plain_mask(self, layer: int) -> bool:
        """Whether `causal` and `window` say all about which keys the layer's queries see; where neither is, keys
        that no query sees (padding) do not matter."""
        seen = self.dataset["visible"].sel(layer=self.head_id((layer, 0)).layer).values
        if self.cross or not (self.attrs["causal"] or self.window(layer)):
            return bool(((seen == self.queries) | (seen == 0)).all())
        expected = visible_queries(
            self.length, causal=self.attrs["causal"], window=self.window(layer)
        )
        return bool((seen == expected).all())

    def save(self, folder: str | Path) -> Path:
        """Write the trace into a new folder.

        Raises:
            LensError: the folder holds a trace already.
        """
        writer = TraceWriter(folder := as_path("folder", folder))
        for layer in self.layers:
            part = self.dataset.sel(layer=layer)
            names = [name for name in DIMENSIONS if name in part.data_vars]
            writer.add_layer(layer, {name: part[name].values for name in names})
        writer.finish(
            token_ids=self.dataset["token_id"].values.tolist(),
            tokens=self.tokens,
            query_ids=self.dataset["query_token_id"].values.tolist() if self.cross else None,
            query_tokens=self.query_tokens if self.cross else None,
            attributes=self.attrs,
        )
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> AttentionTrace:
        """Open a trace folder; arrays are read when they are used.

        Raises:
            LensError: missing, damaged or of another schema version.
        """
        folder = as_path("folder", folder)
        index = read_index(folder)
        variables = lazy_variables(folder, index["layers"])
        try:
            dataset = labelled(
                variables, index["layers"], index["coordinates"], index["attributes"]
            )
        except ValueError as error:
            raise LensError(
                f"{folder} is damaged (its arrays do not fit each other: {error}); "
                "capture this prompt again"
            ) from error
        return cls(dataset, folder)

    def tile(
        self, layer: int, head: int, queries: tuple[int, int], keys: tuple[int, int]
    ) -> np.ndarray:
        """Exact probabilities of one rectangle, from the stored q, k and LSE.

        Args:
            layer, head: which head.
            queries, keys: ranges (first, past the last).

        Returns:
            [queries, keys] float64.

        Raises:
            LensError: q and k were not kept, they do not give back what the layer did (it adds a
                bias or has a mask of its own), or a range leaves the prompt.
        """
        if why := self.tile_refusal(layer, head):
            raise LensError(why)
        queries = check_range("queries", queries, self.queries)
        keys = check_range("keys", keys, self.length)
        return exact_tile(self.dataset, self.head_id((layer, head)), queries, keys)

    def tile_refusal(self, layer: int, head: int) -> str:
        """Why `tile` refuses this head, with the remedy; empty if it does not."""
        chosen = self.head_id((layer, head))
        if chosen not in self._refusals:
            noted = notes_mask(self.attrs, self.layers.index(layer))
            self._refusals[chosen] = (
                refusal(self.dataset, chosen)
                if noted or self.has_plain_mask(layer)
                else f"layer {layer} of {self.model} has a mask by which queries see keys with others between, "
                "which a trace does not keep, so there are no exact tiles; use block_mass"
            )
        return self._refusals[chosen]

    def view(self, head: Any = None, *, layer: int | None = None, query: int | None = None) -> Any:
        """The dashboard's map with its tokens; `.to_html(path)` writes it.

        Args:
            head: "L1H3", or several (a list, rows of an array, a table of heads), which then share zoom, cursor and query.
            layer: all heads of it instead.
            query: token whose row is shown below; the last one if None.

        Raises:
            LensError: none of this name, or the dashboard is not installed.
        """
        return viewer()(self, head, layer=layer, query=query)

    def plot(self, head: AnyHead, **look: Any) -> go.Figure:
        """Block map of one head, as `lens.figures.block_map` draws it."""
        return draw(self, *self.head_id(head), **look)

    def overlay(
        self,
        heads: AnyHead | Sequence[AnyHead] = "mean",
        *,
        query: Token | None = None,
        key: Token | None = None,
        variant: str = "raw",
        image: int = 0,
    ) -> Overlay:
        """Attention on the picture of this trace: `lens.vision.overlay`.

        Example:
            >>> lens.capture(vit, {"pixel_values": images}, keep_qk=True).overlay("L1H2", query=(0, 3)).plot()
        """
        return overlay(self, heads, query=query, key=key, variant=variant, image=image)

    def __repr__(self) -> str:
        size = sum(variable.nbytes for variable in self.dataset.data_vars.values())
        names = ", ".join(str(name) for name in self.dataset.data_vars)
        where = f" in {self.path}" if self.path else ""
        return (
            f"<AttentionTrace of {self.model}: {self._size_in_words()}, "
            f"{len(self.layers)} layers × {self.heads} heads, {size / 1e6:.1f} MB{where}>\n"
            f"  blocks of {self.attrs['block_size']}, {self.attrs['dtype']}, "
            f"backend {self.attrs['backend']}, BOS {self.attrs['bos']}\n"
            f"  {layers_in_words(self.layers)}{self._without_in_words()}\n"
            f"  {names}"
        )

    def _size_in_words(self) -> str:
        sizes = f"{self.queries:,} to {self.length:,}" if self.cross else f"{self.length:,}"
        part = self.part.replace("cross", "cross-attention")
        return f"{part} of {sizes} tokens".removeprefix(" of ")

    def _repr_html_(self) -> str:
        return trace_html(repr(self), self.dataset)


class TraceWriter:
    """Takes a trace layer by layer, in memory or into a folder.

    With a folder each layer is written when it comes and then forgotten, so that memory does not
    grow with the number of layers. `expected` layers get their room at once.

    Raises:
        LensError: the folder holds a finished trace.
    """

    def __init__(self, folder: str | Path | None = None, expected: int = 1) -> None:
        self._folder = None if folder is None else as_path("folder", folder)
        self._layers: list[int] = []  # as they came
        self._arrays = LayerArrays(expected)
        self._shapes: dict[str, tuple[int, ...]] = {}
        if self._folder is not None and (self._folder / INDEX).exists():
            raise LensError(
                f"{self._folder} holds a trace already; choose another folder or delete it"
            )

    def add_layer(self, layer: int, variables: Mapping[str, np.ndarray]) -> None:
        """Take one layer: name -> array with the dimensions of `DIMENSIONS`.

        Raises:
            ValueError: unknown variable, wrong number of dimensions, another shape than in the first
                layer, or a layer that came before.
        """
        check_variables(layer, variables)
        shapes = {name: array.shape for name, array in variables.items()}
        if self._layers and shapes != self._shapes:
            raise ValueError(
                f"layer {layer} must have the variables of the layers before: expected "
                f"{self._shapes}, got {shapes}"
            )
        self._shapes = shapes
        if layer in self._layers:
            raise ValueError(f"layer {layer} was added twice")
        if self._folder is None:
            self._arrays.add(variables)
        else:
            write_layer(self._folder, layer, variables)
        self._layers.append(layer)

    def finish(
        self,
        *,
        token_ids: Sequence[int],
        tokens: Sequence[str],
        attributes: Mapping[str, Any],
        query_ids: Sequence[int] | None = None,
        query_tokens: Sequence[str] | None = None,
    ) -> AttentionTrace:
        """The finished trace.

        Args:
            token_ids, tokens: of every position, as numbers and as text; of cross-attention of the keys.
            query_ids, query_tokens: of the queries where these are of another sequence.
            attributes: as in docs/schema/trace.md; `schema_version` is added.

        Raises:
            ValueError: no layer came, an attribute is missing, or sizes do not fit each other.
        """
        if not self._layers:
            raise ValueError("a trace needs at least one layer; none was added")
        layers = sorted(self._layers)
        if wrong := missing_attributes(attributes, len(layers)):
            raise ValueError(f"the trace's {wrong}")
        if len(token_ids) != len(tokens):
            raise ValueError(
                f"token_ids and tokens must be equally long, got {len(token_ids)} and {len(tokens)}"
            )
        lengths = {
            shape[DIMENSIONS[name].index("query")]
            for name, shape in self._shapes.items()
            if "query" in DIMENSIONS[name]
        }
        rows = tokens if query_tokens is None else query_tokens
        if lengths - {len(rows)}:
            raise ValueError(f"{len(rows)} tokens for {lengths.pop()} positions")
        attributes = {**attributes, "schema_version": SCHEMA_VERSION}
        coordinates = {"token_id": [int(i) for i in token_ids], "token": list(tokens)}
        if query_tokens is not None:
            coordinates["query_token"] = list(query_tokens)
            coordinates["query_token_id"] = [int(i) for i in query_ids or [-1] * len(rows)]
        if self._folder is not None:
            write_index(self._folder, layers, coordinates, attributes)
            return AttentionTrace.load(self._folder)
        arrays = self._arrays.in_order([self._layers.index(layer) for layer in layers])
        variables = {
            name: xr.Variable(("layer", *DIMENSIONS[name]), arrays[name])
            for name in DIMENSIONS
            if name in arrays
        }
        return AttentionTrace(labelled(variables, layers, coordinates, attributes))
