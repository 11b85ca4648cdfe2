"""Trains a causal language model with XGrad in a loop of its own: fine-tunes one, or pretrains a new one.

    accelerate launch scripts/run_clm_no_trainer.py --model_name_or_path openai-community/gpt2 \\
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --do_train --do_eval \\
        --output_dir outputs/wikitext --baseline

The twin of `hf-xgrad clm` without the Trainer: the same flags (fewer of them), losses and files.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import set_seed
from transformers.trainer_utils import speed_metrics

from hf_xgrad.recipes.input_errors import InputError, run_script
from hf_xgrad.recipes.language.batches import IGNORED
from hf_xgrad.recipes.language.clm import CAUSAL, SampleArguments, write_sample
from hf_xgrad.recipes.language.modeling import (
    Prepared,
    describe_for_card,
    make_language_model,
    run_language_model,
    tell_both_ends,
)
from hf_xgrad.recipes.language.scores import TokenScores, mean_loss, score_rows
from hf_xgrad.recipes.loop.arguments import LoopArguments
from hf_xgrad.recipes.loop.results import make_repository, record, save_model, write_card
from hf_xgrad.recipes.loop.training import Batch, make_accelerator, make_loader, train
from hf_xgrad.recipes.results import first_logged, read_log

PROG = "hf-xgrad clm-loop"


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run `hf-xgrad clm-loop` and return its exit status. `prog` is what the user called."""
    objective = dataclasses.replace(
        CAUSAL,
        description=(__doc__ or "").splitlines()[0],
        embedded={**CAUSAL.embedded, "output_dir": "outputs/clm_no_trainer"},
    )
    body = partial(
        run_language_model,
        *(prog, objective),
        run=pretrain_or_fine_tune,
        kind_of_arguments=LoopArguments,
        further=[SampleArguments],
    )
    return run_script(prog, body, arguments)


def pretrain_or_fine_tune(
    prepared: Prepared, args: LoopArguments, checkpoint: str | None, sample_args: SampleArguments
) -> dict[str, float]:
    """Do one run, from the initial weights to the files that it leaves, and return its metrics."""
    accelerator = make_accelerator(args)
    make_repository(args, prepared.model_args.model_name_or_path)
    # New weights are drawn from this: two runs with the same seed start from the same ones.
    set_seed(args.seed)
    model = make_language_model(prepared)
    if getattr(model.config, "output_router_logits", False):
        raise InputError("this loop leaves out what a mixture of experts adds to its loss; `hf-xgrad clm` has it")
    rows = prepared.blocks.get("validation")
    loader = None if rows is None else make_loader(accelerator, args, rows, prepared.collator, train=False)

    def count_tokens(window: list[Batch]) -> torch.Tensor:
        tokens = sum((batch["labels"] != IGNORED).sum() for batch in window)
        return accelerator.gather(tokens).sum()

    def share_of_loss(model: Any, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        # Every token counts the same, also between processes, of whose gradients DDP takes the mean.
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        loss = mean_loss(model(**inputs).logits, batch["labels"], tokens, shifted=True)
        return loss * accelerator.num_processes

    def evaluate() -> dict[str, float]:
        return _evaluate(accelerator, args, model, loader)

    metrics: dict[str, float] = {}
    if args.do_train:
        trained = train(
            *(accelerator, args, model, prepared.blocks["train"], prepared.collator),
            count_items=count_tokens,
            share_of_loss=share_of_loss,
            evaluate=evaluate,
            checkpoint=checkpoint,
        )
        save_model(accelerator, args, model, prepared.tokenizer)
        metrics |= record(args, "train", trained)
    else:
        model = accelerator.prepare_model(model, evaluation_mode=True)
    if args.do_eval:
        found = {name: value for name, value in metrics.items() if name == "epoch"} | evaluate()
        if args.do_train and args.eval_on_start and accelerator.is_main_process:
            found["eval_perplexity_at_start"] = first_logged(read_log(Path(args.output_dir)), "eval_perplexity")
            tell_both_ends(found)
        metrics |= record(args, "eval", found)
    write_sample(accelerator, model, prepared.tokenizer, sample_args, args)
    library = "peft" if prepared.model_args.lora else "transformers"
    card = describe_for_card(prepared, args) | {"library_name": library}
    unwrapped = accelerator.unwrap_model(model)
    write_card(args, unwrapped, prepared.tokenizer, prepared.model_args.model_name_or_path, card)
    return metrics


@torch.no_grad()
def _evaluate(accelerator: Accelerator, args: LoopArguments, model: Any, loader: Any) -> dict[str, float]:
    started, scores = time.time(), TokenScores()
    model.eval()
    for batch in loader:
        labels = batch.pop("labels")
        rows = score_rows(model(**batch).logits, labels, shifted=True)
        # The rows that only fill up the last batch are cut off.
        scores.add(accelerator.gather_for_metrics(rows))
    count = len(loader.dataset)
    steps = math.ceil(count / (args.per_device_eval_batch_size * accelerator.num_processes))
    metrics = {f"eval_{name}": value for name, value in scores.result().items()}
    return metrics | speed_metrics("eval", started, num_samples=count, num_steps=steps)


if __name__ == "__main__":
    sys.exit(main())
