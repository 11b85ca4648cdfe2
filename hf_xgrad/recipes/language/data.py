"""The text of the language modelling scripts: its flags, where it is read from, and how it becomes blocks of tokens.

Nothing is thrown away: the texts of a batch (`datasets.map` has 1000 rows in each) are joined and cut into blocks of
one size, and what is left over is a shorter block. Only a last token with nothing to be predicted from is dropped,
and, with --line_by_line, what a line has beyond that size.
"""

import dataclasses
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pandas as pd
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from hf_xgrad.recipes.input_errors import InputError, check_positive, describe_choices, one_line

TextData: TypeAlias = Dataset | IterableDataset
# Flags that name data.
DATA_SOURCES = ("dataset_name", "train_file", "validation_file")
# The word number of special tokens, which belong to no word.
NO_WORD = -1
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    # No cell is taken for a missing value ("NA" is a word here); a .tsv file has no quoting.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": 3}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_UNREADABLE = (OSError, ValueError, EOFError, zlib.error, datasets.exceptions.DatasetsError, pa.ArrowException)
# Of a stream, this many texts are read to train a tokenizer.
_STREAMED_TEXTS = 100_000

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class LanguageDataArguments:
    """Which texts."""

    _argument_group_name = "data"

    dataset_name: str | None = dataclasses.field(
        default=None, metadata={"help": "A data set on the Hub, or a folder that `datasets` can load."}
    )
    dataset_config_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Which configuration of --dataset_name."}
    )
    train_file: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": f"Training texts: a file ({', '.join(_READERS)}; each but .parquet also .gz) or a folder of them."
        },
    )
    validation_file: str | None = dataclasses.field(
        default=None, metadata={"help": "Validation texts. Left out: a part of the training texts is held out."}
    )
    validation_split_percentage: int = dataclasses.field(
        default=5,
        metadata={
            "help": "How much of the training texts to hold out where there are no validation texts: the last rows, "
            "or of a stream the last rows of every hundred."
        },
    )
    text_column: str | None = dataclasses.field(
        default=None, metadata={"help": "Column of the text. Left out: 'text', or the only column."}
    )
    keep_linebreaks: bool = dataclasses.field(
        default=True, metadata={"help": "Keep the line breaks of .txt files as part of the text."}
    )
    streaming: bool = dataclasses.field(
        default=False, metadata={"help": "Read while training, keeping nothing on disk; needs --max_steps."}
    )
    shuffle_buffer_size: int = dataclasses.field(
        default=10_000, metadata={"help": "With --streaming, blocks are shuffled among so many."}
    )
    preprocessing_num_workers: int | None = dataclasses.field(
        default=None, metadata={"help": "Processes that turn text into tokens."}
    )
    max_train_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Train on the first so many blocks."}
    )
    max_eval_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Evaluate on the first so many blocks."}
    )
    overwrite_cache: bool = dataclasses.field(default=False, metadata={"help": "Tokenize again what is cached."})

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers", "shuffle_buffer_size"):
            check_positive(name, getattr(self, name))
        if not 1 <= self.validation_split_percentage <= 99:
            raise ValueError(f"--validation_split_percentage is from 1 to 99, not {self.validation_split_percentage}")
        if self.dataset_name is not None and (self.train_file or self.validation_file):
            raise ValueError("--dataset_name and data files exclude each other: give one of the two")
        if self.streaming and self.preprocessing_num_workers is not None:
            raise ValueError(
                "--preprocessing_num_workers and --streaming exclude each other: a stream has one process"
            )

    @property
    def named(self) -> bool:
        """Whether any data are named at all."""
        return any(getattr(self, name) for name in DATA_SOURCES)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a run, split by split; `column` is where a row has its text."""

    splits: dict[str, TextData]
    column: str

    def for_tokenizer(self) -> Iterator[str]:
        """Return the texts to train a tokenizer on: those of the first split; of a stream, the first ones."""
        data = next(iter(self.splits.values()))
        rows = islice(data, _STREAMED_TEXTS) if isinstance(data, IterableDataset) else iter(data)
        return (_checked_text(row[self.column]) for row in rows)


def read_texts(
    data_args: LanguageDataArguments, *, do_train: bool, do_eval: bool, hub: dict[str, str | None]
) -> Texts:
    """Read what the run needs; hold validation texts out where there are none. `hub` holds cache_dir and token."""
    given = {"train": data_args.train_file, "validation": data_args.validation_file}
    if data_args.dataset_name is not None:
        splits = _read_hub(data_args, hub)
    else:
        splits = {split: _read_files(path, data_args, hub["cache_dir"]) for split, path in given.items() if path}
    if do_train and "train" not in splits:
        raise InputError("--do_train needs training texts: give --train_file")
    if do_eval and "validation" not in splits:
        if "train" not in splits:
            raise InputError("--do_eval needs validation texts: give --validation_file")
        if not do_train:
            logger.warning(
                "Evaluating on a part of the training texts: held out only where --do_eval was given then, too"
            )
        splits["train"], splits["validation"] = _hold_out(splits["train"], data_args.validation_split_percentage)
    wanted = {"train": do_train, "validation": do_eval}
    splits = {split: data for split, data in splits.items() if wanted[split]}
    sources = {split: path or data_args.train_file or data_args.dataset_name for split, path in given.items()}
    columns = {
        _text_column(f"{split} texts ({sources[split]})", data, data_args.text_column)
        for split, data in splits.items()
    }
    if len(columns) > 1:
        raise InputError(f"the splits have their text in different columns, {' and '.join(sorted(columns))}")
    return Texts(splits, columns.pop())


def texts_from(splits: Mapping[str, Sequence[str]]) -> Texts:
    """Return texts that are in memory."""
    return Texts({split: Dataset.from_dict({"text": list(texts)}) for split, texts in splits.items()}, "text")


def _read_hub(data_args: LanguageDataArguments, hub: dict[str, str | None]) -> dict[str, TextData]:
    name = data_args.dataset_name or ""
    called = f"{name} ({data_args.dataset_config_name})" if data_args.dataset_config_name else name
    found = _loaded(f"data set {called}", name, data_args.dataset_config_name, streaming=data_args.streaming, **hub)
    return {split: found[split] for split in ("train", "validation") if split in found}


def _read_files(path: str, data_args: LanguageDataArguments, cache_dir: str | None) -> TextData:
    files = _find_files(Path(path))
    suffixes = {_suffix(file) for file in files}
    if len(suffixes) > 1:
        raise InputError(f"{path} holds files of several kinds, {', '.join(sorted(suffixes))}: give one kind a folder")
    reader, settings = _READERS[suffixes.pop()]
    if reader == "text":
        settings = settings | {"keep_linebreaks": data_args.keep_linebreaks}
    elif reader == "csv":
        settings = settings | {"features": _all_text(files[0], settings)}
    names = [str(file) for file in files]
    settings = settings | {"cache_dir": cache_dir, "streaming": data_args.streaming}
    data: TextData = _loaded(path, reader, data_files=names, split="train", **settings)
    return data


def _all_text(file: Path, settings: dict[str, Any]) -> Features:
    """Return features that keep a column of numbers as the text that it is in the file."""
    try:
        start = pd.read_csv(file, nrows=100, **settings)
    except _UNREADABLE as error:
        raise InputError(f"cannot read {file}: {one_line(error)}") from error
    if not isinstance(start.index, pd.RangeIndex):
        # pandas takes what is too much for names of the rows.
        raise InputError(
            f"{file} has rows with more fields than its header: put texts with a {settings.get('sep', 'comma')!r} in "
            "quotes, or give them as .txt or .jsonl"
        )
    return Features({name: Value("string") for name in start.columns})


def _suffix(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _find_files(path: Path) -> list[Path]:
    kinds = ", ".join(_READERS)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in _READERS)
        if not files:
            raise InputError(f"{path} has no files that can be read ({kinds})")
        return files
    if _suffix(path) not in _READERS or path.name.lower().endswith(".parquet.gz"):
        raise InputError(f"{path}: unknown kind of file; readable are {kinds} (each but .parquet also .gz)")
    return [path]


def _loaded(source: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (*_UNREADABLE, StopIteration) as error:
        # `datasets` wraps what went wrong in an error that says only that something did.
        cause = error.__cause__ or error
        empty = isinstance(cause, (datasets.arrow_writer.SchemaInferenceError, StopIteration))
        raise InputError(f"cannot read {source}: {'it is empty' if empty else one_line(cause)}") from error


def _hold_out(data: TextData, percentage: int) -> tuple[TextData, TextData]:
    if isinstance(data, IterableDataset):
        first = 100 - percentage
        # A skip, even of nothing, fixes the order of the files; to shuffle would change it, and so these rows.
        ordered = data.skip(0)
        return (
            ordered.filter(lambda _, row: row % 100 < first, with_indices=True),
            ordered.filter(lambda _, row: row % 100 >= first, with_indices=True),
        )
    kept = len(data) - round(len(data) * percentage / 100)
    if not 0 < kept < len(data):
        raise InputError(f"{len(data)} rows are too few to hold {percentage} % of them out: give --validation_file")
    logger.info("No validation texts: held out the last %d of %d rows", len(data) - kept, len(data))
    return data.select(range(kept)), data.select(range(kept, len(data)))


def _text_column(called: str, data: TextData, asked: str | None) -> str:
    try:
        row = next(iter(data), None)
    except _UNREADABLE as error:
        raise InputError(f"cannot read the {called}: {one_line(error)}") from error
    if row is None:
        raise InputError(f"the {called} are empty: there are no rows")
    names = list(row)
    if asked is not None and asked not in names:
        raise InputError(
            f"the {called} have no column {asked!r}; there are {', '.join(names)}{describe_choices(asked, names)}"
        )
    column = asked or ("text" if "text" in names else names[0] if len(names) == 1 else None)
    if column is None:
        raise InputError(f"which column is the text? Give --text_column, one of {', '.join(names)}")
    _checked_text(row[column])
    return column


def _checked_text(value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"the text column holds {value!r}, which is not text")
    return value


@dataclasses.dataclass(frozen=True)
class BlockCutter:
    """Turns texts into rows of `input_ids`, at most `size` long.

    With `masked`, rows stand between the tokenizer's special tokens and have `word_ids`: the number of the word that a
    token belongs to, with `whole_words`, else of the token. With `by_line`, every text is a row of its own, cut off at
    `size`.
    """

    tokenizer: PreTrainedTokenizerBase
    column: str
    size: int
    masked: bool = False
    whole_words: bool = False
    by_line: bool = False

    def __post_init__(self) -> None:
        if self.whole_words and not self.tokenizer.is_fast:
            raise InputError(
                f"--whole_word_masking needs a fast tokenizer; {type(self.tokenizer).__name__} does not tell words"
            )

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        texts = [_checked_text(text) for text in batch[self.column]]
        if self.by_line:
            # A tokenizer cannot take no texts at all; an empty one makes no row.
            texts = [text.strip() for text in texts if text.strip()] or [""]
        encoded = self.tokenizer(
            texts,
            # Masked, they go around each block, not around each text.
            add_special_tokens=not self.masked,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        tokens: list[list[int]] = encoded["input_ids"]
        if not self.masked:
            # A single token has nothing before it, and a first token is never predicted.
            return {"input_ids": [block for block in self._cut(tokens, self.size) if len(block) > 1]}
        words: list[list[int]] = [
            encoded.word_ids(row) if self.whole_words else list(range(len(ids))) for row, ids in enumerate(tokens)
        ]
        before, after = special_tokens(self.tokenizer)
        inner = self.size - len(before) - len(after)
        outer = ([NO_WORD] * len(before), [NO_WORD] * len(after))
        return {
            "input_ids": [[*before, *block, *after] for block in self._cut(tokens, inner)],
            "word_ids": [[*outer[0], *block, *outer[1]] for block in self._cut(_numbered(words), inner)],
        }

    def _cut(self, rows: Iterable[list[int]], size: int) -> list[list[int]]:
        if self.by_line:
            return [row[:size] for row in rows if row]
        joined = list(chain.from_iterable(rows))
        return [joined[start : start + size] for start in range(0, len(joined), size)]


def _numbered(rows: Iterable[list[int]]) -> Iterator[list[int]]:
    """Number words on from row to row, so that those of neighbouring texts stay apart when the texts are joined."""
    first = 0
    for row in rows:
        yield [first + number for number in row]
        first += max(row, default=-1) + 1


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    ids, special = probe["input_ids"], probe["special_tokens_mask"]
    start = special.index(0)
    end = len(special) - special[::-1].index(0)
    return ids[:start], ids[end:]


def make_blocks(
    texts: Texts,
    cutter: BlockCutter,
    data_args: LanguageDataArguments,
    seed: int,
    finish_validation: Callable[[TextData], TextData] = lambda data: data,
) -> dict[str, TextData]:
    """Return the rows to train and to evaluate on. `finish_validation` gets what will be evaluated on."""
    blocks = {split: _cut_split(split, data, cutter, data_args) for split, data in texts.splits.items()}
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if split in blocks and limit is not None:
            blocks[split] = blocks[split].take(limit)
        if split in blocks and next(iter(blocks[split]), None) is None:
            raise InputError(f"the {split} texts are empty: they hold no tokens")
    if "train" in blocks and isinstance(blocks["train"], IterableDataset):
        blocks["train"] = blocks["train"].shuffle(seed=seed, buffer_size=data_args.shuffle_buffer_size)
    if "validation" in blocks:
        blocks["validation"] = finish_validation(blocks["validation"])
    sizes = (f"{split} {len(data)}" for split, data in blocks.items() if isinstance(data, Dataset))
    logger.info("Blocks of up to %d tokens: %s", cutter.size, ", ".join(sizes) or "streamed")
    return blocks


def _cut_split(split: str, data: TextData, cutter: BlockCutter, data_args: LanguageDataArguments) -> TextData:
    if isinstance(data, IterableDataset):
        return data.map(cutter, batched=True, remove_columns=list(next(iter(data))))
    return data.map(
        cutter,
        batched=True,
        remove_columns=data.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc=f"tokenizing {split}",
    )
