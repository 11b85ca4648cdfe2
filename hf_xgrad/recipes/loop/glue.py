"""Fine-tunes a model with XGrad on a GLUE task or on other texts that have labels, in a loop of its own.

    accelerate launch scripts/run_glue_no_trainer.py --model_name_or_path bert-base-cased --task_name mrpc \\
        --do_train --do_eval --output_dir outputs/mrpc --num_train_epochs 3 --baseline

The twin of `hf-xgrad glue` without the Trainer: the same flags (fewer of them), losses and files.
"""

import dataclasses
import inspect
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import EvalPrediction
from transformers.trainer_utils import speed_metrics

from hf_xgrad.recipes.arguments import ModelArguments
from hf_xgrad.recipes.classification.classifier import (
    describe_for_card,
    make_classifier,
    make_collator,
    metrics_function,
    run_classifier,
    write_classes_or_scores,
)
from hf_xgrad.recipes.classification.data import TEST_SPLITS, VALIDATION_SPLITS, DataArguments, GlueData
from hf_xgrad.recipes.input_errors import run_script
from hf_xgrad.recipes.loop.arguments import LoopArguments
from hf_xgrad.recipes.loop.results import make_repository, record, save_model, write_card
from hf_xgrad.recipes.loop.training import make_accelerator, make_loader, train

PROG = "hf-xgrad glue-loop"


@dataclasses.dataclass
class GlueLoopArguments(LoopArguments):
    """The arguments of the loop, and one more."""

    do_predict: bool = dataclasses.field(default=False, metadata={"help": "Write predictions for the test data."})


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run `hf-xgrad glue-loop` and return its exit status. `prog` is what the user called."""
    description = (__doc__ or "").splitlines()[0]
    return run_script(
        prog, lambda words: run_classifier(prog, description, words, GlueLoopArguments, fine_tune), arguments
    )


def fine_tune(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: GlueLoopArguments,
    data: GlueData,
    checkpoint: str | None,
) -> dict[str, float]:
    """Do one run, from the initial weights to the files that it leaves, and return its metrics."""
    accelerator = make_accelerator(args)
    make_repository(args, model_args.model_name_or_path)
    classifier = make_classifier(model_args, data_args, args, data, checkpoint)
    model, tokenizer, numbers = classifier.model, classifier.tokenizer, classifier.numbers
    taken = inspect.signature(model.forward).parameters
    inputs = {
        split: rows.select_columns([n for n in rows.column_names if n in taken])
        for split, rows in classifier.inputs.items()
    }
    mixed = accelerator.mixed_precision != "no"
    collator = make_collator(tokenizer, on_tensor_cores=mixed and accelerator.device.type == "cuda")
    loaders = {
        split: make_loader(accelerator, args, rows, collator, train=False)
        for split, rows in inputs.items()
        if split != "train"
    }
    compute_metrics = metrics_function(data, numbers)

    def evaluate(split: str = "validation") -> dict[str, float]:
        return _evaluate(accelerator, args, model, loaders[split], len(inputs[split]), compute_metrics)

    metrics: dict[str, float] = {}
    if args.do_train:
        trained = train(
            *(accelerator, args, model, inputs["train"], collator),
            # The loss of a window is the mean of its batches' means.
            count_items=len,
            share_of_loss=lambda model, batch, batches: model(**batch).loss / batches,
            evaluate=evaluate,
            checkpoint=checkpoint,
        )
        save_model(accelerator, args, model, tokenizer)
        metrics |= record(args, "train", trained)
    else:
        model = accelerator.prepare_model(model, evaluation_mode=True)
    if args.do_eval:
        found = {name: value for name, value in metrics.items() if name == "epoch"}
        for split, suffix in VALIDATION_SPLITS.items():
            if split in loaders:
                found |= {name + suffix: value for name, value in evaluate(split).items()}
                found[f"eval_samples{suffix}"] = len(inputs[split])
        metrics |= record(args, "eval", found)
    if args.do_predict:
        for split, suffix in TEST_SPLITS.items():
            if split in loaders:
                logits = _outputs(accelerator, args, model, loaders[split])["logits"]
                if accelerator.is_main_process:
                    write_classes_or_scores(Path(args.output_dir), logits, data, data_args, numbers, suffix)
    unwrapped = accelerator.unwrap_model(model)
    write_card(args, unwrapped, tokenizer, model_args.model_name_or_path, describe_for_card(data_args, args))
    return metrics


def _evaluate(
    accelerator: Accelerator,
    args: LoopArguments,
    model: Any,
    loader: Any,
    rows: int,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
) -> dict[str, float]:
    started = time.time()
    outputs = _outputs(accelerator, args, model, loader)
    scores = compute_metrics(EvalPrediction(predictions=outputs["logits"], label_ids=outputs["labels"]))
    scores["loss"] = outputs["losses"].mean().item()
    steps = math.ceil(rows / (args.per_device_eval_batch_size * accelerator.num_processes))
    metrics = {f"eval_{name}": value for name, value in scores.items()}
    return metrics | speed_metrics("eval", started, num_samples=rows, num_steps=steps)


@torch.no_grad()
def _outputs(accelerator: Accelerator, args: LoopArguments, model: Any, loader: Any) -> dict[str, np.ndarray]:
    """Return logits, and where there are labels these and the losses, of all rows and from all processes."""
    model.eval()
    found: dict[str, list[np.ndarray]] = {}
    for batch in loader:
        outputs = model(**batch)
        tensors = {"logits": outputs.logits}
        if "labels" in batch:
            # The mean of a batch stands for each of its rows; the rows that only fill up the last batch are cut off.
            losses = outputs.loss.repeat(args.per_device_eval_batch_size)
            tensors |= {"labels": batch["labels"], "losses": losses}
        for name, tensor in accelerator.gather_for_metrics(tensors).items():
            found.setdefault(name, []).append((tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy())
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


if __name__ == "__main__":
    sys.exit(main())
