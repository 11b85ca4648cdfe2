"""The text of the language modelling scripts: its flags, where it is read from, and how it becomes blocks of tokens.

Nothing is thrown away: the texts of a batch (`datasets.map` has 1000 rows in each) are joined and cut into blocks of
one size, and what is left over is a shorter block. Only a last token with nothing to be predicted from is dropped,
and, with --line_by_line, what a line has beyond that size.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from hf_xgrad.recipes.corpora.files import (
    KINDS,
    UNREADABLE,
    check_rows,
    column_names,
    find_files,
    load_splits,
    read_rows,
    texts_of_files,
)
from hf_xgrad.recipes.input_errors import InputError, as_input_error, check_positive, describe_choices

TextData: TypeAlias = Dataset | IterableDataset
# Flags that name data.
DATA_SOURCES = ("dataset_name", "train_file", "validation_file")
# The word number of special tokens, which belong to no word.
NO_WORD = -1
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
        metadata={"help": f"Training texts: a file, {KINDS}, or a folder of them."},
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
    named = {"train": data_args.train_file, "validation": data_args.validation_file}
    found: dict[str, TextData] = {}
    if data_args.dataset_name is not None:
        called, found = load_splits(
            data_args.dataset_name, data_args.dataset_config_name, streaming=data_args.streaming, **hub
        )
        named = {split: f"{called}, split {split}" if split in found else None for split in named}
    if do_train and not named["train"]:
        raise InputError("--do_train needs training texts: give --train_file")
    if do_eval and not any(named.values()):
        raise InputError("--do_eval needs validation texts: give --validation_file")
    hold_out = do_eval and not named["validation"]
    wanted = {"train": do_train or hold_out, "validation": do_eval}
    read = {
        split: _read(source, found.get(split), data_args, hub["cache_dir"])
        for split, source in named.items()
        if source and wanted[split]
    }
    columns = sorted({column for column, _ in read.values()})
    if len(columns) > 1:
        raise InputError(f"the splits have their text in different columns, {' and '.join(columns)}")
    splits = {split: data for split, (_, data) in read.items()}
    if hold_out:
        splits["train"], splits["validation"] = _hold_out(splits["train"], data_args.validation_split_percentage)
        if not do_train:
            del splits["train"]
            logger.warning(
                "Evaluating on a part of the training texts: held out only where --do_eval was given then, too"
            )
    return Texts(splits, columns[0])


def texts_from(splits: Mapping[str, Sequence[str]]) -> Texts:
    """Return texts that are in memory."""
    return Texts({split: Dataset.from_dict({"text": list(texts)}) for split, texts in splits.items()}, "text")


def _read(
    source: str, found: TextData | None, data_args: LanguageDataArguments, cache_dir: str | None
) -> tuple[str, TextData]:
    """Return the column of the text, and the texts of a file, a folder or a split of the Hub."""
    if found is None:
        files = find_files(source)
        names = column_names(source, chain.from_iterable(map(read_rows, files)))
        column = _text_column(source, names, data_args.text_column)
        settings = {"keep_linebreaks": data_args.keep_linebreaks, "streaming": data_args.streaming}
        return column, texts_of_files(files, column, cache_dir=cache_dir, **settings)
    with as_input_error(*UNREADABLE, prefix=f"cannot read {source}: "):
        column = _text_column(source, column_names(source, found), data_args.text_column)
    # The rows of a stream are checked when they are cut into blocks.
    if isinstance(found, Dataset) and found.data[column].null_count + (found.features[column] != Value("string")):
        for _ in check_rows(source, found.select_columns([column]), [column]):
            pass
    return column, found


def _hold_out(data: TextData, percentage: int) -> tuple[TextData, TextData]:
    if isinstance(data, IterableDataset):
        first = 100 - percentage
        # A skip, even of nothing, fixes the order of the files; to shuffle would change it, and so these rows.
        ordered = data.skip(0)
        kept, out = (
            ordered.filter(lambda _, row: row % 100 < first, with_indices=True),
            ordered.filter(lambda _, row: row % 100 >= first, with_indices=True),
        )
        if next(iter(out), None) is None:
            last = f"the last {percentage} of every hundred rows are held out of a stream"
            raise InputError(f"the validation texts are empty: {last}; give --validation_file")
        return kept, out
    kept = len(data) - round(len(data) * percentage / 100)
    if not 0 < kept < len(data):
        raise InputError(f"{len(data)} rows are too few to hold {percentage} % of them out: give --validation_file")
    logger.info("No validation texts: held out the last %d of %d rows", len(data) - kept, len(data))
    return data.select(range(kept)), data.select(range(kept, len(data)))


def _text_column(source: str, names: Sequence[str], asked: str | None) -> str:
    if asked is not None and asked not in names:
        close = describe_choices(asked, names)
        raise InputError(f"{source} has no column {asked!r}; its columns are {', '.join(names)}{close}")
    column = asked or ("text" if "text" in names else names[0] if len(names) == 1 else None)
    if column is None:
        raise InputError(f"{source}: which column is the text? Give --text_column, one of {', '.join(names)}")
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
    `size`. The usual `group_texts` drops what is left over of each batch, and masks among the texts' special tokens.
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
        if self.size < (1 + self.tokenizer.num_special_tokens_to_add() if self.masked else 2):
            raise InputError(f"rows of {self.size} tokens, as the model takes them, have none to predict")

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
