"""Sequence classification (and regression) as both GLUE scripts do it: model and labels, tokens, metrics, card."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_xgrad.recipes.arguments import ModelArguments
from hf_xgrad.recipes.classification.data import DataArguments, GlueData, names_by_number
from hf_xgrad.recipes.classification.tasks import HUB_NAME, TextMetric
from hf_xgrad.recipes.input_errors import InputError
from hf_xgrad.recipes.pretrained import ensure_padding, load_config, load_model, load_tokenizer
from hf_xgrad.recipes.results import write_predictions

logger = logging.getLogger(__name__)


def check_wanted(model_args: ModelArguments, args: Any) -> None:
    """Refuse a run without anything to do or anything to do it with. Of `args`, do_* are read."""
    if not (args.do_train or args.do_eval or args.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict")
    if model_args.model_name_or_path is None and not (model_args.config_name and model_args.tokenizer_name):
        raise InputError("no model: give --model_name_or_path, or --config_name and --tokenizer_name for a new one")


def make_classifier(model_args: ModelArguments, data: GlueData) -> tuple[Any, PreTrainedTokenizerBase, list[int]]:
    """Load model and tokenizer; return also the number that the model gives to each of the task's classes."""
    config = load_config(model_args)
    tokenizer = load_tokenizer(model_args)
    ensure_padding(tokenizer, config)
    numbers = _label_config(config, data, model_args)
    model = load_model(AutoModelForSequenceClassification, model_args, config)
    return model, tokenizer, numbers


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
    config.problem_type = "regression" if labels.regression else "single_label_classification"
    if labels.names:
        config.id2label = dict(sorted(zip(numbers, labels.names, strict=True)))
        config.label2id = {name: number for number, name in config.id2label.items()}
    return numbers


def tokenize(
    data: GlueData, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, numbers: Sequence[int]
) -> dict[str, Dataset]:
    """Return the inputs of the model, split by split."""
    length = min(data_args.max_seq_length, tokenizer.model_max_length)
    if length < data_args.max_seq_length:
        logger.warning("--max_seq_length %d is more than the model takes; using %d", data_args.max_seq_length, length)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        features = dict(
            tokenizer(
                *(batch[column] for column in data.text_columns),
                truncation=True,
                max_length=length,
                padding="max_length" if data_args.pad_to_max_length else False,
            )
        )
        if "labels" in batch and not data.labels.regression:
            features["labels"] = [numbers[label] for label in batch["labels"]]
        return features

    return {
        split: dataset.map(
            encode,
            batched=True,
            remove_columns=list(data.text_columns),
            load_from_cache_file=not data_args.overwrite_cache,
            desc=f"tokenizing {split}",
        )
        for split, dataset in data.splits.items()
    }


def make_collator(tokenizer: PreTrainedTokenizerBase, *, on_tensor_cores: bool) -> DataCollatorWithPadding:
    """Return what makes batches: padded to their longest input, and on tensor cores to a multiple of eight."""
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if on_tensor_cores else None)


def _classes_or_scores(predictions: Any, data: GlueData, numbers: Sequence[int]) -> np.ndarray:
    """Return what a model's output says: scores, or classes as the task numbers them."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    if data.labels.regression:
        return np.squeeze(logits, axis=-1)
    return np.argsort(numbers)[np.argmax(logits, axis=-1)]


def metrics_function(data: GlueData, numbers: Sequence[int]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return what computes the metrics of the task from a model's outputs."""
    metric = TextMetric(data.metrics)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        # In the task's numbers, not the model's: F1 is that of the task's class 1.
        references = prediction.label_ids if data.labels.regression else np.argsort(numbers)[prediction.label_ids]
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
