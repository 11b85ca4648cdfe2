"""The Trainer that predicts before forward and backward, and restores before the optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy, has_length
from transformers.utils import logging

from hf_xgrad.core.config import ARGUMENTS, XGradConfig
from hf_xgrad.core.diagnostics import Observer, describe
from hf_xgrad.core.moves import Move
from hf_xgrad.core.refusals import (
    check_deepspeed,
    check_engine,
    check_fp8,
    check_generation,
    check_model,
    refused,
    unwrap_optimizer,
)
from hf_xgrad.predictor import WeightPredictor
from hf_xgrad.trainer.optimizers import ExtraOptimizersMixin
from hf_xgrad.trainer.publishing import PublishingMixin
from hf_xgrad.trainer.resuming import ResumingMixin

logger = logging.get_logger(__name__)


class XGradMixin(ResumingMixin, PublishingMixin, ExtraOptimizersMixin):
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
        TypeError: a class in which the mixin comes after a Trainer.
        ValueError: an optimizer, a model or an engine with which the prediction cannot be right, or
            `rule="closed_form"` with an optimizer that has no closed form.

    Example:
        >>> from transformers import Trainer
        >>> class MyXGradTrainer(XGradMixin, Trainer):
        ...     pass

    Source: Guan et al., "XGrad: Boosting Gradient-Based Optimizers With Weight Prediction", arXiv 2305.18240.
    """

    _xgrad_config: XGradConfig | None = None
    _predicts_for: torch.optim.Optimizer | None = None  # the optimizer that the predictor was made for
    _from_args: tuple[list[Any], XGradConfig] | None = None  # fields of `args`, and the settings that they gave

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(XGradMixin)]:
            if issubclass(base, Trainer) and not issubclass(base, XGradMixin):
                raise TypeError(
                    f"XGrad: in class {cls.__name__} the trainer {base.__name__} comes before XGradMixin, whose "
                    f"training_step would not be called. Put the mixin first: class {cls.__name__}(XGradMixin, "
                    f"{base.__name__})."
                )

    def __init__(self, *args: Any, xgrad_config: XGradConfig | None = None, **kwargs: Any) -> None:
        self._xgrad_config = xgrad_config
        super().__init__(*args, **kwargs)
        self.set_up_xgrad(xgrad_config)

    def set_up_xgrad(self, config: XGradConfig | None) -> None:
        """Takes the settings, those of the arguments for None, and refuses what cannot be right."""
        self._xgrad_config = config
        self._check_xgrad()
        self.prepare_publishing()

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's own; the first of its steps that knows `args`, before any generation engine is started."""
        if self.xgrad_config.active:
            check_generation(self.args)
        super().create_accelerator_and_postprocess()

    def _check_xgrad(self) -> None:
        """Refuses, before any training time is spent, what cannot be right."""
        config = self.xgrad_config
        if not config.active:
            return
        accelerator = self.accelerator
        check_generation(self.args)
        check_engine(accelerator.distributed_type.value)
        recipe = getattr(accelerator.ao_recipe_handler, "config", None)
        check_fp8(
            getattr(accelerator.fp8_backend, "value", None),
            gathers_in_fp8=getattr(recipe, "enable_fsdp_float8_all_gather", False),
        )
        if self.is_deepspeed_enabled:
            if self.args.auto_find_batch_size:
                raise refused(
                    "auto_find_batch_size=True under DeepSpeed",
                    "its next try starts from what the model holds after the error, which may be predicted weights",
                    "Set per_device_train_batch_size",
                )
            check_deepspeed(accelerator.state.deepspeed_plugin.hf_ds_config.config)
        check_model(self.model)
        self._check_optimizer(config)

    @property
    def xgrad_config(self) -> XGradConfig:
        """The settings in force: `xgrad_config` if given, else those of `args`, which may change while training."""
        if self._xgrad_config is not None:
            return self._xgrad_config
        fields = [getattr(self.args, name, None) for name in ARGUMENTS.values()]
        if self._from_args is None or self._from_args[0] != fields:
            self._from_args = fields, XGradConfig.from_args(self.args)
        return self._from_args[1]

    # ---- prediction ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's own `training_step` (forward and backward), on predicted weights."""
        predictor = self.current_predictor()
        if predictor is None:
            return super().training_step(model, inputs, *args, **kwargs)
        # Some layers write weights when they go from evaluation to training: the true ones, if it is done here.
        model.train()
        predictor.measure(self._next_step_is_logged())
        with predictor.predicted():
            return super().training_step(model, inputs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own `train`; see `ResumingMixin.train` for checkpoints."""
        self._steps_unpredicted = 0
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
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.current_predictor()  # listens from the first step on, whatever training_step does
        super()._run_epoch(*args, **kwargs)

    def current_predictor(self) -> WeightPredictor | None:
        """The predictor of the run, made if need be; None where nothing is predicted.

        It follows the settings, and an optimizer that has taken the place of another.
        """
        config = self.xgrad_config
        if self.optimizer is None or (self._predictor is None and not config.active):
            return None
        optimizer = unwrap_optimizer(self.optimizer)
        if self._predictor is None or self._predicts_for is not optimizer:
            self._predictor, self._predicts_for = self._make_predictor(optimizer, config), optimizer
        elif config is not self._predictor.config:
            self._predictor.config = config
        return self._predictor

    def _make_predictor(self, optimizer: torch.optim.Optimizer, config: XGradConfig) -> WeightPredictor:
        if self.is_deepspeed_enabled:
            from hf_xgrad.deepspeed import ZeroPredictor

            predictor: WeightPredictor = ZeroPredictor(self.model_wrapped, config)
        else:
            predictor = WeightPredictor(optimizer, config, self.model_wrapped)
        prediction = predictor.prediction
        if prediction is not None:
            prediction.more_observers.append(_UnpredictedSteps(self))
            if self.is_world_process_zero():
                logger.info(f"XGrad: {describe(prediction.weights, config)}.")
        return predictor

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's own `log`; a training log also gets `s` and the diagnostics of its step, as `xgrad/...`."""
        if "loss" in logs and self._predictor is not None and self._predictor.prediction is not None:
            found = {"steps": self._predictor.prediction.steps, **self._predictor.diagnostics()}
            logs.update({f"xgrad/{name}": value for name, value in found.items()})
        super().log(logs, *args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        # The Trainer converts what a search suggests to the type that a field has, which here would cut 0.5 to 0 where
        # s was 1, and could not make "auto" of a number; of a text it makes any of them.
        if trial is not None and hasattr(self.args, "xgrad_steps"):
            self.args.xgrad_steps = str(self.args.xgrad_steps)
        super()._hp_search_setup(trial)
        if trial is not None and hasattr(self.args, "xgrad_steps"):
            self.args.xgrad_steps = XGradConfig.from_args(self.args).steps

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


class _UnpredictedSteps(Observer):
    """Counts, and warns of, steps that were taken without a prediction."""

    def __init__(self, trainer: XGradMixin) -> None:
        self._trainer = trainer
        self._predicted = False

    def predicted(self, window: Sequence[Move]) -> None:
        self._predicted = True

    def after_step(self, window: Sequence[Move]) -> None:
        trainer = self._trainer
        if not self._predicted:
            if trainer._steps_unpredicted == 0:
                logger.warning(
                    f"XGrad: a step was taken without a prediction: training_step of {type(trainer).__name__} did not "
                    "call that of XGradMixin, so that it trains as without XGrad. Call super().training_step(), or "
                    "switch XGrad off (xgrad=False)."
                )
            trainer._steps_unpredicted += 1
        self._predicted = False
