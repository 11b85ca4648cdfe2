"""A prediction at work: what is predicted, how it is undone, what is remembered, and who looks on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_xgrad.core.auto_steps import StepsAhead
from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.diagnostics import LostMoves, Observer, StepComparison, is_power_of_two, warn_of_rounding
from hf_xgrad.core.last_update import LastUpdate
from hf_xgrad.core.ledger import Ledger
from hf_xgrad.core.moves import ClosedFormMove, Move, on_device
from hf_xgrad.core.weights import Chunk, Weights


class Prediction:
    """The parts of a predictor at work: what is predicted, how it is undone, what is remembered, who looks on.

    Args:
        weights: the weights, as the engine has them.
        config: the settings; those but the rule may be set anew.
    """

    def __init__(self, weights: Weights, config: XGradConfig) -> None:
        self.weights = weights
        self._ledger = Ledger()
        self._last_update = LastUpdate(weights)
        self._steps = StepsAhead(weights, config)
        self.comparison = StepComparison(weights, self._steps.of_groups)
        self.observers: list[Observer] = [self.comparison, LostMoves(), self._steps.auto]
        self._window: list[Move] = []  # what the last prediction of the open window has moved
        self._predictions = 0
        self._exposed = False  # whether others may hold copies of predicted weights
        warn_of_rounding(weights)
        weights.watch_steps(self, Prediction.before_step, Prediction.after_step)

    @property
    def config(self) -> XGradConfig:
        return self._steps.config

    @config.setter
    def config(self, config: XGradConfig) -> None:
        self._steps.config = config

    @torch.no_grad()
    def predict(self) -> None:
        self._exposed = True
        self.weights.begin()
        self._window = []
        chunks = self.weights.chunks()
        self._last_update.predicting(chunks)
        compare_values = is_power_of_two(self._predictions + 1)
        for chunk in chunks:
            move = self._move(chunk)
            if move is not None:
                self._ledger.overwrite(chunk, move.adder(), compare_values=compare_values)
                self._window.append(move)
        self._last_update.predicted()
        self._predictions += bool(self._window)
        for observer in self.observers:
            observer.predicted(self._window)
        self.weights.publish()

    def _move(self, chunk: Chunk) -> Move | None:
        """The move of a chunk; None where it is zero."""
        steps = self._steps.of(chunk.group)
        if chunk.form is None:
            return self._last_update.move(chunk, steps)
        if not isinstance(steps, Tensor) and steps == 0.0:
            return None
        decay = chunk.form.decay(chunk.group) if chunk.form.decay is not None and self.config.weight_decay else None
        return ClosedFormMove(
            chunk,
            on_device(-steps * chunk.group["lr"], chunk),
            None if decay is None else on_device(-steps * decay, chunk),
        )

    @torch.no_grad()
    def restore(self, *, failed: bool) -> list[str]:
        """Brings the true weights back, and returns the names of those that others wrote meanwhile."""
        written = self._take_back()
        if self._exposed:
            self.weights.finish(failed=failed)
            self._exposed = False
        return written

    def _take_back(self) -> list[str]:
        self._last_update.restoring()
        self._ledger.bring_back(self._last_update.keep)
        written, self._ledger.written = self._ledger.written, []
        self._last_update.restored(spoilt=bool(written))
        return [self.weights.name_of(p) for p in written]

    @torch.no_grad()
    def before_step(self) -> None:
        """The optimizer is about to step."""
        if self._ledger.is_open:
            if not self.weights.steps_inside:
                raise RuntimeError(
                    "WeightPredictor: optimizer.step() on predicted weights; leave predicted() (or call restore()) "
                    "first"
                )
            self._take_back()
        for observer in self.observers:
            observer.before_step(self._window)
        self._last_update.before_step()

    @torch.no_grad()
    def after_step(self) -> None:
        """The optimizer has stepped."""
        self._last_update.after_step()
        for observer in self.observers:
            observer.after_step(self._window)
        self._window = []
        self._steps.end_window()

    def describe(self) -> str:
        """By which rule weights are predicted, how many steps ahead, and why; one line."""
        name = type(self.weights.optimizer).__name__
        kinds: dict[str, list[int]] = {}
        for g, group in enumerate(self.weights.groups()):
            form, obstacle = self.weights.form_or_obstacle(group)
            rule = f"the closed form of {name}" if form is not None else f"the last-update rule ({obstacle})"
            fixed = self.config.steps_under(form)
            steps = "chosen from the updates while training (auto)" if fixed is None else f"{fixed:g}"
            kinds.setdefault(f"by {rule}, s = {steps}", []).append(g)
        if len(kinds) == 1:
            return f"weights are predicted {next(iter(kinds))}"
        of_groups = "; ".join(f"those of group {', '.join(map(str, gs))} {kind}" for kind, gs in kinds.items())
        return f"weights are predicted: {of_groups}"

    @property
    def steps(self) -> float:
        """`s`, the mean over the groups; waits for the device."""
        steps = [float(s) for s, _ in self._steps.of_groups().values()]
        return sum(steps) / len(steps)

    @property
    def remembers(self) -> set[str]:
        forms = [self.weights.form(group) for group in self.weights.groups()]
        needed = {"weights"} if None in forms else set()
        return needed | ({"steps"} if None in map(self.config.steps_under, forms) else set())

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        self.weights.settle()
        state = self._last_update.state_dict()
        steps = self._steps.auto.state_dict()
        if steps:
            state["steps"] = steps
        return state | {"process": self.weights.process} if state and self.weights.process else state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights.settle()
        if state and state.get("process") != self.weights.process:
            raise ValueError(
                f"WeightPredictor: state_dict is that of {_process(state.get('process'))}, and is needed by "
                f"{_process(self.weights.process)}: of sharded weights each process has to save and load its own"
            )
        steps = state.get("steps", {}) if "steps" in self.remembers else {}
        self._steps.auto.check_state_dict(steps)
        self._last_update.check_state_dict(state)
        # All of it has been checked: from here on nothing is refused.
        self.weights.forget_copies()
        self._steps.auto.load_state_dict(steps)
        self._last_update.load_state_dict(state)
        self._steps.end_window()
        self._window = []


def _process(process: list[int] | None) -> str:
    return "whole weights" if process is None else f"process {process[0]} of {process[1]}"
