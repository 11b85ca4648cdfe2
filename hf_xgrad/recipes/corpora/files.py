"""Reads local files and Hub data sets into `datasets.Dataset`; what cannot be read is named in one line.

Text stays text: in a .csv or .tsv file no cell is taken for a number or a missing value ("NA" is a word here). A .tsv
file has no quoting, which is the format's definition and how GLUE's own files are written; a .csv file has.
"""

import csv
import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from sklearn.model_selection import train_test_split

from hf_xgrad.recipes.input_errors import InputError, describe_choices, one_line

Columns = dict[str, list[Any]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one source; `source` is what to call it in an error."""

    source: str
    data: datasets.Dataset

    def require(self, column: str) -> str:
        """Return `column` if it is there, or else raise an error which lists the columns that are."""
        names = self.data.column_names
        if column not in names:
            close = describe_choices(column, names)
            raise InputError(f"{self.source} has no column {column!r}; its columns are {', '.join(names)}{close}")
        return column

    def check_text(self, column: str) -> None:
        """Raise an error unless each row has text in `column`."""
        feature = self.data.features[self.require(column)]
        for row, value in enumerate(self.data[column], start=1):
            if value is None:
                raise InputError(f"{self.source}, row {row}: column {column!r} is missing")
            if not isinstance(value, str):
                raise InputError(f"{self.source}, row {row}: column {column!r} holds {value!r}, not text ({feature})")

    def values(self, column: str) -> list[Any]:
        """Return a column; a label class of the Hub as its name, an unknown one (-1) as None."""
        values = self.data[self.require(column)][:]
        feature = self.data.features[column]
        if isinstance(feature, datasets.ClassLabel):
            return [feature.names[value] if value is not None and value >= 0 else None for value in values]
        return list(values)

    def head(self, count: int | None) -> "Table":
        """Return the first `count` rows, or all of them."""
        if count is None or count >= len(self.data):
            return self
        return dataclasses.replace(self, data=self.data.select(range(count)))


def read_file(path: str) -> Table:
    """Read a .csv, .tsv, .json, .jsonl (each also .gz) or .parquet file."""
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    if path.lower().endswith(".parquet"):
        return _checked(Table(path, datasets.Dataset(_read_parquet(path))))
    if suffix not in _READERS:
        kinds = ", ".join(_READERS)
        raise InputError(f"{path}: unknown kind of file; readable are {kinds} (each also .gz) and .parquet")
    text = _decode(_read_bytes(path), path)
    if not text.strip():
        raise InputError(f"{path} is empty")
    columns = _READERS[suffix](text, path)
    arrays = {name: _to_arrow(values) for name, values in columns.items()}
    return _checked(Table(path, datasets.Dataset(pa.table(arrays))))


def read_hub(name: str, config: str | None, cache_dir: str | None, token: str | None) -> dict[str, Table]:
    """Load a data set by its name on the Hub (or from a folder of files) and return its splits."""
    called = f"{name} ({config})" if config else name
    try:
        splits = datasets.load_dataset(name, config, cache_dir=cache_dir, token=token)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # OSError covers requests' and httpx's connection errors, missing files and a missing data set alike.
        raise InputError(f"cannot load data set {called}: {one_line(error)}") from error
    return {split: _checked(Table(f"{called}, split {split}", data)) for split, data in splits.items()}


def split_table(table: Table, percentage: int, seed: int, strata: Sequence[int] | None) -> tuple[Table, Table, bool]:
    """Divide a table at random; return the larger part, the smaller one, and whether each stratum went into both.

    `strata` gives the class of each row; where a class is too small to be divided, the split is not stratified.
    """
    count = len(table.data)
    held_out = round(count * percentage / 100)
    if not 0 < held_out < count:
        raise InputError(f"{table.source}: {count} rows are too few to hold {percentage} % of them out for validation")
    stratified = strata is not None and _can_stratify(strata, held_out)
    kept, out = train_test_split(
        np.arange(count), test_size=held_out, random_state=seed, stratify=strata if stratified else None
    )
    return (
        dataclasses.replace(table, data=table.data.select(kept)),
        dataclasses.replace(table, data=table.data.select(out)),
        stratified,
    )


def _can_stratify(strata: Sequence[int], held_out: int) -> bool:
    sizes = np.unique(np.asarray(strata), return_counts=True)[1]
    return bool(sizes.min() >= 2 and len(sizes) <= held_out and len(sizes) <= len(strata) - held_out)


def _checked(table: Table) -> Table:
    if len(table.data) == 0:
        raise InputError(f"{table.source} is empty: it has no rows")
    return table


def _read_bytes(path: str) -> bytes:
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not path.lower().endswith(".gz"):
        return raw
    try:
        return gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file: {one_line(error)}") from error


def _decode(raw: bytes, path: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text") from error


def _read_csv(text: str, path: str) -> Columns:
    return _read_delimited(text, path, delimiter=",", strict=True)


def _read_tsv(text: str, path: str) -> Columns:
    return _read_delimited(text, path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(text: str, path: str, **dialect: Any) -> Columns:
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    try:
        header = next(row for row in reader if row)
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise InputError(f"{path}, line {reader.line_num}: column {twice!r} is there twice")
        rows: list[list[str]] = []
        for row in reader:
            if row and len(row) != len(header):
                raise InputError(f"{path}, line {reader.line_num}: {len(row)} fields, but {len(header)} columns")
            if row:
                rows.append(row)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error
    return {name: [row[position] for row in rows] for position, name in enumerate(header)}


def _read_json(text: str, path: str) -> Columns:
    if not text.lstrip().startswith("["):
        return _read_json_lines(text, path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from error
    return _to_columns(((f"row {number}", row) for number, row in enumerate(rows, start=1)), path)


def _read_json_lines(text: str, path: str) -> Columns:
    def parsed() -> Iterator[tuple[str, Any]]:
        # Not splitlines(): that also breaks at characters such as U+2028, which JSON allows within a string.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}, line {number}: {error.msg} (column {error.colno})") from error

    return _to_columns(parsed(), path)


def _to_columns(rows: Iterator[tuple[str, Any]], path: str) -> Columns:
    columns: Columns = {}
    for count, (place, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}, {place}: not a JSON object ({{name: value, ...}})")
        for name in row:
            columns.setdefault(name, [None] * count)
        for name, values in columns.items():
            values.append(row.get(name))
    return columns


def _to_arrow(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        # Numbers and text in one column: legal in JSON, not in Arrow.
        return pa.array([value if isinstance(value, str | None) else json.dumps(value) for value in values])


def _read_parquet(path: str) -> pa.Table:
    raw = _read_bytes(path)
    try:
        return pyarrow.parquet.read_table(pa.BufferReader(raw))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from error


_READERS: dict[str, Callable[[str, str], Columns]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
}
