"""What tests may know of a predictor's inside, in one place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_xgrad import WeightPredictor


def kept_weights(predictor: WeightPredictor | None) -> dict[Tensor, Tensor]:
    """The kept tensor of each parameter; empty where nothing was ever predicted."""
    active: Any = predictor._active if predictor is not None else None
    return active.weights.kept if active is not None else {}


def chosen_steps(predictor: WeightPredictor) -> list[float]:
    """`s` of each group whose `s` is chosen, as it is for the coming window."""
    active: Any = predictor._active
    return active._steps.auto.values()


def remembered(predictor: WeightPredictor) -> Any:
    """What the last-update rule remembers: what its tensors hold, and the learning rates of the groups."""
    active: Any = predictor._active
    return active._last_update._holds, list(active._last_update._lrs.values())


def window(predictor: WeightPredictor) -> list[Any]:
    """The moves of the open window."""
    active: Any = predictor._active
    return active._window
