"""A prediction at work: what is predicted, how it is undone, what is remembered, and who looks on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.diagnostics import LostMoves, Observer, StepComparison, is_power_of_two, mean, warn_of_rounding
from hf_xgrad.core.last_update import LastUpdate
from hf_xgrad.core.ledger import Ledger
from hf_xgrad.core.moves import ClosedFormMove, Move, on_device
from hf_xgrad.core.steps_ahead import StepsAhead
from hf_xgrad.core.weights import Chunk, Weights
from hf_xgrad.core.written import name_of


class Prediction:
    """The parts of a predictor at work: what is predicted, how it is undone, what is remembered, who looks on.

    Args:
        weights: the weights, as the engine has them.
        config: the settings; those but the rule may be set anew.
        more_observers: told of every prediction and step, too; may be added to.
    """

    def __init__(self, weights: Weights, config: XGradConfig, more_observers: Sequence[Observer] = ()) -> None:
        self.weights = weights
        self._ledger = Ledger()
        self.last_update = LastUpdate(weights)
        self.steps_ahead = StepsAhead(weights, config)
        self.comparison = StepComparison(weights, self.steps_ahead.of_groups)
        self._observers: list[Observer] = [self.comparison, LostMoves(), self.steps_ahead.auto]
        self.more_observers = list(more_observers)
        self._window: list[Move] = []  # what the last prediction of the open window has moved
        self._predictions = 0
        self._exposed = False  # whether others may hold copies of predicted weights
        warn_of_rounding(weights)
        weights.watch_steps(self, Prediction.before_step, Prediction.after_step)

    @property
    def config(self) -> XGradConfig:
        return self.steps_ahead.config

    @config.setter
    def config(self, config: XGradConfig) -> None:
        self.steps_ahead.config = config

    @torch.no_grad()
    def predict(self) -> None:
        self._exposed = True
        self.weights.begin()
        self._window = []
        chunks = self.weights.chunks()
        self.last_update.predicting(chunks)
        compare_values = is_power_of_two(self._predictions + 1)
        for chunk in chunks:
            move = self._move(chunk)
            if move is not None:
                self._ledger.overwrite(chunk, move.writer(), compare_values=compare_values)
                self._window.append(move)
        self.last_update.predicted()
        self._predictions += bool(self._window)
        for observer in (*self._observers, *self.more_observers):
            observer.predicted(self._window)
        self.weights.publish()

    def _move(self, chunk: Chunk) -> Move | None:
        """The move of a chunk; None where it is zero."""
        steps = self.steps_ahead.of(chunk.group)
        if chunk.form is None:
            return self.last_update.move(chunk, steps)
        if not isinstance(steps, Tensor) and steps == 0.0:
            return None
        decay = chunk.form.decay(chunk.group) if chunk.form.decay is not None and self.config.weight_decay else None
        return ClosedFormMove(
            chunk,
            on_device(-steps * chunk.group["lr"], chunk),
            None if decay is None else on_device(-steps * decay, chunk),
        )

    def restore(self, *, failed: bool) -> list[str]:
        """Brings the true weights back, and returns the names of those that others wrote meanwhile."""
        written = self._take_back()
        if self._exposed:
            self.weights.finish(failed=failed)
            self._exposed = False
        return written

    @torch.no_grad()
    def _take_back(self) -> list[str]:
        self.last_update.restoring()
        self._ledger.bring_back(self.last_update.keep)
        written, self._ledger.written = self._ledger.written, []
        self.last_update.restored(spoilt=bool(written))
        return [name_of(p, self.weights) for p in written]

    def before_step(self) -> None:
        """The optimizer is about to step."""
        if self._ledger.is_open:
            if not self.weights.steps_inside:
                raise RuntimeError(
                    "WeightPredictor: optimizer.step() on predicted weights; leave predicted() (or call restore()) "
                    "first"
                )
            self._take_back()
        for observer in (*self._observers, *self.more_observers):
            observer.before_step(self._window)
        self.last_update.before_step()

    def after_step(self) -> None:
        """The optimizer has stepped."""
        self.last_update.after_step()
        for observer in (*self._observers, *self.more_observers):
            observer.after_step(self._window)
        self.begin_window()

    def begin_window(self) -> None:
        """What was predicted for another step counts no more."""
        self._window = []
        self.steps_ahead.end_window()

    @property
    def steps(self) -> float:
        """`s`, the mean over the groups; waits for the device."""
        return mean([float(s) for s, _ in self.steps_ahead.of_groups().values()])
