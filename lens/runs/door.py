"""The one door to the files of a run folder: sizes bounded before anything is read, contents held against the schema.

What is read may be damaged or made by somebody else. Whatever does not fit is a `LensError` that names the file
and the column; nothing that is asked for through this door takes memory or time without bound.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from pydantic import BaseModel

from lens.common.errors import LensError
from lens.common.files import open_regular, read_json, read_text
from lens.common.schema import validated
from lens.runs.manifest import read_manifest, size_problem
from lens.runs.schema import LATER, Kind

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

_Model = TypeVar("_Model", bound=BaseModel)
_MOST_TEXT = 2**20
_MOST_FILE = 2**28
_MOST_FOOTER = 2**24
MOST_ROWS = 4_000_000
_MOST_VALUES = 2**25
_MOST_BYTES = 2**27
"""Of the strings of a table, and of a table before decompression; a text of 131,072 tokens has 0.6 MB."""
_MOST_COLUMNS = 1000
_INDEX = "__index_level_0__"  # of older folders
_WORDS: dict[Kind, str] = {
    "text": "text",
    "number": "numbers",
    "integer": "whole numbers",
    "integers": "lists of whole numbers",
    "texts": "lists of text",
}


class Door:
    """The files of one run folder, by their relative paths.

    Attributes:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def manifest(self) -> Mapping[str, Any] | None:
        """What the run wrote; None for a folder without a manifest."""
        return read_manifest(self.folder)

    def has(self, name: str) -> bool:
        """Whether there is such a file, of whatever kind."""
        path = self.folder / name
        return path.exists() or path.is_symlink()

    def check(self, *names: str) -> None:
        """Raises LensError where a file has another size than the run wrote."""
        for name in names:
            if problem := size_problem(self.folder, name, self.manifest):
                raise LensError(f"{self.folder}: {problem}")

    def text(self, name: str, most: int = _MOST_TEXT) -> str:
        """A text file."""
        self.check(name)
        return read_text(self.folder / name, most=most, within=self.folder)

    def toml(self, name: str) -> dict[str, Any]:
        """A TOML file."""
        try:
            return tomllib.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise LensError(
                f"{self.folder / name} cannot be read ({error}); run the analysis again"
            ) from error

    def json(self, name: str, most: int = 2**25) -> dict[str, Any]:
        """A JSON object."""
        self.check(name)
        return read_json(self.folder / name, most=most, within=self.folder)

    def entries(self, model: type[_Model], name: str, most: int = 2**25) -> _Model:
        """A JSON object that fits a schema."""
        return validated(model, self.json(name, most), self.folder / name)

    def table(
        self,
        name: str,
        kinds: Mapping[str, Kind] | None = None,
        *,
        most_rows: int = MOST_ROWS,
        shape: Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """A parquet table.

        Args:
            name: of the file.
            kinds: columns that it must have, and what they hold.
            most_rows: more are refused before they are read.
            shape: its `shape_of` when it was written.

        Raises:
            LensError: it does not fit, is too large, or is no parquet.
        """
        import pyarrow.parquet as pq

        self.check(name)
        path = self.folder / name
        with open_regular(path, most=_MOST_FILE, within=self.folder) as file:
            try:
                stored = pq.ParquetFile(
                    file,
                    thrift_string_size_limit=_MOST_FOOTER,
                    thrift_container_size_limit=_MOST_FOOTER,
                )
                problem = _too_much(stored, file, most_rows, len(kinds or ())) or _of_other_shape(
                    stored, shape
                )
                if not problem:
                    table = _with_numbers(stored.read(), kinds or {})
                    problem = "; ".join(_unfit(table, kinds or {}))
                    if not problem:
                        found = table.to_pandas(ignore_metadata=True)
                        return found.drop(columns=_INDEX, errors="ignore")
            except Exception as error:  # whatever the decoder says of damaged bytes
                problem = f"it is damaged: {type(error).__name__}: {error}"
        raise LensError(f"{path}: {problem}; run the analysis again")


def shape_of(path: Path) -> dict[str, Any]:
    """`rows` of a parquet file, and `columns` with their types."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as stored:
        return _shape(stored)


def _shape(stored: pq.ParquetFile) -> dict[str, Any]:
    columns = {field.name: str(field.type) for field in stored.schema_arrow}
    return {"rows": stored.metadata.num_rows, "columns": columns}


def _of_other_shape(stored: pq.ParquetFile, shape: Mapping[str, Any] | None) -> str:
    if not shape or (found := _shape(stored)) == shape:
        return ""
    if found["rows"] != shape.get("rows"):
        return f"it has {found['rows']} rows instead of {shape.get('rows')}"
    columns = shape.get("columns")
    wrong = {*found["columns"].items()} ^ {*(columns if isinstance(columns, dict) else {}).items()}
    return f"column {min(name for name, _ in wrong)} is not as it was written" if wrong else ""


def _too_much(stored: pq.ParquetFile, file: BinaryIO, most_rows: int, columns: int) -> str:
    """Why a table takes more memory than any that a run writes: by its metadata, and by its dictionaries."""
    about = stored.metadata
    if about.num_rows > most_rows:
        return f"it has {about.num_rows:,} rows, more than the {most_rows:,} that it can have"
    if about.num_columns > _MOST_COLUMNS:
        return (
            f"it has {about.num_columns:,} columns, more than the {_MOST_COLUMNS:,} that are read"
        )
    values = size = 0
    texts: dict[str, list[int]] = {}
    for group in range(about.num_row_groups):
        for column in range(about.num_columns):
            chunk = about.row_group(group).column(column)
            values += chunk.num_values
            size += chunk.total_uncompressed_size
            if chunk.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
                sums = texts.setdefault(chunk.path_in_schema, [0, 0])
                sums[0], sums[1] = (
                    sums[0] + chunk.num_values,
                    sums[1] + chunk.total_uncompressed_size,
                )
    most_values = max(_MOST_VALUES, most_rows * columns)
    if values > most_values:
        return f"it has {values:,} values, more than the {most_values:,} that are read"
    if size > _MOST_BYTES:
        return f"it has {size:,} bytes, more than the {_MOST_BYTES:,} that are read"
    for path, (count, stored_bytes) in texts.items():
        if count * stored_bytes > _MOST_BYTES and _bytes_of_texts(file, path) > _MOST_BYTES:
            return f"column {path.partition('.')[0]} has more than {_MOST_BYTES:,} bytes of text"
    return ""


def _bytes_of_texts(file: BinaryIO, path: str) -> int:
    """Bytes of a column of strings with each counted as often as it stands, though it is stored once."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    column = pq.ParquetFile(file, read_dictionary=[path]).read(columns=[path]).column(0)
    total = 0
    for chunk in column.chunks:
        while pa.types.is_nested(chunk.type) and not pa.types.is_dictionary(chunk.type):
            chunk = chunk.flatten()
        if not pa.types.is_dictionary(chunk.type):
            return chunk.nbytes
        lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)  # pyright: ignore[reportAttributeAccessIssue]
        total += pc.sum(lengths.cast(pa.int64())).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]
    return total


def _unfit(table: pa.Table, kinds: Mapping[str, Kind]) -> Iterator[str]:
    """What is wrong with the columns of a table."""
    import pyarrow.compute as pc
    import pyarrow.types as of

    tests = {
        "text": _is_text,
        "number": lambda kind: of.is_floating(kind) or of.is_integer(kind),
        "integer": of.is_integer,
        "integers": lambda kind: of.is_list(kind) and of.is_integer(kind.value_type),
        "texts": lambda kind: of.is_list(kind) and _is_text(kind.value_type),
    }
    if len(set(table.column_names)) < len(table.column_names):
        yield "a column is there twice"
        return
    if missing := [name for name in kinds if name not in table.column_names]:
        yield f"it lacks the columns {', '.join(missing)}"
    for name in [name for name in kinds if name not in missing]:
        column, kind = table.column(name), kinds[name]
        if not tests[kind](column.type):
            yield f"column {name} must hold {_WORDS[kind]}, got {column.type}"
        elif kind != "number" and column.null_count:
            yield f"column {name} has {column.null_count} empty cells"
        elif kind in ("integers", "texts") and pc.list_flatten(column).null_count:  # pyright: ignore[reportAttributeAccessIssue]
            yield f"column {name} has lists with empty places"


def _with_numbers(table: pa.Table, kinds: Mapping[str, Kind]) -> pa.Table:
    """The table with NaN for numbers that an older version did not write, or that are all empty."""
    import pyarrow as pa

    for name in [name for name, kind in kinds.items() if kind == "number"]:
        nothing = pa.nulls(len(table), pa.float64())
        if name in table.column_names and pa.types.is_null(table.schema.field(name).type):
            table = table.set_column(table.column_names.index(name), name, nothing)
        elif name in LATER and name not in table.column_names:
            table = table.append_column(name, nothing)
    return table


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow.types as of

    return of.is_string(kind) or of.is_large_string(kind)
