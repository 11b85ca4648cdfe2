"""How many steps ahead each group is predicted."""

from __future__ import annotations

from torch import Tensor

from hf_xgrad.core.auto_steps import AutoSteps
from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.rules import Group
from hf_xgrad.core.weights import Weights


class StepsAhead:
    """`s` of each group: fixed, or chosen in training; the same for all micro-batches of a window.

    Args:
        weights: gives the groups.
        config: tells which is which; may be set anew, for the next window.
    """

    def __init__(self, weights: Weights, config: XGradConfig) -> None:
        self._weights = weights
        self.auto = AutoSteps(weights, config)
        self._in_window: dict[int, float | Tensor] = {}  # by the id of the group

    @property
    def config(self) -> XGradConfig:
        return self.auto.config

    @config.setter
    def config(self, config: XGradConfig) -> None:
        self.auto.config = config

    def of(self, group: Group) -> float | Tensor:
        """`s` of the window, which begins with the first question."""
        if id(group) not in self._in_window:
            for other in self._weights.groups():
                self._in_window.setdefault(id(other), self._now(other))
        return self._in_window[id(group)]

    def _now(self, group: Group) -> float | Tensor:
        fixed = self.config.steps_under(self._weights.form(group))
        return self.auto.steps(group) if fixed is None else fixed

    def of_groups(self) -> dict[int, tuple[float | Tensor, bool]]:
        """`s` of each group that has weights, by its place in the optimizer, and whether it was chosen in training.

        That of the window, or of the next one where none has begun.
        """
        return {
            g: (
                self._in_window.get(id(group), self._now(group)),
                self.config.steps_under(self._weights.form(group)) is None,
            )
            for g, group in enumerate(self._weights.groups())
            if group["params"]
        }

    def end_window(self) -> None:
        """To be called after each realised step."""
        self._in_window.clear()
