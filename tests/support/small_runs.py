"""A regression of a few weights, runs of it, and what hf_xgrad says meanwhile; for the tests of the trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import tiny_models as tiny
from hf_xgrad import XGradTrainer, XGradTrainingArguments

WORDS = 12
CLOSED_FORM = {"optim": "adamw_torch", "xgrad_steps": 1.0}
LAST_UPDATE = {"optim": "adamw_torch", "xgrad_steps": 1.0, "xgrad_rule": "last_update"}
MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9"}
# Keys of log entries that tell the time.
CLOCKS = ("runtime", "per_second")


class Regression(nn.Module):
    """The score of a few words is a linear map of their mean embedding."""

    def __init__(self, **embedding: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, 4, **embedding)
        self.score = nn.Linear(4, 1)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        score = self.score(self.words(ids).mean(1)).squeeze(-1)
        return {"loss": nn.functional.mse_loss(score, labels.to(score.dtype)), "logits": score}


def rows(size: int = 32, seed: int = 1) -> list[dict[str, Tensor]]:
    """Three words each, and a number to predict."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"ids": torch.randint(WORDS, (3,), generator=generator), "labels": torch.randn((), generator=generator)}
        for _ in range(size)
    ]


def make(
    folder: Path,
    cls: type = XGradTrainer,
    model: nn.Module | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    given: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer of a `Regression`; `given` are further arguments of it, `settings` fields of its arguments.

    The learning rate stays as it is and no gradient is clipped, unless `settings` say otherwise.
    """
    defaults = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.05}
    args = tiny.arguments(folder, XGradTrainingArguments, **{**defaults, **settings})
    given = {"train_dataset": rows(), "eval_dataset": rows(8, seed=2), **(given or {})}
    return cls(model=Regression() if model is None else model, args=args, callbacks=list(callbacks), **given)


def history(trainer: Any) -> list[dict[str, Any]]:
    """The log, but for the entries that tell the time."""
    return [
        {key: value for key, value in entry.items() if not any(clock in key for clock in CLOCKS)}
        for entry in trainer.state.log_history
    ]


def outcome(trainer: Any, since: int = 0) -> tuple[Any, ...]:
    """What must be equal where two runs are: the log since a step, weights, the optimizer's state, random numbers.

    To be called right after train(), as it draws a number.
    """
    log = [entry for entry in history(trainer) if entry["step"] > since and "train_loss" not in entry]
    weights = {name: w.tolist() for name, w in tiny.weights(trainer.model).items()}
    return log, weights, [t.tolist() for t in tiny.optimizer_state(trainer)], float(torch.rand(()))


def trained(trainer: Any, resume: Any = None, since: int = 0) -> tuple[Any, ...]:
    """Trains, and gives the outcome."""
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer, since)


def training_logs(trainer: Any) -> list[dict[str, Any]]:
    """The log entries of training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@contextmanager
def listening(level: int = logging.WARNING) -> Iterator[list[str]]:
    """`with` this: a list that gets what hf_xgrad logs, and the Python warnings that name XGrad, as they come."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, listener = logging.getLogger("hf_xgrad"), Listener(level)
    before = logger.level
    logger.addHandler(listener)
    logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_, **__: (
                said.append(str(message)) if "XGrad" in str(message) else None
            )
            yield said
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before)
