"""The trainers of Transformers on predicted weights, and the way to make one of any other."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from transformers import Seq2SeqTrainer, Trainer

from hf_xgrad.core.config import XGradConfig
from hf_xgrad.trainer.mixin import XGradMixin
from hf_xgrad.trainer.optimizers import optimizer_of

TrainerT = TypeVar("TrainerT", bound=Trainer)


class XGradTrainer(XGradMixin, Trainer):
    """`transformers.Trainer` that trains on predicted weights; see `XGradMixin`.

    Takes the place of `Trainer` as it is: with plain `TrainingArguments` it predicts by the rule, and as many steps
    ahead, as suits the optimizer.
    """

    get_optimizer_cls_and_kwargs = staticmethod(optimizer_of)


class XGradSeq2SeqTrainer(XGradMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that trains on predicted weights; see `XGradMixin`."""

    get_optimizer_cls_and_kwargs = staticmethod(optimizer_of)


def enable_xgrad(trainer: TrainerT, **settings: Any) -> TrainerT:
    """Makes a trainer that has been made elsewhere, by a framework say, train on predicted weights.

    It becomes what `class X(XGradMixin, type(trainer))` would have made, in place. Of one that is so already, the
    settings are replaced.

    Args:
        trainer: any `transformers.Trainer`, before `train()`.
        settings: as of `XGradConfig` (`steps`, `rule`, `weight_decay`, `enabled`). Where none is given, those of its
            arguments hold, or the defaults.

    Returns:
        The same trainer.

    Raises:
        TypeError: `trainer` is not a `transformers.Trainer`, or a setting has another name or type.
        ValueError: what `XGradMixin` refuses; the trainer is then as it was.
        RuntimeError: it is training.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from hf_xgrad import enable_xgrad
        >>> def train_with_xgrad(trainer: Trainer) -> None:
        ...     enable_xgrad(trainer, steps=2.0).train()
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"enable_xgrad: `trainer` must be a transformers.Trainer, got {type(trainer).__name__}")
    if trainer.is_in_train:
        raise RuntimeError("enable_xgrad: the trainer is training; call it before train()")
    config = XGradConfig(**settings) if settings else None
    before = dict(vars(trainer))
    changed: Any = trainer
    kind: Any = type(trainer)
    if not isinstance(trainer, XGradMixin):
        changed.__class__ = _with_mixin(kind)
    try:
        changed.set_up_xgrad(config)
    except BaseException:
        changed.__class__ = kind
        vars(trainer).clear()
        vars(trainer).update(before)
        raise
    return trainer


@cache
def _with_mixin(kind: Any) -> type:
    return type(f"XGrad{kind.__name__}", (XGradMixin, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
