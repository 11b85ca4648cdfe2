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

from hf_xgrad.recipes.corpora.files import check_rows, column_names, load_splits, read_rows, split_rows
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


def read(path: Path, *columns: str) -> list[dict[str, Any]]:
    return list(check_rows(str(path), read_rows(str(path), columns), (), *columns))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_back_what_was_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, ROWS)
    assert read(path, "sentence", "label") == ROWS
    assert column_names("rows", read_rows(str(path))) == ["sentence", "label"]
    if kind != "parquet":
        packed = tmp_path / f"packed.{kind}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert read(packed, "sentence", "label") == ROWS


@pytest.mark.parametrize("text", ["sentence,label\na,1\n", "sentence,label\r\na,1\r\n", "\n\nsentence,label\n\na,1"])
def test_line_ends_blank_lines_and_byte_order_marks_do_not_matter(tmp_path: Path, text: str) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        for kind, content in (("csv", text), ("tsv", text.replace(",", "\t"))):
            (tmp_path / f"rows.{kind}").write_bytes(mark + content.encode())
            assert read(tmp_path / f"rows.{kind}", "sentence", "label") == [{"sentence": "a", "label": "1"}]


@pytest.mark.parametrize(
    "content", ['{"a": "x"}\n', '[{"a": "x"}]', "a\nx\n", "x\n"], ids=["jsonl", "json", "csv", "txt"]
)
def test_a_byte_order_mark_is_no_part_of_any_file(
    tmp_path: Path, content: str, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / f"rows.{request.node.callspec.id}.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + content.encode()))
    column = "text" if ".txt" in path.name else "a"
    assert read(path, column) == [{column: "x"}]


def test_json_lines_may_be_called_json_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"a": 1}\n\n{"a": 2, "b": "x"}\n')
    (tmp_path / "rows.jsonl").write_text('\n [{"a": 1},\n{"a": 2}]\n')
    for name in ("rows.json", "rows.jsonl"):
        assert read(tmp_path / name, "a") == [{"a": 1}, {"a": 2}]


def test_values_of_json_stay_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": "2021-03-01"}\n{"a": null}\n{"a": [2]}\n{"a": 1e3}\n')
    assert [row["a"] for row in read(path, "a")] == [1, "2021-03-01", None, [2], 1000.0]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_field_may_be_long(tmp_path: Path, kind: str) -> None:
    rows = [{"sentence": "a" * 200_000, "label": "0"}]
    WRITERS[kind](tmp_path / f"rows.{kind}", rows)
    assert read(tmp_path / f"rows.{kind}", "sentence", "label") == rows


def test_columns_that_are_not_used_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(",,text\n0,1,a\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "odd": "\\ud800"}\n{"text": "b", "odd": {"x": [1, "y"]}}\n')
    pyarrow.parquet.write_table(
        pa.table({"odd": pa.array([b"\xff"]), "text": ["a"], "time": pa.array([2**62], pa.timestamp("us"))}),
        tmp_path / "rows.parquet",
    )
    for name, texts in (("rows.csv", ["a"]), ("rows.jsonl", ["a", "b"]), ("rows.parquet", ["a"])):
        assert [row["text"] for row in read(tmp_path / name, "text")] == texts
        assert "text" in column_names(name, read_rows(str(tmp_path / name)))


def read_all(path: Path) -> None:
    column_names(str(path), read_rows(str(path)))
    read(path, "a")


MALFORMED = {
    "few.csv": (b"a,b\n1,2\n3\n", "line 3: 1 fields, but 2 columns"),
    "many.csv": (b"a,b\n1,2\n\n3,4,5\n", "line 4: 3 fields, but 2 columns"),
    "twice.csv": (b"a,a\n1,2\n", "line 1: column 'a' is there twice"),
    "quote.csv": (b'a,b\n1,"2\n3,4\n', "line 3: unexpected end of data"),
    "text.csv": (b"a,b\n1,2\n\xff,4\n", "line 3: not UTF-8 text"),
    "few.tsv": (b"a\tb\n1\t2\n3\n", "line 3: 1 fields, but 2 columns"),
    "quoted.tsv": (b'a\tb\n"1\t2\n3\n4"\t5\n', "line 3: 1 fields"),
    "empty.csv": (b"", "is empty: it has no rows"),
    "blank.jsonl": (b" \n\n", "is empty: it has no rows"),
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
    "deep.jsonl": (b'{"a": 1}\n{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 2: brackets are nested too"),
    "deep.json": (b'[{"a": ' + b"[" * 100_000, "line 1: brackets are nested too"),
    "digits.jsonl": (b'{"a": ' + b"1" * 9999 + b"}\n", "line 1: Exceeds the limit"),
    "utf-16.txt": ("text\n".encode("utf-16"), "line 1: not UTF-8 text"),
    "rows.xlsx": (b"a\n", "unknown kind of file; readable are .txt, .csv, .tsv, .json, .jsonl"),
    "rows.parquet.gz": (b"a\n", "unknown kind of file"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_named_with_the_line(tmp_path: Path, name: str) -> None:
    content, named = MALFORMED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_all(tmp_path / name)
    assert name in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl.gz", "rows.parquet"])
def test_missing_files_and_folders_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match=rf"cannot read .*{name}: No such file"):
        next(read_rows(str(path)))
    path.mkdir()
    with pytest.raises(InputError, match=name):
        next(read_rows(str(path)))


def test_missing_columns_list_those_that_are_there() -> None:
    rows = [{"sentence": "a", "label": 1}, {"label": 1}]
    with pytest.raises(
        InputError, match=r"^a\.csv has no column 'sentense'; its columns are sentence, label; did you m"
    ):
        list(check_rows("a.csv", rows, ["sentense"]))
    with pytest.raises(InputError, match=r"^a\.csv, row 2 has no column 'sentence'; its columns are label$"):
        list(check_rows("a.csv", rows, [], "sentence"))


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        (None, "is missing"),
        (3, "holds 3, not text"),
        (["a"], r"holds \['a'\], not text"),
        (b"a", "holds b'a', not text"),
        ("\ud83d", r"holds half of a surrogate pair, which is no character: '\\ud83d'"),
    ],
)
def test_texts_are_checked_row_by_row(value: Any, wrong: str) -> None:
    rows = [{"sentence": "a"}, {"sentence": ""}, {"sentence": value}]
    with pytest.raises(InputError, match=rf"^a\.csv, row 3: column 'sentence' {wrong}$"):
        list(check_rows("a.csv", rows, ["sentence"]))
    assert list(check_rows("a.csv", rows[:2], ["sentence"])) == rows[:2]


LABELS = [0] * 70 + [1] * 30
HUNDRED = datasets.Dataset.from_dict({"row": list(range(100))})


def test_a_split_divides_the_rows_and_keeps_the_shares() -> None:
    kept, out, stratified = split_rows("rows.csv", HUNDRED.add_column("label", LABELS), 10, 0, LABELS)
    assert stratified
    assert sorted([*kept["row"], *out["row"]]) == list(range(100))
    assert Counter(out["label"]) == {0: 7, 1: 3}


def test_a_split_depends_on_its_seed_only() -> None:
    held_out = [split_rows("rows.csv", HUNDRED, 20, seed, LABELS)[1]["row"][:] for seed in (1, 1, 2)]
    assert held_out[0] == held_out[1] != held_out[2]


def test_a_split_by_datasets_would_hold_out_other_rows() -> None:
    """Whoever gives the split to the library changes all losses."""
    labelled = HUNDRED.add_column("label", LABELS).class_encode_column("label")
    ours = split_rows("rows.csv", HUNDRED, 20, 1, LABELS)[1]["row"][:]
    theirs = labelled.train_test_split(0.2, stratify_by_column="label", seed=1)["test"]["row"][:]
    assert sorted(ours) != sorted(theirs)


@pytest.mark.parametrize("labels", [None, [0] * 99 + [1], list(range(50)) * 2], ids=["scores", "single", "many"])
def test_a_split_that_cannot_be_stratified(labels: list[int] | None) -> None:
    kept, out, stratified = split_rows("rows.csv", HUNDRED, 10, 0, labels)
    assert not stratified
    assert (len(kept), len(out)) == (90, 10)


def test_too_few_rows_to_split() -> None:
    with pytest.raises(InputError, match=r"rows\.csv: 4 rows are too few to hold 10 % of them out"):
        split_rows("rows.csv", HUNDRED.take(4), 10, 0, None)


def test_a_folder_is_loaded_as_from_the_hub(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "validation.jsonl", ROWS[:2])
    called, splits = load_splits(str(tmp_path), None, cache_dir=str(tmp_path / "cache"), token=None)
    assert called == str(tmp_path)
    assert splits.keys() == {"train", "validation"}
    assert splits["validation"].to_list() == ROWS[:2]


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

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=r"cannot load data set some/name \(part\): ") as caught:
        load_splits("some/name", "part")
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
    path = SHARED / f"{name}.jsonl.gz"
    columns = column_names(name, read_rows(str(path)))
    texts = [column for column in columns if column.startswith("sentence")]
    assert Counter(row["label"] for row in check_rows(name, read_rows(str(path)), texts, "label")) == REAL[name]


# What is told in corpora/files.py of the readers of `datasets`. Where one of these fails, the library may do.


def loaded(tmp_path: Path, kind: str, **files: str) -> list[Any]:
    for name, content in files.items():
        (tmp_path / f"{name}.{kind}").write_text(content)
    names = [str(tmp_path / f"{name}.{kind}") for name in files]
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset(kind, data_files=names, split="train", cache_dir=cache)
    assert isinstance(found, datasets.Dataset)
    return found.to_list()


def test_what_datasets_would_make_of_the_files(tmp_path: Path) -> None:
    assert loaded(tmp_path, "csv", a="text,id\nb\n")[0]["text"] == "b"  # a row that is too short
    assert loaded(tmp_path, "json", b='{"text": "2021-03-01"}\n')[0]["text"] != "2021-03-01"
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        loaded(tmp_path, "json", c='{"text": "a"}\n', d='{"text": "a", "id": 1}\n')
