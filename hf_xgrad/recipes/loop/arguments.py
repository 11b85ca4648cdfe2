"""The flags of the training loop, and the optimizer and the schedule that they stand for."""

# ruff: noqa: RUF009 (what the defaults are made by ends in dataclasses.field)
import dataclasses
import json
import logging
import math
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import transformers
from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from hf_xgrad import XGradConfig, XGradTrainer, XGradTrainingArguments
from hf_xgrad.trainer.arguments import Steps

Strategy = Literal["no", "steps", "epoch"]
Optim = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adam",
    "adam3",
    "adabelief",
    "nadam",
    "radam",
    "adafactor",
    "adagrad",
    "rmsprop",
    "sgd",
]
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]


def _of_trainer(name: str) -> Any:
    """Return a field with the default and the help that it has in the Trainer's arguments."""
    known = XGradTrainingArguments.__dataclass_fields__[name]
    return dataclasses.field(default=known.default, metadata=known.metadata)


@dataclasses.dataclass
class LoopArguments:
    """Those of the Trainer's arguments that the loop honours."""

    _argument_group_name = "training"

    output_dir: str = dataclasses.field(default="trainer_output", metadata={"help": "Where the results go."})
    do_train: bool = _of_trainer("do_train")
    do_eval: bool = _of_trainer("do_eval")
    seed: int = _of_trainer("seed")
    data_seed: int | None = _of_trainer("data_seed")
    num_train_epochs: float = _of_trainer("num_train_epochs")
    max_steps: int = _of_trainer("max_steps")
    per_device_train_batch_size: int = _of_trainer("per_device_train_batch_size")
    per_device_eval_batch_size: int = _of_trainer("per_device_eval_batch_size")
    gradient_accumulation_steps: int = _of_trainer("gradient_accumulation_steps")
    dataloader_num_workers: int = _of_trainer("dataloader_num_workers")
    dataloader_pin_memory: bool = _of_trainer("dataloader_pin_memory")
    optim: Optim = _of_trainer("optim")
    optim_args: str | None = _of_trainer("optim_args")
    learning_rate: float = _of_trainer("learning_rate")
    weight_decay: float = _of_trainer("weight_decay")
    adam_beta1: float = _of_trainer("adam_beta1")
    adam_beta2: float = _of_trainer("adam_beta2")
    adam_epsilon: float = _of_trainer("adam_epsilon")
    max_grad_norm: float = _of_trainer("max_grad_norm")
    lr_scheduler_type: Scheduler = _of_trainer("lr_scheduler_type")
    lr_scheduler_kwargs: dict[str, Any] | str | None = _of_trainer("lr_scheduler_kwargs")
    warmup_steps: float = _of_trainer("warmup_steps")
    bf16: bool = _of_trainer("bf16")
    fp16: bool = _of_trainer("fp16")
    gradient_checkpointing: bool = dataclasses.field(
        default=False, metadata={"help": "Compute activations anew in the backward pass, to save memory."}
    )
    use_cpu: bool = _of_trainer("use_cpu")
    logging_strategy: Strategy = _of_trainer("logging_strategy")
    logging_first_step: bool = _of_trainer("logging_first_step")
    logging_steps: float = _of_trainer("logging_steps")
    eval_strategy: Strategy = _of_trainer("eval_strategy")
    eval_steps: float | None = _of_trainer("eval_steps")
    eval_on_start: bool = _of_trainer("eval_on_start")
    save_strategy: Strategy = _of_trainer("save_strategy")
    save_steps: float = _of_trainer("save_steps")
    save_total_limit: int | None = _of_trainer("save_total_limit")
    resume_from_checkpoint: str | None = _of_trainer("resume_from_checkpoint")
    disable_tqdm: bool = dataclasses.field(default=False, metadata={"help": "Show no progress bar."})
    report_to: list[str] = dataclasses.field(
        default_factory=lambda: ["none"],
        metadata={"help": "Trackers, as Accelerate names them: tensorboard, wandb..."},
    )
    project: str = dataclasses.field(default="huggingface", metadata={"help": "Project of the trackers."})
    push_to_hub: bool = _of_trainer("push_to_hub")
    hub_model_id: str | None = _of_trainer("hub_model_id")
    hub_token: str | None = _of_trainer("hub_token")
    hub_private_repo: bool | None = _of_trainer("hub_private_repo")
    xgrad: bool = _of_trainer("xgrad")
    xgrad_steps: Steps = _of_trainer("xgrad_steps")
    xgrad_rule: str = _of_trainer("xgrad_rule")
    xgrad_weight_decay: bool = _of_trainer("xgrad_weight_decay")

    def __post_init__(self) -> None:
        self.xgrad_steps = XGradConfig.from_args(self).steps
        if self.fp16 and self.bf16:
            raise ValueError("--fp16 and --bf16 exclude each other: give one of the two")
        self.do_eval = self.do_eval or self.eval_strategy != "no" or self.eval_on_start
        self.eval_steps = self.eval_steps or self.logging_steps
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(self, name, _interval(name, getattr(self, name)))
        if isinstance(self.lr_scheduler_kwargs, str):
            self.lr_scheduler_kwargs = _json_settings("lr_scheduler_kwargs", self.lr_scheduler_kwargs)
        known = ["none", "all", *(str(tracker) for tracker in get_available_trackers())]
        for tracker in self.report_to:
            if tracker not in known:
                raise ValueError(f"--report_to {tracker}: not installed, or not known; there are {', '.join(known)}")

    @property
    def device(self) -> torch.device:
        device: torch.device = PartialState(cpu=self.use_cpu).device
        return device

    @property
    def process_index(self) -> int:
        index: int = PartialState(cpu=self.use_cpu).process_index
        return index

    @property
    def should_log(self) -> bool:
        return self.process_index == 0

    def get_process_log_level(self) -> int:
        level: int = transformers.utils.logging.get_verbosity()
        return level if self.should_log else logging.ERROR

    def main_process_first(self, desc: str = "") -> AbstractContextManager[None]:
        """`with` this: the other processes wait for the main one of their machine."""
        turn: AbstractContextManager[None] = PartialState(cpu=self.use_cpu).local_main_process_first()
        return turn


def _interval(name: str, value: float) -> float:
    """Check a number of steps, or a share of all steps below 1."""
    if not value > 0 or (value > 1 and value != int(value)):
        raise ValueError(f"--{name} must be a number of steps, or a share of all steps below 1, not {value}")
    return value if value < 1 else int(value)


def _json_settings(name: str, text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} {text!r} is not JSON: {error.msg}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--{name} {text!r} does not hold settings")
    return settings


def make_optimizer(model: nn.Module, args: LoopArguments) -> Optimizer:
    """Make the optimizer that the Trainer has under this name; biases and norms do not decay."""
    kind, settings = XGradTrainer.get_optimizer_cls_and_kwargs(args)  # type: ignore[arg-type]
    # The Trainer's own answer needs no trainer.
    decaying = set(XGradTrainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups = [
        {"params": [w for name, w in trained if name in decaying], "weight_decay": args.weight_decay},
        {"params": [w for name, w in trained if name not in decaying], "weight_decay": 0.0},
    ]
    optimizer: Optimizer = kind(groups, **settings)
    return optimizer


def make_schedule(optimizer: Optimizer, args: LoopArguments, max_steps: int) -> LRScheduler:
    """Make the learning rate schedule for so many optimizer steps."""
    warmup = args.warmup_steps
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=int(warmup) if warmup >= 1 else math.ceil(max_steps * warmup),
        num_training_steps=max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )
