"""What of a prediction a checkpoint has, and what is refused when that is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_xgrad.core.last_update import Holds, Memory
from hf_xgrad.core.prediction import Prediction
from hf_xgrad.core.weights import Weights

_OF_LAST_UPDATE = {"holds", "lrs", "weights"}


def needed_parts(prediction: Prediction) -> set[str]:
    """What a resumed run needs beside the optimizer's state: `"weights"`, `"steps"`, or neither."""
    forms = [prediction.weights.form(group) for group in prediction.weights.groups()]
    needed = {"weights"} if None in forms else set()
    return needed | ({"steps"} if None in map(prediction.config.steps_under, forms) else set())


@torch.no_grad()
def state_of(prediction: Prediction) -> dict[str, Any]:
    """`WeightPredictor.state_dict` of a prediction."""
    weights = prediction.weights
    weights.settle()
    state: dict[str, Any] = {}
    memory = prediction.last_update.memory()
    if memory is not None:
        names = _names(weights)
        state["holds"] = memory.holds.value
        state["lrs"] = [float(lr) if isinstance(lr, Tensor) else lr for lr in memory.lrs]
        state["weights"] = {names[id(p)]: tensor for p, tensor in memory.weights.items()}
        state["still"] = sorted(set(names.values()) - set(state["weights"]))
    steps = prediction.steps_ahead.auto.state_dict()
    if steps:
        state["steps"] = steps
    if state and weights.process is not None:
        state["process"] = weights.process
    return state


@torch.no_grad()
def load_state(prediction: Prediction, state: Mapping[str, Any]) -> None:
    """`WeightPredictor.load_state_dict` of a prediction.

    Raises:
        ValueError: the state is not one that it can have been in; nothing is changed then.
    """
    weights = prediction.weights
    weights.settle()
    if state and state.get("process") != weights.process:
        raise ValueError(
            f"WeightPredictor: state_dict is that of {_process(state.get('process'))}, and is needed by "
            f"{_process(weights.process)}: of sharded weights each process has to save and load its own"
        )
    needed = needed_parts(prediction)
    steps = state.get("steps", {}) if "steps" in needed else {}
    prediction.steps_ahead.auto.check_state_dict(steps)
    memory = _checked_memory(weights, state) if "weights" in needed and _OF_LAST_UPDATE & set(state) else None
    # All of it has been checked: from here on nothing is refused.
    weights.forget_copies()
    prediction.steps_ahead.auto.load_state_dict(steps)
    prediction.last_update.recall(memory)
    prediction.begin_window()


def _checked_memory(weights: Weights, state: Mapping[str, Any]) -> Memory:
    missing = sorted(_OF_LAST_UPDATE - set(state))
    if missing:
        raise ValueError(f"WeightPredictor: state_dict lacks {missing}")
    if state["holds"] not in (Holds.PREVIOUS.value, Holds.MOVE.value):
        raise ValueError(f"WeightPredictor: state_dict has {state['holds']!r} in `holds`")
    groups = weights.groups()
    _check_rates(state["lrs"], [group.get("lr") for group in groups])
    tensors, still = state["weights"], state.get("still", [])
    if not isinstance(still, list) or not all(isinstance(name, str) for name in still):
        raise ValueError(f"WeightPredictor: state_dict has no names of weights in `still`, but {still!r:.80}")
    places = {f"{g}.{i}" for g, group in enumerate(groups) for i in range(len(group["params"]))}
    unknown = sorted({*tensors, *still} - places)
    if unknown:
        raise ValueError(
            f"WeightPredictor: state_dict names parameters that the optimizer does not have: {unknown[:3]}"
        )
    names = _names(weights)
    needed = {names[id(p)]: p for chunk in weights.chunks() if chunk.form is None for p in chunk.owners}
    lacking = [name for name in needed if name not in tensors and name not in still]
    if lacking:
        raise ValueError(f"WeightPredictor: state_dict lacks the weights {lacking[:3]}")
    found = {name: p for name, p in needed.items() if name in tensors}
    for name, p in found.items():
        _check_weight(name, tensors[name], weights.part(p))
    return Memory(Holds(state["holds"]), state["lrs"], {p: tensors[name] for name, p in found.items()})


def _names(weights: Weights) -> dict[int, str]:
    """`"<group>.<index>"`, the place in the optimizer, of each parameter under the last-update rule, by its id."""
    return {
        id(p): f"{g}.{i}"
        for g, group in enumerate(weights.groups())
        if weights.form(group) is None
        for i, p in enumerate(group["params"])
    }


def _check_rates(lrs: Any, current: list[Any]) -> None:
    if not isinstance(lrs, list) or not all(map(_is_learning_rate, lrs)):
        raise ValueError(f"WeightPredictor: state_dict has no learning rates in `lrs`, but {lrs!r:.80}")
    if len(lrs) != len(current):
        raise ValueError(f"WeightPredictor: state_dict has {len(lrs)} parameter groups, the optimizer {len(current)}")
    if any(lr is None and now is not None for lr, now in zip(lrs, current, strict=True)):
        raise ValueError(f"WeightPredictor: state_dict lacks learning rates that the optimizer has: {lrs!r:.80}")


def _is_learning_rate(lr: Any) -> bool:
    """Whether a state may have it: a finite number, or None where an optimizer has none."""
    return lr is None or (type(lr) in (int, float) and abs(lr) <= sys.float_info.max)


def _check_weight(name: str, tensor: Tensor, param: Tensor) -> None:
    if tensor.shape != param.shape:
        raise ValueError(
            f"WeightPredictor: weight {name} of state_dict has shape {tuple(tensor.shape)}, the parameter "
            f"{tuple(param.shape)}"
        )
    if tensor.dtype != param.dtype:
        raise ValueError(
            f"WeightPredictor: weight {name} of state_dict is of type {tensor.dtype}, the parameter of {param.dtype}"
        )
    # What has diverged goes on as it was; but a weight is not finite again that was not so before.
    infinite = ~torch.isfinite(tensor)
    if infinite.any() and (infinite & torch.isfinite(param).to(infinite.device)).any():
        raise ValueError(f"WeightPredictor: weight {name} of state_dict holds NaN or infinity")


def _process(process: list[int] | None) -> str:
    return "whole weights" if process is None else f"process {process[0]} of {process[1]}"
