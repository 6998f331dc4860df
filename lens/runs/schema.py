"""What the files of a run folder hold (docs/schema/run-folder.md), said once, for whoever writes or reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from lens.circuits.graph.graph import StreamGraph
from lens.common.errors import LensError
from lens.common.files import printable
from lens.common.schema import in_words, validated
from lens.traces.profiles import COLUMNS as HEAD_COLUMNS

SCHEMA = "attention-lens/run"
SCHEMA_VERSION = 1
KIND_WORDS = {
    "text": "text",
    "copied": "copied random tokens",
    "picture": "pictures",
    "sound": "sounds",
}
"""Kinds of prompts, and what they are called in sentences."""
PROMPT_KINDS = tuple(KIND_WORDS)
"""In the table of heads also names of the means over them."""

Kind = Literal["text", "number", "integer", "integers", "texts"]
_TEXTS = (
    *("prompt_id", "kind", "title", "text", "status", "metric", "variant", "detail"),
    *("name", "bos", "ranking", "circuit"),
)
_INTEGERS = ("layer", "head", "n", "tokens", "edges")
_LISTS: dict[str, Kind] = {"token_ids": "integers", "token_strings": "texts"}
PROMPT_COLUMNS = (
    "prompt_id",
    "kind",
    "title",
    "text",
    "tokens",
    "token_ids",
    "token_strings",
    "loss",
    "loss_repeat",
    "status",
    "seconds",
)


def kinds_of(columns: tuple[str, ...]) -> dict[str, Kind]:
    """Column -> what it holds; what is no text, whole number or list is a number."""
    texts: dict[str, Kind] = dict.fromkeys(_TEXTS, "text")
    integers: dict[str, Kind] = dict.fromkeys(_INTEGERS, "integer")
    known = texts | integers | _LISTS
    return {name: known.get(name, "number") for name in columns}


PROMPTS = kinds_of(PROMPT_COLUMNS)
HEADS = kinds_of(HEAD_COLUMNS)
LATER = ("uniform", "random_weights")
"""Columns that older folders lack: NaN there."""
SECTIONS: Mapping[str, Mapping[str, dict[str, Kind]]] = {
    "detection": {
        "epsilon": kinds_of(("epsilon", "rate", "low", "high", "tokens", "bos", "n")),
        "heads": kinds_of(("layer", "head", "alpha")),
    },
    "importance": {"scores": kinds_of(("name",))},
    "classes": {
        "metrics": kinds_of(("layer", "name", "metric", "value", "n")),
        "classes": kinds_of(("layer", "name", "metric", "class", "value", "n")),
    },
    "rings": {"rings": kinds_of(("prompt_id", "layer", "name", "ring", "mass", "uniform_mass"))},
    "grounding": {
        "heads": kinds_of(("layer", "head", "name", "iou", "iou_middle", "pointing", "n")),
        "boxes": kinds_of(("prompt_id", "left", "top", "right", "bottom")),
    },
    "pattern_summary": {"maps": kinds_of(("prompt_id", "layer", "name", "group", "x", "y"))},
    "circuit": {
        "faithfulness": kinds_of(
            (
                *("ranking", "edges", "share", "faithfulness", "low", "high"),
                *("random", "random_low", "random_high", "kl"),
            )
        ),
        "same_size": kinds_of(("circuit", "faithfulness", "low", "high")),
    },
}
"""Section -> its tables that pages look into -> the columns that they read."""

_Line = Annotated[str, AfterValidator(lambda text: " ".join(printable(text).split()))]
_Text = Annotated[str, AfterValidator(printable)]
_Count = Annotated[int, Field(ge=0, le=2**53)]
_Size = Annotated[int, Field(ge=1, le=2**20)]
_Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
_Score = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


_Setting = str | bool | int | float


class _Open(BaseModel):
    """Further entries are kept, as a later version may have more."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class _ModelEntry(_Open):
    name: _Line
    layers: _Size
    heads: _Size
    class_: _Line | None = Field(None, alias="class")
    revision: _Line | None = None
    attending: list[_Count] | None = None
    part: _Line | None = None
    kv_heads: _Size | None = None
    head_dim: _Size | None = None
    vocab: _Size | None = None
    context: _Count | None = None
    parameters: _Count | None = None
    dtype: _Line | None = None
    licence: _Line | None = None


class _Prompts(_Open):
    done: _Count
    total: _Count
    tokens: _Count | None = None


class _Failure(_Open):
    type: _Line
    message: _Text


class RunFile(_Open):
    """`run.json`. Entries with a default can be done without: one that does not fit is left out and said."""

    id: _Line
    title: _Line
    what: _Line
    task: _Line | None = None
    status: Literal["started", "success", "partial", "error"]
    created: _Line
    model: _ModelEntry
    prompts: _Prompts
    versions: dict[str, _Line]
    files: dict[str, _Count]
    updated: _Line | None = None
    seconds: _Seconds | None = None
    pid: int | None = None
    host: str | None = None
    process_started: int | None = None
    command: _Text | None = None
    device: _Line | None = None
    backend: _Line | None = None
    block_size: _Size | None = None
    seed: int | None = None
    bos: _Line | None = None
    warnings: list[_Text] = []
    unsupported: dict[str, _Text] = {}
    error: _Failure | None = None
    manifest: str | None = None


class ConfigFile(_Open):
    """`config.toml`: settings by section."""

    model: dict[str, _Setting] = {}
    prompts: dict[str, _Setting] = {}
    capture: dict[str, _Setting] = {}
    analysis: dict[str, _Setting] = {}
    seed: int = 0


class _HeadlineEntry(_Open):
    """`lens.runs.headlines.Headline`."""

    text: _Text
    value: _Score
    low: _Score | None
    high: _Score | None
    baseline: _Score
    against: _Line
    spread: _Positive | None = None
    unit: _Line = ""
    figure: str = ""
    many: Annotated[int, Field(ge=1, le=2**53)] = 1
    units: Annotated[int, Field(ge=0, le=2**53)] = 0

    @model_validator(mode="after")
    def _fit(self) -> _HeadlineEntry:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class SectionFile(_Open):
    """`section.json`. `shapes` has the rows and column types of each table; older folders lack it, and headlines."""

    name: _Name
    title: _Line
    summary: list[_Text]
    limits: list[_Text]
    columns: dict[str, _Text]
    configuration: dict[str, Any]
    tables: list[_Name]
    figures: list[_Name]
    headlines: list[_HeadlineEntry] = []
    shapes: dict[str, dict[str, Any]] = {}


class DetectionEntries(_Open):
    """What pages read of the configuration of the section on detection."""

    epsilon: float
    rate: float | None = None
    rate_over_all_queries: float | None = None


class _Graph(_Open):
    layers: _Size
    heads: _Size
    kv_heads: _Size
    mlps: bool
    parallel: bool
    kv: Any = None

    @property
    def parts(self) -> int:
        """Number of writers."""
        return 1 + self.layers * (self.heads + self.mlps)

    def unknown(self, edges: Iterable[str]) -> list[str]:
        """Those that are none by their names: a layer of heads reads as one in a hybrid alone."""
        return list(filter(_TOGETHER.search, edges))


_TOGETHER = re.compile(r"->a\d+$")
_MOST_PAIRS = 2**26
_NODE = r"(input|a\d{1,4}\.[hs]\d{1,5}|m\d{1,4})"  # s: mixer heads beside softmax heads
_READER = r"(a\d{1,4}(\.h\d{1,5}(<[qkv]>)?)?|m\d{1,4}|logits)"
_Node = Annotated[str, Field(pattern=f"^{_NODE}$")]
_Reader = Annotated[str, Field(pattern=f"^{_READER}$")]
_Edge = Annotated[str, Field(pattern=f"^{_NODE}->{_READER}$")]


class _Hybrid(_Open):
    """`lens.circuits.graph.graph.StreamGraph`."""

    writers: list[_Node]
    readers: list[_Reader]
    before: list[_Count]
    feeds: list[list[_Count]]

    @model_validator(mode="after")
    def _fit(self) -> _Hybrid:
        if (pairs := len(self.writers) * len(self.readers)) > _MOST_PAIRS:
            raise ValueError(
                f"has {pairs:,} pairs of a writer and a reader, {_MOST_PAIRS:,} are read"
            )
        try:
            self.made()
        except LensError as error:
            raise ValueError(f"is no graph: {error}") from error
        return self

    def made(self) -> StreamGraph:
        """The graph itself."""
        names = tuple(self.writers), tuple(self.readers), tuple(self.before)
        return StreamGraph(*names, tuple(map(tuple, self.feeds)))

    @property
    def parts(self) -> int:
        """Number of writers."""
        return len(self.writers)

    def unknown(self, edges: Iterable[str]) -> list[str]:
        """Those that it has not got."""
        known = set(self.made().edges)
        return [edge for edge in edges if edge not in known]


def _graph_kind(given: Any) -> str:
    """Of what is read, and of what was."""
    is_hybrid = "writers" in given if isinstance(given, dict) else isinstance(given, _Hybrid)
    return "of_hybrid" if is_hybrid else "of_sizes"


_AnyGraph = Annotated[
    Annotated[_Graph, Tag("of_sizes")] | Annotated[_Hybrid, Tag("of_hybrid")],
    Discriminator(_graph_kind),
]


class CircuitFile(_Open):
    """`circuits/<task>.json`."""

    format: Literal["lens-circuit"]
    version: Literal[1]
    model: _Line
    task: _Line
    made: _Line
    graph: _AnyGraph
    nodes: list[_Node]
    edges: list[_Edge]
    scores: list[_Score] | None = None
    faithfulness: dict[str, list[_Score]] = {}

    @model_validator(mode="after")
    def _fit(self) -> CircuitFile:
        if unknown := self.graph.unknown(self.edges):
            raise ValueError(f"has the edge {unknown[0]!r}, which its graph has not got")
        if self.scores is not None and len(self.scores) != len(self.edges):
            raise ValueError(f"{len(self.scores)} scores for {len(self.edges)} edges")
        if len({len(column) for column in self.faithfulness.values()}) > 1:
            raise ValueError("the columns of faithfulness are not equally long")
        return self


class _Scored(_Open):
    score: _Score


class _About(_Open):
    """Of the scores, what the benchmark's format has no place for."""

    graph: _Hybrid | None = None


class ImportancesFile(_Open):
    """`circuits/mib/importances.json`: every edge with its score; of a hybrid with its graph."""

    edges: dict[_Edge, _Scored]
    lens: _About = _About()

    @model_validator(mode="after")
    def _fit(self) -> ImportancesFile:
        graph = self.lens.graph
        unknown = (
            list(filter(_TOGETHER.search, self.edges))
            if graph is None
            else graph.unknown(self.edges)
        )
        if unknown:
            raise ValueError(f"has the edge {unknown[0]!r}, which its graph has not got")
        if graph is not None and (lacking := graph.made().n - len(self.edges)):
            raise ValueError(f"has no score of {lacking:,} edges of its graph")
        return self


def run_entries(value: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The entries of `run.json`, and one sentence for each that does not fit or is missing and can be done without.

    Raises:
        LensError: of another version, or one that cannot be done without does not fit.
    """
    version = value.get("schema_version")
    if value.get("schema") != SCHEMA or version != SCHEMA_VERSION:
        versions = value.get("versions")
        writer = versions.get("attention-lens", "?") if isinstance(versions, dict) else "?"
        raise LensError(
            f"{path} has schema {value.get('schema')!r} version {version!r}, this attention-lens reads "
            f"{SCHEMA!r} version {SCHEMA_VERSION}; it was written by attention-lens {writer}: "
            f"read it with that version"
        )
    damage, kept = [], {**value, "model": value.get("model")}
    try:
        return RunFile.model_validate(value, strict=True).model_dump(by_alias=True), ()
    except ValidationError as error:
        for one in error.errors(include_url=False):
            part, holder, model = kept, one["loc"][0], RunFile
            if holder == "model" and len(one["loc"]) > 1 and isinstance(kept["model"], dict):
                kept["model"] = part = dict(kept["model"])
                holder, model = one["loc"][1], _ModelEntry
            names = {field.alias or name: field for name, field in model.model_fields.items()}
            if holder in names and not names[str(holder)].is_required():
                part.pop(holder, None)
                damage.append(f"{path.name}: {in_words(one)}")
    found = validated(RunFile, kept, path).model_dump(by_alias=True)
    return found, tuple(damage)
