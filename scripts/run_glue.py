"""Fine-tunes a model with XGrad on a GLUE task, or on any other texts (or pairs of texts) that have labels.

    python scripts/run_glue.py --model_name_or_path bert-base-cased --task_name mrpc --do_train --do_eval \\
        --output_dir outputs/mrpc --num_train_epochs 3 --baseline

`run_glue.py settings.yaml --seed 3` takes its flags from a file first. See --help for all of them.
"""

import logging
import sys
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
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from glue_data import TEST_SPLITS, VALIDATION_SPLITS, DataArguments, GlueData, names_by_number, read_data
from glue_tasks import HUB_NAME, TextMetric
from hf_xgrad import XGradTrainer, XGradTrainingArguments
from pretrained import ensure_padding, load_config, load_model, load_tokenizer
from run_results import write_predictions
from script_arguments import InputError, ModelArguments, RunArguments, ScriptParser, as_input_error, run_script
from training_runs import (
    check_optimizer_flags,
    check_run,
    finish,
    record,
    run_with_baseline,
    set_up_logging,
    train,
)

PROG = "run_glue.py"

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(PROG, _run, arguments)


def _run(arguments: list[str]) -> None:
    parser = ScriptParser(
        *(ModelArguments, DataArguments, RunArguments, XGradTrainingArguments),
        prog=PROG,
        description=(__doc__ or "").splitlines()[0],
    )
    # The Trainer's own default pushes every checkpoint, before there are any results to push with it.
    parser.set_defaults(hub_strategy="end")
    model_args, data_args, run_args, args = parser.parse(arguments)
    set_up_logging(args, __name__, "glue_data")
    _check(model_args, run_args, args)
    config = load_config(model_args)
    data = read_data(data_args, args, config, {"cache_dir": model_args.cache_dir, "token": model_args.token})
    _check_best_metric(args, data)
    run_with_baseline(
        *(parser, arguments, run_args, args),
        lambda each, checkpoint: fine_tune(model_args, data_args, each, data, checkpoint),
    )


def _check(model_args: ModelArguments, run_args: RunArguments, args: XGradTrainingArguments) -> None:
    if not (args.do_train or args.do_eval or args.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict")
    if model_args.model_name_or_path is None and not (model_args.config_name and model_args.tokenizer_name):
        raise InputError("no model: give --model_name_or_path, or --config_name and --tokenizer_name for a new one")
    check_run(run_args, args)
    check_optimizer_flags(args)


def _check_best_metric(args: XGradTrainingArguments, data: GlueData) -> None:
    wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss", *data.metrics, *(["combined_score"] if data.combined else [])]
    if wanted not in known:
        raise InputError(f"--metric_for_best_model {wanted} is not one of {', '.join(known)}")


def fine_tune(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: XGradTrainingArguments,
    data: GlueData,
    checkpoint: str | None,
) -> dict[str, float]:
    """Do one run, from the initial weights to the files that it leaves, and return its metrics."""
    # The new head is drawn from this: two runs with the same seed start from the same weights.
    set_seed(args.seed)
    config = load_config(model_args)
    tokenizer = load_tokenizer(model_args)
    ensure_padding(tokenizer, config)
    numbers = _label_config(config, data, model_args)
    model = load_model(AutoModelForSequenceClassification, model_args, config)
    # BERT's forward takes **kwargs, so that the Trainer believes it to divide its loss by the items of the whole
    # accumulation window. It does not, and the loss would come out multiplied by the accumulation steps.
    model.accepts_loss_kwargs = False
    with args.main_process_first(desc="tokenizing"):
        inputs = _tokenize(data, tokenizer, data_args, numbers)
    trainer = _make_trainer(model, tokenizer, args, data, inputs, numbers)
    metrics: dict[str, float] = {}
    if args.do_train:
        metrics |= record(trainer, "train", train(trainer, checkpoint))
    if args.do_eval:
        metrics |= record(trainer, "eval", _evaluate(trainer, inputs))
    if args.do_predict:
        _predict(trainer, inputs, data, data_args, numbers)
    finish(trainer, _card(data_args, args))
    return metrics


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


def _tokenize(
    data: GlueData, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, numbers: Sequence[int]
) -> dict[str, Dataset]:
    length = min(data_args.max_seq_length, tokenizer.model_max_length)
    if length < data_args.max_seq_length:
        logger.warning("--max_seq_length %d is more than the model takes; using %d", data_args.max_seq_length, length)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
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
            tokenize,
            batched=True,
            remove_columns=list(data.text_columns),
            load_from_cache_file=not data_args.overwrite_cache,
            desc=f"tokenizing {split}",
        )
        for split, dataset in data.splits.items()
    }


def _make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: XGradTrainingArguments,
    data: GlueData,
    inputs: dict[str, Dataset],
    numbers: Sequence[int],
) -> XGradTrainer:
    # Tensor cores want lengths that are multiples of eight.
    multiple = 8 if (args.fp16 or args.bf16) and args.device.type == "cuda" else None
    with as_input_error(ValueError, ImportError):
        return XGradTrainer(
            model=model,
            args=args,
            train_dataset=inputs.get("train") if args.do_train else None,
            eval_dataset=inputs.get("validation") if args.do_eval else None,
            compute_metrics=_metrics_function(data, numbers),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple),
        )


def _classes_or_scores(predictions: Any, data: GlueData, numbers: Sequence[int]) -> np.ndarray:
    """Return what a model's output says: scores, or classes as the task numbers them."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    if data.labels.regression:
        return np.squeeze(logits, axis=-1)
    return np.argsort(numbers)[np.argmax(logits, axis=-1)]


def _metrics_function(data: GlueData, numbers: Sequence[int]) -> Callable[[EvalPrediction], dict[str, float]]:
    metric = TextMetric(data.metrics)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        # In the task's numbers, not the model's: F1 is that of the task's class 1.
        references = prediction.label_ids if data.labels.regression else np.argsort(numbers)[prediction.label_ids]
        predictions = _classes_or_scores(prediction.predictions, data, numbers)
        scores = metric.compute(predictions=predictions, references=references)
        return {**scores, "combined_score": float(np.mean(list(scores.values())))} if data.combined else scores

    return compute_metrics


def _evaluate(trainer: Trainer, inputs: dict[str, Dataset]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for split, suffix in VALIDATION_SPLITS.items():
        if split in inputs:
            found = trainer.evaluate(inputs[split])
            metrics |= {name if name == "epoch" else name + suffix: value for name, value in found.items()}
            metrics[f"eval_samples{suffix}"] = len(inputs[split])
    return metrics


def _predict(
    trainer: Trainer, inputs: dict[str, Dataset], data: GlueData, data_args: DataArguments, numbers: Sequence[int]
) -> None:
    for split, suffix in TEST_SPLITS.items():
        if split not in inputs:
            continue
        logits = trainer.predict(inputs[split], metric_key_prefix="predict").predictions
        values = data.labels.decode(_classes_or_scores(logits, data, numbers))
        task = f"_{data_args.task_name}{suffix}" if data_args.task_name else ""
        if trainer.is_world_process_zero():
            write_predictions(Path(str(trainer.args.output_dir)) / f"predict_results{task}.tsv", values)


def _card(data_args: DataArguments, args: XGradTrainingArguments) -> dict[str, Any]:
    card: dict[str, Any] = {"tasks": "text-classification", "tags": ["xgrad"] if args.xgrad else []}
    if data_args.task is not None:
        return card | {
            "language": "en",
            "dataset": f"GLUE {data_args.task.title}",
            "dataset_tags": HUB_NAME,
            "dataset_args": data_args.task_name,
        }
    files = ", ".join(Path(path).name for path in data_args.files.values())
    return card | {"dataset": data_args.dataset_name or files}


if __name__ == "__main__":
    sys.exit(main())
