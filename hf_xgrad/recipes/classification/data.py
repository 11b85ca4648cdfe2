"""The data of `hf-xgrad glue`: its flags, and how they become texts with numbered labels, split by split."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import PreTrainedConfig

from hf_xgrad.recipes.classification.labels import CLASSES, Labels, ProblemType, find_labels, labels_of_model
from hf_xgrad.recipes.classification.tasks import DEFAULT_SCORES, HUB_NAME, SCORES_OF, TASKS, Task
from hf_xgrad.recipes.corpora.files import KINDS, check_rows, column_names, load_splits, read_rows, split_rows
from hf_xgrad.recipes.input_errors import InputError, check_positive

# MNLI has two of each; the suffixes tell the second one's metrics and predictions from the first one's.
VALIDATION_SPLITS = {"validation": "", "validation_mismatched": "_mm"}
TEST_SPLITS = {"test": "", "test_mismatched": "-mm"}
SPLITS = ("train", *VALIDATION_SPLITS, *TEST_SPLITS)

_METRICS = dict.fromkeys(name for scores in SCORES_OF.values() for name in scores)

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
    train_file: str | None = dataclasses.field(default=None, metadata={"help": f"Training data: {KINDS}."})
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
    problem_type: ProblemType | None = dataclasses.field(
        default=None,
        metadata={
            "help": "What the labels are. Left out: scores (regression) if most are numbers and one has a fraction, "
            "else classes. Lists of classes (multi-label) are trained on only where this asks for them."
        },
    )
    metrics: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": f"Which of {', '.join(_METRICS)} to report. Left out: those of the task."},
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
        if self.task_name is not None and self.problem_type is not None:
            raise ValueError("--task_name says what the labels are: it excludes --problem_type")
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
    sources = _find_sources(data_args, hub)
    _check_splits(sources, args)
    text_columns = _text_columns(data_args, next(iter(sources.values())))
    columns = (text_columns, data_args.label_column)
    train = _read(sources["train"], *columns) if "train" in sources else None
    labels, why = _labels(data_args, sources["train"].name if train else "", train and train[1], config)
    kind = "regression" if labels.regression else f"{labels.problem_type}, {len(labels.names)} classes"
    logger.info("Labels: %s, since %s", kind, why)
    metrics, combined = _metrics(data_args, labels)
    read: dict[str, Dataset] = {}
    for split, source in sources.items():
        if split not in TEST_SPLITS:
            data, values = train if train and split == "train" else _read(source, *columns)
            read[split] = data.add_column("labels", labels.encode(values, source.name))
        elif args.do_predict:
            read[split], _ = _read(source, text_columns)
    if args.do_eval and "validation" not in read:
        read["train"], read["validation"] = _hold_out(sources["train"].name, read["train"], data_args, args, labels)
    limits = {
        "train": data_args.max_train_samples,
        **dict.fromkeys(VALIDATION_SPLITS, data_args.max_eval_samples),
        **dict.fromkeys(TEST_SPLITS, data_args.max_predict_samples),
    }
    splits = {split: data if limits[split] is None else data.take(limits[split]) for split, data in read.items()}
    logger.info("Rows: %s", ", ".join(f"{split} {len(data)}" for split, data in splits.items()))
    return GlueData(splits, text_columns, labels, metrics, combined)


def names_by_number(config: PreTrainedConfig) -> dict[int, str]:
    """Return the label names of a model's configuration."""
    return {int(number): str(name) for number, name in (config.id2label or {}).items()}


class _Source(NamedTuple):
    """Where the rows of a split come from: the file `name`, or `data` of the Hub."""

    name: str
    columns: list[str]
    data: Dataset | None = None


def _find_sources(data_args: DataArguments, hub: dict[str, str | None]) -> dict[str, _Source]:
    if data_args.files:
        return {split: _Source(path, column_names(path, read_rows(path))) for split, path in data_args.files.items()}
    name = data_args.dataset_name or HUB_NAME
    config = data_args.dataset_config_name or (None if data_args.dataset_name else data_args.task_name)
    called, found = load_splits(name, config, **hub)
    found = {split.removesuffix("_matched"): data for split, data in found.items()}
    names = {split: f"{called}, split {split}" for split in SPLITS if split in found}
    return {split: _Source(name, column_names(name, found[split]), found[split]) for split, name in names.items()}


def _read(source: _Source, texts: Sequence[str], *label: str) -> tuple[Dataset, list[Any]]:
    """Return the texts, checked, and the labels as they are there; of the Hub's classes the names."""
    columns = list(dict.fromkeys(texts))
    if source.data is None:
        rows = list(check_rows(source.name, read_rows(source.name, [*texts, *label]), texts, *label))
        features = Features(dict.fromkeys(columns, Value("string")))
        data = Dataset.from_dict({name: [row[name] for row in rows] for name in columns}, features=features)
        return data, [row[name] for row in rows for name in label]
    wanted = [name for name in dict.fromkeys((*texts, *label)) if name in source.columns]
    rows = list(check_rows(source.name, source.data.select_columns(wanted), texts, *label))
    features = [source.data.features[name] for name in label]
    return source.data.select_columns(columns), [_named(row[name], features[0]) for row in rows for name in label]


def _named(value: Any, feature: Any) -> Any:
    if isinstance(feature, List) and value is not None:
        return [_named(each, feature.feature) for each in value]
    if isinstance(feature, ClassLabel):
        return feature.names[value] if value is not None and value >= 0 else None
    return value


def _check_splits(sources: dict[str, _Source], args: Any) -> None:
    if args.do_train and "train" not in sources:
        raise InputError("--do_train needs training data: give --train_file")
    if args.do_eval and not {"train", "validation"} & sources.keys():
        raise InputError("--do_eval needs validation data: give --validation_file")
    if args.do_predict and "test" not in sources:
        raise InputError("--do_predict needs test data: give --test_file")


def _text_columns(data_args: DataArguments, source: _Source) -> tuple[str, ...]:
    """Return the columns named by flags, or the task's, or else those that go by the usual names."""
    if data_args.text_column is not None:
        return tuple(name for name in (data_args.text_column, data_args.text_pair_column) if name is not None)
    if data_args.task is not None:
        return data_args.task.text_columns
    for usual in (("sentence1", "sentence2"), ("sentence",), ("text",)):
        if set(usual) <= set(source.columns):
            return usual
    columns = ", ".join(source.columns)
    raise InputError(f"{source.name}: which column is the text? Give --text_column, one of {columns}")


def _labels(
    data_args: DataArguments, source: str, train: list[Any] | None, config: PreTrainedConfig
) -> tuple[Labels, str]:
    """Return the labels, and why they are those."""
    if data_args.task is not None:
        return data_args.task.labels, "--task_name says so"
    if train is not None:
        return find_labels(train, source, data_args.problem_type)
    return labels_of_model(names_by_number(config), config.problem_type), "the model was trained so"


def _metrics(data_args: DataArguments, labels: Labels) -> tuple[tuple[str, ...], bool]:
    """Return the names of the metrics, and whether their mean is reported too."""
    if data_args.metrics is None and data_args.task is not None:
        return data_args.task.metrics, len(data_args.task.metrics) > 1
    possible = SCORES_OF[labels.problem_type]
    wanted = tuple(data_args.metrics or DEFAULT_SCORES[labels.problem_type])
    for name in wanted:
        if name not in possible:
            kind = "scores" if labels.regression else "lists of classes" if labels.sets else "classes"
            raise InputError(f"--metrics {name}: for labels that are {kind} there are {', '.join(possible)}")
        if name == "f1" and not labels.sets and len(labels.names) != 2:
            raise InputError(f"--metrics f1 needs two classes, but there are {len(labels.names)}")
    return wanted, False


def _hold_out(
    source: str, train: Dataset, data_args: DataArguments, args: Any, labels: Labels
) -> tuple[Dataset, Dataset]:
    seed = args.seed if args.data_seed is None else args.data_seed
    strata = train["labels"][:] if labels.problem_type == CLASSES else None
    kept, held_out, stratified = split_rows(source, train, data_args.validation_split_percentage, seed, strata)
    logger.info(
        "No validation data: held out %d of the %d rows of %s (%d %%, seed %d, %s)",
        *(len(held_out), len(train), source, data_args.validation_split_percentage, seed),
        "the same share of each label" if stratified else "not stratified by label",
    )
    return kept, held_out
