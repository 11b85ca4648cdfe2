"""Training under the Trainer: what is left to train is trained, and the model, its metrics and its card are left."""

import logging
import math
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer_utils import has_length

from hf_xgrad.outputs.files import STATE_FILE
from hf_xgrad.recipes.input_errors import InputError
from hf_xgrad.recipes.results import RESUMED, read_json, until_trained

logger = logging.getLogger(__name__)


def train(trainer: Trainer, checkpoint: str | None) -> dict[str, float]:
    """Train, from `checkpoint` if there is one, save the model and return the training metrics.

    Where the checkpoint is already the last one of the run, its model is loaded and nothing is trained: the Trainer's
    own resuming would go one step too far if the run ends within an epoch.
    """
    _check_batches(trainer)
    if checkpoint is None:
        return _trained(trainer, None, TrainerState())
    state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
    total = _total_steps(trainer)
    if state.global_step >= total:
        return _load_finished(trainer, Path(checkpoint), state)
    logger.info("Resuming from %s (step %d of %d)", checkpoint, state.global_step, total)
    return _trained(trainer, checkpoint, state) | {RESUMED: state.global_step}


def _trained(trainer: Trainer, checkpoint: str | None, before: TrainerState) -> dict[str, float]:
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    tokens = trainer.state.num_input_tokens_seen - before.num_input_tokens_seen
    if tokens > 0:
        metrics["train_tokens_per_second"] = round(tokens / metrics["train_runtime"], 1)
    # An "internal" call is one that does not push: results and card are still to be written.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if has_length(trainer.train_dataset):
        metrics["train_samples"] = trainer.num_examples(trainer.get_train_dataloader())
    return metrics


def _check_batches(trainer: Trainer) -> None:
    """Refuse what the Trainer would take for a training of no steps."""
    data: Any = trainer.train_dataset
    if trainer.args.dataloader_drop_last and has_length(data) and len(trainer.get_train_dataloader()) == 0:
        raise InputError(
            f"nothing to train on: {len(data)} rows do not make a batch of --per_device_train_batch_size "
            f"{trainer.args.per_device_train_batch_size} for each process: leave out --dataloader_drop_last"
        )


def _total_steps(trainer: Trainer) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = max(1, math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)


def _load_finished(trainer: Trainer, checkpoint: Path, state: TrainerState) -> dict[str, float]:
    best = state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best is not None and Path(best).is_dir():
        checkpoint = Path(best)
    logger.info("Training is complete in %s (step %d): nothing left to train", checkpoint, state.global_step)
    _load_weights(trainer.model, checkpoint)
    results = Path(str(trainer.args.output_dir))
    has_state = (results / STATE_FILE).is_file()
    # That of the folder has the end of the training, too.
    trainer.state = TrainerState.load_from_json(str(results / STATE_FILE)) if has_state else state
    trainer.state.log_history = until_trained(trainer.state.log_history)
    # The card says which one it was.
    trainer.create_optimizer()
    trainer.save_model(_internal_call=True)
    if not has_state:
        trainer.save_state()
    return read_json(results / "train_results.json")


def _load_weights(model: Any, folder: Path) -> None:
    if hasattr(model, "peft_config"):
        import peft

        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))
        return
    stored = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(stored.state_dict())


def record(trainer: Trainer, kind: str, metrics: dict[str, float]) -> dict[str, float]:
    """Show metrics, write them to <kind>_results.json and all_results.json, and return them."""
    if metrics:
        trainer.log_metrics(kind, metrics)
        trainer.save_metrics(kind, metrics)
        if kind == "eval" and trainer.args.do_train:
            # Its log has this evaluation now.
            trainer.save_state()
    return metrics


def write_card(trainer: Trainer, card: dict[str, Any]) -> None:
    """Write the card of a trained model."""
    if not trainer.args.do_train:
        return
    if trainer.args.push_to_hub:
        # Trackers may have something to add to what is pushed.
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    model: Any = trainer.model
    if hasattr(model, "peft_config"):
        # peft rewrites the tags of the card, from those of the model.
        model.get_base_model().add_model_tags(card["tags"])
    trainer.create_model_card(**card)
