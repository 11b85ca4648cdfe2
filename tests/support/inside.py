"""What tests may know of a predictor's inside, in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from hf_xgrad import WeightPredictor
from hf_xgrad.core import auto_steps, diagnostics, weights


def kept_weights(predictor: WeightPredictor | None) -> dict[Tensor, Tensor]:
    """The kept tensor of each parameter; empty where nothing was ever predicted."""
    active: Any = predictor.prediction if predictor is not None else None
    return active.weights.kept if active is not None else {}


def predictor_of(trainer: Any) -> WeightPredictor | None:
    """The predictor of a trainer that is training; None where it has none, or none yet."""
    return trainer._predictor


def chosen_steps(predictor: WeightPredictor) -> list[float]:
    """`s` of each group whose `s` is chosen, as it is for the coming window."""
    active: Any = predictor.prediction
    return active.steps_ahead.auto.values()


def remembered(predictor: WeightPredictor) -> Any:
    """What the last-update rule remembers: what its tensors hold, and the learning rates of the groups."""
    active: Any = predictor.prediction
    return active.last_update._holds, list(active.last_update._lrs.values())


def window(predictor: WeightPredictor) -> list[Any]:
    """The moves of the open window."""
    active: Any = predictor.prediction
    return active._window


def compute_weights(predictor: Any) -> dict[Tensor, Tensor]:
    """What forward reads of each weight that the optimizer steps, of a ZeroPredictor."""
    return predictor.prediction.weights._computes


def is_in_place(predictor: Any) -> bool:
    """Whether a ZeroPredictor takes both for the same memory."""
    return predictor.prediction.weights._in_place


def sample_limits() -> tuple[int, int]:
    """How many tensors of a group steps="auto" looks at, and how many elements of each."""
    return auto_steps._TENSORS, auto_steps._ELEMENTS


def sampling(monkeypatch: pytest.MonkeyPatch, tensors: int, elements: int) -> None:
    """Has steps="auto" look at so many."""
    monkeypatch.setattr(auto_steps, "_TENSORS", tensors)
    monkeypatch.setattr(auto_steps, "_ELEMENTS", elements)


def watch_comparisons(monkeypatch: pytest.MonkeyPatch, note: Callable[[], Any]) -> None:
    """Has `note` called whenever something is computed to compare a prediction with its step."""
    for cls, name in ((diagnostics.StepComparison, "_look"), (diagnostics._Sample, "products")):
        compute = getattr(cls, name)
        noting = lambda *args, compute=compute: (note(), compute(*args))[1]  # noqa: E731
        monkeypatch.setattr(cls, name, noting)


def in_chunks(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Has predictions work on chunks of so many weights."""
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", elements)
