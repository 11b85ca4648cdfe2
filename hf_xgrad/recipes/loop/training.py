"""A training loop in plain PyTorch and Accelerate, with XGrad: what glue-loop and clm-loop share.

Flags have the names, the defaults and the meaning that they have for the Trainer, and so have the files of a run. On
the same seed the losses are those of the Trainer.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, DistributedType, GradientAccumulationPlugin, ProjectConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, set_seed
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_utils import rotate_checkpoints, speed_metrics

from hf_xgrad import WeightPredictor, XGradConfig
from hf_xgrad.outputs.checkpoints import begin_writing, writing
from hf_xgrad.outputs.files import STATE_FILE
from hf_xgrad.recipes.input_errors import InputError, as_input_error
from hf_xgrad.recipes.loop.arguments import LoopArguments, Strategy, make_optimizer, make_schedule
from hf_xgrad.recipes.results import RESUMED, read_json

Batch = dict[str, Tensor]
logger = logging.getLogger(__name__)


def make_accelerator(args: LoopArguments) -> Accelerator:
    """Make the Accelerator; refuse what it, or the loop, cannot do here."""
    folder = Path(args.output_dir)
    with as_input_error(ValueError, ImportError):
        accelerator = Accelerator(
            cpu=args.use_cpu,
            mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else None,
            # The loop itself sees to the short last window of an epoch.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            # Every process shuffles alike, from the seed and the number of the epoch.
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.data_seed),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not args.gradient_checkpointing)],
            log_with=None if "none" in args.report_to else args.report_to,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "runs")),
        )
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise InputError(f"this loop runs on one device or under DDP, not under {kind.value}")
    return accelerator


def make_loader(
    accelerator: Accelerator, args: LoopArguments, data: Any, collator: Callable[..., Any], *, train: bool
) -> DataLoader[Any]:
    """Make the batches of a data set; to train on, in a new order every epoch."""
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_size=args.per_device_train_batch_size if train else args.per_device_eval_batch_size,
        shuffle=train,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
    )
    prepared: DataLoader[Any] = accelerator.prepare(loader)
    return prepared


def train(
    accelerator: Accelerator,
    args: LoopArguments,
    model: Any,
    data: Any,
    collator: Callable[..., Any],
    *,
    count_items: Callable[[list[Batch]], Any],
    share_of_loss: Callable[[nn.Module, Batch, Any], Tensor],
    evaluate: Callable[[], dict[str, float]],
    checkpoint: str | None,
) -> dict[str, float]:
    """Train `model`, from `checkpoint` if there is one, and return the training metrics.

    Args:
        count_items: what the loss of a window of batches (those of one optimizer step) is an average over.
        share_of_loss: `(model, batch, count_items(window)) -> ` what a batch adds to the loss of its window.
        evaluate: is called where the flags say so.
    """
    # As under the Trainer, dropout is drawn from here on, whatever was drawn to make the model.
    set_seed(args.seed)
    loader = make_loader(accelerator, args, data, collator, train=True)
    window_size = args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(loader) / window_size)
    max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    if hasattr(model.config, "use_cache"):
        # Keys and values are kept to generate from, not to train.
        model.config.use_cache = False
    if args.gradient_checkpointing:
        # Newer Transformers call it by the first name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    model, optimizer = accelerator.prepare(model, make_optimizer(model, args))
    # Not prepared: a prepared schedule makes as many steps at a time as there are processes.
    schedule = make_schedule(optimizer, args, max_steps)
    predictor = WeightPredictor(optimizer, XGradConfig.from_args(args), model)
    accelerator.register_for_checkpointing(schedule, predictor)

    state = TrainerState() if checkpoint is None else TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
    state.max_steps, state.num_train_epochs = max_steps, math.ceil(max_steps / steps_per_epoch)
    state.train_batch_size = args.per_device_train_batch_size
    state.compute_steps(args, max_steps)
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        if state.global_step >= max_steps:
            logger.info("Training is complete in %s (step %d): nothing left to train", checkpoint, state.global_step)
            # A run may have been stopped between its last checkpoint and its end.
            folder = Path(args.output_dir)
            if accelerator.is_main_process and not (folder / STATE_FILE).is_file():
                state.save_to_json(str(folder / STATE_FILE))
            return read_json(folder / "train_results.json")
        logger.info("Resuming from %s (step %d of %d)", checkpoint, state.global_step, max_steps)
    log = _Log(accelerator, args, state)
    if args.eval_on_start and checkpoint is None:
        log.write(evaluate())

    loss_of_steps = torch.zeros((), device=accelerator.device)
    try:
        for epoch in range(state.global_step // steps_per_epoch, state.num_train_epochs):
            done = state.global_step % steps_per_epoch * window_size
            for window in _windows(loader, epoch, window_size, skip=done):
                step = state.global_step + 1
                ends = step == max_steps or step % steps_per_epoch == 0
                logs = _is_due(args.logging_strategy, state.logging_steps, step, ends)
                logs = logs or (args.logging_first_step and step == 1)
                predictor.measure(logs)

                model.train()
                items = count_items(window)
                # accumulate() lets the optimizer step whenever this count is a multiple of the window's size; the last
                # window of an epoch may have fewer batches than others, and starts nearer to it.
                accelerator.step = window_size - len(window)
                for batch in window:
                    with accelerator.accumulate(model):
                        with predictor.predicted():
                            loss = share_of_loss(model, batch, items)
                            # backward() divides by the size of a full window, `loss` is a share already.
                            accelerator.backward(loss * window_size)
                        loss_of_steps += loss.detach()
                        if accelerator.sync_gradients:
                            grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                        optimizer.step()
                        optimizer.zero_grad()
                learning_rate = optimizer.param_groups[0]["lr"]
                if not accelerator.optimizer_step_was_skipped:
                    schedule.step()

                done += len(window)
                state.global_step, state.epoch = step, epoch + done / len(loader)
                log.tell("on_step_end")
                if logs:
                    log.write_step(loss_of_steps, grad_norm, learning_rate, predictor.diagnostics())
                last_of_steps = step == max_steps
                if _is_due(args.eval_strategy, state.eval_steps, step, ends, also=last_of_steps):
                    log.write(evaluate())
                if _is_due(args.save_strategy, state.save_steps, step, ends, also=last_of_steps):
                    _save_checkpoint(accelerator, args, state, model)
                if step == max_steps:
                    break
    finally:
        # A signal may come between the end of the prediction's body and its way out.
        predictor.restore()

    metrics = log.finish(loss_of_steps, len(data))
    if accelerator.is_main_process:
        state.save_to_json(str(Path(args.output_dir) / STATE_FILE))
    return metrics


def _windows(loader: Any, epoch: int, size: int, *, skip: int) -> Iterator[list[Batch]]:
    """Yield the batches of an epoch, but for the first `skip`, as many at a time as an optimizer step takes."""
    if skip:
        loader = skip_first_batches(loader, skip)
    loader.set_epoch(epoch)
    batches = iter(loader)
    # To start an iterator takes a random number. In the middle of an epoch that was done before.
    with torch.random.fork_rng(devices=[], enabled=skip > 0):
        window = list(islice(batches, size))
    while window:
        yield window
        window = list(islice(batches, size))


def _is_due(strategy: Strategy, every: float, step: int, ends_epoch: bool, *, also: bool = False) -> bool:
    """Tell what follows a step, as the Trainer has it; `also` adds a step to those that "steps" stands for."""
    if strategy == "steps":
        return step % every == 0 or also
    return strategy == "epoch" and ends_epoch


def _save_checkpoint(accelerator: Accelerator, args: LoopArguments, state: TrainerState, model: Any) -> None:
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    with writing(str(folder), args.output_dir):
        if accelerator.is_main_process:
            begin_writing(str(folder))
        accelerator.wait_for_everyone()
        accelerator.save_state(str(folder))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            # It has the classes that the model was trained for.
            accelerator.unwrap_model(model).config.save_pretrained(str(folder))
            # This comes last: a checkpoint without its state was cut off.
            state.save_to_json(str(folder / STATE_FILE))
    if accelerator.is_main_process:
        rotate_checkpoints(args.output_dir, args.save_total_limit, use_mtime=True)


class _Log:
    """What a run tells while it trains: in the state's log_history, to trackers, and by the Trainer's callbacks."""

    def __init__(self, accelerator: Accelerator, args: LoopArguments, state: TrainerState) -> None:
        self.accelerator, self.args, self.state = accelerator, args, state
        self.started, self.first_step, self.logged_step = time.time(), state.global_step, state.global_step
        self.total_loss = 0.0
        settings = {name: value for name, value in vars(args).items() if isinstance(value, (bool, int, float, str))}
        settings.pop("hub_token", None)
        accelerator.init_trackers(args.project, config=settings)
        state.is_world_process_zero = accelerator.is_main_process
        state.is_local_process_zero = accelerator.is_local_main_process
        self.shown = PrinterCallback() if args.disable_tqdm else ProgressCallback()
        self.tell("on_train_begin")

    def write(self, values: dict[str, float]) -> None:
        """Log values; they get the epoch, too."""
        values["epoch"] = self.state.epoch or 0
        self.state.log_history.append({**values, "step": self.state.global_step})
        self.accelerator.log(rewrite_logs(values), step=self.state.global_step)
        self.tell("on_log", logs=dict(values))

    def tell(self, event: str, **what: Any) -> None:
        """Show that something has come about, by its name among the Trainer's callbacks."""
        getattr(self.shown, event)(self.args, self.state, TrainerControl(), **what)

    def write_step(self, losses: Tensor, grad_norm: Any, learning_rate: float, diagnostics: dict[str, float]) -> None:
        """Log the mean of the losses since the last time, and set them to zero."""
        loss = self._mean_over_processes(losses)
        values = {
            "loss": loss / (self.state.global_step - self.logged_step),
            "grad_norm": float(grad_norm),
            "learning_rate": float(learning_rate),
            **{f"xgrad/{name}": value for name, value in diagnostics.items()},
        }
        losses.zero_()
        self.total_loss += loss
        self.logged_step = self.state.global_step
        self.write(values)

    def finish(self, losses: Tensor, samples: int) -> dict[str, float]:
        """Log the metrics of the training as a whole, and return them."""
        steps = self.state.global_step - self.first_step
        batch_size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        seen = batch_size * self.accelerator.num_processes * self.state.max_steps
        if self.args.max_steps <= 0:
            seen = samples * self.args.num_train_epochs
        seen = seen * steps / self.state.max_steps
        metrics = speed_metrics("train", self.started, num_samples=seen, num_steps=steps)
        metrics["train_loss"] = (self.total_loss + self._mean_over_processes(losses)) / steps
        self.write(metrics)
        self.tell("on_train_end")
        for tracker in self.accelerator.trackers:
            tracker.finish()
        resumed = {RESUMED: self.first_step} if self.first_step else {}
        return {**metrics, **resumed, "train_samples": samples}

    def _mean_over_processes(self, losses: Tensor) -> float:
        mean: float = self.accelerator.gather(losses).mean().item()
        return mean
