"""Fine-tunes a model with XGrad on a GLUE task, or on any other texts (or pairs of texts) that have labels.

    hf-xgrad glue --model_name_or_path bert-base-cased --task_name mrpc --do_train --do_eval \\
        --output_dir outputs/mrpc --num_train_epochs 3 --baseline

`hf-xgrad glue settings.yaml --seed 3` takes its flags from a file first. See --help for all of them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from hf_xgrad import XGradTrainer, XGradTrainingArguments
from hf_xgrad.outputs.hub import HUB_ERRORS
from hf_xgrad.recipes.arguments import ModelArguments, RunArguments, ScriptParser
from hf_xgrad.recipes.classification.classifier import (
    check_wanted,
    describe_for_card,
    make_classifier,
    make_collator,
    metrics_function,
    tokenize,
    write_classes_or_scores,
)
from hf_xgrad.recipes.classification.data import TEST_SPLITS, VALIDATION_SPLITS, DataArguments, GlueData, read_data
from hf_xgrad.recipes.input_errors import InputError, as_input_error, run_script
from hf_xgrad.recipes.pretrained import load_config
from hf_xgrad.recipes.runs import (
    check_optimizer_flags,
    check_run,
    do_runs,
    plan_runs,
    record,
    set_up_logging,
    train,
    write_card,
)

PROG = "hf-xgrad glue"


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run `hf-xgrad glue` and return its exit status. `prog` is what the user called."""
    return run_script(prog, lambda words: _run(words, prog), arguments)


def _run(arguments: list[str], prog: str) -> None:
    parser = ScriptParser(
        *(ModelArguments, DataArguments, RunArguments, XGradTrainingArguments),
        prog=prog,
        description=(__doc__ or "").splitlines()[0],
    )
    # The Trainer's own default pushes every checkpoint, before there are any results to push with it.
    parser.set_defaults(hub_strategy="end")
    model_args, data_args, run_args, args = parser.parse(arguments)
    set_up_logging(args)
    check_wanted(model_args, args)
    check_run(run_args, args)
    check_optimizer_flags(args)
    runs = plan_runs(parser, arguments, run_args, args, model_args, data_args)
    config = load_config(model_args)
    data = read_data(data_args, args, config, {"cache_dir": model_args.cache_dir, "token": model_args.token})
    _check_best_metric(args, data)
    do_runs(runs, lambda each, checkpoint: fine_tune(model_args, data_args, each, data, checkpoint))


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
    model, tokenizer, numbers = make_classifier(model_args, data)
    # BERT's forward takes **kwargs, so that the Trainer believes it to divide its loss by the items of the whole
    # accumulation window. It does not, and the loss would come out multiplied by the accumulation steps.
    model.accepts_loss_kwargs = False
    with args.main_process_first(desc="tokenizing"):
        inputs = tokenize(data, tokenizer, data_args, numbers)
    trainer = _make_trainer(model, tokenizer, args, data, inputs, numbers)
    metrics: dict[str, float] = {}
    if args.do_train:
        metrics |= record(trainer, "train", train(trainer, checkpoint))
    if args.do_eval:
        metrics |= record(trainer, "eval", _evaluate(trainer, inputs))
    if args.do_predict:
        _predict(trainer, inputs, data, data_args, numbers)
    write_card(trainer, describe_for_card(data_args, args))
    return metrics


def _make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: XGradTrainingArguments,
    data: GlueData,
    inputs: dict[str, Dataset],
    numbers: Sequence[int],
) -> XGradTrainer:
    on_tensor_cores = (args.fp16 or args.bf16) and args.device.type == "cuda"
    with as_input_error(ImportError, *HUB_ERRORS):
        return XGradTrainer(
            model=model,
            args=args,
            train_dataset=inputs.get("train") if args.do_train else None,
            eval_dataset=inputs.get("validation") if args.do_eval else None,
            compute_metrics=metrics_function(data, numbers),
            processing_class=tokenizer,
            data_collator=make_collator(tokenizer, on_tensor_cores=on_tensor_cores),
        )


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
        if trainer.is_world_process_zero():
            folder = Path(str(trainer.args.output_dir))
            write_classes_or_scores(folder, logits, data, data_args, numbers, suffix)


if __name__ == "__main__":
    sys.exit(main())
