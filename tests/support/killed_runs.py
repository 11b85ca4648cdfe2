"""The worker of test_killed_runs.py: runs that are killed at a chosen moment, and go on when they are started again.

Each run is a fork of one process, which has imported all that a run needs: so dozens of them are affordable.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Imported here, before any fork: building an optimizer would do it in each run.
import safetensors.torch
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PreTrainedConfig, TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

import tiny_models as tiny
from hf_xgrad import XGradTrainer, XGradTrainingArguments
from hf_xgrad.outputs.checkpoints import last_checkpoint
from inside import predictor_of

STEPS_PER_EPOCH = 3
STEPS = 3 * STEPS_PER_EPOCH
SAVE_STEPS = 2  # checkpoint-6 ends an epoch, the others stand inside one
BATCH = 4
LOG = "log.txt"
WITNESS = "witness.txt"  # what there was to see at the moment of a signal

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch"},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
    "adafactor": {"optim": "adafactor", "xgrad_steps": 1.0},
    "rmsprop": {"optim": "rmsprop", "learning_rate": 1e-3, "xgrad_steps": 1.0},
    "last_update": {"optim": "adamw_torch", "xgrad_rule": "last_update", "xgrad_steps": 1.0},
    "auto": {"optim": "adamw_torch", "xgrad_steps": "auto"},
    "auto-adafactor": {"optim": "adafactor", "xgrad_steps": "auto"},
}
WITHOUT_FILE = ("adamw", "momentum")  # the optimizer's state is all that their predictions need
PRECISIONS = ("fp32", "bf16", "bf16-weights")


@dataclass(frozen=True)
class SetUp:
    """What is trained: on shuffled data, with dropout, a warm-up and, with accumulation, a short last window."""

    optimizer: str = "adamw"
    precision: str = "fp32"
    accumulation: int = 1
    dropout: float = 0.1
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.precision}-{self.accumulation}"


@dataclass(frozen=True)
class Signal:
    """When a run sends itself a signal.

    Attributes:
        moment: "forward", "backward" or "optimizer": in the middle of that; "rotation": while an old checkpoint is
            removed; a pattern with a dot: while a file of such a name is written into a checkpoint; else an event of
            callbacks.
        step: the optimizer steps that are done by then, or the number of the checkpoint.
        share: what there is of the file by then, or what is gone of the old checkpoint.
    """

    moment: str
    step: int
    share: float = 0.5
    number: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        shared = "." in self.moment or self.moment == "rotation"
        return f"{self.moment}@{self.step}" + (f"x{self.share:g}" if shared else "")


def make_trainer(folder: Path, setup: SetUp) -> Any:
    model = tiny.bert(hidden_dropout_prob=setup.dropout, attention_probs_dropout_prob=setup.dropout)
    if setup.precision == "bf16-weights":
        model.to(torch.bfloat16)
    batches = STEPS_PER_EPOCH * setup.accumulation - (setup.accumulation > 1)
    settings = {
        "max_steps": STEPS,
        "warmup_steps": 2,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": setup.accumulation,
        "bf16": setup.precision == "bf16",
        **OPTIMIZERS[setup.optimizer],
        **setup.settings,
    }
    args = tiny.arguments(folder, XGradTrainingArguments, **settings)
    return XGradTrainer(model=model, args=args, train_dataset=tiny.Sentences(BATCH * batches * args.world_size))


def run(folder: str, setup: SetUp, *signals: Signal, pulse: Connection | None = None) -> None:
    """The same command each time: goes on from the last checkpoint if there is one, and leaves the end weights."""
    _begin(folder)
    try:
        trainer = make_trainer(Path(folder), setup)
        if setup.settings.get("enable_jit_checkpoint"):
            _watch_checkpoints(trainer)
        for each in signals:
            _arm(trainer, each)
        if pulse is not None:
            _tell_progress(trainer, pulse)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint or last_checkpoint(folder))
        trainer.save_model(folder)
    except BaseException:
        traceback.print_exc()
        raise


def run_process(folder: str, setup: SetUp, rank: int, store: str, kill: Signal | None) -> None:
    """One of two processes under DDP, that meet in the file `store`; at `kill`, one has come further than the other.

    Process 1 stops before it writes its random state. Process 0, which has written its own, is killed where it waits
    for the other, or else as soon as the checkpoint looks complete.
    """
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    _begin(folder, f"log-{rank}.txt")
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
        trainer = make_trainer(Path(folder), setup)
        if kill is not None:
            _stop_between_the_files(rank, kill, Path(folder))
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        trainer.save_model(folder)
        # Where the other process has gone, gloo may never end the threads that a regular exit waits for.
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        raise


def run_script(folder: str, name: str, flags: list[str], kill: Signal | None) -> None:
    """One of the scripts; the steps of `kill` are those of this process."""
    _begin(folder)
    script = importlib.import_module(name)
    if kill is not None:
        _arm_process(kill, Path(folder))
    sys.exit(script.main(flags))


def _begin(folder: str, log: str = LOG) -> None:
    torch.set_num_threads(1)
    file = os.open(Path(folder, log), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _arm(trainer: Any, each: Signal) -> None:
    """Sends this process a signal at its moment, once."""
    sent: list[Signal] = []

    def send() -> None:
        if sent:
            return
        sent.append(each)
        predictor = predictor_of(trainer)
        predicted = predictor is not None and predictor.is_predicted
        Path(trainer.args.output_dir, WITNESS).write_text("predicted" if predicted else "true")
        os.kill(os.getpid(), each.number)
        # SIGTERM's handler leaves the request for a checkpoint to a timer.
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join()

    if each.moment in ("forward", "backward"):
        _at_micro_batch(trainer, each, send)
    elif each.moment == "rotation":
        _at_rotation(trainer, each, send)
    elif "." in each.moment:
        _at_file(each, send)
    else:
        _at_event(trainer, each, send)


def _at_micro_batch(trainer: Any, each: Signal, send: Callable[[], None]) -> None:
    """In the second micro-batch of a window, or in the only one."""
    forwards: list[int] = []  # steps done at each
    layer = trainer.model.bert.encoder.layer[1]

    def is_due() -> bool:
        return forwards.count(each.step) == min(2, trainer.args.gradient_accumulation_steps)

    def forward(*_: Any) -> None:
        forwards.append(trainer.state.global_step)
        if each.moment == "forward" and is_due():
            send()

    def backward(_: Tensor) -> None:
        if each.moment == "backward" and is_due():
            send()

    layer.register_forward_pre_hook(forward)
    layer.output.dense.weight.register_hook(backward)


def _at_event(trainer: Any, each: Signal, send: Callable[[], None]) -> None:
    def observe(event: str, state: Any, **_: Any) -> None:
        if state.global_step != each.step:
            return
        if event == each.moment:
            send()
        if event == "pre_optimizer_step" and each.moment == "optimizer":
            optimizer = trainer.optimizer.optimizer
            if each.number == signal.SIGKILL:
                optimizer.param_groups = optimizer.param_groups[:1]  # half of its work
            optimizer.register_step_post_hook(lambda *_: send())

    trainer.add_callback(tiny.EveryEvent(observe))


def _at_rotation(trainer: Any, each: Signal, send: Callable[[], None]) -> None:
    rmtree = shutil.rmtree

    def remove(path: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == each.step:
            files = sorted(Path(path).iterdir())
            for file in files[: round(each.share * len(files))]:
                file.unlink()
            send()
        rmtree(path, *args, **kwargs)

    shutil.rmtree = remove  # type: ignore[assignment]


def _at_file(each: Signal, send: Callable[[], None]) -> None:
    """While a file is written: then a share of its bytes is there, and what is written after it is not."""

    def written(path: Path) -> None:
        if fnmatch(path.name, each.moment) and path.parent.name == f"checkpoint-{each.step}":
            os.truncate(path, int(path.stat().st_size * each.share))
            send()

    _after_each_file(written)


def _after_each_file(written: Callable[[Path], None]) -> None:
    """Calls `written` with the path whenever a file of a checkpoint was."""

    def wrap(write: Callable[..., Any]) -> Callable[..., Any]:
        def writing(what: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            result = write(what, path, *args, **kwargs)
            if isinstance(path, (str, os.PathLike)):
                written(Path(path))
            return result

        return writing

    writers: list[tuple[Any, str]] = [
        (torch, "save"),
        (safetensors.torch, "serialize_file"),
        (PreTrainedConfig, "to_json_file"),
        (TrainerState, "save_to_json"),
    ]
    for owner, name in writers:
        setattr(owner, name, wrap(getattr(owner, name)))


def _arm_process(each: Signal, folder: Path) -> None:
    """As `_arm`, where there is no trainer at hand: told by what all modules and optimizers of this process do."""
    steps: list[Any] = []

    def send() -> None:
        (folder / WITNESS).write_text(str(each))
        os.kill(os.getpid(), each.number)

    def at(moment: str) -> Callable[..., None]:
        return lambda *_: send() if each.moment == moment and len(steps) == each.step else None

    if "." in each.moment:
        _at_file(each, send)
    register_optimizer_step_pre_hook(at("pre_optimizer_step"))
    register_optimizer_step_post_hook(lambda *_: steps.append(None))
    register_optimizer_step_post_hook(at("optimizer_step"))
    nn.modules.module.register_module_forward_hook(at("forward"))


def _stop_between_the_files(rank: int, kill: Signal, folder: Path) -> None:
    def send(*_: Any, **__: Any) -> None:
        (folder / WITNESS).write_text(str(kill))
        os.kill(os.getpid(), kill.number)

    if rank == 1:
        save = torch.save

        def stop(what: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if Path(path).name == "rng_state_1.pth" and Path(path).parent.name == f"checkpoint-{kill.step}":
                signal.pause()
            save(what, path, *args, **kwargs)

        torch.save = stop
        return

    def written(path: Path) -> None:
        if path.parent.name == f"checkpoint-{kill.step}":
            if path.name == "rng_state_0.pth":
                dist.barrier = send
            if path.name == "trainer_state.json":
                send()

    _after_each_file(written)


def _watch_checkpoints(trainer: Any) -> None:
    """Leaves, as witness, the event at which each just-in-time checkpoint was written; takes the wait out of them."""
    events: list[str] = []
    call_event = trainer.callback_handler.call_event

    def called(event: str, *args: Any, **kwargs: Any) -> Any:
        events.append(event)
        return call_event(event, *args, **kwargs)

    trainer.callback_handler.call_event = called
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, JITCheckpointCallback):
            manager = callback.jit_manager
            assert manager is not None
            manager.kill_wait = 0
            execute = manager.execute_jit_checkpoint

            def executed(execute: Callable[[], None] = execute) -> None:
                with Path(trainer.args.output_dir, WITNESS).open("a") as file:
                    file.write(f" {events[-1]}@{trainer.state.global_step}")
                execute()

            manager.execute_jit_checkpoint = executed


def _tell_progress(trainer: Any, pulse: Connection) -> None:
    """One byte for whatever happens, so that the parent can tell how far this run has come."""

    def tell(*_: Any, **__: Any) -> None:
        pulse.send_bytes(b".")

    trainer.add_callback(tiny.EveryEvent(tell))
    trainer.model.bert.encoder.layer[0].register_forward_hook(tell)
    trainer.model.bert.encoder.layer[0].output.dense.weight.register_hook(tell)
    _after_each_file(tell)
