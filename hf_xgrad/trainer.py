"""The Trainer that predicts before forward and backward, and restores before the optimizer steps."""

from __future__ import annotations

import inspect
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import OPTIMIZER_NAME, DistributedType
from accelerate.utils.dataclasses import FP8BackendType
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, has_length
from transformers.utils import logging

from hf_xgrad.arguments import EXTRA_OPTIMIZERS, XGradConfig
from hf_xgrad.checkpoints import (
    INCOMPLETE_NAME,
    CheckpointError,
    begin_writing,
    checkpoint_to_resume,
    holds_mark_only,
    load_state,
    state_name,
    state_names,
    write_state,
    writing,
)
from hf_xgrad.hub import PUSH_ERRORS, UnsavedToken, has_model, push_again, push_command
from hf_xgrad.model_card import (
    TrainedModel,
    base_model_of,
    complete_card,
    is_hub_id,
    naming_hub_models_only,
    with_readable_log,
)
from hf_xgrad.optim import AdaM3
from hf_xgrad.prediction import (
    IN_BACKWARD,
    WeightPredictor,
    check_optimizer,
    no_closed_form,
    refusal,
    refused,
    refused_setting,
)
from hf_xgrad.rules import closed_form_of

# To a type checker the mixin is a Trainer; at run time it is mixed into one.
if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)

# What a predictor may need from its file in a checkpoint.
_REMEMBERED = {"weights": "the weights before the last update", "steps": "what xgrad_steps='auto' has learnt"}

_EXTRAPOLATED = "it already trains at an extrapolated point"
# The eps of these stands among squared gradients: `adam_epsilon` counts only where it is not its default of 1e-8.
_SMALL_EPSILON = {"adabelief": 1e-16, "adam3": 1e-16}
_DEFAULT_EPSILON = TrainingArguments.__dataclass_fields__["adam_epsilon"].default

_REFUSED_ENGINES = {
    DistributedType.MEGATRON_LM: "it has a training loop of its own, which runs the optimizer's step together with "
    "forward and backward",
    DistributedType.XLA: "it was never tried there",
}

# Values of `optim` that are refused, with the reason.
_REFUSED_OPTIMIZERS = {
    "lomo": IN_BACKWARD,
    "adalomo": IN_BACKWARD,
    "galore_adamw_layerwise": IN_BACKWARD,
    "galore_adamw_8bit_layerwise": IN_BACKWARD,
    "galore_adafactor_layerwise": IN_BACKWARD,
    "apollo_adamw_layerwise": IN_BACKWARD,
    "schedule_free_radam": _EXTRAPOLATED,
    "schedule_free_adamw": _EXTRAPOLATED,
    "schedule_free_sgd": _EXTRAPOLATED,
}


class XGradMixin(_Trainer):
    """Makes any Trainer train on predicted weights; goes first in the bases.

        w_hat_t = w_t - s * lr_t * delta_t          before every training step
        g_t     = grad L(w_hat_t; batch_t)          the Trainer's own `training_step`
        w_{t+1} = optimizer.step(w_t, g_t)          on the true weights

    Outside `training_step` the model always holds its true weights.

    Args:
        xgrad_config: the settings, where the class of `args` has no `xgrad*` fields; given, it is used instead of
            them.

    All other arguments are those of the Trainer that it is mixed into.

    Raises:
        ValueError: an optimizer or an engine with which the prediction cannot be right, or `rule="closed_form"` with
            an optimizer that has no closed form.

    Example:
        >>> from transformers import Trainer
        >>> class MyXGradTrainer(XGradMixin, Trainer):
        ...     pass

    Source: Guan et al., "XGrad: Boosting Gradient-Based Optimizers With Weight Prediction", arXiv 2305.18240.
    """

    def __init__(self, *args: Any, xgrad_config: XGradConfig | None = None, **kwargs: Any) -> None:
        self._xgrad_config = xgrad_config
        self._predictor: WeightPredictor | None = None
        # The checkpoint that holds the run as it stands, and the length of its log.
        self._saved: tuple[str, int] | None = None
        super().__init__(*args, **kwargs)
        if self.args.hub_token is not None:
            # The Trainer pickles its arguments, token and all, into a file that it pushes.
            self.args.hub_token = UnsavedToken(self.args.hub_token)
        self._has_own_optimizer = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        self._check_xgrad()
        self._warn_of_local_names()

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's own; the first of its steps that knows `args`, before any generation engine is started."""
        if self.xgrad_config.active and getattr(self.args, "use_vllm", False):
            raise ValueError(
                "XGrad: use_vllm=True is refused: the vLLM engine is given the weights inside a training step, where "
                "they are predicted, and keeps serving them outside it. Generate with the model itself "
                "(use_vllm=False), or switch XGrad off (XGradConfig(enabled=False))."
            )
        super().create_accelerator_and_postprocess()

    @property
    def xgrad_config(self) -> XGradConfig:
        """The settings in force: `xgrad_config` if given, else those of `args` (which a search may change)."""
        return self._xgrad_config or XGradConfig.from_args(self.args)

    # ---- prediction ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's own `training_step` (forward and backward), on predicted weights."""
        predictor = self._get_predictor()
        if predictor is None:
            return super().training_step(model, inputs, *args, **kwargs)
        predictor.measure(self._next_step_is_logged())
        with predictor.predicted():
            return super().training_step(model, inputs, *args, **kwargs)

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
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._predictor is not None:
                # Only has work to do where a Ctrl-C came in the middle of restoring.
                self._predictor.restore()
            self._predictor = None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Called once a run, and again by auto_find_batch_size with the schedule begun anew: what is remembered of the
        # last update says nothing about this run.
        self._predictor = None
        self._saved = None
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed where nothing is left to train: within an epoch the Trainer would go one step too far.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's own `log`; a training log also gets the diagnostics of its step, as `xgrad/...`."""
        if "loss" in logs and self._predictor is not None:
            logs.update({f"xgrad/{name}": value for name, value in self._predictor.diagnostics().items()})
        super().log(logs, *args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        # The Trainer converts what a search suggests to the type that a field has, which here would cut 0.5 to 0 where
        # s was 1, and could not make "auto" of a number; of a text it makes any of them.
        if trial is not None and hasattr(self.args, "xgrad_steps"):
            self.args.xgrad_steps = str(self.args.xgrad_steps)
        super()._hp_search_setup(trial)
        if trial is not None and hasattr(self.args, "xgrad_steps"):
            self.args.xgrad_steps = XGradConfig.from_args(self.args).steps

    def _get_predictor(self) -> WeightPredictor | None:
        config = self.xgrad_config
        optimizer = self.optimizer
        if not config.active or optimizer is None:
            return None
        if self._predictor is None:
            self._predictor = self._make_predictor(optimizer, config)
        return self._predictor

    def _make_predictor(self, optimizer: torch.optim.Optimizer, config: XGradConfig) -> WeightPredictor:
        if self.is_deepspeed_enabled:
            from hf_xgrad.deepspeed import ZeroPredictor

            return ZeroPredictor(self.model_wrapped, config)
        return WeightPredictor(optimizer, config, self.model_wrapped)

    def _next_step_is_logged(self) -> bool:
        """Whether the step under way will be followed by a log, as DefaultFlowCallback decides it."""
        args, state, step = self.args, self.state, self.state.global_step + 1
        if args.logging_first_step and step == 1:
            return True
        if args.logging_strategy == IntervalStrategy.STEPS:
            return state.logging_steps > 0 and step % state.logging_steps == 0
        if args.logging_strategy == IntervalStrategy.EPOCH:
            dataloader = self.callback_handler.train_dataloader
            if dataloader is None or not has_length(dataloader):
                return step == state.max_steps
            steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
            return step == state.max_steps or step % steps_per_epoch == 0
        return False

    # ---- checkpoints ----

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
                Path(checkpoint, INCOMPLETE_NAME).unlink(missing_ok=True)
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
        with predictor.ignoring_steps() if predictor is not None else nullcontext():
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
        if self.is_fsdp_enabled and self.optimizer is not None and not self.optimizer.state:
            _warn_of_lost_state(checkpoint)
        predictor = self._get_predictor()
        if predictor is None or not predictor.remembers:
            return
        lost = predictor.remembers - load_state(predictor, checkpoint)
        if lost:
            missing = " and ".join(what for key, what in _REMEMBERED.items() if key in lost)
            others = ", ".join(state_names(checkpoint))
            hint = f" Other processes have left it there ({others}): resume with as many." if others else ""
            logger.warning(
                f"XGrad: {checkpoint} does not have {missing} ({state_name(predictor.process)}): that starts "
                f"anew.{hint}"
            )

    # ---- model card and Hub ----

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own card, completed: method and settings, loss curves, how to load the model, citation.

        Names that the Hub would reject the card for (a base model or a data set in a local folder) are left out.
        """
        if not self.is_world_process_zero():
            return
        create = super().create_model_card
        given = inspect.signature(create).bind(*args, **kwargs).arguments
        if given.get("model_name") == "":
            # Of output_dir ".", say.
            kwargs["model_name"] = os.path.basename(os.path.abspath(str(self.args.output_dir)))
        with naming_hub_models_only(self.model), with_readable_log(self.state):
            create(*args, **kwargs)
        trained = TrainedModel.of(self, self.xgrad_config, given.get("tasks"), self._has_own_optimizer)
        try:
            complete_card(str(self.args.output_dir), trained)
        except Exception:
            # Some trainers write the card with every checkpoint: it must not end a run.
            logger.warning("XGrad: the model card is left as the Trainer wrote it.", exc_info=True)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own `push_to_hub`; an error has a note that says how to push again what was trained."""
        try:
            return super().push_to_hub(*args, **kwargs)
        except CheckpointError:
            raise
        except PUSH_ERRORS as error:
            if has_model(str(self.args.output_dir)):
                way_out = push_again(error, self._push_command(kwargs))
                error.add_note(f"XGrad: the model is in {self.args.output_dir}; {way_out}")
            raise

    def _push_command(self, given: dict[str, Any]) -> str:
        args = self.args
        private, revision = (given.get(name) for name in ("private", "revision"))
        return push_command(
            str(args.output_dir),
            self.hub_model_id or args.hub_model_id,
            private=args.hub_private_repo if private is None else private,
            revision=args.hub_revision if revision is None else revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._warn_of_failed_pushes()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """Tells of pushes in the background that failed, which the Trainer never asks for."""
        in_progress = getattr(self, "push_in_progress", None)
        if in_progress is None:
            return
        done = [job for job in in_progress.jobs if job.done()]
        in_progress.jobs = [job for job in in_progress.jobs if job not in done]
        errors = [error for error in (job.exception() for job in done if not job.cancelled()) if error is not None]
        if errors:
            logger.warning(
                f"XGrad: a push of a checkpoint failed ({errors[-1]}); training goes on, and everything is in "
                f"{self.args.output_dir}. To push it by hand: {self._push_command({})}"
            )

    def _warn_of_local_names(self) -> None:
        if not self.args.push_to_hub or not self.is_world_process_zero():
            return
        name = base_model_of(self.model)
        if name is not None and not is_hub_id(name):
            logger.warning(
                f"XGrad: the model was loaded from {name}, which is no id of the Hub: the model card will not name it "
                "as base_model, as the Hub would reject the card for it."
            )

    # ---- optimizers ----

    @classmethod
    def get_optimizer_cls_and_kwargs(cls, args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """As the Trainer's own, with the optimizers that XGrad adds to `optim`."""
        if args.optim in EXTRA_OPTIMIZERS:
            return _extra_optimizer(args)
        return super().get_optimizer_cls_and_kwargs(args, model)

    def _check_xgrad(self) -> None:
        """Refuses, before any training time is spent, what cannot be right."""
        config = self.xgrad_config
        if not config.active:
            return
        args = self.args
        distributed_type = self.accelerator.distributed_type
        if distributed_type in _REFUSED_ENGINES:
            raise ValueError(
                f"XGrad: {distributed_type.value} is refused: {_REFUSED_ENGINES[distributed_type]}. Train with DDP, "
                "FSDP or DeepSpeed, or switch XGrad off (xgrad=False)."
            )
        reason = _fp8_refusal(self.accelerator)
        if reason is not None:
            raise ValueError(f"XGrad: {reason}, or switch XGrad off (xgrad=False).")
        if self.is_deepspeed_enabled:
            if args.auto_find_batch_size:
                raise ValueError(
                    "XGrad: auto_find_batch_size=True is refused under DeepSpeed: its next try starts from what the "
                    "model holds after the error, which may be predicted weights. Set per_device_train_batch_size, or "
                    "switch XGrad off (xgrad=False)."
                )
            from hf_xgrad.deepspeed import check_config

            check_config(self.accelerator.state.deepspeed_plugin.hf_ds_config.config)
        optimizer = self.optimizer
        if optimizer is not None:
            check_optimizer(optimizer, config)
            return
        given = self.optimizer_cls_and_kwargs
        if given is None:
            self.check_arguments(args, config, self.model)
            return
        reason = IN_BACKWARD if "optimizer_dict" in given[1] else refusal(given[0]) or refused_setting(given[1])
        if reason is not None:
            raise refused(given[0].__name__, reason)
        # What a factory will make is not known yet: the predictor looks at it before the first step.
        if config.rule == "closed_form" and isinstance(given[0], type) and issubclass(given[0], torch.optim.Optimizer):
            _check_closed_form(given[0], given[1], config)

    @classmethod
    def check_arguments(cls, args: TrainingArguments, config: XGradConfig | None = None, model: Any = None) -> None:
        """Refuses arguments with which a trainer would be refused, before there is a model.

        Args:
            args: arguments of the run.
            config: settings of XGrad; by default those of `args`.
            model: the model, for optimizers that are set up by its modules; these are not looked into without it.

        Raises:
            ValueError: `optim` is refused, `optim_args` are wrong, or `xgrad_rule="closed_form"` has none.
            ImportError: `optim` needs a library that is not installed.
        """
        config = config or XGradConfig.from_args(args)
        if not config.active:
            return
        name = str(getattr(args.optim, "value", args.optim))
        if name in _REFUSED_OPTIMIZERS:
            raise refused(f"optim={name!r}", _REFUSED_OPTIMIZERS[name])
        wants_form = config.rule == "closed_form" and (model is not None or not args.optim_target_modules)
        if name in EXTRA_OPTIMIZERS or wants_form:
            optimizer_class, kwargs = cls.get_optimizer_cls_and_kwargs(args, model)
            reason = refused_setting(kwargs)
            if reason is not None:
                raise refused(f"optim={name!r} with optim_args={args.optim_args!r}", reason)
            if wants_form:
                _check_closed_form(optimizer_class, kwargs, config)


def _fp8_refusal(accelerator: Any) -> str | None:
    """Why weights cannot be predicted with Accelerate's fp8 as it is set up, and the way out; None where they can.

    torchao and Transformer Engine keep the weights in high precision and cast them at each forward, predicted or not.
    """
    backend = accelerator.fp8_backend
    if backend == FP8BackendType.MSAMP:
        return (
            "fp8 by MS-AMP is refused: it keeps the weights in 8 and 16 bits with scales of their own, which a "
            "prediction cannot write. Choose torchao (ACCELERATE_FP8_BACKEND=AO)"
        )
    recipe = getattr(accelerator.ao_recipe_handler, "config", None)
    if backend == FP8BackendType.AO and getattr(recipe, "enable_fsdp_float8_all_gather", False):
        return (
            "fp8 by torchao with its all-gather in fp8 is refused: it scales the weights by what they were after the "
            "optimizer's step, not as they are predicted. Switch that off "
            "(ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER=false)"
        )
    return None


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


def _check_closed_form(optimizer_class: Any, kwargs: dict[str, Any], config: XGradConfig) -> None:
    """Tries the settings of an optimizer that is yet to be made, on one weight."""
    if closed_form_of(optimizer_class) is None:
        # Not made even for a trial: who knows what it wants.
        raise no_closed_form(f"{optimizer_class.__name__} has none")
    # Transformers puts groups among the settings of some (GaLore, APOLLO): tried are theirs, but for the weights.
    settings = {"params": [{}], **kwargs}
    groups = [{**group, "params": [nn.Parameter(torch.zeros(1, 1))]} for group in settings.pop("params")]
    check_optimizer(optimizer_class(groups, **settings), config)


def _extra_optimizer(args: TrainingArguments) -> tuple[type, dict[str, Any]]:
    """Class and settings of one of `EXTRA_OPTIMIZERS`; `optim_args` wins over the `adam_*` fields."""
    optimizer_class: Any
    if args.optim == "adabelief":
        try:
            import pytorch_optimizer
        except ImportError as error:
            raise ImportError(
                "optim='adabelief' needs the pytorch-optimizer library: pip install 'hf_xgrad[adabelief]'"
            ) from error
        optimizer_class = pytorch_optimizer.AdaBelief
    else:
        optimizer_class = {
            "adam": torch.optim.Adam,
            "adam3": AdaM3,
            "nadam": torch.optim.NAdam,
            "radam": torch.optim.RAdam,
        }[args.optim]
    eps = args.adam_epsilon
    if eps == _DEFAULT_EPSILON:
        eps = _SMALL_EPSILON.get(args.optim, eps)
    kwargs = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": eps}
    settable = {
        name: parameter.default
        for name, parameter in inspect.signature(optimizer_class).parameters.items()
        # The Trainer's own fields have the others, and win: it sets them for each parameter group.
        if name not in ("params", "lr", "betas", "weight_decay") and parameter.default is not inspect.Parameter.empty
    }
    for pair in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
        name, _, text = pair.partition("=")
        if name not in settable:
            raise ValueError(
                f"optim_args={args.optim_args!r}: {args.optim} takes no {name!r} there; it takes "
                f"{', '.join(sorted(settable))} (learning_rate, adam_beta1, adam_beta2 and weight_decay are arguments "
                "of their own)"
            )
        kwargs[name] = _parse_setting(name, text, settable[name], args.optim_args)
    return optimizer_class, kwargs


def _parse_setting(name: str, text: str, default: Any, optim_args: str | None) -> Any:
    """`text` as a value of the type that `default` has; a default of None stands for an optional bool."""
    try:
        if default is None or isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False, "none": default}[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        kind = "true or false" if default is None or isinstance(default, bool) else f"of type {type(default).__name__}"
        raise ValueError(f"optim_args={optim_args!r}: {name} must be {kind}, got {text!r}") from None


class XGradTrainer(XGradMixin, Trainer):
    """`transformers.Trainer` that trains on predicted weights; see `XGradMixin`.

    Takes the place of `Trainer` as it is: with plain `TrainingArguments` it predicts one step ahead by the rule that
    fits the optimizer.
    """


class XGradSeq2SeqTrainer(XGradMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that trains on predicted weights; see `XGradMixin`."""
