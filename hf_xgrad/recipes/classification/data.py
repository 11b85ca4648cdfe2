"""The data of `hf-xgrad glue`: its flags, and how they become texts with numbered labels, split by split."""

import dataclasses
import logging
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig

from hf_xgrad.recipes.classification.labels import Labels, find_labels, labels_of_model
from hf_xgrad.recipes.classification.tasks import CLASS_SCORES, HUB_NAME, REGRESSION_SCORES, TASKS, Task
from hf_xgrad.recipes.corpora.files import Table, read_file, read_hub, split_table
from hf_xgrad.recipes.input_errors import InputError, check_positive

# MNLI has two of each; the suffixes tell the second one's metrics and predictions from the first one's.
VALIDATION_SPLITS = {"validation": "", "validation_mismatched": "_mm"}
TEST_SPLITS = {"test": "", "test_mismatched": "-mm"}
SPLITS = ("train", *VALIDATION_SPLITS, *TEST_SPLITS)

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class DataArguments:
    """Which texts and labels, and how they are fed to the model."""

    _argument_group_name = "data"

    task_name: str | None = dataclasses.field(
        default=None, metadata={"help": f"GLUE task: {', '.join(TASKS)}. Without files, its data come from the Hub."}
    )
    dataset_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Another data set on the Hub, or a folder that `datasets` can load."}
    )
    dataset_config_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Which configuration of --dataset_name."}
    )
    train_file: str | None = dataclasses.field(
        default=None, metadata={"help": "Training data: .csv, .tsv, .json, .jsonl (each also .gz) or .parquet."}
    )
    validation_file: str | None = dataclasses.field(
        default=None, metadata={"help": "Validation data. Left out: a part of the training data is held out."}
    )
    validation_mismatched_file: str | None = dataclasses.field(
        default=None, metadata={"help": "MNLI's mismatched validation data."}
    )
    test_file: str | None = dataclasses.field(default=None, metadata={"help": "Data to predict the labels of."})
    test_mismatched_file: str | None = dataclasses.field(
        default=None, metadata={"help": "MNLI's mismatched test data."}
    )
    validation_split_percentage: int = dataclasses.field(
        default=10, metadata={"help": "How much of the training data to hold out where there are no validation data."}
    )
    text_column: str | None = dataclasses.field(default=None, metadata={"help": "Column of the (first) text."})
    text_pair_column: str | None = dataclasses.field(default=None, metadata={"help": "Column of the second text."})
    label_column: str = dataclasses.field(default="label", metadata={"help": "Column of the label or score."})
    metrics: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": f"Which of {', '.join(CLASS_SCORES | REGRESSION_SCORES)} to report. Left out: those of the task."
        },
    )
    max_seq_length: int = dataclasses.field(
        default=128, metadata={"help": "Longer inputs are cut off after so many tokens."}
    )
    pad_to_max_length: bool = dataclasses.field(
        default=False, metadata={"help": "Pad to --max_seq_length instead of to the longest input of each batch."}
    )
    max_train_samples: int | None = dataclasses.field(default=None, metadata={"help": "Train on the first so many."})
    max_eval_samples: int | None = dataclasses.field(default=None, metadata={"help": "Evaluate on the first so many."})
    max_predict_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Predict the first so many only."}
    )
    overwrite_cache: bool = dataclasses.field(default=False, metadata={"help": "Tokenize again what is cached."})

    def __post_init__(self) -> None:
        if self.task_name is not None:
            # As GLUE itself writes them, too: SST-2, WNLI.
            self.task_name = self.task_name.lower().replace("-", "")
        if self.task_name is not None and self.task_name not in TASKS:
            raise ValueError(f"unknown task {self.task_name!r}; --task_name is one of {', '.join(TASKS)}")
        for name in ("max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            check_positive(name, getattr(self, name))
        if not 1 <= self.validation_split_percentage <= 99:
            raise ValueError(f"--validation_split_percentage is from 1 to 99, not {self.validation_split_percentage}")
        if self.files and self.dataset_name is not None:
            raise ValueError("--dataset_name and data files exclude each other: give one of the two")
        if not self.files and self.dataset_name is None and self.task_name is None:
            raise ValueError("no data: give --task_name, --dataset_name or --train_file")
        if self.text_pair_column is not None and self.text_column is None:
            raise ValueError("--text_pair_column names a second text: it needs --text_column")
        if self.task_name != "mnli" and any(split.endswith("_mismatched") for split in self.files):
            raise ValueError("mismatched files are MNLI's: they need --task_name mnli")

    @property
    def files(self) -> dict[str, str]:
        """The data files given, by split."""
        return {split: path for split in SPLITS if (path := getattr(self, f"{split}_file")) is not None}

    @property
    def task(self) -> Task | None:
        return TASKS[self.task_name] if self.task_name is not None else None


@dataclasses.dataclass(frozen=True)
class GlueData:
    """Texts with labels (as the task numbers them), by split; test splits without."""

    splits: dict[str, Dataset]
    text_columns: tuple[str, ...]
    labels: Labels
    metrics: tuple[str, ...]
    combined: bool  # whether the metrics' mean is reported too, as GLUE does where a task has two


def read_data(data_args: DataArguments, args: Any, config: PreTrainedConfig, hub: dict[str, str | None]) -> GlueData:
    """Read and check the splits that the run needs; hold out validation data where there are none.

    Without a task and without training data the labels are those of the model, whose configuration is `config`. `hub`
    holds cache_dir and token. Of `args`, seed, data_seed, do_train, do_eval and do_predict are read.
    """
    tables = _read_tables(data_args, hub)
    _check_splits(tables, args)
    text_columns = _text_columns(data_args, next(iter(tables.values())))
    labels = _labels(data_args, tables.get("train"), config)
    metrics, combined = _metrics(data_args, labels)
    splits = {
        split: _prepared(table, text_columns, None if split in TEST_SPLITS else data_args.label_column, labels)
        for split, table in tables.items()
        if split not in (() if args.do_predict else TEST_SPLITS)
    }
    if args.do_eval and "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(splits["train"], data_args, args, labels)
    limits = {
        "train": data_args.max_train_samples,
        **dict.fromkeys(VALIDATION_SPLITS, data_args.max_eval_samples),
        **dict.fromkeys(TEST_SPLITS, data_args.max_predict_samples),
    }
    datasets = {split: table.head(limits[split]).data for split, table in splits.items()}
    logger.info("Rows: %s", ", ".join(f"{split} {len(data)}" for split, data in datasets.items()))
    return GlueData(datasets, text_columns, labels, metrics, combined)


def names_by_number(config: PreTrainedConfig) -> dict[int, str]:
    """Return the label names of a model's configuration."""
    return {int(number): str(name) for number, name in (config.id2label or {}).items()}


def _read_tables(data_args: DataArguments, hub: dict[str, str | None]) -> dict[str, Table]:
    if data_args.files:
        return {split: read_file(path) for split, path in data_args.files.items()}
    name = data_args.dataset_name or HUB_NAME
    config = data_args.dataset_config_name or (None if data_args.dataset_name else data_args.task_name)
    tables = {split.removesuffix("_matched"): table for split, table in read_hub(name, config, **hub).items()}
    return {split: tables[split] for split in SPLITS if split in tables}


def _check_splits(tables: dict[str, Table], args: Any) -> None:
    if args.do_train and "train" not in tables:
        raise InputError("--do_train needs training data: give --train_file")
    if args.do_eval and not {"train", "validation"} & tables.keys():
        raise InputError("--do_eval needs validation data: give --validation_file")
    if args.do_predict and "test" not in tables:
        raise InputError("--do_predict needs test data: give --test_file")


def _text_columns(data_args: DataArguments, table: Table) -> tuple[str, ...]:
    """Return the columns named by flags, or the task's, or else those that go by the usual names."""
    if data_args.text_column is not None:
        return tuple(name for name in (data_args.text_column, data_args.text_pair_column) if name is not None)
    if data_args.task is not None:
        return data_args.task.text_columns
    names = table.data.column_names
    for usual in (("sentence1", "sentence2"), ("sentence",), ("text",)):
        if set(usual) <= set(names):
            return usual
    raise InputError(f"{table.source}: which column is the text? Give --text_column, one of {', '.join(names)}")


def _labels(data_args: DataArguments, train: Table | None, config: PreTrainedConfig) -> Labels:
    if data_args.task is not None:
        return data_args.task.labels
    if train is not None:
        return find_labels(train.values(data_args.label_column), train.source)
    return labels_of_model(names_by_number(config))


def _metrics(data_args: DataArguments, labels: Labels) -> tuple[tuple[str, ...], bool]:
    """Return the names of the metrics, and whether their mean is reported too."""
    if data_args.metrics is None and data_args.task is not None:
        return data_args.task.metrics, len(data_args.task.metrics) > 1
    possible = REGRESSION_SCORES if labels.regression else CLASS_SCORES
    wanted = tuple(data_args.metrics or (possible if labels.regression else ("accuracy",)))
    for name in wanted:
        if name not in possible:
            kind = "scores" if labels.regression else "classes"
            raise InputError(f"--metrics {name}: for labels that are {kind} there are {', '.join(possible)}")
        if name == "f1" and len(labels.names) != 2:
            raise InputError(f"--metrics f1 needs two classes, but there are {len(labels.names)}")
    return wanted, False


def _prepared(table: Table, text_columns: tuple[str, ...], label_column: str | None, labels: Labels) -> Table:
    """Return the text columns and, as "labels", the numbered labels, all of them checked."""
    for column in text_columns:
        table.check_text(column)
    data = table.data.select_columns(list(dict.fromkeys(text_columns)))
    if label_column is not None:
        numbers = labels.encode(table.values(label_column), table.source)
        data = data.add_column("labels", numbers)
    return dataclasses.replace(table, data=data)


def _hold_out(train: Table, data_args: DataArguments, args: Any, labels: Labels) -> tuple[Table, Table]:
    seed = args.seed if args.data_seed is None else args.data_seed
    strata = None if labels.regression else train.data["labels"][:]
    kept, held_out, stratified = split_table(train, data_args.validation_split_percentage, seed, strata)
    logger.info(
        "No validation data: held out %d of the %d rows of %s (%d %%, seed %d, %s)",
        *(len(held_out.data), len(train.data), train.source, data_args.validation_split_percentage, seed),
        "the same share of each label" if stratified else "not stratified by label",
    )
    return kept, held_out
