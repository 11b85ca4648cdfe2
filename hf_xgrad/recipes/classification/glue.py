"""Fine-tunes a model with XGrad on a GLUE task, or on any other texts (or pairs of texts) that have labels.

    hf-xgrad glue --model_name_or_path bert-base-cased --task_name mrpc --do_train --do_eval \\
        --output_dir outputs/mrpc --num_train_epochs 3 --baseline

`hf-xgrad glue settings.yaml --seed 3` takes its flags from a file first. See --help for all of them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import Trainer

from hf_xgrad import XGradTrainer, XGradTrainingArguments
from hf_xgrad.outputs.hub import HUB_ERRORS
from hf_xgrad.recipes.arguments import ModelArguments
from hf_xgrad.recipes.classification.classifier import (
    Classifier,
    describe_for_card,
    make_classifier,
    make_collator,
    metrics_function,
    run_classifier,
    write_classes_or_scores,
)
from hf_xgrad.recipes.classification.data import TEST_SPLITS, VALIDATION_SPLITS, DataArguments, GlueData
from hf_xgrad.recipes.input_errors import as_input_error, run_script
from hf_xgrad.recipes.training import record, train, write_card

PROG = "hf-xgrad glue"


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run `hf-xgrad glue` and return its exit status. `prog` is what the user called."""
    description = (__doc__ or "").splitlines()[0]
    return run_script(
        prog, lambda words: run_classifier(prog, description, words, XGradTrainingArguments, fine_tune), arguments
    )


def fine_tune(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: XGradTrainingArguments,
    data: GlueData,
    checkpoint: str | None,
) -> dict[str, float]:
    """Do one run, from the initial weights to the files that it leaves, and return its metrics."""
    classifier = make_classifier(model_args, data_args, args, data, checkpoint)
    # BERT's forward takes **kwargs, so that the Trainer believes it to divide its loss by the items of the whole
    # accumulation window. It does not, and the loss would come out multiplied by the accumulation steps.
    classifier.model.accepts_loss_kwargs = False
    trainer = _make_trainer(classifier, args, data)
    metrics: dict[str, float] = {}
    if args.do_train:
        metrics |= record(trainer, "train", train(trainer, checkpoint))
    if args.do_eval:
        metrics |= record(trainer, "eval", _evaluate(trainer, classifier))
    if args.do_predict:
        _predict(trainer, classifier, data, data_args)
    write_card(trainer, describe_for_card(data_args, args))
    return metrics


def _make_trainer(classifier: Classifier, args: XGradTrainingArguments, data: GlueData) -> XGradTrainer:
    on_tensor_cores = (args.fp16 or args.bf16) and args.device.type == "cuda"
    with as_input_error(ImportError, *HUB_ERRORS):
        return XGradTrainer(
            model=classifier.model,
            args=args,
            train_dataset=classifier.inputs.get("train") if args.do_train else None,
            eval_dataset=classifier.inputs.get("validation") if args.do_eval else None,
            compute_metrics=metrics_function(data, classifier.numbers),
            processing_class=classifier.tokenizer,
            data_collator=make_collator(classifier.tokenizer, on_tensor_cores=on_tensor_cores),
        )


def _evaluate(trainer: Trainer, classifier: Classifier) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for split, suffix in VALIDATION_SPLITS.items():
        if split in classifier.inputs:
            found = trainer.evaluate(classifier.inputs[split])
            metrics |= {name if name == "epoch" else name + suffix: value for name, value in found.items()}
            metrics[f"eval_samples{suffix}"] = len(classifier.inputs[split])
    return metrics


def _predict(trainer: Trainer, classifier: Classifier, data: GlueData, data_args: DataArguments) -> None:
    for split, suffix in TEST_SPLITS.items():
        if split not in classifier.inputs:
            continue
        logits = trainer.predict(classifier.inputs[split], metric_key_prefix="predict").predictions
        if trainer.is_world_process_zero():
            folder = Path(str(trainer.args.output_dir))
            write_classes_or_scores(folder, logits, data, data_args, classifier.numbers, suffix)


if __name__ == "__main__":
    sys.exit(main())
