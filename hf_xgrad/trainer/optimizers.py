"""The optimizers that XGrad adds to `optim`, and what is refused of those that a trainer is to make."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.refusals import IN_BACKWARD, check_name, check_optimizer, refusal, refused, refused_setting
from hf_xgrad.core.rules import closed_form_of, no_closed_form
from hf_xgrad.optim import AdaM3
from hf_xgrad.trainer.arguments import EXTRA_OPTIMIZERS

# To a type checker the mixin is a Trainer; at run time it is mixed into one.
if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

# The eps of these stands among squared gradients: `adam_epsilon` counts only where it is not its default of 1e-8.
_SMALL_EPSILON = {"adabelief": 1e-16, "adam3": 1e-16}
_DEFAULT_EPSILON = TrainingArguments.__dataclass_fields__["adam_epsilon"].default

_MakeOptimizer = Callable[[TrainingArguments, Any], tuple[Any, dict[str, Any]]]


class ExtraOptimizersMixin(_Trainer):
    """Lets `optim` name the optimizers of `EXTRA_OPTIMIZERS`, too."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's own `create_optimizer`, with the optimizers that XGrad adds to `optim`."""
        # Not by get_optimizer_cls_and_kwargs alone, a static method of some trainers and an instance's of others.
        if self.args.optim not in EXTRA_OPTIMIZERS or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(*args, **kwargs)
        self.optimizer_cls_and_kwargs = extra_optimizer(self.args)
        try:
            return super().create_optimizer(*args, **kwargs)
        finally:
            self.optimizer_cls_and_kwargs = None

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
        _check_arguments(args, config or XGradConfig.from_args(args), model, optimizer_of)

    def _check_optimizer(self, config: XGradConfig) -> None:
        """Refuses the optimizer that the trainer was given, or is to make.

        Raises:
            ValueError: no prediction can be right with it, or `config.rule="closed_form"` has none.
        """
        given = self.optimizer_cls_and_kwargs
        if self.optimizer is not None:
            check_optimizer(self.optimizer, config)
        elif given is None:
            _check_arguments(self.args, config, self.model, self.get_optimizer_cls_and_kwargs)
        else:
            is_layerwise = isinstance(given[1].get("optimizer_dict"), dict)
            reason = IN_BACKWARD if is_layerwise else refusal(given[0]) or refused_setting(given[1])
            if reason is not None:
                raise refused(given[0].__name__, reason)
            # What a factory will make is not known yet: the predictor looks at it before the first step.
            is_class = isinstance(given[0], type) and issubclass(given[0], torch.optim.Optimizer)
            if config.rule == "closed_form" and is_class:
                _check_closed_form(given[0], given[1], config)


def _check_arguments(args: TrainingArguments, config: XGradConfig, model: Any, make: _MakeOptimizer) -> None:
    if not config.active:
        return
    name = str(getattr(args.optim, "value", args.optim))
    check_name(name)
    wants_form = config.rule == "closed_form" and (model is not None or not args.optim_target_modules)
    if name in EXTRA_OPTIMIZERS or wants_form:
        optimizer_class, kwargs = extra_optimizer(args) if name in EXTRA_OPTIMIZERS else make(args, model)
        reason = refused_setting(kwargs)
        if reason is not None:
            raise refused(f"optim={name!r} with optim_args={args.optim_args!r}", reason)
        if wants_form:
            _check_closed_form(optimizer_class, kwargs, config)


def _check_closed_form(optimizer_class: Any, kwargs: dict[str, Any], config: XGradConfig) -> None:
    """Tries the settings of an optimizer that is yet to be made, on one weight."""
    if closed_form_of(optimizer_class) is None:
        # Not made even for a trial: who knows what it wants.
        raise no_closed_form(f"{optimizer_class.__name__} has none")
    # Groups may be among the settings, under one of these names: tried are theirs, but for the weights.
    settings = dict(kwargs)
    given = [settings.pop(name) for name in ("params", "model", "optimizer_dict") if name in settings]
    groups = [{**group, "params": [nn.Parameter(torch.zeros(1, 1))]} for group in (given[-1] if given else [{}])]
    check_optimizer(optimizer_class(groups, **settings), config)


def optimizer_of(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
    """The Trainer's own `get_optimizer_cls_and_kwargs`, with the optimizers that XGrad adds to `optim`."""
    return (
        extra_optimizer(args) if args.optim in EXTRA_OPTIMIZERS else Trainer.get_optimizer_cls_and_kwargs(args, model)
    )


def extra_optimizer(args: TrainingArguments) -> tuple[type, dict[str, Any]]:
    """Class and settings of one of `EXTRA_OPTIMIZERS`; `optim_args` wins over the `adam_*` fields."""
    optimizer_class: Any
    if args.optim == "adabelief":
        try:
            import pytorch_optimizer
        except ImportError as error:
            raise ImportError(
                "optim='adabelief' needs the pytorch-optimizer library: pip install pytorch-optimizer"
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
