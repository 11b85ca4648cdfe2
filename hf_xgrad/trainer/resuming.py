"""Checkpoints of a trainer: whole ones only, with what the predictor remembers, and exactly where they were left."""

from __future__ import annotations

import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import OPTIMIZER_NAME
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_xgrad.outputs.checkpoints import (
    begin_writing,
    checkpoint_to_resume,
    holds_mark_only,
    missing_optimizer,
    writing,
)
from hf_xgrad.outputs.files import INCOMPLETE_FILE
from hf_xgrad.outputs.predictor_state import load_state, state_name, state_names, write_state
from hf_xgrad.predictor import WeightPredictor

# To a type checker the mixin is a Trainer; at run time it is mixed into one.
if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)

# What a predictor may need from its file in a checkpoint.
_REMEMBERED = {"weights": "the weights before the last update", "steps": "what xgrad_steps='auto' has learnt"}


class ResumingMixin(_Trainer):
    """Saves and resumes so that a run which was stopped ends as one that was not."""

    _predictor: WeightPredictor | None = None  # while there is one
    # The checkpoint that holds the run as it stands, and the length of its log.
    _saved: tuple[str, int] | None = None

    def current_predictor(self) -> WeightPredictor | None:
        """The predictor of the run, made if need be; None where nothing is predicted."""
        raise NotImplementedError

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own `train`, which goes on from whole checkpoints only.

        `resume_from_checkpoint=True` is the last whole one of `output_dir`, with a warning for each later one.

        Raises:
            ValueError: the checkpoint that is named, or every one in `output_dir`, is half-written or damaged.
        """
        # As it was given, since a Trainer between this and that of Transformers may take fewer arguments.
        folder = str(self.args.output_dir)
        if args and args[0]:
            args = (checkpoint_to_resume(args[0], folder), *args[1:])
        elif kwargs.get("resume_from_checkpoint"):
            given = kwargs["resume_from_checkpoint"]
            kwargs = {**kwargs, "resume_from_checkpoint": checkpoint_to_resume(given, folder)}
        return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._saved = None
        return super()._inner_training_loop(*args, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_of_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        found: tuple[int, int] = super()._init_training_state(
            max_steps, steps_of_epoch, epochs, resume_from_checkpoint, trial
        )
        if epochs != sys.maxsize or self.state.global_step == 0 or self.state.epoch is None:
            return found
        # A stream: nobody knows how many batches it has, and the Trainer takes a pass to last all steps. But where the
        # checkpoint was written it added to the passes made what share of all steps' batches this one had given.
        state = TrainerState.load_from_json(os.path.join(str(resume_from_checkpoint), TRAINER_STATE_NAME))
        passes = math.ceil(self.state.epoch) - 1
        batches = round((self.state.epoch - passes) * state.max_steps * self.args.gradient_accumulation_steps)
        return passes, 0 if self.args.ignore_data_skip else batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed where nothing is left to train: within an epoch the Trainer would go one step too far. The end of
            # the epoch, with its evaluation, comes as ever.
            self.control.should_training_stop = True
            kwargs["num_update_steps_per_epoch"] = 0
        super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own `save_model`; what the disk refuses is an error of one line."""
        run = str(self.args.output_dir)
        with writing(run if output_dir is None else str(output_dir), run):
            super().save_model(output_dir, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = self._get_output_dir(trial=trial)
        checkpoint = os.path.join(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        here = (os.path.abspath(checkpoint), len(self.state.log_history))
        if here == self._saved and holds_mark_only(checkpoint):
            # A just-in-time checkpoint: to write over the one that is there would risk it for other random numbers.
            if self.args.should_save:
                Path(checkpoint, INCOMPLETE_FILE).unlink(missing_ok=True)
            return
        with writing(checkpoint, run):
            if self.args.should_save:
                begin_writing(checkpoint)
            # Others might be quicker to write their files into what still looks whole.
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        self._saved = here

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last that each process writes: the state, which makes the checkpoint whole, has to wait for all of them.
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        predictor = self._predictor
        prediction = predictor.prediction if predictor is not None else None
        # Under FSDP2 the state of an optimizer that has none yet is saved by a step with lr = 0, which counts as none.
        with prediction.weights.ignoring_steps() if prediction is not None else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)
        state = predictor.state_dict() if predictor is not None else {}
        process = state.get("process")
        if self.args.should_save:
            # Of an earlier run into this folder: they do not belong to the weights beside them.
            own = {state_name((rank, process[1])) for rank in range(process[1])} if process else set()
            for name in set(state_names(output_dir)) - own:
                os.remove(os.path.join(output_dir, name))
        if state and (process or self.args.should_save):
            write_state(state, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._saved = (os.path.abspath(checkpoint), len(self.state.log_history))
        predictor = self.current_predictor()
        if predictor is None:
            return
        missing = missing_optimizer(checkpoint)
        if missing is not None and self.is_world_process_zero():
            logger.warning(
                f"XGrad: {checkpoint} has no {missing}: the optimizer and its schedule start anew, and nothing is "
                "predicted before the first step."
            )
        elif self.is_fsdp_enabled and self.optimizer is not None and not self.optimizer.state:
            _warn_of_lost_state(checkpoint)
        lost = predictor.remembers - load_state(predictor, checkpoint) if predictor.remembers else set()
        if lost:
            missing = " and ".join(what for key, what in _REMEMBERED.items() if key in lost)
            others = ", ".join(state_names(checkpoint))
            hint = f" Other processes have left it there ({others}): resume with as many." if others else ""
            logger.warning(
                f"XGrad: {checkpoint} does not have {missing} ({state_name(predictor.process)}): that starts "
                f"anew.{hint}"
            )


def _warn_of_lost_state(checkpoint: str) -> None:
    """Says that an optimizer came back without its state, where the checkpoint has one in shards."""
    folder = os.path.join(checkpoint, f"{OPTIMIZER_NAME}_0")
    if not os.path.isfile(os.path.join(folder, ".metadata")):
        return
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if any(
        name.startswith("optimizer.state.") for name in FileSystemReader(folder).read_metadata().state_dict_metadata
    ):
        logger.warning(
            f"XGrad: the optimizer's state in {checkpoint} was not taken up, which Transformers cannot do under FSDP "
            "1 with SHARDED_STATE_DICT. The optimizer starts anew, and nothing is predicted before its first step. To "
            "go on exactly, train under FSDP 2 (fsdp_version: 2)."
        )
