"""Texts of every kind of file, what is held out of them, and the blocks that they are cut into."""

import csv
import gzip
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from torch.utils.data import DataLoader
from transformers import BertTokenizer, PreTrainedTokenizerFast

from hf_xgrad.recipes.input_errors import InputError
from hf_xgrad.recipes.language import data as language_data
from hf_xgrad.recipes.language.data import (
    NO_WORD,
    BlockCutter,
    LanguageDataArguments,
    Texts,
    make_blocks,
    read_texts,
    texts_from,
)
from hf_xgrad.recipes.language.tokenizer import train_tokenizer

# Text that formats like to spoil: missing values by another name, numbers, booleans, other alphabets, line separators.
LINES = ["NA", "null", "1e-5", "true", "", " two  spaces ", "naïve café 文", "a\u2028b\u0085c", "nan", "-", "007"]
QUOTED = ['say "hi"', "one, two", '"', "it's", "two\nlines"]
WORDS = ["Alan", "saw", "the", "unbelievable", "文", "123", "don't", "—", "\n", "  ", "<|mask|>"]


@pytest.fixture(scope="module")
def masked() -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join(WORDS[:3]) * 3], 290, masked=True, model_max_length=10**6)


@pytest.fixture(scope="module")
def causal() -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join(WORDS[:3]) * 3], 290, masked=False, model_max_length=10**6)


def random_texts(seed: int) -> list[str]:
    """Return up to 20 texts of up to 12 words, some without any."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(13))) for _ in range(1 + draw.randrange(20))]


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], special: bool = False) -> list[int]:
    """Return the tokens of the texts, one text at a time."""
    return list(chain.from_iterable(tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts))


# Blocks


@pytest.mark.parametrize("seed", range(12))
def test_causal_blocks_are_the_tokens_in_order(
    causal: PreTrainedTokenizerFast, masked: PreTrainedTokenizerFast, seed: int
) -> None:
    texts, size = random_texts(seed), 2 + seed % 7
    for tokenizer in (causal, masked):
        blocks = BlockCutter(tokenizer, "text", size)({"text": texts})
        assert blocks.keys() == {"input_ids"}
        tokens = tokens_of(tokenizer, texts, special=True)
        # Nothing can be predicted from a last token that is alone.
        kept = tokens[:-1] if len(tokens) % size == 1 else tokens
        assert list(chain(*blocks["input_ids"])) == kept
        assert all(len(block) == size for block in blocks["input_ids"][:-1])
        assert all(1 < len(block) <= size for block in blocks["input_ids"])


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_masked_blocks_stand_between_special_tokens(
    masked: PreTrainedTokenizerFast, seed: int, whole_words: bool
) -> None:
    texts, size = random_texts(seed), 4 + seed
    cutter = BlockCutter(masked, "text", size, masked=True, whole_words=whole_words)
    blocks = cutter({"text": texts})
    inner = [block[1:-1] for block in blocks["input_ids"]]
    assert list(chain(*inner)) == tokens_of(masked, texts)
    assert all(len(block) == size - 2 for block in inner[:-1])
    assert all(0 < len(block) <= size - 2 for block in inner)
    assert {(block[0], block[-1]) for block in blocks["input_ids"]} <= {(masked.cls_token_id, masked.sep_token_id)}
    assert {(words[0], words[-1]) for words in blocks["word_ids"]} <= {(NO_WORD, NO_WORD)}
    assert list(map(len, blocks["word_ids"])) == list(map(len, blocks["input_ids"]))
    numbers = list(chain(*(words[1:-1] for words in blocks["word_ids"])))
    assert NO_WORD not in numbers
    assert same_groups(numbers, words_one_by_one(masked, texts, whole_words))


def words_one_by_one(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], whole: bool) -> list[Any]:
    """Return what word each token belongs to: a text and a number, or the token's own place."""
    words: list[Any] = []
    for number, text in enumerate(texts):
        for word in tokenizer(text, add_special_tokens=False).word_ids():
            words.append((number, word) if whole else len(words))
    return words


def same_groups(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether both number the same things alike, if by other numbers."""
    pairs = set(zip(one, other, strict=True))
    return len(pairs) == len(set(one)) == len(set(other))


def test_a_word_of_several_tokens_is_one(masked: PreTrainedTokenizerFast) -> None:
    cutter = BlockCutter(masked, "text", 16, masked=True, whole_words=True)
    words = cutter({"text": ["文文 a", "b"]})["word_ids"][0]
    tokens = [len(masked(text, add_special_tokens=False)["input_ids"]) for text in ("文文", " a", "b")]
    assert tokens[0] > 3
    assert words == [NO_WORD, *[0] * tokens[0], *[1] * tokens[1], 2, NO_WORD]


def test_each_line_is_a_row(masked: PreTrainedTokenizerFast) -> None:
    texts = ["the saw\n", "\n", " \t\n", "  Alan saw the unbelievable thing \n", "x"]
    rows = BlockCutter(masked, "text", 8, masked=True, by_line=True)({"text": texts})
    tokens = [tokens_of(masked, [text]) for text in ("the saw", "Alan saw the unbelievable thing", "x")]
    assert rows["input_ids"] == [[masked.cls_token_id, *row[:6], masked.sep_token_id] for row in tokens]
    assert [len(words) for words in rows["word_ids"]] == [len(row) for row in rows["input_ids"]]


@pytest.mark.parametrize("by_line", [False, True])
def test_texts_without_tokens_make_no_rows(masked: PreTrainedTokenizerFast, by_line: bool) -> None:
    cutter = BlockCutter(masked, "text", 8, masked=True, by_line=by_line)
    assert cutter({"text": [""] if not by_line else [" ", "\n"]}) == {"input_ids": [], "word_ids": []}


def test_rows_without_room_for_a_token_to_predict(
    masked: PreTrainedTokenizerFast, causal: PreTrainedTokenizerFast
) -> None:
    for tokenizer, kind, least in ((masked, True, 3), (causal, False, 2)):
        BlockCutter(tokenizer, "text", least, masked=kind)
        with pytest.raises(InputError, match=f"rows of {least - 1} tokens, as the model takes them, have none"):
            BlockCutter(tokenizer, "text", least - 1, masked=kind)


def test_whole_words_of_a_tokenizer_that_does_not_tell_them(tmp_path: Path) -> None:
    class Slow(BertTokenizer):
        is_fast = False

    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(InputError, match="--whole_word_masking needs a fast tokenizer; Slow does not tell words"):
        BlockCutter(Slow(str(tmp_path / "vocab.txt")), "text", 8, masked=True, whole_words=True)


def rows_of(data: language_data.TextData) -> list[dict[str, Any]]:
    return [dict(row) for row in data]


def blocks_of(texts: Texts, cutter: BlockCutter, **settings: Any) -> list[dict[str, Any]]:
    arguments = LanguageDataArguments(train_file="x", **settings)
    return rows_of(make_blocks(texts, cutter, arguments, seed=0)["train"])


def stored(path: Path, lines: Sequence[str], streaming: bool = False, **settings: Any) -> Texts:
    """Return texts that were written to a file and read from it."""
    path.write_text("".join(lines), encoding="utf-8")
    arguments = LanguageDataArguments(train_file=str(path), streaming=streaming, **settings)
    return read(arguments, path.parent / "cache", do_eval=False)


def read(arguments: LanguageDataArguments, cache: Path, *, do_train: bool = True, do_eval: bool = True) -> Texts:
    return read_texts(arguments, do_train=do_train, do_eval=do_eval, hub={"cache_dir": str(cache), "token": None})


def test_nothing_is_lost_whatever_the_batches_processes_and_streaming(
    tmp_path: Path, causal: PreTrainedTokenizerFast
) -> None:
    lines = [f"{number} saw the {number % 7}\n" for number in range(2500)]
    texts, cutter = stored(tmp_path / "a.txt", lines), BlockCutter(causal, "text", 16)
    tokens = tokens_of(causal, lines)
    whole = blocks_of(texts, cutter)
    # map takes 1000 rows at a time; a block ends where they end.
    assert whole == [
        {"input_ids": block}
        for first in (0, 1000, 2000)
        for block in cutter({"text": lines[first : first + 1000]})["input_ids"]
    ]
    assert sum(len(row["input_ids"]) for row in whole) >= len(tokens) - 3
    halves = list(chain(*(row["input_ids"] for row in blocks_of(texts, cutter, preprocessing_num_workers=2))))
    assert halves == tokens
    stream = stored(tmp_path / "a.txt", lines, streaming=True)
    blocks = make_blocks(stream, cutter, LanguageDataArguments(train_file="x", streaming=True), seed=0)["train"]
    read_in_turn = stream.splits["train"].map(cutter, batched=True, remove_columns=["text"])
    assert rows_of(read_in_turn) == whole
    shuffled = rows_of(blocks)
    assert shuffled != whole
    assert sorted(map(str, shuffled)) == sorted(map(str, whole))


def test_what_is_cached_is_not_taken_for_other_blocks(tmp_path: Path, masked: PreTrainedTokenizerFast) -> None:
    texts = stored(tmp_path / "a.txt", ["Alan saw the saw\n"] * 9)
    for settings in ({"size": 8}, {"size": 12}, {"size": 8, "by_line": True}, {"size": 8, "masked": True}):
        cutter = BlockCutter(masked, "text", **settings)  # type: ignore[arg-type]
        for overwrite in (False, True):
            found = blocks_of(texts, cutter, overwrite_cache=overwrite)
            assert [row["input_ids"] for row in found] == cutter({"text": ["Alan saw the saw\n"] * 9})["input_ids"]


@pytest.mark.parametrize("streaming", [False, True])
def test_max_samples_are_the_first_blocks(tmp_path: Path, causal: PreTrainedTokenizerFast, streaming: bool) -> None:
    lines = [f"{number} saw\n" for number in range(50)]
    (tmp_path / "a.txt").write_text("".join(lines))
    file = str(tmp_path / "a.txt")
    cutter = BlockCutter(causal, "text", 8)
    every = cutter({"text": lines})["input_ids"]

    def found(train: int, validation: int) -> dict[str, list[list[int]]]:
        arguments = LanguageDataArguments(
            train_file=file,
            validation_file=file,
            streaming=streaming,
            max_train_samples=train,
            max_eval_samples=validation,
        )
        blocks = make_blocks(read(arguments, tmp_path / "cache"), cutter, arguments, seed=0)
        return {split: sorted(row["input_ids"] for row in data) for split, data in blocks.items()}

    assert len(every) > 9
    assert found(5, 3) == {"train": sorted(every[:5]), "validation": sorted(every[:3])}
    assert found(10**6, 10**6) == {"train": sorted(every), "validation": sorted(every)}


def test_only_what_is_evaluated_on_is_finished(causal: PreTrainedTokenizerFast) -> None:
    texts = texts_from({"train": ["the saw"] * 5, "validation": ["Alan"] * 50})
    cutter, arguments = BlockCutter(causal, "text", 4), LanguageDataArguments(max_eval_samples=2)
    blocks = make_blocks(texts, cutter, arguments, 0, lambda data: data.map(lambda row: {"done": len(data)}))
    assert blocks["train"].column_names == ["input_ids"]
    assert blocks["validation"]["done"] == [2, 2]


def test_texts_without_tokens_are_refused(masked: PreTrainedTokenizerFast, causal: PreTrainedTokenizerFast) -> None:
    lines = BlockCutter(masked, "text", 8, masked=True, by_line=True)
    for cutter, texts in ((lines, [" ", ""]), (BlockCutter(causal, "text", 8), ["", "x"])):
        with pytest.raises(InputError, match="the train texts are empty: they hold no tokens"):
            make_blocks(texts_from({"train": texts}), cutter, LanguageDataArguments(), 0)


# Files


def write_delimited(path: Path, texts: Sequence[str], **dialect: Any) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, **dialect)
        writer.writerows([["text", "idx"], *([text, number] for number, text in enumerate(texts))])


def write_json_rows(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


WRITERS: dict[str, tuple[Callable[[Path, Sequence[str]], None], list[str]]] = {
    "txt": (lambda path, texts: path.write_text("".join(texts), encoding="utf-8") and None, [f"{t}\n" for t in LINES]),
    "csv": (write_delimited, LINES + QUOTED),
    "tsv": (
        lambda path, texts: write_delimited(path, texts, delimiter="\t", quoting=3, quotechar=None),
        LINES + QUOTED[:-1],
    ),
    "json": (
        lambda path, texts: path.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8") and None,
        LINES + QUOTED,
    ),
    "jsonl": (write_json_rows, LINES + QUOTED),
    "parquet": (
        lambda path, texts: pyarrow.parquet.write_table(pa.table({"text": list(texts)}), path),
        LINES + QUOTED,
    ),
}


def texts_in(path: Path, cache: Path, **settings: Any) -> list[str]:
    texts = read(LanguageDataArguments(train_file=str(path), **settings), cache, do_eval=False)
    return [row[texts.column] for row in texts.splits["train"]]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_back_what_was_written(tmp_path: Path, kind: str) -> None:
    write, texts = WRITERS[kind]
    plain, packed = tmp_path / f"rows.{kind}", tmp_path / f"packed.{kind.upper()}.gz"
    write(plain, texts)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain,) if kind == "parquet" else (plain, packed):
        for streaming in (False, True):
            assert texts_in(path, tmp_path / "cache", streaming=streaming) == texts


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_looks_like_numbers_is_text(tmp_path: Path, kind: str, streaming: bool) -> None:
    # pandas guesses the type of a column from all of it.
    for texts in (["007", "12"], ["1.50", "2"], ["true", "False"], ["", ""], ["NA", "", "1"]):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.{kind}"
        WRITERS[kind][0](path, texts)
        assert texts_in(path, tmp_path / "cache", streaming=streaming) == texts


def test_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ntwo\x0bhalf\nthree")
    kept = ["one\n", "\n", "two\x0bhalf\n", "three"]
    assert texts_in(tmp_path / "a.txt", tmp_path / "cache") == kept
    dropped = texts_in(tmp_path / "a.txt", tmp_path / "cache", keep_linebreaks=False)
    assert dropped == [line.removesuffix("\n") for line in kept]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_its_files_by_name(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("1\n")
    (folder / "b" / "a.txt.gz").write_bytes(gzip.compress(b"2\n"))
    (folder / "c.txt").write_text("3\n4")
    (folder / "README").write_text("not a text")
    assert texts_in(folder, tmp_path / "cache", streaming=streaming) == ["1\n", "2\n", "3\n", "4"]


def bad(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def mixed_folder(path: Path) -> Path:
    (path / "mixed").mkdir()
    bad(path / "mixed" / "a.txt", b"a")
    return bad(path / "mixed" / "b.csv", b"text\na\n").parent


def empty_folder(path: Path) -> Path:
    (path / "none").mkdir()
    return path / "none"


ZIPPED = gzip.compress(b"text\n" + bytes(range(32, 120)) * 9)
FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path / "no.txt", r"cannot read .*no\.txt: No such file"),
    "kind": (lambda path: bad(path / "a.docx", b"a"), r"a\.docx: unknown kind of file; readable are \.txt, \.csv, "),
    "packed parquet": (lambda path: bad(path / "a.parquet.gz", b"a"), "unknown kind of file"),
    "mixed": (mixed_folder, r"mixed holds files of several kinds, \.csv, \.txt: give one kind a folder"),
    "empty folder": (empty_folder, r"none has no files that can be read \(\.txt, "),
    "empty txt": (lambda path: bad(path / "a.txt", b""), "empty"),
    "empty csv": (lambda path: bad(path / "a.csv", b""), r"a\.csv is empty: it has no rows"),
    "open quotes": (
        lambda path: bad(path / "a.csv", b"text\nHello there, my friend\n"),
        r"a\.csv, line 2: 2 fields, but 1 columns; texts with a comma need quotes",
    ),
    "header only": (lambda path: bad(path / "a.csv", b"text\n"), "empty|no data"),
    "empty jsonl": (lambda path: bad(path / "a.jsonl", b""), "empty"),
    "encoding": (lambda path: bad(path / "a.txt", b"fine\n\xff\xfe\n"), r"a\.txt, line 2: not UTF-8 text"),
    "csv encoding": (
        lambda path: bad(path / "a.csv", b"text\nfine\n\xff\n"),
        r"a\.csv, line 3: not UTF-8 text",
    ),
    "cut off": (
        lambda path: bad(path / "a.csv.gz", ZIPPED[:-12]),
        r"a\.csv\.gz is not a whole gzip file: Compressed file ended before",
    ),
    "not packed": (lambda path: bad(path / "a.txt.gz", b"plain text\n"), r"a\.txt\.gz is not a whole gzip file: "),
    "spoilt": (
        lambda path: bad(path / "a.txt.gz", ZIPPED[:20] + b"\xff\xff" + ZIPPED[22:]),
        r"a\.txt\.gz is not a whole gzip file: ",
    ),
    "json line": (lambda path: bad(path / "a.jsonl", b'{"text": "a"}\n{"text": \n'), r"a\.jsonl, line 2: "),
    "json": (lambda path: bad(path / "a.json", b'[{"text": "a"}, {'), r"a\.json, line 1: "),
    "ragged csv": (lambda path: bad(path / "a.csv", b"text\na\na,b,c\n"), r"a\.csv, line 3: 3 fields, but 1 columns"),
    "not parquet": (lambda path: bad(path / "a.parquet", b"PAR1 and so on"), r"cannot read .*a\.parquet: "),
    "column": (lambda path: bad(path / "a.csv", b"a,b\n1,2\n"), r"a\.csv: which column is the text.* one of a, b"),
    "null": (lambda path: bad(path / "a.jsonl", b'{"text": null}\n'), r"a\.jsonl, row 1: column 'text' is missing"),
    "number": (
        lambda path: bad(path / "a.jsonl", b'{"text": 7}\n'),
        r"a\.jsonl, row 1: column 'text' holds 7, not text",
    ),
    "list": (
        lambda path: bad(path / "a.jsonl", b'{"text": ["a"]}\n'),
        r"a\.jsonl, row 1: column 'text' holds \['a'\], not text",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, fault: str, streaming: bool) -> None:
    make, message = FAULTS[fault]
    arguments = LanguageDataArguments(train_file=str(make(tmp_path)), streaming=streaming)
    with pytest.raises(InputError, match=message) as caught:
        list(read(arguments, tmp_path / "cache", do_eval=False).for_tokenizer())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.json", "b.parquet"])
def test_what_is_not_text_further_down(tmp_path: Path, name: str, streaming: bool) -> None:
    folder, rows = tmp_path / "texts", [{"text": "a"}, {"text": "b"}, {"text": None}]
    folder.mkdir()
    for file, content in (("a." + name[2:], rows[:2]), (name, rows)):
        if "parquet" in file:
            pyarrow.parquet.write_table(pa.Table.from_pylist(content), folder / file)
            continue
        text = json.dumps(content) if "jsonl" not in file else "\n".join(map(json.dumps, content))
        bad(folder / file, gzip.compress(text.encode()) if ".gz" in file else text.encode())
    arguments = LanguageDataArguments(train_file=str(folder), streaming=streaming)
    with pytest.raises(InputError, match=rf"{name}, row 3: column 'text' is missing$"):
        list(read(arguments, tmp_path / "cache", do_eval=False).for_tokenizer())


def test_what_is_not_text_on_the_hub(monkeypatch: pytest.MonkeyPatch, causal: PreTrainedTokenizerFast) -> None:
    split = datasets.Dataset.from_dict({"text": ["a", None]})
    arguments = LanguageDataArguments(dataset_name="me/set")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **settings: {"train": split})
    hub = {"cache_dir": None, "token": None}
    with pytest.raises(InputError, match="me/set, split train, row 2: column 'text' is missing"):
        read_texts(arguments, do_train=True, do_eval=False, hub=hub)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **settings: {"train": split.to_iterable_dataset()})
    texts = read_texts(arguments, do_train=True, do_eval=False, hub=hub)
    with pytest.raises(InputError, match="the text column holds None, which is not text"):
        make_blocks(texts, BlockCutter(causal, "text", 4), arguments, 0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "contents"),
    [
        ("csv", ["text,id\na,1\n", "text\na\n", "id,more,text\nx,,a\n"]),
        ("tsv", ["text\tid\na\t1\n", "\t\ttext\n0\t0\ta\n"]),
        (
            "jsonl",
            ['{"text": "a"}\n{"text": "a", "id": 1}', '{"id": null, "text": "a"}', '{"text": "a", "id": ["x", 1]}'],
        ),
        ("json", ['[{"text": "a", "id": 1}]', '[{"text": "a", "id": "2021-03-01"}]']),
    ],
)
def test_files_of_a_folder_may_differ_in_other_columns(
    tmp_path: Path, kind: str, contents: list[str], streaming: bool
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number}.{kind}").write_bytes(b"\xef\xbb\xbf" + content.encode())
    found = texts_in(folder, tmp_path / "cache", text_column="text", streaming=streaming)
    assert set(found) == {"a"}
    assert len(found) >= len(contents)
    (folder / f"z.{kind}").write_text(contents[0].replace("text", "words"))
    with pytest.raises(InputError, match=rf"z\.{kind} has no column 'text'; its columns are "):
        texts_in(folder, tmp_path / "cache", text_column="text", streaming=streaming)


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / ".hidden" / "texts"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("a")
    (folder / "._a.txt").write_bytes(b"\xff")
    (folder / ".b.csv").write_text("text\n")
    assert texts_in(folder, tmp_path / "cache") == ["a"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path, streaming: bool) -> None:
    for text in ("a\n", "b\n"):
        file = bad(tmp_path / "a.txt", text.encode())
        os.utime(file, ns=(0, ord(text[0])))
        assert texts_in(file, tmp_path / "cache", streaming=streaming) == [text]


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_of_json_stay_text(tmp_path: Path, streaming: bool) -> None:
    texts = ["2021-03-01", "2021-03-01T12:00:00Z", "1e5", "null"]
    write_json_rows(tmp_path / "a.jsonl", texts)
    assert texts_in(tmp_path / "a.jsonl", tmp_path / "cache", streaming=streaming) == texts
    bad(tmp_path / "b.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(InputError, match=r"b\.jsonl, row 2: column 'text' holds half of a surrogate pair"):
        texts_in(tmp_path / "b.jsonl", tmp_path / "cache", streaming=streaming)


def test_the_column_of_the_text(tmp_path: Path) -> None:
    two = bad(tmp_path / "two.jsonl", b'{"title": "A", "text": "a", "body": "b", "year": 5}\n')
    only = bad(tmp_path / "only.jsonl", b'{"body": "c"}\n')
    cache = tmp_path / "cache"
    assert texts_in(two, cache) == ["a"]
    assert texts_in(two, cache, text_column="body") == ["b"]
    assert texts_in(only, cache) == ["c"]
    with pytest.raises(InputError, match=r"two\.jsonl has no column 'boddy'.*; did you mean body"):
        texts_in(two, cache, text_column="boddy")
    with pytest.raises(InputError, match=r"two\.jsonl, row 1: column 'year' holds 5, not text"):
        texts_in(two, cache, text_column="year")
    both = LanguageDataArguments(train_file=str(two), validation_file=str(only))
    with pytest.raises(InputError, match="different columns, body and text"):
        read(both, cache)
    assert [row["body"] for row in read(both, cache, do_train=False).splits["validation"]] == ["c"]


# Splits


@pytest.mark.parametrize("percentage", [1, 5, 50, 99])
def test_the_last_rows_are_held_out(tmp_path: Path, percentage: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = [f"{number}\n" for number in range(200)]
    file = bad(tmp_path / "a.txt", "".join(lines).encode())
    arguments = LanguageDataArguments(train_file=str(file), validation_split_percentage=percentage)
    found = {split: [row["text"] for row in data] for split, data in read(arguments, tmp_path / "c").splits.items()}
    kept = 200 - 2 * percentage
    assert found == {"train": lines[:kept], "validation": lines[kept:]}
    assert f"held out the last {2 * percentage} of 200 rows" in caplog.text


def test_too_few_rows_to_hold_any_out(tmp_path: Path) -> None:
    arguments = LanguageDataArguments(train_file=str(bad(tmp_path / "a.txt", b"1\n2\n")))
    with pytest.raises(InputError, match="2 rows are too few to hold 5 % of them out: give --validation_file"):
        read(arguments, tmp_path / "cache")


def test_a_stream_too_short_to_hold_any_out(tmp_path: Path) -> None:
    file = str(bad(tmp_path / "a.txt", b"saw\n" * 95))
    with pytest.raises(InputError, match="the last 5 of every hundred rows are held out of a stream; give --valid"):
        read(LanguageDataArguments(train_file=file, streaming=True), tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_held_out_of_in_every_hundred_rows(
    tmp_path: Path, causal: PreTrainedTokenizerFast, workers: int
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(3):
        bad(folder / f"{number}.txt", "".join(f"{number}.{row} saw\n" for row in range(150)).encode())
    arguments = LanguageDataArguments(
        train_file=str(folder), streaming=True, validation_split_percentage=20, shuffle_buffer_size=8
    )
    blocks = make_blocks(read(arguments, tmp_path / "c"), BlockCutter(causal, "text", 99, by_line=True), arguments, 3)

    def lines(split: str) -> list[str]:
        # Blocks of one worker after those of another: whose turn it is does not matter here.
        loader = DataLoader(blocks[split], batch_size=None, num_workers=workers)  # type: ignore[arg-type]
        return [causal.decode(row["input_ids"]) for row in loader]

    everything = sorted(f"{number}.{row} saw" for number in range(3) for row in range(150))
    held_out = lines("validation")
    orders = []
    for epoch in range(3):
        blocks["train"].set_epoch(epoch)  # type: ignore[union-attr]
        orders.append(lines("train"))
        assert sorted(orders[-1] + held_out) == everything
    assert orders[0] != orders[1] != orders[2]
    if not workers:
        assert held_out == [
            f"{number}.{row} saw" for number in range(3) for row in range(150) if (150 * number + row) % 100 >= 80
        ]


def test_only_the_splits_of_the_run_are_kept(tmp_path: Path) -> None:
    train, validation = bad(tmp_path / "t.txt", b"t\n" * 40), bad(tmp_path / "v.txt", b"v\n")
    both = LanguageDataArguments(train_file=str(train), validation_file=str(validation))
    cache = tmp_path / "cache"
    assert read(both, cache).splits.keys() == {"train", "validation"}
    assert read(both, cache, do_eval=False).splits.keys() == {"train"}
    assert read(both, cache, do_train=False).splits.keys() == {"validation"}
    alone = read(LanguageDataArguments(train_file=str(train)), cache, do_train=False)
    assert [row["text"] for row in alone.splits["validation"]] == ["t\n"] * 2
    with pytest.raises(InputError, match="--do_train needs training texts: give --train_file"):
        read(LanguageDataArguments(validation_file=str(validation)), cache)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hub(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    split = datasets.Dataset.from_dict({"text": [f"{number}" for number in range(200)]})

    def load(*names: Any, **settings: Any) -> Any:
        asked.append((names, settings))
        return {"train": split.to_iterable_dataset() if streaming else split, "test": None}

    monkeypatch.setattr(datasets, "load_dataset", load)
    arguments = LanguageDataArguments(dataset_name="me/set", dataset_config_name="raw", streaming=streaming)
    found = read_texts(arguments, do_train=True, do_eval=True, hub={"cache_dir": "c", "token": "t"})
    assert asked == [(("me/set", "raw"), {"streaming": streaming, "cache_dir": "c", "token": "t"})]
    assert {name: len(list(data)) for name, data in found.splits.items()} == {"train": 190, "validation": 10}

    def fail(*names: Any, **settings: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("no such\ndata set")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"^cannot load data set me/set \(raw\): no such data set$"):
        read_texts(arguments, do_train=True, do_eval=False, hub={"cache_dir": None, "token": None})


def test_a_data_set_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_json_rows(folder / "train.jsonl", ["a", "b"])
    write_json_rows(folder / "validation.jsonl", ["c"])
    found = read(LanguageDataArguments(dataset_name=str(folder)), tmp_path / "cache").splits
    assert {split: data["text"][:] for split, data in found.items()} == {"train": ["a", "b"], "validation": ["c"]}


def test_a_tokenizer_is_trained_on_the_training_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(texts_from({"train": ["a", "b"], "validation": ["c"]}).for_tokenizer()) == ["a", "b"]
    monkeypatch.setattr(language_data, "_STREAMED_TEXTS", 3)
    lines = [f"{number}\n" for number in range(5)]
    assert list(stored(tmp_path / "a.txt", lines).for_tokenizer()) == lines
    assert list(stored(tmp_path / "a.txt", lines, streaming=True).for_tokenizer()) == lines[:3]


# Flags


def refusals() -> Iterator[tuple[dict[str, Any], str]]:
    for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers", "shuffle_buffer_size"):
        yield {name: 0}, f"--{name} must be 1 or more, not 0"
    for percentage in (0, 100):
        yield (
            {"validation_split_percentage": percentage},
            f"--validation_split_percentage is from 1 to 99, not {percentage}",
        )
    yield {"dataset_name": "a", "train_file": "b"}, "--dataset_name and data files exclude each other"
    yield {"streaming": True, "preprocessing_num_workers": 1}, "--preprocessing_num_workers and --streaming exclude"


@pytest.mark.parametrize(("settings", "message"), list(refusals()))
def test_flags_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageDataArguments(**settings)
