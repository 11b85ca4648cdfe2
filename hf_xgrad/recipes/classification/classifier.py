"""Sequence classification (and regression) as both GLUE scripts do it: model and labels, tokens, metrics, card."""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    CONFIG_NAME,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_xgrad.recipes.arguments import ModelArguments, RunArguments
from hf_xgrad.recipes.classification.data import DataArguments, GlueData, names_by_number, read_data
from hf_xgrad.recipes.classification.tasks import HUB_NAME, TextMetric
from hf_xgrad.recipes.input_errors import InputError
from hf_xgrad.recipes.pretrained import (
    ensure_padding_token,
    fit_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    most_tokens,
)
from hf_xgrad.recipes.results import write_predictions
from hf_xgrad.recipes.runs import check_run, do_runs, make_parser, plan_runs, set_up_logging

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model, its tokenizer, what it is given of each split, and the number that it has for each of the classes."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    inputs: dict[str, Dataset]
    numbers: list[int]


def run_classifier(
    prog: str,
    description: str,
    arguments: list[str],
    kind_of_arguments: type,
    fine_tune: Callable[[ModelArguments, DataArguments, Any, GlueData, str | None], dict[str, float]],
) -> None:
    """Do what a command line asks for.

    `kind_of_arguments` are those of the Trainer or of the loop; `fine_tune` does one run, from the initial weights, or
    a checkpoint, to the files that it leaves, and returns its metrics.
    """
    kinds = (ModelArguments, DataArguments, RunArguments, kind_of_arguments)
    parser = make_parser(prog, description, *kinds)
    model_args, data_args, run_args, args = parser.parse(arguments)
    set_up_logging(args)
    _check_wanted(model_args, args)
    check_run(run_args, args)
    runs = plan_runs(parser, arguments, run_args, args, model_args, data_args)
    config = load_config(model_args)
    data = read_data(data_args, args, config, {"cache_dir": model_args.cache_dir, "token": model_args.token})
    if isinstance(args, TrainingArguments):
        _check_best_metric(args, data)
    do_runs(runs, lambda each, checkpoint: fine_tune(model_args, data_args, each, data, checkpoint))


def _check_best_metric(args: TrainingArguments, data: GlueData) -> None:
    wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss"]
    if not args.prediction_loss_only:
        known += [*data.metrics, *(["combined_score"] if data.combined else [])]
    if wanted not in known:
        raise InputError(f"--metric_for_best_model {wanted} is not one of {', '.join(known)}")


def _check_wanted(model_args: ModelArguments, args: Any) -> None:
    """Refuse a run without anything to do or anything to do it with."""
    if not (args.do_train or args.do_eval or args.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict")
    if model_args.model_name_or_path is None and not (model_args.config_name and model_args.tokenizer_name):
        raise InputError("no model: give --model_name_or_path, or --config_name and --tokenizer_name for a new one")
    if args.do_predict and getattr(args, "prediction_loss_only", False):
        raise InputError("--prediction_loss_only leaves nothing to write: it excludes --do_predict")


def make_classifier(
    model_args: ModelArguments, data_args: DataArguments, args: Any, data: GlueData, checkpoint: str | None
) -> Classifier:
    """Load model and tokenizer, and encode the data. Of `args`, seed and main_process_first are read."""
    # The new head is drawn from this: two runs with the same seed start from the same weights.
    set_seed(args.seed)
    config = load_config(model_args)
    tokenizer = load_tokenizer(model_args)
    ensure_padding_token(tokenizer)
    if config.pad_token_id is None and tokenizer.pad_token_id < getattr(config, "vocab_size", math.inf):
        config.pad_token_id = tokenizer.pad_token_id
    numbers = _label_config(config, data, model_args)
    _check_classes(config, checkpoint)
    model = load_model(AutoModelForSequenceClassification, model_args, config)
    fit_tokenizer(model, tokenizer)
    with args.main_process_first(desc="tokenizing"):
        return Classifier(model, tokenizer, _tokenize(data, model, tokenizer, data_args, numbers), numbers)


def _label_config(config: PreTrainedConfig, data: GlueData, model_args: ModelArguments) -> list[int]:
    """Put the labels into `config`; return the number that the model gives to each of the task's classes."""
    labels = data.labels
    count = max(1, len(labels.names))
    has_head = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    fits = config.num_labels == count or model_args.ignore_mismatched_sizes
    if model_args.model_name_or_path and has_head and not fits:
        raise InputError(
            f"{model_args.model_name_or_path} was fine-tuned for {config.num_labels} labels, the data have {count}: "
            "--ignore_mismatched_sizes gives it a new head"
        )
    numbers = labels.numbers_in(names_by_number(config))
    config.num_labels = count
    config.problem_type = labels.problem_type
    if labels.names:
        config.id2label = dict(sorted(zip(numbers, labels.names, strict=True)))
        config.label2id = {name: number for number, name in config.id2label.items()}
    return numbers


def _check_classes(config: PreTrainedConfig, checkpoint: str | None) -> None:
    """Refuse to go on with a head for other classes than those of the data: they would go by wrong names."""
    if checkpoint is None or not (Path(checkpoint) / CONFIG_NAME).is_file():
        return
    trained = PreTrainedConfig.from_pretrained(checkpoint)
    theirs, ours = _classes(trained), _classes(config)
    if theirs != ours:
        raise InputError(
            f"{checkpoint} was trained for {_listed(theirs)}, but the data have {_listed(ours)} now: name a new "
            "--output_dir, or bring back the data"
        )


def _classes(config: PreTrainedConfig) -> list[str]:
    if config.problem_type == "regression":
        return ["a score"]
    names = [name for _, name in sorted(names_by_number(config).items())]
    return names if config.problem_type != "multi_label_classification" else ["any of", *names]


def _listed(names: Sequence[str], most: int = 30) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} classes)" if len(names) > most else "")


def _tokenize(
    data: GlueData,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    numbers: Sequence[int],
) -> dict[str, Dataset]:
    """Return the inputs of the model, split by split."""
    length = min(data_args.max_seq_length, most_tokens(tokenizer, model.config, model))
    if length < data_args.max_seq_length:
        logger.warning("--max_seq_length %d is more than the model takes; using %d", data_args.max_seq_length, length)
    added = tokenizer.num_special_tokens_to_add(pair=len(data.text_columns) > 1)
    if length <= added:
        raise InputError(f"--max_seq_length {length} has no room for a text beside {added} special tokens")

    def tokens_of(*texts: list[str]) -> dict[str, list[Any]]:
        padding = "max_length" if data_args.pad_to_max_length else False
        return dict(tokenizer(*texts, truncation=True, max_length=length, padding=padding))

    def encode(batch: dict[str, list[Any]], rows: list[int], split: str) -> dict[str, Any]:
        texts = [batch[column] for column in data.text_columns]
        features = tokens_of(*texts)
        for place, row in enumerate(rows):
            # A model has no answer to no tokens at all: what is empty is read as a blank.
            if _is_empty(features, place):
                blank = tokens_of(*([" "] for _ in texts))
                if _is_empty(blank, 0):
                    raise InputError(f"row {row + 1} of {split} is empty to the tokenizer {tokenizer.name_or_path}")
                for name, values in blank.items():
                    features[name][place] = values[0]
        if "labels" in batch:
            features["labels"] = data.labels.for_model(batch["labels"], numbers)
        return features

    return {
        split: dataset.map(
            encode,
            batched=True,
            with_indices=True,
            fn_kwargs={"split": split},
            remove_columns=list(data.text_columns),
            load_from_cache_file=not data_args.overwrite_cache,
            desc=f"tokenizing {split}",
        )
        for split, dataset in data.splits.items()
    }


def _is_empty(features: dict[str, list[Any]], row: int) -> bool:
    masks = features.get("attention_mask")
    return not any(masks[row]) if masks else not features["input_ids"][row]


def make_collator(tokenizer: PreTrainedTokenizerBase, *, on_tensor_cores: bool) -> DataCollatorWithPadding:
    """Return what makes batches: padded to their longest input, and on tensor cores to a multiple of eight."""
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if on_tensor_cores else None)


def _classes_or_scores(predictions: Any, data: GlueData, numbers: Sequence[int]) -> np.ndarray:
    """Return what a model's output says: scores, or classes as the task numbers them."""
    return data.labels.of_model(predictions[0] if isinstance(predictions, tuple) else predictions, numbers)


def metrics_function(data: GlueData, numbers: Sequence[int]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return what computes the metrics of the task from a model's outputs."""
    metric = TextMetric(data.metrics, data.labels.problem_type)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        # In the task's numbers, not the model's: F1 is that of the task's class 1.
        references = data.labels.of_model(prediction.label_ids, numbers, logits=False)
        predictions = _classes_or_scores(prediction.predictions, data, numbers)
        scores = metric.compute(predictions=predictions, references=references)
        return {**scores, "combined_score": float(np.mean(list(scores.values())))} if data.combined else scores

    return compute_metrics


def write_classes_or_scores(
    folder: Path, predictions: Any, data: GlueData, data_args: DataArguments, numbers: Sequence[int], suffix: str
) -> None:
    """Write what a model says of a test split, in the task's own names, to predict_results*.tsv."""
    values = data.labels.decode(_classes_or_scores(predictions, data, numbers))
    task = f"_{data_args.task_name}{suffix}" if data_args.task_name else ""
    write_predictions(folder / f"predict_results{task}.tsv", values)


def describe_for_card(data_args: DataArguments, args: Any) -> dict[str, Any]:
    """Return what the model card says of task and data. Of `args`, xgrad is read."""
    card: dict[str, Any] = {"tasks": "text-classification", "tags": ["xgrad"] if args.xgrad else []}
    task, files = data_args.task, data_args.files
    if task is not None and not files:
        on_hub = {"dataset_tags": HUB_NAME, "dataset_args": data_args.task_name}
        return card | on_hub | {"language": "en", "dataset": f"GLUE {task.title}"}
    # What files hold nobody knows: their scores are not those of GLUE.
    trained_on = Path(files["train"]).name if "train" in files else None
    named = f"{trained_on} (as GLUE {task.title})" if task is not None and trained_on else trained_on
    return card | {"dataset": data_args.dataset_name or named}
