"""Reading of local files and Hub data sets, and splitting."""

import csv
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from hf_xgrad.recipes.corpora import files as text_datasets
from hf_xgrad.recipes.corpora.files import Table, read_file, read_hub, split_table
from hf_xgrad.recipes.input_errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data"

# Text that formats like to spoil: missing values by another name, numbers, booleans, other alphabets, line separators.
TEXTS = ["NA", "null", "1e-5", "true", " two  spaces ", "naïve café 文", "a\u2028b\u0085c", "nan", "-"]
QUOTED = ['say "hi"', "one, two", '"', "it's"]
ROWS = [{"sentence": text, "label": str(row % 2)} for row, text in enumerate(TEXTS + QUOTED)]


def write_delimited(path: Path, rows: list[dict[str, str]], **dialect: Any) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **dialect)
        writer.writeheader()
        writer.writerows(rows)


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    write_delimited(path, rows)


def write_tsv(path: Path, rows: list[dict[str, str]]) -> None:
    write_delimited(path, rows, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")


def write_json(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], None]] = {
    "csv": write_csv,
    "tsv": write_tsv,
    "json": write_json,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


def table(**columns: list[Any]) -> Table:
    return Table("rows.csv", datasets.Dataset.from_dict(columns))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_back_what_was_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, ROWS)
    assert read_file(str(path)).data.to_list() == ROWS
    if kind != "parquet":
        packed = tmp_path / f"packed.{kind}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert read_file(str(packed)).data.to_list() == ROWS


@pytest.mark.parametrize("text", ["sentence,label\na,1\n", "sentence,label\r\na,1\r\n", "\n\nsentence,label\n\na,1"])
def test_line_ends_blank_lines_and_byte_order_marks_do_not_matter(tmp_path: Path, text: str) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "rows.csv").write_bytes(mark + text.encode())
        assert read_file(str(tmp_path / "rows.csv")).data.to_list() == [{"sentence": "a", "label": "1"}]


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"a": 1}\n\n{"a": 2, "b": "x"}\n')
    assert read_file(str(tmp_path / "rows.json")).data.to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


def test_json_columns_of_mixed_types_become_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": "x"}\n{"a": null}\n{"a": [2]}\n')
    assert read_file(str(tmp_path / "rows.jsonl")).data["a"][:] == ["1", "x", None, "[2]"]


MALFORMED = {
    "few.csv": (b"a,b\n1,2\n3\n", "line 3: 1 fields, but 2 columns"),
    "many.csv": (b"a,b\n1,2\n\n3,4,5\n", "line 4: 3 fields, but 2 columns"),
    "twice.csv": (b"a,a\n1,2\n", "line 1: column 'a' is there twice"),
    "quote.csv": (b'a,b\n1,"2\n3,4\n', "line 3: unexpected end of data"),
    "text.csv": (b"a,b\n1,2\n\xff,4\n", "line 3: not UTF-8 text"),
    "few.tsv": (b"a\tb\n1\t2\n3\n", "line 3: 1 fields, but 2 columns"),
    "quoted.tsv": (b'a\tb\n"1\t2\n3\n4"\t5\n', "line 3: 1 fields"),
    "empty.csv": (b"", "is empty"),
    "blank.jsonl": (b" \n\n", "is empty"),
    "header.csv": (b"a,b\n", "is empty: it has no rows"),
    "none.json": (b"[]", "is empty: it has no rows"),
    "bad.json": (b'[\n{"a": 1},\n{"a": }\n]', "line 3: Expecting value"),
    "rows.json": (b'[{"a": 1}, 2]', "row 2: not a JSON object"),
    "bad.jsonl": (b'{"a": 1}\n{"a": 2\n', "line 2: "),
    "list.jsonl": (b'{"a": 1}\n[2]\n', "line 2: not a JSON object"),
    "plain.csv.gz": (b"a,b\n1,2\n", "is not a whole gzip file"),
    "cut.csv.gz": (gzip.compress(b"a,b\n" + b"1,2\n" * 99)[:-9], "is not a whole gzip file"),
    "broken.jsonl.gz": (gzip.compress(b'{"a": 1}\n{"a": 2\n'), "line 2: "),
    "bad.parquet": (b"PAR1 it is not", "cannot read"),
    "rows.txt": (b"a\n", "unknown kind of file; readable are .csv, .tsv, .json, .jsonl"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_named_with_the_line(tmp_path: Path, name: str) -> None:
    content, named = MALFORMED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_file(str(tmp_path / name))
    assert name in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl.gz", "rows.parquet"])
def test_missing_files_and_folders_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match=rf"cannot read .*{name}: No such file"):
        read_file(str(path))
    path.mkdir()
    with pytest.raises(InputError, match=name):
        read_file(str(path))


def test_missing_columns_list_those_that_are_there() -> None:
    with pytest.raises(InputError, match="has no column 'sentense'; its columns are sentence, label; did you mean"):
        table(sentence=["a"], label=[1]).require("sentense")


def test_texts_are_checked_row_by_row() -> None:
    table(sentence=["a", ""]).check_text("sentence")
    with pytest.raises(InputError, match=r"rows\.csv, row 2: column 'sentence' is missing"):
        table(sentence=["a", None]).check_text("sentence")
    with pytest.raises(InputError, match="row 1: column 'sentence' holds 3, not text"):
        table(sentence=[3]).check_text("sentence")


def test_values_of_a_label_class_are_its_names() -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"label": [1, 0, -1]}, features=features)
    assert Table("hub", data).values("label") == ["yes", "no", None]


def test_head() -> None:
    assert table(a=[1, 2, 3]).head(2).data["a"][:] == [1, 2]
    assert table(a=[1, 2, 3]).head(None).data["a"][:] == [1, 2, 3]
    assert table(a=[1, 2, 3]).head(9).data["a"][:] == [1, 2, 3]


LABELS = [0] * 70 + [1] * 30


def test_a_split_divides_the_rows_and_keeps_the_shares() -> None:
    kept, out, stratified = split_table(table(row=list(range(100)), label=LABELS), 10, 0, LABELS)
    assert stratified
    assert sorted([*kept.data["row"], *out.data["row"]]) == list(range(100))
    assert Counter(out.data["label"]) == {0: 7, 1: 3}


def test_a_split_depends_on_its_seed_only() -> None:
    rows = table(row=list(range(100)))
    held_out = [split_table(rows, 20, seed, LABELS)[1].data["row"][:] for seed in (1, 1, 2)]
    assert held_out[0] == held_out[1] != held_out[2]


@pytest.mark.parametrize("labels", [None, [0] * 99 + [1], list(range(50)) * 2], ids=["scores", "single", "many"])
def test_a_split_that_cannot_be_stratified(labels: list[int] | None) -> None:
    kept, out, stratified = split_table(table(row=list(range(100))), 10, 0, labels)
    assert not stratified
    assert (len(kept.data), len(out.data)) == (90, 10)


def test_too_few_rows_to_split() -> None:
    with pytest.raises(InputError, match=r"rows\.csv: 4 rows are too few to hold 10 % of them out"):
        split_table(table(row=[1, 2, 3, 4]), 10, 0, None)


def test_a_folder_is_loaded_as_from_the_hub(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "validation.jsonl", ROWS[:2])
    splits = read_hub(str(tmp_path), None, str(tmp_path / "cache"), None)
    assert splits.keys() == {"train", "validation"}
    assert splits["validation"].data.to_list() == ROWS[:2]
    assert splits["train"].source == f"{tmp_path}, split train"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach\n the Hub"),
        ValueError("BuilderConfig 'x' not found"),
        datasets.exceptions.DatasetNotFoundError("no such data set"),
    ],
)
def test_what_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(text_datasets.datasets, "load_dataset", load)
    with pytest.raises(InputError, match=r"cannot load data set some/name \(part\): ") as caught:
        read_hub("some/name", "part", None, None)
    assert "\n" not in str(caught.value)


# Rows and labels that ../shared/data/README.md gives for each file.
REAL = {
    "cola/train": {0: 2528, 1: 6023},
    "cola/validation": {0: 322, 1: 721},
    "mrpc/train": {0: 1194, 1: 2474},
    "mrpc/validation": {0: 129, 1: 279},
    "mrpc/test": {0: 578, 1: 1147},
    "sst2/train": {0: 29780, 1: 37569},
    "sst2/validation": {0: 428, 1: 444},
    "sst2/test": {0: 912, 1: 909},
}


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data: {os.path.relpath(SHARED)} is not there")
@pytest.mark.parametrize("name", REAL)
def test_real_data_are_read_whole(name: str) -> None:
    real = read_file(str(SHARED / f"{name}.jsonl.gz"))
    assert Counter(real.values("label")) == REAL[name]
    for column in real.data.column_names:
        if column.startswith("sentence"):
            real.check_text(column)
