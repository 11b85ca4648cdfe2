"""Reads files and data sets of the Hub, row by row; what cannot be read is named in one line: the file and the row.

Text stays text: in a .csv or .tsv file no cell is taken for a number or a missing value ("NA" is a word here). A .tsv
file has no quoting, which is the format's definition and how GLUE's own files are written; a .csv file has.
"""

import csv
import gzip
import json
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, Features, IterableDataset, Value
from sklearn.model_selection import train_test_split

from hf_xgrad.recipes.input_errors import InputError, describe_choices, one_line

Row = dict[str, Any]
# OSError covers requests' and httpx's connection errors, missing files and a missing data set alike.
UNREADABLE = (OSError, ValueError, EOFError, zlib.error, datasets.exceptions.DatasetsError, pa.ArrowException)


def find_files(path: str) -> list[str]:
    """Return the file, or those of a folder and of the folders in it, which are of one kind; hidden ones left out."""
    if not Path(path).is_dir():
        _suffix(path)
        return [path]
    inside = (file.relative_to(path) for file in sorted(Path(path).rglob("*")) if file.is_file())
    shown = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
    files = {str(Path(path, file)): suffix for file in shown if (suffix := _suffix_of(file.name)) in _READERS}
    if not files:
        raise InputError(f"{path} has no files that can be read ({KINDS})")
    if len(suffixes := sorted(set(files.values()))) > 1:
        raise InputError(f"{path} holds files of several kinds, {', '.join(suffixes)}: give one kind a folder")
    return list(files)


# Not datasets.load_dataset: it names neither row nor file of a fault, fills up short rows of a .csv, makes dates of
# JSON's texts, and wants the same columns in all files of a folder, used or not.
def read_rows(file: str, columns: Sequence[str] | None = None, *, keep_linebreaks: bool = False) -> Iterator[Row]:
    """Return the rows of a file; of a .parquet the `columns` alone have values."""
    rows = _READERS[_suffix(file)](file, columns)
    if _suffix(file) == ".txt" and not keep_linebreaks:
        return ({"text": row["text"].removesuffix("\n")} for row in rows)
    return rows


def column_names(source: str, rows: Iterable[Row]) -> list[str]:
    """Return the columns of the first row."""
    row = next(iter(rows), None)
    if row is None:
        raise InputError(f"{source} is empty: it has no rows")
    return list(row)


def check_rows(source: str, rows: Iterable[Row], texts: Sequence[str], *others: str) -> Iterator[Row]:
    """Return each row with these columns; raise an error unless it has all of them, and text in `texts`."""
    for number, row in enumerate(rows, start=1):
        for column in (*texts, *others):
            if column not in row:
                close = describe_choices(column, list(row))
                place = source if number == 1 else f"{source}, row {number}"
                raise InputError(f"{place} has no column {column!r}; its columns are {', '.join(row)}{close}")
        for column in texts:
            _check_text(f"{source}, row {number}: column {column!r}", row[column])
        yield {column: row[column] for column in (*texts, *others)}


def texts_of_files(
    files: Sequence[str], column: str, *, keep_linebreaks: bool, streaming: bool, cache_dir: str | None
) -> Dataset | IterableDataset:
    """Return one column of files, checked: kept on disk or, with `streaming`, read in passing."""
    # What is on disk is found again by these settings: size and time tell a file that was written anew.
    stamped = [(file, *_stamp(file)) for file in files]
    settings = {"files": stamped, "column": column, "keep_linebreaks": keep_linebreaks}
    features = Features({column: Value("string")})
    if streaming:
        return IterableDataset.from_generator(_texts, features=features, gen_kwargs=settings)
    try:
        return Dataset.from_generator(_texts, features=features, cache_dir=cache_dir, gen_kwargs=settings)
    except UNREADABLE as error:
        # `datasets` wraps what went wrong in an error that says only that something did.
        cause = error.__cause__ or error
        wrong = f"cannot read {files[0]}: {one_line(cause)}"
        raise (cause if isinstance(cause, InputError) else InputError(wrong)) from None


def load_splits(name: str, config: str | None, **settings: Any) -> tuple[str, dict[str, Any]]:
    """Load a data set by its name on the Hub (or from a folder of splits); return what to call it, and its splits."""
    called = f"{name} ({config})" if config else name
    try:
        return called, dict(datasets.load_dataset(name, config, **settings))
    except UNREADABLE as error:
        raise InputError(f"cannot load data set {called}: {one_line(error.__cause__ or error)}") from error


def split_rows(
    source: str, data: Dataset, percentage: int, seed: int, strata: Sequence[int] | None
) -> tuple[Dataset, Dataset, bool]:
    """Divide rows at random; return the larger part, the smaller one, and whether each stratum went into both.

    `strata` gives the class of each row; where a class is too small to be divided, the split is not stratified.
    """
    held_out = round(len(data) * percentage / 100)
    if not 0 < held_out < len(data):
        raise InputError(f"{source}: {len(data)} rows are too few to hold {percentage} % of them out for validation")
    stratified = strata is not None and _can_stratify(strata, held_out)
    # Not Dataset.train_test_split: with the same seed it holds out other rows, and so gives other losses.
    kept, out = train_test_split(
        np.arange(len(data)), test_size=held_out, random_state=seed, stratify=strata if stratified else None
    )
    return data.select(kept), data.select(out), stratified


def _can_stratify(strata: Sequence[int], held_out: int) -> bool:
    sizes = np.unique(np.asarray(strata), return_counts=True)[1]
    return bool(sizes.min() >= 2 and len(sizes) <= held_out and len(sizes) <= len(strata) - held_out)


def _suffix_of(name: str) -> str:
    plain = Path(name.lower().removesuffix(".gz")).suffix
    return plain + ".gz" if plain == ".parquet" and name.lower().endswith(".gz") else plain


def _suffix(file: str) -> str:
    if (suffix := _suffix_of(file)) not in _READERS:
        raise InputError(f"{file}: unknown kind of file; readable are {KINDS}")
    return suffix


def _stamp(file: str) -> tuple[int, int]:
    try:
        found = Path(file).stat()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def _texts(files: list[tuple[str, int, int]], column: str, keep_linebreaks: bool) -> Iterator[Row]:
    for file, *_ in files:
        yield from check_rows(file, read_rows(file, [column], keep_linebreaks=keep_linebreaks), [column])


def _check_text(called: str, value: Any) -> None:
    if value is None:
        raise InputError(f"{called} is missing")
    if not isinstance(value, str):
        raise InputError(f"{called} holds {reprlib.repr(value)}, not text")
    if not _is_utf8(value):
        raise InputError(f"{called} holds half of a surrogate pair, which is no character: {reprlib.repr(value)}")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(file: str, newline: str | None = None) -> Iterator[str]:
    """Return the lines of a file, packed or not, without a byte order mark."""
    opened = gzip.open if file.lower().endswith(".gz") else open
    try:
        # The bytes that are no UTF-8 come as halves of surrogate pairs, and so in their line.
        with opened(file, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline) as lines:
            for number, line in enumerate(lines, start=1):
                if not _is_utf8(line):
                    raise InputError(f"{file}, line {number}: not UTF-8 text")
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file} is not a whole gzip file: {one_line(error)}") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def _read_txt(file: str, _: Sequence[str] | None) -> Iterator[Row]:
    return ({"text": line} for line in _lines(file))


def _read_csv(file: str, columns: Sequence[str] | None) -> Iterator[Row]:
    return _read_delimited(file, columns, "; texts with a comma need quotes", delimiter=",", strict=True)


def _read_tsv(file: str, columns: Sequence[str] | None) -> Iterator[Row]:
    return _read_delimited(file, columns, "", delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(file: str, columns: Sequence[str] | None, hint: str, **dialect: Any) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_lines(file, newline=""), **dialect)
    try:
        header = next(filter(None, reader), [])
        for name in columns or ():
            if header.count(name) > 1:
                raise InputError(f"{file}, line {reader.line_num}: column {name!r} is there twice")
        for cells in filter(None, reader):
            if len(cells) != len(header):
                wrong = f"{len(cells)} fields, but {len(header)} columns{hint}"
                raise InputError(f"{file}, line {reader.line_num}: {wrong}")
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: {error}") from error


def _read_json(file: str, _: Sequence[str] | None) -> Iterator[Row]:
    lines = ((number, line) for number, line in enumerate(_lines(file), start=1) if line.strip())
    first, line = next(lines, (1, ""))
    if line.lstrip().startswith("["):
        everything = "".join(_lines(file))
        rows = ((f"row {row}", value) for row, value in enumerate(_parse(file, 1, everything), start=1))
    else:
        # An iterator that is empty where the file is.
        left = chain([(first, line)] if line else [], lines)
        rows = ((f"line {number}", _parse(file, number, text.rstrip())) for number, text in left)
    for place, value in rows:
        if not isinstance(value, dict):
            raise InputError(f"{file}, {place}: not a JSON object ({{name: value, ...}})")
        yield value


def _parse(file: str, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}"
        raise InputError(f"{file}, {place}: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise InputError(f"{file}, line {line}: brackets are nested too deeply") from error
    except ValueError as error:
        # A number of thousands of digits.
        raise InputError(f"{file}, line {line}: {one_line(error)}") from error


def _read_parquet(file: str, columns: Sequence[str] | None) -> Iterator[Row]:
    try:
        with open(file, "rb") as opened, pyarrow.parquet.ParquetFile(opened) as table:
            names = table.schema_arrow.names
            if columns is None or not set(columns) <= set(names):
                # Somebody wants to know what columns there are.
                yield from repeat(dict.fromkeys(names), table.metadata.num_rows)
                return
            for batch in table.iter_batches(columns=list(columns)):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot read {file}: {one_line(getattr(error, 'strerror', None) or error)}") from error


_READERS: dict[str, Callable[[str, Sequence[str] | None], Iterator[Row]]] = {
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
KINDS = ", ".join(_READERS) + " (each but .parquet also .gz)"
